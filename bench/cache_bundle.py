"""What a cache bundle is worth: boots of a new machine without and with one, and of one that has its caches.

    python bench/cache_bundle.py [--rounds 3] [--engines compiled] [--out bench/results/cache_bundle.json]

In each round, in turn: `without`, an empty home and temporary folder; `bundle`, the same and a bundle in a folder;
`caches`, the home of the boot before; `both`, that home and the bundle, which is then fetched for nothing. The
bundle is made by `coldsnap warm` first. Needs a C++ compiler for `compiled`.

Predicted, before the first run, on two CPU cores: without a bundle an eager engine boots in 11 s, a compiled one in
27 s. With one 4.3 s and 10 s: as fast as with caches that are there, and within 0.1 s, because the fetch has its
own process and the import leaves a core free. `both` costs nothing against `caches`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {"eager": "true", "compiled": "false"}
CONTENDERS = ("without", "bundle", "caches", "both")
PHASES = ("import_vllm", "cache", "configure", "engine")


def run(command: list[str], work: Path, **more: str) -> str:
    """Run a command of ours on this machine's one home; return its output."""
    env = {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "HOME": str(work / "home"),
        "TMPDIR": str(work / "tmp"),
        "COLDSNAP_LEDGER_DIR": str(work / "ledger"),
    }
    for folder in ("home", "tmp"):
        (work / folder).mkdir(exist_ok=True)
    done = subprocess.run(command, env=env | more, cwd=work, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def boot(work: Path, **more: str) -> dict[str, Any]:
    """Boot the worker for one job; return the record of its cold start."""
    ledger = work / "ledger" / "ledger.jsonl"
    ledger.unlink(missing_ok=True)
    job = (ROOT / "test_input.json").read_text()
    run([sys.executable, str(ROOT / "handler.py"), "--test_input", job], work, **more)
    record: dict[str, Any] = json.loads(ledger.read_text().splitlines()[0])
    return record


def forget(work: Path) -> None:
    """Make this a machine that has never booted."""
    for folder in ("home", "tmp"):
        shutil.rmtree(work / folder, ignore_errors=True)


def compare(engine: str, rounds: int, work: Path) -> dict[str, Any]:
    """Return every boot of one kind of engine, and its bundle's size."""
    store = work / engine
    eager = {"ENFORCE_EAGER": ENGINES[engine]}
    forget(work)
    run([str(Path(sys.executable).with_name("coldsnap")), "warm", str(store)], work, **eager)
    if not store.exists():
        sys.exit(f"{engine}: this engine keeps nothing that it computes, so there is no bundle to compare with")
    (bundle,) = store.iterdir()
    boots: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    states = {"without": "off", "bundle": "hit", "caches": "off", "both": "hit"}
    for number in range(rounds):
        for name in CONTENDERS:
            if name in {"without", "bundle"}:
                forget(work)
            uri = str(store) if states[name] == "hit" else "off"
            record = boot(work, CACHE_URI=uri, **eager)
            assert record["cache"] == states[name], record
            boots[name].append(record)
            print(engine, number + 1, name, f"{record['seconds']:.2f} s", flush=True)
    return {"bundle_bytes": bundle.stat().st_size, "boots": boots}


def median(boots: list[dict[str, Any]], phase: str | None = None) -> float:
    """Return the median of the boots' seconds, or of one phase's."""
    return statistics.median(float(boot["phases"].get(phase, 0.0) if phase else boot["seconds"]) for boot in boots)


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rounds = max(len(found["boots"]["without"]) for found in results.values())
    lines = [
        "# What a cache bundle is worth",
        "",
        f"`bench/cache_bundle.py`, two CPU cores, tiny W8A8 model, page cache warm, median of {rounds} rounds in turn,",
        "seconds from the process's start to ready. `without`: a new machine. `bundle`: the same, with a bundle in a",
        "folder. `caches`: a machine that has its caches. `both`: that machine, and a bundle fetched for nothing.",
    ]
    for engine, found in results.items():
        boots = found["boots"]
        lines += [
            "",
            f"## {engine}: a bundle of {found['bundle_bytes']} bytes",
            "",
            "| | ready | least–most | ratio | " + " | ".join(PHASES) + " | fetch, beside |",
            "|---|---|---|---|" + "---|" * len(PHASES) + "---|",
        ]
        base = median(boots["without"])
        for name in CONTENDERS:
            every = [boot["seconds"] for boot in boots[name]]
            phases = " | ".join(f"{median(boots[name], phase):.2f}" for phase in PHASES)
            beside = statistics.median(boot["beside"].get("cache", 0.0) for boot in boots[name])
            lines.append(
                f"| {name} | {median(boots[name]):.2f} | {min(every):.2f}–{max(every):.2f} | "
                f"{median(boots[name]) / base:.2f} | {phases} | {beside:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a cache bundle is worth.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["compiled"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cache_bundle.json")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="cache-bundle-") as folder:
        for engine in options.engines:
            results[engine] = compare(engine, options.rounds, Path(folder))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
