"""A load on the terminal: a line of progress while it runs, then tables."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldsnap.desk.bench.driver import Run
from coldsnap.desk.bench.figures import Summary
from coldsnap.desk.report.notation import count, digits, seconds, usd

_WIDE = 110
_TICK_SECONDS = 0.5
_TICKS_OF_A_LINE = 20
"""Where lines cannot be written over, there are fewer of them."""
_CLEAR = "\r\x1b[K"

TIMES = {
    "ttft": "TTFT, to the first output",
    "itl": "ITL, mean of a request",
    "gap": "longest gap of a request",
    "e2e": "E2E, to the whole answer",
}


@contextlib.asynccontextmanager
async def progress(run: Run) -> AsyncIterator[None]:
    """Tell on stderr how a load goes."""
    task = asyncio.create_task(_tell(run, over=sys.stderr.isatty()))
    try:
        yield
    finally:
        task.cancel()
        if sys.stderr.isatty():
            sys.stderr.write(_CLEAR)


async def _tell(run: Run, *, over: bool) -> None:
    begun = time.monotonic()
    while True:
        await asyncio.sleep(_TICK_SECONDS * (1 if over else _TICKS_OF_A_LINE))
        so_far = time.monotonic() - begun
        line = (
            f"{so_far:5.1f} s: {run.sent} sent, {run.running} in flight, {len(run.outcomes)} done, "
            f"{run.failed} failed, {run.tokens / so_far:,.0f} output tokens/s"
        )
        sys.stderr.write(f"{_CLEAR}{line}" if over else f"{line}\n")
        sys.stderr.flush()


def show(about: Mapping[str, Any], summary: Summary) -> None:
    """Print everything."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    spoken = about["api"] if about["transport"] == "openai" else f"{about['api']}, as jobs"
    console.print(Text(f"{about['url']} ({spoken}), model {about['model'] or 'its own'}", style="bold"))
    console.print(Text(f"{about['load']}; seed {about['seed']}"))
    times = _table("of requests that ended well", "requests", "mean", "p50", "p90", "p95", "p99", "most")
    for name, label in TIMES.items():
        if (spread := getattr(summary, name)) is not None:
            values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.most)
            times.add_row(label, count(spread.count), *map(seconds, values))
    if times.row_count:
        console.print(times)
    rest = _table("", "")
    for label, value in lines(summary, about["slo"]):
        rest.add_row(label, value)
    console.print(rest)
    if summary.failures:
        failures = _table("what failed", "requests")
        failures.add_column("for example", overflow="fold")
        for each in summary.failures:
            failures.add_row(Text(each.kind), count(each.count), Text(each.example))
        console.print(failures)
    for note in summary.notes:
        console.print(Text(f"! {note}", style="yellow"))


def lines(summary: Summary, slo: Mapping[str, float] | None) -> Iterator[tuple[str, str]]:
    """Yield the figures that are not times, with what they are called."""
    yield "requests that ended well", f"{count(summary.succeeded)} of {count(summary.succeeded + summary.failed)}"
    yield "seconds, to the end of the last answer", digits(summary.seconds)
    yield "requests/s", digits(summary.requests_per_second)
    yield "output tokens/s", digits(summary.output_tokens_per_second)
    yield "prompt tokens/s", digits(summary.prompt_tokens_per_second)
    if summary.succeeded > summary.tokens.unknown:
        counted = summary.succeeded - summary.tokens.unknown
        tokens = summary.tokens
        yield (
            "tokens of a request, prompt and output",
            f"{digits(tokens.prompt / counted)} and {digits(tokens.output / counted)}",
        )
    yield "most in flight", count(summary.most_in_flight)
    if summary.good is not None and slo is not None:
        terms = ", ".join(f"{name} ≤ {seconds(most)}" for name, most in slo.items())
        good = summary.good
        yield f"goodput, requests/s with {terms}", f"{digits(good.per_second)} ({good.share:.1%})"
    if (cost := summary.cost) is not None:
        each = f"{seconds(cost.gpu_seconds / cost.requests)} of GPU"
        yield "cost of a request", _money(each, None if cost.usd is None else cost.usd / cost.requests)
        for name, spent, tokens_of in (
            ("prompt", cost.prefill_gpu_seconds, cost.prompt_tokens),
            ("output", cost.decode_gpu_seconds, cost.output_tokens),
        ):
            if tokens_of:
                dollars = cost.usd_of(spent)
                million = f"{digits(spent / tokens_of * 1e6)} s of GPU"
                yield (
                    f"cost of 1M {name} tokens",
                    _money(million, None if dollars is None else dollars / tokens_of * 1e6),
                )
    late = f", requests sent late by {seconds(summary.client.late.p99)} at p99" if summary.client.late else ""
    yield "this client", f"{summary.client.cpu_share:.0%} of a core{late}"


def _money(gpu: str, dollars: float | None) -> str:
    return gpu if dollars is None else f"{gpu}, {usd(dollars)}"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=bool(first))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
