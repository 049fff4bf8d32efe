"""How often a snapshot comes from the disk where memory cannot hold it: a check before the engine, and one beside it.

    python bench/late_verification.py once FOLDER [--rounds 5]     # as root, with cgroups of version 1

1.2 GB in 16 files, 0.7 GB of memory for all processes, 0.4 GB/s from the disk, which is a network volume's rate. A
process that stands in for the engine maps the files and copies each, in order, from some seconds after `engine_starts`
on. Counted are the bytes that the disk delivers to check and engine, as a multiple of the snapshot's; seconds are not
measured. Results go to bench/results/late_verification.json.

Predicted: 2.0 for the barrier; beside 1.0 where the engine loads at once, up to 1.5 where it begins 3 s later.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import evict  # noqa: E402

from coldsnap.snapshot.manifest import Quantization, Source, load_manifest, verify, write_manifest  # noqa: E402
from coldsnap.snapshot.weights import WeightsCheck  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "late_verification.json"
GROUPS = Path("/sys/fs/cgroup")
MEMORY, FILES, BYTES, RATE = 700 << 20, 16, 75 << 20, 400_000_000
COPIED = 16 << 20


def limit(folder: Path, *, rate: int, memory: int | None = None) -> None:
    """Put this process and those that it starts into cgroups with these limits."""
    device = folder.stat().st_dev
    wanted = {"blkio": ("blkio.throttle.read_bps_device", f"{os.major(device)}:{os.minor(device)} {rate}")}
    if memory is not None:
        wanted["memory"] = ("memory.limit_in_bytes", str(memory))
    for controller, (name, value) in wanted.items():
        group = GROUPS / controller / "late-verification"
        group.mkdir(exist_ok=True)
        (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(os.getpid()))


def delivered() -> int:
    """Return the bytes that the disk has delivered to this process and those that it has waited for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def copy(folder: Path) -> int:
    """Map each file and copy it, as the engine does; return the bytes that the disk delivered for that."""
    before = delivered()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for start in range(0, len(mapped), COPIED):
                bytes(mapped[start : start + COPIED])
    return delivered() - before


def measure(folder: Path, way: str, seconds: float) -> float:
    """Check and copy once; return the bytes from the disk, as a multiple of the snapshot's."""
    limit(folder, rate=RATE, memory=MEMORY)
    manifest = load_manifest(folder)
    if way == "barrier":
        reading = verify(folder, manifest)
        copied = copy(folder)
    else:
        check = WeightsCheck(folder, manifest)
        check.engine_starts()
        time.sleep(seconds)
        copied = copy(folder)
        reading = check.result()
    assert reading is not None
    assert reading.disk_bytes is not None
    return (reading.disk_bytes + copied) / manifest.size


def once(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Measure each way in a process of its own, with nothing of the snapshot in the page cache."""
    snapshot = folder / "random"
    if not snapshot.exists():
        snapshot.mkdir(parents=True)
        for number in range(FILES):
            (snapshot / f"{number:02}.safetensors").write_bytes(os.urandom(BYTES))
        write_manifest(
            snapshot, source=Source(), quantization=Quantization(), served_model_name="m", engine_args={}, versions={}
        )
    ways = {"barrier": ("barrier", 0.0), "beside, at once": ("beside", 0.0),
            "beside, 1 s later": ("beside", 1.0), "beside, 3 s later": ("beside", 3.0)}  # fmt: skip
    results: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (way, seconds) in ways.items():
            evict(snapshot)
            command = [sys.executable, __file__, "measure", str(snapshot), "--way", way, "--seconds", str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[name].append(round(float(done.stdout), 3))
            print(name, results[name][-1], file=sys.stderr)
    return results


def main() -> None:
    """Measure all ways in turn, or one, as the process that is limited."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["once", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", default="beside")
    parser.add_argument("--seconds", type=float, default=0.0)
    args = parser.parse_args()
    folder = args.folder.absolute()
    if args.part == "measure":
        print(measure(folder, args.way, args.seconds))
        return
    results = once(folder, args.rounds)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print({name: statistics.median(values) for name, values in results.items()})


if __name__ == "__main__":
    main()
