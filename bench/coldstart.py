"""From process start to ready, beside vLLM's own API server, page cache warm and evicted.

    python bench/coldstart.py [--pairs 5] [--states warm evicted] [--out bench/results/coldstart.json]

Both boot in turn on the same snapshot, from the same environment, each in a process group of its own. Ours is
ready when it asks the control plane for jobs; one is waiting, and the time to its first chunk is taken too. The
server is ready when /health answers; it is then sent the same prompt. `restored` is ours out of a process image that is
made for this environment first. Evicting is `posix_fadvise(DONTNEED)` over the snapshot, the virtual environment and
the image.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from contenders import NATIVE, OPENAI, healthy, server_command  # noqa: E402
from waterfall import waterfall  # noqa: E402

from coldsnap.settings import Settings  # noqa: E402
from coldsnap.testing import ControlPlane  # noqa: E402

ENVIRONMENT = Path(sys.prefix)
RESTORE = ROOT / "build" / "image" / "restore"
IMAGE = "worker.image"
"""In the home of these boots."""


@dataclass
class Boot:
    """One boot. Seconds from the start of the process, as this program saw it."""

    ready: float
    first_chunk: float
    cpu: float
    """CPU-seconds of all its processes up to then."""
    record: dict[str, Any] | None = None
    exit: float = 0.0
    """From SIGTERM to the end of the process."""


def evict(*folders: Path) -> int:
    """Drop every file below `folders` from the page cache; return how many bytes they are."""
    os.sync()  # what is dirty stays
    size = 0
    for folder in folders:
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    size += path.stat().st_size
    return size


def base(home: Path) -> dict[str, str]:
    """Return what both contenders find in their environment."""
    own = (
        "PATH",
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
    )  # where this machine has things
    kept = {name: os.environ[name] for name in own if name in os.environ} | {"HOME": str(home), "LANG": "C.UTF-8"}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def cpu_seconds(group: int) -> float:
    """Return the CPU-seconds of a process group so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def start(command: list[str], env: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own: a session of its own would be given a share of the processors."""
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=log, process_group=0)


def stop(process: subprocess.Popen[bytes]) -> float:
    """Send SIGTERM, wait for the end, leave nothing of the group; return the seconds it took."""
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        print("killed: it did not end within 30 s of SIGTERM", file=sys.stderr)
    took = time.monotonic() - begun
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return took


async def ours(home: Path, log: Path, **more: str) -> Boot:
    """Boot the worker with one job waiting; `more` are variables for it."""
    return await booted(home, log, [], more)


async def booted(home: Path, log: Path, command: list[str], more: dict[str, str]) -> Boot:
    """Boot the worker by way of `command`."""
    async with ControlPlane(poll_seconds=30) as plane:
        job = plane.submit(NATIVE)
        folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=home))
        env = base(home) | plane.environment() | {"COLDSNAP_LEDGER_DIR": str(folder)} | more
        with log.open("wb") as out:
            begun = time.monotonic()
            process = start([*command, sys.executable, str(ROOT / "handler.py")], env, out)
        try:
            worker = await plane.wait_for_worker(600)
            await job.result(60)
            assert worker.first_poll is not None
            assert job.timestamps.first_chunk is not None
            boot = Boot(worker.first_poll - begun, job.timestamps.first_chunk - begun, cpu_seconds(process.pid))
            plane.release_polls()
        finally:
            took = await asyncio.to_thread(stop, process)
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    boot.record = next(line for line in lines if line["record"] == "cold_start")
    boot.exit = took
    return boot


async def restored(home: Path, log: Path) -> Boot:
    """Restore the worker from the image in `home`; a plain boot does not count."""
    boot = await booted(home, log, [str(RESTORE), "require", str(home / IMAGE)], {})
    assert boot.record
    assert boot.record["image"] == "restored"
    return boot


def make_image(home: Path) -> None:
    """Make the image for the environment of these boots."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from coldsnap import make_image;"
        "sys.exit(make_image.command(sys.argv[2:]))"
    )
    command = [sys.executable, "-P", "-c", program, str(ROOT / "src"), str(home / IMAGE)]
    subprocess.run(command, env=base(home), check=True)


async def theirs(home: Path, log: Path) -> Boot:
    """Boot vLLM's API server on the snapshot, with the arguments that were baked into it."""
    command, url = server_command()
    with log.open("wb") as out:
        begun = time.monotonic()
        process = start(command, base(home), out)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await healthy(session, url)
            ready = time.monotonic() - begun
            await stream(session, url)
            boot = Boot(ready, time.monotonic() - begun, cpu_seconds(process.pid))
    finally:
        took = await asyncio.to_thread(stop, process)
    boot.exit = took
    return boot


async def stream(session: aiohttp.ClientSession, url: str) -> None:
    """Stream one completion as far as its first chunk."""
    async with session.post(f"{url}/v1/chat/completions", json=OPENAI["openai_input"]) as answer:
        answer.raise_for_status()
        await answer.content.readany()


def import_profile(home: Path) -> list[tuple[str, float, int]]:
    """Return (package, seconds of its own code, modules) of a boot up to the engine's fork, largest first."""
    job = {"input": {"prompt": "hi", "sampling_params": {"max_tokens": 1}}}
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "handler.py"), "--test_input", json.dumps(job)],
        env=base(home) | {"COLDSNAP_LEDGER_DIR": str(home)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for line in result.stderr.splitlines():
        if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", line):
            seconds[match[2]] += int(match[1])
            modules[match[2]] += 1
    return [(name, us / 1e6, modules[name]) for name, us in seconds.most_common(15)]


async def main() -> None:
    """Boot the pairs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--states", nargs="+", default=["warm", "evicted"], choices=["warm", "evicted"])
    parser.add_argument("--alone", action="store_true", help="without the baseline")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "coldstart.json")
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="coldstart-"))
    folder = Settings.read({}).snapshot()
    assert folder is not None
    await ours(home, home / "first.log")  # fills the home's caches, for both
    images = RESTORE.exists()
    if images:
        make_image(home)
    boots: dict[str, list[Boot]] = {}
    for state in args.states:
        for number in range(args.pairs):
            contenders = [("coldsnap", ours)] + ([] if args.alone else [("vllm", theirs)])
            contenders += [("restored", restored)] if images else []
            for name, contender in contenders if number % 2 == 0 else contenders[::-1]:
                if state == "evicted":
                    evict(folder, ENVIRONMENT, *([home / IMAGE] if images else []))
                boot = await contender(home, home / f"{name}.log")
                boots.setdefault(f"{name}, {state}", []).append(boot)
                print(
                    f"{state} {number + 1}/{args.pairs} {name:9} ready {boot.ready:6.2f} s, first chunk "
                    f"{boot.first_chunk:6.2f} s, exit {boot.exit:5.2f} s",
                    file=sys.stderr,
                )
    write(args.out, boots, import_profile(home))


def median(boots: list[Boot]) -> Boot:
    """Return the boot whose time to ready is the median."""
    return sorted(boots, key=lambda boot: boot.ready)[len(boots) // 2]


def write(out: Path, boots: dict[str, list[Boot]], profile: list[tuple[str, float, int]]) -> None:
    """Write everything as JSON, medians as Markdown, and our median boots as a waterfall."""
    lines = [
        "| | ready, median | all | first chunk | CPU | exit after SIGTERM | of vLLM's own server |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in boots.items():
        who, state = name.split(", ")
        server = boots.get(f"vllm, {state}", [])
        ratios = [run.ready / other.ready for run, other in zip(runs, server, strict=False)]
        ratio = f"{statistics.median(ratios):.3f}" if ratios and who != "vllm" else ""
        every = ", ".join(f"{run.ready:.2f}" for run in runs)
        first, cpu, exits = (statistics.median(getattr(run, field) for run in runs) for field in FIELDS)
        ready = statistics.median(run.ready for run in runs)
        lines.append(f"| {name} | {ready:.2f} s | {every} | {first:.2f} s | {cpu:.1f} s | {exits:.2f} s | {ratio} |")
    lines += ["", "Phases of our boot (median of each, seconds):", ""]
    states = [name for name in boots if not name.startswith("vllm")]
    rows: dict[str, list[str]] = {}
    for name in states:
        records = [run.record for run in boots[name] if run.record]
        for phase in PHASES:
            seconds = [r["phases"][phase] for r in records if phase in r["phases"]]
            rows.setdefault(phase, []).append(f"{statistics.median(seconds):.2f}" if seconds else "")
        worst = max(abs(sum(r["phases"].values()) / r["seconds"] - 1) for r in records)
        assert worst < 0.02, f"the phases miss the total by {worst:.1%}"
    lines += ["| | " + " | ".join(states) + " |", "|---" * (len(states) + 1) + "|"]
    lines += [f"| {phase} | " + " | ".join(values) + " |" for phase, values in rows.items()]
    lines += ["", "Imports of a boot, seconds of a package's own code under `-X importtime` (which slows them):", ""]
    lines += ["| package | seconds | modules |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.3f} | {count} |" for name, seconds, count in profile]
    about = {"processors": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    data = about | {"boots": {name: [asdict(run) for run in runs] for name, runs in boots.items()}, "imports": profile}
    out.write_text(json.dumps(data, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".svg").write_text(waterfall({name: median(boots[name]).record or {} for name in states}))
    print("\n".join(lines))


FIELDS = ("first_chunk", "cpu", "exit")
PHASES = (
    "python", "restore", "take_over", "settings", "import_vllm", "verify", "cache", "configure", "engine", "import_sdk",
    "import_http", "verify_weights", "sdk", "warm_up",
)  # fmt: skip

if __name__ == "__main__":
    asyncio.run(main())
