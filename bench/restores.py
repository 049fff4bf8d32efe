"""Restores the worker's process image again and again, and with faults drawn at random.

    python bench/restores.py [--restores 500] [--faults 100] [--out bench/results/restores.json]

A restore ends where the worker refuses its argument, so that it is the restore that is counted and timed. A fault is
one of `FAULTS`: the worker boots and has to answer the demo's job, restored or plainly. The image must be there:
`make demo` twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "build" / "image"
IMAGE = PROGRAMS / "worker.image"
JOB = json.dumps({"input": {"messages": [{"role": "user", "content": "What is a cold start?"}]}})
COMMAND = [sys.executable, str(ROOT / "handler.py"), "--test_input"]

Options = dict[str, Any]


def alter(folder: Path, change: Callable[[bytearray], object]) -> Path:
    """Return an altered copy of the image."""
    content = bytearray(IMAGE.read_bytes())
    change(content)
    file = folder / "altered.image"
    file.write_bytes(content)
    file.chmod(0o600)
    return file


def flip(content: bytearray) -> None:
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def cut(content: bytearray) -> None:
    del content[random.randrange(len(content)) :]


def environ(**more: str) -> Options:
    return {"env": os.environ | more}


FAULTS: dict[str, Callable[[Path], tuple[Path, Options]]] = {
    "none": lambda _: (IMAGE, {}),
    "a byte of the image altered": lambda folder: (alter(folder, flip), {}),
    "the image cut short": lambda folder: (alter(folder, cut), {}),
    "the image missing": lambda folder: (folder / "none", {}),
    "a variable that the import read": lambda _: (IMAGE, environ(TORCHDYNAMO_VERBOSE="1")),
    "a variable that nobody read": lambda _: (IMAGE, environ(READ_BY_NOBODY="1")),
    "another folder": lambda folder: (IMAGE, {"cwd": folder}),
    "another folder for temporary files": lambda folder: (IMAGE, environ(TMPDIR=str(folder))),
    "files open": lambda _: (IMAGE, {"open": 20}),
    "one processor": lambda _: (IMAGE, {"processors": {0}}),
    "removed while it is restored": lambda folder: (alter(folder, lambda _: None), {"remove": True}),
}


def run(image: Path, job: str, options: Options) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the worker on `image` with one job; return it, and the seconds it took."""
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(options.pop("open", 0))]
    processors, remove = options.pop("processors", None), options.pop("remove", False)

    def prepare() -> None:
        if processors:
            os.sched_setaffinity(0, processors)

    begun = time.monotonic()
    process = subprocess.Popen(
        [PROGRAMS / "restore", "auto", image, *COMMAND, job], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=prepare, pass_fds=opened, **options,  # noqa: PLW1509 -- there is no thread
    )  # fmt: skip
    if remove:
        time.sleep(random.random() * 0.1)
        image.unlink()
    out, err = process.communicate(timeout=120)
    for fd in opened:
        os.close(fd)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err), time.monotonic() - begun


def main() -> None:
    """Restore, break, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restores", type=int, default=500)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "restores.json")
    args = parser.parse_args()
    random.seed(18)
    seconds, failures = [], Counter[str]()
    for _ in range(args.restores):
        done, took = run(IMAGE, "{", {})
        seconds.append(took)
        if done.returncode != 1 or not done.stderr.startswith("coldsnap: --test_input: expected JSON"):
            failures[f"{done.returncode}: {done.stderr[-200:]}"] += 1
    answered: dict[str, Counter[str]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="restores-"))
    os.environ["COLDSNAP_LEDGER_DIR"] = str(scratch / "ledger")
    for number in range(args.faults):
        fault = [*FAULTS][number % len(FAULTS)]
        image, options = FAULTS[fault](scratch)
        done, _ = run(image, JOB, options)
        how = "failed: " + done.stderr[-300:]
        if done.returncode == 0 and '"finish_reason": "stop"' in done.stdout:
            record = next(line for line in done.stdout.splitlines() if '"record":"cold_start"' in line)
            how = json.loads(record)["image"]
        answered.setdefault(fault, Counter())[how] += 1
        print(f"{number + 1} {fault}: {how}", flush=True)
    shutil.rmtree(scratch)
    ordered = sorted(seconds)
    result = {
        "machine": {"processors": os.cpu_count(), "kernel": platform.release(), "image_bytes": IMAGE.stat().st_size},
        "restores": len(seconds), "failures": dict(failures),
        "seconds": {"median": statistics.median(seconds), "p99": ordered[int(len(ordered) * 0.99)], "max": ordered[-1]}
        if seconds else None,
        "faults": {fault: dict(counts) for fault, counts in answered.items()},
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
