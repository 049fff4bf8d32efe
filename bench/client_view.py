"""What a slow, failing platform costs the client: POSTs that take 50 or 200 ms, with jitter and 1% of 500s.

    python bench/client_view.py [--streams 16] [--jobs 96] [--rounds 3] [--out bench/results/client-view.md]

The same jobs, 160 tokens each, run against the control plane without and with delays, in turns. Half of a delay
passes before a POST counts as arrived, half before it is answered. Every job's text must be that of the others.
The end is taken twice: when the text is complete, and when the job is (job-done, one POST later).

Predicted: a chunk is on its way when the last token comes (half a round trip left, on average), the last chunk then
takes half of one to arrive: text complete one round trip later than without delay, job done two.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from contenders import NATIVE, OPENAI, ROOT, Ring, quantile

from coldsnap.testing import ControlPlane, Faults, Job

TOKENS = 160
PLATFORMS = {
    "no delay": Faults(),
    "50 ms": Faults(delay=0.0375, jitter=0.025, stream_5xx=0.01, done_5xx=0.01),
    "200 ms": Faults(delay=0.15, jitter=0.1, stream_5xx=0.01, done_5xx=0.01),
}

_HEADING = (
    "| jobs | a POST | first chunk | text complete | round trips above 1.05 × no delay | job done "
    "| round trips above | longest gap, p50 / most | POSTs a job |"
)


def text(job: Job) -> str:
    """Return what the client has read."""
    if not isinstance(job.chunks[0], str):
        return "".join(chunk["text"] for chunk in job.chunks)
    events = [json.loads(line[6:]) for line in "".join(job.chunks).splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


async def run(plane: ControlPlane, content: dict[str, Any], streams: int, jobs: int) -> list[Job]:
    """Run jobs, so many at a time, and return them."""
    room = asyncio.Semaphore(streams)

    async def one() -> Job:
        async with room:
            job = plane.submit(content)
            await job.result(60)
            return job

    return list(await asyncio.gather(*(one() for _ in range(jobs))))


def row(kind: str, name: str, found: list[Job], base: dict[str, float]) -> str:
    """Return a line of the table, and fill `base` from the undelayed run."""
    faults = PLATFORMS[name]
    trip = 1000 * (faults.delay + faults.jitter / 2)
    starts = [(job.timestamps, job.timestamps.submitted) for job in found]
    ttft = [1000 * (times.chunks[0] - start) for times, start in starts]
    whole = [1000 * (times.chunks[-1] - start) for times, start in starts]
    done = [1000 * ((times.done or 0.0) - start) for times, start in starts]
    gap = [1000 * max(b - a for a, b in itertools.pairwise(times.chunks)) for times, _ in starts]
    values = {"whole": quantile(whole, 0.5), "done": quantile(done, 0.5)}
    base.update(values if not trip else {})
    posts = sum(job.posts for job in found) / len(found)
    later = [f"{(values[k] - 1.05 * base[k]) / trip:.2f}" if trip else "" for k in ("whole", "done")]
    return (
        f"| {kind} | {name} | {quantile(ttft, 0.5):.0f} / {quantile(ttft, 0.95):.0f} "
        f"| {values['whole']:.0f} / {quantile(whole, 0.95):.0f} | {later[0]} "
        f"| {values['done']:.0f} / {quantile(done, 0.95):.0f} | {later[1]} "
        f"| {quantile(gap, 0.5):.0f} / {max(gap):.0f} | {posts:.1f} |"
    )


async def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "client-view.md")
    args = parser.parse_args()
    native = NATIVE | {"sampling_params": {"max_tokens": TOKENS, "temperature": 0.0}}
    openai = OPENAI | {"openai_input": {**OPENAI["openai_input"], "max_tokens": TOKENS}}
    found: dict[tuple[str, str], list[Job]] = {}
    async with Ring() as started:
        plane = await started.plane()
        await started.worker(plane)
        for content in (native, openai):
            await run(plane, content, 16, 32)
        for _ in range(args.rounds):
            for kind, content in {"native": native, "OpenAI": openai}.items():
                for name, faults in PLATFORMS.items():
                    plane.faults = faults
                    found.setdefault((kind, name), []).extend(await run(plane, content, args.streams, args.jobs))
                    print(kind, name, file=sys.stderr)
        assert plane.violations == [], plane.violations
    texts = {text(job) for jobs in found.values() for job in jobs}
    assert len(texts) == 1, "a text was not complete or not in order"
    lines = [
        f"{args.streams} streams of {TOKENS} tokens, {args.rounds} × {args.jobs} jobs a line; ms, p50 / p95.",
        "Every text was complete and in order.",
        "",
        _HEADING,
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in ("native", "OpenAI"):
        base: dict[str, float] = {}
        lines += [row(kind, name, found[kind, name], base) for name in PLATFORMS]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
