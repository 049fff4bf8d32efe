"""The report on the terminal: the page's tables, without its plots."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldsnap.desk.report.figures import Figures, Row
from coldsnap.desk.report.notation import count, digits, exact, part, ratio, seconds, usd
from coldsnap.desk.report.source import Intake
from coldsnap.foundation.plural import plural

_TORN_SHOWN = 5


def show(figures: Figures, intake: Intake, by: str, loaded: str, console: Console) -> None:
    """Print everything."""
    about = figures.about
    console.print(Text(f"{about['begun']} to {about['ended']} UTC", style="bold"), end="")
    requests = plural(figures.total.get("requests", 0), "request")
    console.print(f" · {plural(about['workers'], 'worker')} · {requests}")
    of_requests = (_groups, _latency, _batches, _dearest, _api) if figures.total else ()
    for section in (_spent, _boots, *of_requests):
        section(figures, by, loaded, console)
    _invoice(figures, console)
    for note in (*figures.notes, *reading(intake)):
        console.print(Text(f"! {note}", style="yellow"))


def reading(intake: Intake) -> Iterable[str]:
    """Say what was not read, or counted once for twice."""
    if intake.torn:
        yield f"Left out, because it could not be read: {plural(len(intake.torn), 'line')}"
        yield from (f"  {torn}" for torn in intake.torn[:_TORN_SHOWN])
        if len(intake.torn) > _TORN_SHOWN:
            yield f"  and {len(intake.torn) - _TORN_SHOWN} more"
    if intake.newer:
        yield f"Left out, with a newer schema than this coldsnap knows: {plural(intake.newer, 'record')}"
    if intake.repeated:
        yield f"Counted once, met in an upload and its local file: {plural(intake.repeated, 'line')}"


def _table(console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _spent(figures: Figures, _: str, __: str, console: Console) -> None:
    whole = sum(figures.spent.values())
    rows = [
        [name, exact(each), part(each, whole), usd(figures.spent_usd[name])] for name, each in figures.spent.items()
    ]
    dollars = list(figures.spent_usd.values())
    total = sum(each for each in dollars if each is not None) if None not in dollars else None
    rows.append(["total", exact(whole), "", usd(total)])
    rows += [[f"  overhead: {cause}", exact(each), part(each, whole), ""] for cause, each in figures.causes.items()]
    _table(console, "Where the GPU-seconds went", ("", "GPU-s", "share", "dollars"), rows)


def _groups(figures: Figures, by: str, loaded: str, console: Console) -> None:
    names = [*figures.groups, figures.total | {"name": "all"}] if len(figures.groups) > 1 else figures.groups
    _table(
        console,
        f"What requests cost, by {by}: marginal, and loaded with cold start, overhead, idle and drain ({loaded})",
        (
            by, "requests", "failed", "GPU-s", "each takes", "loaded GPU-s", "each, loaded",
            "dollars each", "loaded dollars",
        ),
        (
            [
                str(row["name"]), count(row["requests"]), count(row["failed"]), exact(row["gpu_seconds"]),
                seconds(row["gpu_seconds"] / row["requests"]), exact(row["loaded_gpu_seconds"]),
                seconds(row["loaded_gpu_seconds"] / row["requests"]), usd(ratio(row["usd"], row["requests"])),
                usd(ratio(row["loaded_usd"], row["requests"])),
            ]
            for row in names
        ),
    )  # fmt: skip
    _table(
        console,
        "For 1M tokens: input is prompt tokens that were not cached",
        (
            by, "input\ntokens", "cached", "output\ntokens",
            *(f"{side}:\n{what}" for side in ("in", "out") for what in ("GPU-s", "loaded", "$", "loaded $")),
        ),
        (
            [
                str(row["name"]), count(row["input_tokens"]), count(row["cached_tokens"]), count(row["output_tokens"]),
                *(digits(_million(row[name], row["input_tokens"])) for name in ("prefill", "loaded_prefill")),
                *(usd(_million(row[name], row["input_tokens"])) for name in ("prefill_usd", "loaded_prefill_usd")),
                *(digits(_million(row[name], row["output_tokens"])) for name in ("decode", "loaded_decode")),
                *(usd(_million(row[name], row["output_tokens"])) for name in ("decode_usd", "loaded_decode_usd")),
            ]
            for row in names
        ),
    )  # fmt: skip


def _million(value: float | None, tokens: float | None) -> float | None:
    per_token = ratio(value, tokens)
    return None if per_token is None else per_token * 1e6


def _latency(figures: Figures, _: str, __: str, console: Console) -> None:
    rows = (
        [each.name, count(each.count), seconds(each.p50), seconds(each.p95), seconds(each.p99)]
        for each in figures.spreads
    )
    _table(console, "How long they took (requests that ended well)", ("", "requests", "p50", "p95", "p99"), rows)


def _boots(figures: Figures, _: str, __: str, console: Console) -> None:
    if not figures.phases:
        return
    rows = [
        [each["phase"], seconds(each["p50"]), seconds(each["p95"])] for each in figures.phases if not each["beside"]
    ]
    rows.append(["process start to ready", seconds(figures.boots["p50"]), seconds(figures.boots["p95"])])
    beside = [each for each in figures.phases if each["beside"]]
    rows += [[f"  beside: {each['phase']}", seconds(each["p50"]), seconds(each["p95"])] for each in beside]
    _table(console, f"Cold start ({figures.boots['count']} boots)", ("phase", "p50", "p95"), rows)
    if sentence := snapshot_rates(figures.boots):
        console.print(sentence)


def snapshot_rates(boots: Row) -> str:
    """Return how fast boots read the snapshot; empty if none of them did."""
    if not boots["reads"]:
        return ""
    boots_read = plural(boots["reads"], "boot")
    sentence = f"The snapshot was read and hashed at {digits(boots['read_rate'])} GB/s, the median of {boots_read}"
    disk = f"; {digits(boots['disk_rate'])} GB/s in the {boots['disk_reads']} that had most of it from the disk"
    return sentence + (disk if boots["disk_reads"] else "") + "."


def _batches(figures: Figures, _: str, __: str, console: Console) -> None:
    if not figures.batches:
        return
    first = figures.batches[0]["seconds"][1]
    rows = (
        [
            f"about {row['batch']:.0f}", count(row["requests"]), *(seconds(each) for each in row["seconds"]),
            f"{row['seconds'][1] / first:.2f}", usd(_million(row["usd"], row["tokens"])),
        ]
        for row in figures.batches
    )  # fmt: skip
    columns = ("requests in a step", "requests", "p5", "p50", "p95", "to the first", "$ 1M out")
    _table(console, "What an output token cost, by batch size (GPU time)", columns, rows)


def _dearest(figures: Figures, _: str, __: str, console: Console) -> None:
    rows = (
        [
            row["job_id"], row["time"], f"{row['input_tokens']:,} + {row['cached_tokens']:,}",
            count(row["output_tokens"]), digits(row["mean_batch"]),
            exact(row["gpu_seconds"]), exact(row["loaded_gpu_seconds"]), usd(row["usd"]),
        ]
        for row in figures.dearest
    )  # fmt: skip
    columns = ("job", "ended", "input + cached", "output", "batch", "GPU-s", "loaded", "dollars")
    _table(console, "The dearest requests", columns, rows)


def _api(figures: Figures, _: str, __: str, console: Console) -> None:
    if not figures.api:
        return
    rows = (
        [
            each.rate.name, digits(each.rate.input), digits(each.rate.output), usd(each.usd), usd(each.own_usd),
            digits(each.requests_per_second), "–" if each.utilisation is None else f"{each.utilisation:.0%}",
        ]
        for each in figures.api
    )  # fmt: skip
    columns = ("API", "$ 1M in", "$ 1M out", "this traffic", "own, loaded", "break-even req/s", "of a worker")
    _table(console, "The same traffic at API rates", columns, rows)
    console.print(
        "Above 100% of a worker: at the batches seen here, own GPUs are dearer however busy they are.\n", style="dim"
    )


def _invoice(figures: Figures, console: Console) -> None:
    invoice = figures.invoice
    line = f"Worker-seconds: {invoice.seconds:,.1f}, rounded up by worker {invoice.rounded:,.0f} ({usd(invoice.usd)})"
    if invoice.billed is not None:
        off = "" if invoice.off is None else f", {invoice.off:+.1%}"
        line += f"; billed: {invoice.billed:,.0f}{off}"
    console.print(line)
    if figures.joules is not None:
        of_requests = "" if figures.request_joules is None else f", {digits(figures.request_joules)} J for requests"
        console.print(f"Energy, as the GPUs report it, since ready: {digits(figures.joules)} J{of_requests}")
