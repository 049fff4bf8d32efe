"""Where a worker's processor time goes, by process and function: py-spy while jobs stream.

    python bench/token_profile.py [--checkout DIR] [--levels 32 128] [--out bench/results/tokenpath-profile.md]

For each level and kind of job the worker runs for `--seconds` under `py-spy record` (which takes some of the machine
too: only shares are meant to be read). A function's own time is what it spent outside of functions that it called;
its total includes them. Idle samples are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections import Counter
from pathlib import Path

from contenders import NATIVE, OPENAI, ROOT, Ring, Worker

_RATE = 200
_TOP = 16


def short(frame: str) -> str:
    """Return `function (file)` of a frame, without the line and the folders that everything is in."""
    name, _, place = frame.partition(" (")
    place = re.sub(r":\d+\)?$|\)$", "", place)
    for prefix in ("site-packages/", "/src/", "lib/python3.11/"):
        place = place.rpartition(prefix)[2]
    return f"{name} ({place})" if place else name


def read(raw: Path) -> dict[str, tuple[int, Counter[str], Counter[str]]]:
    """Return, by process, the number of samples and those of each function: its own and in total."""
    found: dict[str, tuple[int, Counter[str], Counter[str]]] = {}
    for text in raw.read_text().splitlines():
        stack, _, count = text.rpartition(" ")
        frames = stack.split(";")
        at = max((i for i, frame in enumerate(frames) if frame.startswith("process ")), default=-1)
        process = re.sub(r"^process \d+:?\"?|\"$", "", frames[at]) if at >= 0 else "?"
        process = next((kind for kind in ("EngineCore", "Worker") if f"VLLM::{kind}" in process), process)
        process = "front end" if "handler.py" in process else process
        functions = [short(frame) for frame in frames[at + 1 :] if not frame.startswith("thread ")]
        if not functions:
            continue
        total, own, within = found.setdefault(process, (0, Counter(), Counter()))
        own[functions[-1]] += int(count)
        for function in set(functions):
            within[function] += int(count)
        found[process] = total + int(count), own, within
    return found


def tables(title: str, raw: Path, top: int = _TOP) -> list[str]:
    """Return the functions that take most, in Markdown."""
    lines = [f"## {title}", ""]
    for process, (total, own, within) in sorted(read(raw).items(), key=lambda each: -each[1][0]):
        if total < _RATE // 4:
            continue
        shown = top if process == "front end" else 5
        lines += [
            f"**{process}**, {total} samples",
            "",
            "| own | of the process | | in total | |",
            "|---|---|---|---|---|",
        ]
        mine = own.most_common(shown)
        below = [each for each in within.most_common() if each[1] < 0.6 * total][:shown]  # not what everything is in
        for (a, n), (b, m) in zip(mine, below, strict=False):
            lines.append(f"| {n / total:.1%} | `{a}` | | {m / total:.1%} | `{b}` |")
        lines.append("")
    return lines


async def main() -> None:
    """Run each level under py-spy and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--levels", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tokenpath-profile.md")
    args = parser.parse_args()
    lines: list[str] = []
    async with Ring() as started:
        plane = await started.plane()
        pid = await started.worker(plane, args.checkout)
        for name, job in {"native": NATIVE, "OpenAI": OPENAI}.items():
            contender = Worker(name, plane, pid, job)
            await contender.run(None, 32, 64)
            for level in args.levels:
                raw = started.scratch / f"{name}-{level}.raw"
                command = ["record", "-f", "raw", "-r", str(_RATE), "-d", str(args.seconds), "-s", "-F"]
                spy = await asyncio.create_subprocess_exec(
                    str(Path(sys.executable).with_name("py-spy")), *command, "-o", str(raw), "-p", str(pid),
                    stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
                )  # fmt: skip
                while spy.returncode is None:
                    await contender.run(None, level, 16 * level)
                    await asyncio.sleep(0)
                lines += tables(f"{name}, {level} streams", raw)
                print(name, level, file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
