"""What metering a step costs, in the engine's process and in the worker's, at 1 to 256 running requests.

    python bench/step_meter.py [--levels 1 16 64 128 256] [--rounds 3] [--out bench/results/step_meter.json]

On the real engine, with the demo snapshot: n requests decode 96 tokens each, and what is measured is each step in
which all n decode. The meter times itself (it lies inside the step), the reader is timed from outside. The step's
length here is that of a tiny model on a CPU, shorter than any that is worth serving: the ratio is an upper bound.

Predicted before the first run: 10 us + 0.25 us a request in the engine's process (two dictionary look-ups, a
comparison and two appends each), so 42 us at 128; at the 8 ms that 128 requests take here, 0.5%. In the worker's
process 60 us a step, nearly the same at any level: numpy's calls, not its loops. At 256 requests that was wrong,
121 us. Predicted before processor time was measured beside it: 60 us of its own, the rest a wait for one of two cores.
Wrong again, 157 us were its own: the first frame of a read finds the caches full of other things, and from 256 on more
than half of all frames are the first. The median hides that below; hence the mean of the processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

TOKENS = 96
PREDICTED: dict[str, Callable[[int], float]] = {"engine_us": lambda n: 10 + 0.25 * n, "reader_us": lambda _: 60.0}
LIMIT = 0.01


def row(level: int, samples: list[tuple[float, ...]]) -> dict[str, Any]:
    """Return medians of (metering, step, reading), and the mean processor time of reading, over a level's steps."""
    metering, step, reading, _ = (statistics.median(column) for column in zip(*samples, strict=True))
    cpu = statistics.fmean(sample[3] for sample in samples)
    return {
        "running": level,
        "steps": len(samples),
        "step_ms": round(step * 1e3, 3),
        "engine_us": round(metering * 1e6, 1),
        "engine_us_predicted": PREDICTED["engine_us"](level),
        "of_step": round(metering / step, 5),
        "reader_us": round(reading * 1e6, 1),
        "reader_cpu_us": round(cpu * 1e6, 1),
        "reader_us_predicted": PREDICTED["reader_us"](level),
    }


async def measure(engine: Any, levels: list[int], rounds: int) -> list[dict[str, Any]]:
    """Run every level in every round, in turns."""
    from coldsnap.engine import Generation, Meter

    await engine.warm_up()
    accounts = engine._accounts  # noqa: SLF001 -- no public way to a single frame, and none needed
    samples: dict[int, list[tuple[float, ...]]] = {level: [] for level in levels}
    level = 0
    charge: Callable[[Any], None] = accounts._frame  # noqa: SLF001 -- as above

    def timed(frame: Any) -> None:
        begun, used = time.perf_counter(), time.thread_time()
        charge(frame)
        used, took = time.thread_time() - used, time.perf_counter() - begun
        decodes = len(frame.step.numbers) == level and not frame.events and (frame.step.tokens[:, 1] == 1).all()
        if level and decodes:
            samples[level].append((frame.metering, frame.step.end - frame.step.start, took, used))

    accounts.reader._on_frame = timed  # noqa: SLF001 -- as above

    async def one(name: str) -> None:
        sampling = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
        async for _ in engine.generate(Generation(name, prompt="hi there", sampling=sampling), Meter()):
            pass

    for round_number in range(rounds):
        for level in levels:
            await asyncio.gather(*(one(f"{round_number}-{level}-{i}") for i in range(level)))
            await asyncio.sleep(0.1)
    return [row(each, samples[each]) for each in levels]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| running | step, ms | engine, µs a step | predicted | of the step | worker, µs a step | predicted | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each['running']} | {each['step_ms']:.2f} | {each['engine_us']:.1f} | {each['engine_us_predicted']:.0f} "
        f"| {each['of_step']:.2%} | {each['reader_us']:.1f} | {each['reader_us_predicted']:.0f} "
        f"| {each['reader_cpu_us']:.1f} |"
        for each in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print and write; return 1 if the limit at 128 running requests is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "step_meter.json")
    args = parser.parse_args()

    from coldsnap.boot import boot
    from coldsnap.settings import Settings
    from coldsnap.timeline import Timeline

    environ = os.environ
    environ.setdefault("MAX_NUM_SEQS", str(max(args.levels)))
    booted = boot(Settings.read(environ), Timeline(), environ)
    try:
        rows = asyncio.run(measure(booted.engine, args.levels, args.rounds))
        info = booted.engine.info
    finally:
        booted.engine.close()
    about = {"vllm": info.version, "gpu": info.gpu, "cpus": os.cpu_count(), "python": platform.python_version()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "limit_at_128": LIMIT, "levels": rows}, indent=1) + "\n")
    heading = f"vLLM {about['vllm']} on {about['cpus']} cores ({about['gpu']}), Python {about['python']}"
    args.out.with_suffix(".md").write_text(f"# What metering a step costs\n\n{heading}\n\n{table(rows)}\n")
    print(table(rows))
    return int(any(each["running"] == 128 and each["of_step"] > LIMIT for each in rows))


if __name__ == "__main__":
    sys.exit(main())
