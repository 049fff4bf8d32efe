"""What happens at four times what the engine sustains: throughput, who is refused, how long the admitted take.

    python bench/overload.py [--timed] [--rounds 5] [--seconds 8] [--out bench/results/overload]

An endpoint with MAX_QUEUE and MAX_QUEUE_SECONDS before a worker, as in `coldsnap serve`. Each round: the peak, with
MAX_CONCURRENCY jobs under way and half as many waiting; then jobs at four times the rate at which those ended, by the
clock, whatever becomes of them; then both with one in ten of them of 1,000 tokens instead of 64, which has a peak of
its own: a step over longer contexts takes longer. With `--timed` an
engine that keeps time stands for vLLM, so that no other process takes it the processor: 128 requests at once, a step of
4 ms and 0.2 ms a request.

Predicted: throughput under overload is at least 0.95 of the peak's, because a refusal costs next to nothing and the
worker takes no more than it runs. No admitted job waits longer than the queue's jobs take, or MAX_QUEUE_SECONDS. A
short job beside long ones takes no longer, once taken, than beside short ones: the engine runs all that it has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import QUESTION, ROOT, TOKENS, Ring, quantile

from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.job import RUNSYNC
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.submission import Submission
from coldsnap.errors import Refused
from coldsnap.testing import Job, JobFailed

_CONCURRENCY = 128
_QUEUE = 256
_QUEUE_SECONDS = 10.0
_FACTOR = 4.0
_LONG_TOKENS = 1000
_LONG_EACH = 10
_MEAN_TOKENS = ((_LONG_EACH - 1) * TOKENS + _LONG_TOKENS) / _LONG_EACH
_MIXED = ", one in ten long"
_TIMED = {"boot": [0.1, 0.1], "a": 0.004, "b": 1e-6, "c": 0.0002, "d": 0.0, "max_num_seqs": _CONCURRENCY}


@dataclass(frozen=True)
class Outcome:
    """One run. Seconds; of short jobs alone, from their submission."""

    name: str
    offered: int
    refused: int
    """Told 429 at once."""
    expired: int
    """Told 429 after MAX_QUEUE_SECONDS."""
    tokens_per_second: float
    """Of jobs that ended in the time in which jobs came, its first second left out."""
    longest_queue: int
    ttft_p50: float
    ttft_p99: float
    whole_p50: float
    whole_p99: float
    run_p50: float
    run_p99: float
    """From when the worker took it."""


class Load:
    """Jobs for an endpoint, and what became of them."""

    def __init__(self, endpoint: Endpoint, *, timed: bool) -> None:
        self._endpoint = endpoint
        self._timed = timed

    async def closed(self, name: str, seconds: float, sizes: Iterator[int]) -> Outcome:
        """Keep worker and queue full, and no fuller."""
        end = time.monotonic() + seconds
        jobs: list[tuple[Job, int]] = []

        async def client(number: int) -> None:
            await asyncio.sleep(number / 200)  # all at once would not fit into the queue
            while time.monotonic() < end:
                size = next(sizes)
                jobs.append((self._submit(size), size))
                await jobs[-1][0].result()

        begun = time.monotonic()
        await asyncio.gather(*(client(number) for number in range(_CONCURRENCY + _CONCURRENCY // 2)))
        return _outcome(name, jobs, begun, seconds, refused=0)

    async def open(self, name: str, seconds: float, rate: float, sizes: Iterator[int]) -> Outcome:
        """Submit at a rate, and wait for all that was admitted."""
        begun = time.monotonic()
        jobs, refused, number = [], 0, 0
        while (due := begun + number / rate) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number += 1
            size = next(sizes)
            try:
                jobs.append((self._submit(size), size))
            except Refused:
                refused += 1
        for job, _ in jobs:
            with contextlib.suppress(JobFailed):
                await job.result()
        return _outcome(name, jobs, begun, seconds, refused=refused)

    def _submit(self, tokens: int) -> Job:
        sampling: dict[str, Any] = {"max_tokens": tokens}
        if self._timed:
            content: dict[str, Any] = {"prompt": "word " * 14}
        else:
            content = {"messages": [{"role": "user", "content": QUESTION}]}
            sampling |= {"temperature": 0.0, "ignore_eos": True}
        submitted = content | {"stream": True, "sampling_params": sampling}
        return self._endpoint.submit(Submission(submitted, {}, RUNSYNC), sync=True)


def _outcome(name: str, jobs: list[tuple[Job, int]], begun: float, seconds: float, *, refused: int) -> Outcome:
    good = [(job, size) for job, size in jobs if job.error is None]
    if wrong := [job for job, _ in jobs if job.error and "MAX_QUEUE_SECONDS" not in job.error]:
        raise RuntimeError(f"{len(wrong)} jobs failed: {wrong[0].error}")
    tokens, turns = 0.0, []
    for job, size in good:
        times = job.timestamps
        assert times.taken
        assert times.done
        # The part of its running time that lies in the window: a long job counts for what it did there.
        inside = min(times.done, begun + seconds) - max(times.taken, begun + 1)
        tokens += size * max(0.0, inside) / (times.done - times.taken)
        turns += [(times.submitted, 1), (times.taken, -1)]
    waiting, longest = 0, 0
    for _, change in sorted(turns):
        waiting += change
        longest = max(longest, waiting)
    short = [job.timestamps for job, size in good if size == TOKENS]
    ttft = [times.chunks[0] - times.submitted for times in short]
    whole = [(times.done or 0.0) - times.submitted for times in short]
    run = [(times.done or 0.0) - (times.taken or 0.0) for times in short]
    return Outcome(
        name, len(jobs) + refused, refused, len(jobs) - len(good), tokens / (seconds - 1), longest,
        quantile(ttft, 0.5), quantile(ttft, 0.99), quantile(whole, 0.5), quantile(whole, 0.99),
            quantile(run, 0.5), quantile(run, 0.99),
    )  # fmt: skip


def _mixed() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield _LONG_TOKENS if number % _LONG_EACH == 0 else TOKENS


def _short() -> Iterator[int]:
    while True:
        yield TOKENS


async def measured(rounds: int, seconds: float, *, timed: bool) -> list[Outcome]:
    """Return all runs of all rounds."""
    outcomes: list[Outcome] = []
    async with Ring() as ring:
        ring.environ |= {"MAX_CONCURRENCY": str(_CONCURRENCY), "TIMED_ENGINE": json.dumps(_TIMED)}
        plane = await ring.plane()
        store = ring.enter_context(Store(ring.scratch / "serve.db", print))
        endpoint = await ring.enter_async_context(
            Endpoint(plane, store, Scaling(), print, max_queue=_QUEUE, max_queue_seconds=_QUEUE_SECONDS)
        )
        command = [str(ROOT / "src" / "coldsnap" / "testing" / "timed_worker.py")] if timed else []
        await ring.worker(plane, ROOT, *command)
        load = Load(endpoint, timed=timed)
        await load.closed("warm-up", 3.0, _short())
        for _ in range(rounds):
            for more, sizes, mean in (("", _short(), TOKENS), (_MIXED, _mixed(), _MEAN_TOKENS)):
                peak = await load.closed(f"peak{more}", seconds, sizes)
                rate = _FACTOR * peak.tokens_per_second / mean
                outcomes += [peak, await load.open(f"4x{more}", seconds, rate, sizes)]
                print(*outcomes[-2:], sep="\n")
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Return medians over the rounds, and the ratio of the throughput to the same round's peak of the same jobs."""
    lines = [
        "| run | offered | 429 at once / later | tokens/s | of the peak | queue | TTFT | whole | taken to end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each.name for each in outcomes):
        runs = [each for each in outcomes if each.name == name]
        peaks = [each.tokens_per_second for each in outcomes if each.name == f"peak{_MIXED if _MIXED in name else ''}"]

        def median(field: str, runs: list[Outcome] = runs) -> float:
            return float(statistics.median(getattr(each, field) for each in runs))

        ratio = statistics.median(each.tokens_per_second / peak for each, peak in zip(runs, peaks, strict=True))
        lines.append(
            f"| {name} | {median('offered'):.0f} | {median('refused'):.0f} / {median('expired'):.0f} "
            f"| {median('tokens_per_second'):.0f} | {ratio:.2f} | {max(each.longest_queue for each in runs)} "
            f"| {median('ttft_p50'):.2f} / {median('ttft_p99'):.2f} "
            f"| {median('whole_p50'):.2f} / {median('whole_p99'):.2f} "
            f"| {median('run_p50'):.2f} / {median('run_p99'):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "overload")
    given = parser.parse_args()
    outcomes = asyncio.run(measured(given.rounds, given.seconds, timed=given.timed))
    given.out.with_suffix(".json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n", "utf-8")
    text = (
        f"# Overload\n\n`{' '.join(sys.argv)}`, medians of {given.rounds} rounds of {given.seconds:g} s; "
        f"{'an engine that keeps time' if given.timed else 'vLLM and the demo'}. MAX_CONCURRENCY={_CONCURRENCY}, "
        f"MAX_QUEUE={_QUEUE}, MAX_QUEUE_SECONDS={_QUEUE_SECONDS:g}. Times are of the short jobs that were admitted: to "
        "the first chunk, to the end, and from when the worker took one to its end; p50 / p99, in seconds.\n\n"
        f"{table(outcomes)}"
    )
    given.out.with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
