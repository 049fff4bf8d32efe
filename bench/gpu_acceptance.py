"""What a GPU must show before coldsnap is trusted on it: one command, offline, in steps that are bounded.

    python bench/gpu_acceptance.py --out FOLDER [--minutes 25] [--steps demo,load] [--work FOLDER] [--shape 8b] [--dry]

Each step runs in a process of its own, which is killed at its limit with everything that it has started. What it found
is in FOLDER/results.jsonl as soon as it ends, and FOLDER/acceptance.md is written again: a run that is cut off, also by
SIGTERM, tells what it knows. Runs of other steps into the same FOLDER add to it. The exit code is 1 where a claim of
ours does not hold, or a step broke, was cut off or was not reached. WORK keeps the checkpoint (8 GB of random weights,
made by the first step that needs it) and the caches between runs; `--shape tiny` runs on a CPU and proves the program,
not the GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from gpu_bench import Bench  # noqa: E402
from gpu_boot_steps import bundle, cold_start, machine, verification  # noqa: E402
from gpu_serve_steps import books, demo, load, sleep, stops, tokens  # noqa: E402


@dataclass(frozen=True)
class Step:
    """One step and the most seconds that it may take."""

    run: Callable[[Bench], Awaitable[None]]
    limit: int


STEPS: Mapping[str, Step] = {
    "machine": Step(machine, 60),
    "demo": Step(demo, 120),
    "cold_start": Step(cold_start, 420),
    "load": Step(load, 360),
    "books": Step(books, 120),
    "stops": Step(stops, 120),
    "bundle": Step(bundle, 240),
    "verification": Step(verification, 180),
    "tokens": Step(tokens, 240),
    "sleep": Step(sleep, 150),
}
"""In the order of their worth: what comes last may not be reached."""

_LOG_LINES = 40
_VERDICT = {True: "holds", False: "**FAILS**", None: "not judged here"}


def bounded(command: list[str], log: Path, limit: float, stopped: threading.Event) -> tuple[str, float]:
    """Run a command until it ends, its limit or `stopped`; return its state and its seconds. Nothing of it is left."""
    begun = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    while process.poll() is None and time.monotonic() < begun + limit and not stopped.is_set():
        time.sleep(0.1)
    state = {None: "cut off", 0: "passed"}.get(process.poll(), "broke")
    end_session(process.pid)
    process.wait()
    return state, round(time.monotonic() - begun, 1)


def end_session(leader: int) -> None:
    """Kill every process of a session: its process groups differ, and some have outlived their parents."""
    while pids := [*session(leader)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == leader and state != "Z":
                pids.append(int(stat.parent.name))
    return pids


def result(name: str, state: str, seconds: float, work: Path) -> dict[str, Any]:
    """Return what became of a step, with all that it has found."""
    found, log = work / f"{name}.json", work / f"{name}.log"
    content = json.loads(found.read_text()) if found.exists() else {"claims": [], "facts": {}}
    if state == "passed" and any(claim["holds"] is False for claim in content["claims"]):
        state = "failed"
    if state in {"broke", "cut off"}:
        content["log"] = log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:]
    return {"step": name, "state": state, "seconds": seconds, **content}


def page(results: list[dict[str, Any]], shape: str) -> str:
    """Return what was found as Markdown: the claims first, then what each step measured."""
    latest = {each["step"]: each for each in results}
    lines = ["# coldsnap on a GPU", ""]
    if shape != "8b":
        lines += [f"The shape is `{shape}`: this run proves the program, not a GPU.", ""]
    lines += ["| step | state | seconds | claims that hold | fail | not judged |", "|---|---|---|---|---|---|"]
    for name in (name for name in STEPS if name in latest):
        each = latest[name]
        verdicts = [claim["holds"] for claim in each["claims"]]
        counts = " | ".join(str(verdicts.count(verdict)) for verdict in (True, False, None))
        lines.append(f"| {name} | {each['state']} | {each['seconds']} | {counts} |")
    lines += ["", "| step | claim | found | goal | |", "|---|---|---|---|---|"]
    for name in (name for name in STEPS if name in latest):
        for claim in latest[name]["claims"]:
            cells = [name, claim["claim"], claim["found"], claim["goal"], _VERDICT[claim["holds"]]]
            lines.append("| " + " | ".join(str(cell).replace("|", "/")[:200] for cell in cells) + " |")
    for name in (name for name in STEPS if name in latest):
        each = latest[name]
        facts = json.dumps(each["facts"], indent=1)
        lines += ["", f"## {name}", "", str(STEPS[name].run.__doc__), "", "```json", facts, "```"]
        if "log" in each:
            lines += ["", f"It {each['state']}. The end of its log:", "", "```text", *each["log"], "```"]
    return "\n".join(lines) + "\n"


def run(chosen: dict[str, Step], args: argparse.Namespace) -> int:
    """Run the steps and write after each; return the exit code."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.out / "results.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    until, good = time.monotonic() + 60 * args.minutes, True
    stopped = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stopped.set())
    for name, step in chosen.items():
        (args.work / f"{name}.json").unlink(missing_ok=True)
        limit = min(step.limit * args.slack, until - time.monotonic())
        state, seconds = "not reached", 0.0
        if limit > 0 and not stopped.is_set():
            print(f"{name}: {limit:.0f} s at most", flush=True)
            command = [sys.executable, __file__, "--one", name, "--work", str(args.work), "--shape", args.shape]
            state, seconds = bounded(command, args.work / f"{name}.log", limit, stopped)
        results.append(result(name, state, seconds, args.work))
        with kept.open("a") as lines:
            lines.write(json.dumps(results[-1]) + "\n")
        (args.out / "acceptance.md").write_text(page(results, args.shape))
        print(f"{name}: {results[-1]['state']} after {seconds:.0f} s", flush=True)
        for claim in results[-1]["claims"]:
            print(f"  {_VERDICT[claim['holds']]:15} {claim['claim']}: {claim['found']} ({claim['goal']})", flush=True)
        for line in results[-1].get("log", []):
            print(f"  {line}", flush=True)
        good = good and results[-1]["state"] == "passed"
    return 0 if good else 1


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("acceptance"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "coldsnap-acceptance"))
    parser.add_argument("--minutes", type=float, default=25.0, help="for all steps together")
    parser.add_argument("--slack", type=float, default=1.0, help="times each step's limit, for a slow machine")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of: %(default)s")
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b")
    parser.add_argument("--dry", action="store_true", help="list the steps and their limits, and run none")
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        asyncio.run(run_one(args))
        return 0
    if unknown := set(args.steps.split(",")) - STEPS.keys():
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, found {', '.join(sorted(unknown))}")
    chosen = {name: step for name, step in STEPS.items() if name in args.steps.split(",")}
    if args.dry:
        for name, step in chosen.items():
            print(f"{name:14}{step.limit:4} s  {step.run.__doc__}")
        print(f"{'at most':14}{sum(step.limit for step in chosen.values()):4} s, cut at {60 * args.minutes:.0f}")
        return 0
    return run(chosen, args)


async def run_one(args: argparse.Namespace) -> None:
    """Run one step, in this process."""
    await STEPS[args.one].run(Bench(args.work, args.shape, args.work / f"{args.one}.json"))


if __name__ == "__main__":
    sys.exit(main())
