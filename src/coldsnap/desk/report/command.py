"""`coldsnap report`: its options, checked, and the way from a ledger to the report."""

from __future__ import annotations

import argparse
import errno
import os
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console

from coldsnap.desk.report import api, figures, page, source, store, terminal
from coldsnap.errors import ReportError

_SPAN = re.compile(r"(\d+(?:\.\d+)?)([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_WIDE = 150
"""Columns where the terminal does not say how many it has, as in a pipe."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("place", metavar="PATH|s3://…", help="a ledger.jsonl, a folder of them, or an upload's place")
    parser.add_argument("--html", metavar="FILE", help="write the page with its plots there")
    parser.add_argument("--since", metavar="WHEN", help="leave out what came before: 2026-11-21, or 7d, 12h, 30m ago")
    parser.add_argument("--by", default="model", metavar="|".join(figures.BY), help="how requests are grouped")
    parser.add_argument(
        "--loaded", default=store.LOADED[0], metavar="|".join(store.LOADED),
        help="how cold start, overhead, idle and drain are spread over an endpoint's requests",
    )  # fmt: skip
    parser.add_argument("--api-prices", metavar="FILE", help="price the same traffic at these rates (YAML)")
    parser.add_argument("--billed-seconds", metavar="N", help="worker-seconds on the invoice, to compare with")


def run(options: argparse.Namespace) -> int:
    """Read, compute, show."""
    _one_of("--by", options.by, tuple(figures.BY))
    _one_of("--loaded", options.loaded, store.LOADED)
    since = None if options.since is None else when(options.since, datetime.now(UTC))
    billed = None if options.billed_seconds is None else _seconds(options.billed_seconds)
    rates = None if options.api_prices is None else api.read(Path(options.api_prices))
    if options.html is not None:
        _check_writable(Path(options.html))
    console = _Console()
    if not console.is_terminal:
        console = _Console(width=_WIDE)
    with tempfile.TemporaryDirectory(prefix="coldsnap-report-") as folder:
        intake = source.read(options.place, Path(folder))
        with store.load(intake.lines, since=since, loaded=options.loaded) as database:
            results = figures.gather(database, options.by, rates, billed)
    if not results.about["workers"]:
        raise ReportError(f"--since {options.since}: {options.place} has no record since then")
    terminal.show(results, intake, options.by, options.loaded, console)
    if options.html is not None:
        choices = page.Choices(options.by, options.loaded, since, rates)
        _write(Path(options.html), page.render(results, intake, choices))
        console.print(f"The page with its plots: {options.html}")
    return 0


def when(text: str, now: datetime) -> datetime:
    """Return the moment that `--since` means: a date or time of ISO 8601, UTC unless it says so, or a span ago."""
    if span := _SPAN.fullmatch(text):
        try:
            return now - timedelta(**{_UNITS[span[2]]: float(span[1])})
        except OverflowError as error:
            raise ReportError(f"--since: {text} is further back than there are dates") from error
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ReportError(
            f"--since: expected a date (2026-11-21), a time (2026-11-21T08:30) or a span (7d, 12h, 30m), found {text!r}"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _one_of(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ReportError(f"{option}: expected one of {', '.join(choices)}, found {given!r}")


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ReportError(f"--billed-seconds: expected the invoice's worker-seconds, 0 or more, found {text!r}")
    return number


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `cli.main`: rich would exit with 1."""
        raise  # noqa: PLE0704 -- it is called where the error is being handled


def _check_writable(path: Path) -> None:
    """Raise before the work rather than after it."""
    if path.is_dir():
        raise ReportError(f"--html: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ReportError(f"--html: {path} cannot be written (there is no folder {path.parent})")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ReportError(f"--html: {path} cannot be written ({os.strerror(errno.EACCES)})")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--html: {path} cannot be written ({error.strerror})") from error
