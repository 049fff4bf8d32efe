"""The last step of an image's build: hold its labels to what is in it, and make what the first boot would make.

    finish_image.py snapshots/demo --digest 1b8f… --vllm 0.32.0 --coldsnap 0.1.0

An empty digest is not compared. Beside a GPU vLLM looks at a model's class in a process of its own, which takes
eight seconds, and keeps what it found in a file; so does `remembered`. Made here, every cold start finds them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.errors import BootError  # noqa: E402
from coldsnap.snapshot import manifest as snapshot  # noqa: E402
from coldsnap.vllm import release as vllm_release  # noqa: E402
from coldsnap.vllm import start as vllm_start  # noqa: E402


def differing(labels: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return a sentence for each label that is given and not true."""
    return [
        f"{name}: the build says {value}, the image holds {found[name]}"
        for name, value in labels.items()
        if value and value != found[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("snapshot", type=Path, help="the snapshot's folder")
    for label in ("digest", "vllm", "coldsnap"):
        parser.add_argument(f"--{label}", default="")
    args = parser.parse_args()
    try:
        manifest = snapshot.load_manifest(args.snapshot)
        snapshot.verify(args.snapshot, manifest)
    except BootError as error:
        sys.exit(f"coldsnap: {error.message}")
    actual = {
        "digest": manifest.digest,
        "vllm": vllm_release.version().partition("+")[0],
        "coldsnap": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
    }
    if wrong := differing({name: getattr(args, name) for name in actual}, actual):
        sys.exit(f"coldsnap: {wrong[0]}")
    architectures = orjson.loads((args.snapshot / "config.json").read_bytes()).get("architectures") or []
    inspected = vllm_start.inspect_models(architectures, os.environ)
    print(f"coldsnap: {args.snapshot.name} {manifest.digest}, vLLM {actual['vllm']}, inspected: {inspected}")


if __name__ == "__main__":
    main()
