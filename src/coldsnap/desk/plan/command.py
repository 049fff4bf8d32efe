"""`coldsnap plan`: its options, checked, and the way from a trace and a ledger to settings."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import orjson
from rich.console import Console

from coldsnap.desk import trace
from coldsnap.desk.plan import calibration, page, terminal, words
from coldsnap.desk.plan.calibration import Calibration
from coldsnap.desk.plan.frontier import Plan, Ranges, search
from coldsnap.desk.plan.simulation import Choice, Traffic
from coldsnap.desk.report import source
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.errors import PlanError
from coldsnap.settings import ROOT

T = TypeVar("T", int, float)

_DEFAULTS = Scaling(0, 3, 5.0, "queue-delay", 4.0)
"""An endpoint's, as the platform makes it."""
_CONCURRENCY = 128
"""MAX_CONCURRENCY's default, for ledgers that do not say it."""
_RULES = ("queue-delay", "request-count")
_TIME = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m)?")
_UNITS = {"ms": 1e-3, "s": 1.0, None: 1.0, "m": 60.0}
_WIDE = 160
"""Columns where the terminal does not say how many it has, as in a pipe."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `cli.main`: rich would exit with 1."""
        raise  # noqa: PLE0704 -- it is called where the error is being handled


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("trace", metavar="TRACE", help="JSON lines of time, prompt_tokens, output_tokens; or a ledger")
    parser.add_argument(
        "--ledger", metavar="PATH|s3://…", help="what the endpoint's workers wrote (default: .coldsnap in the clone)"
    )
    parser.add_argument("--model", help="whose requests in the ledger count")
    parser.add_argument("--endpoint", metavar="ID", help="whose records in the ledger count")
    parser.add_argument("--ttft-p95", metavar="TIME", help="what 95%% of first tokens must not exceed: 2s, 500ms")
    parser.add_argument("--active", metavar="N,…", help="active workers to try")
    parser.add_argument("--max-workers", metavar="N,…", help="most workers to try (default: 1,2,3,5,10)")
    parser.add_argument("--idle-timeout", metavar="S,…", help="idle timeouts to try (default: 1,5,15,60,300)")
    parser.add_argument("--concurrency", metavar="N,…", help="MAX_CONCURRENCY to try (default: 8,32,128)")
    parser.add_argument("--scaler", default="queue-delay", metavar="|".join(_RULES), help="when workers are added")
    parser.add_argument("--scaler-value", metavar="X", help="seconds in the queue, or requests a worker (default: 4)")
    parser.add_argument(
        "--current", metavar="ACTIVE,MAX,IDLE", help="the endpoint's settings, to compare with (default: 0,3,5)"
    )
    parser.add_argument(
        "--flex-price", metavar="USD", help="a second of one GPU (default: the platform's, or the ledger's)"
    )
    parser.add_argument(
        "--active-price",
        metavar="USD",
        help="the same for active workers (default: as flex; the platform publishes none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the cold starts (default: 0)")
    parser.add_argument("--html", metavar="FILE", help="write the page with its plot there")
    parser.add_argument("--json", metavar="FILE", help="write every setting's figures there")


def run(options: argparse.Namespace) -> int:
    """Read, calibrate, simulate, show."""
    target = None if options.ttft_p95 is None else seconds("--ttft-p95", options.ttft_p95)
    ranges = _ranges(options)
    flex = None if options.flex_price is None else _number("--flex-price", options.flex_price)
    active = None if options.active_price is None else _number("--active-price", options.active_price)
    scaling = _current(options)
    for option, path in (("--html", options.html), ("--json", options.json)):
        if path is not None:
            _writable(option, Path(path))
    place = options.ledger or _ledger()
    traffic = Traffic.of(trace.read(options.trace, _note))
    with tempfile.TemporaryDirectory(prefix="coldsnap-plan-") as folder:
        intake = source.read(place, Path(folder))
        try:
            measured = calibration.read(
                intake.lines, model=options.model, endpoint=options.endpoint, flex=flex, active=active
            )
        except PlanError as error:
            raise PlanError(f"{place}: {error.message}") from error
    current = Choice(scaling, measured.concurrency or _CONCURRENCY)
    name = "defaults" if options.current is None else "now"
    inputs = words.Inputs(options.trace, place, traffic, current, name, options.seed)
    console = _Console()
    if not console.is_terminal:
        console = _Console(width=_WIDE)
    with console.status("simulating"):
        plan = search(traffic, measured, current, ranges, target=target, seed=options.seed)
    terminal.show(plan, measured, inputs, console)
    if options.html is not None:
        _write("--html", Path(options.html), page.render(plan, measured, inputs).encode())
        console.print(f"The page with its plot: {options.html}")
    if options.json is not None:
        _write("--json", Path(options.json), orjson.dumps(figures(plan, measured, inputs), option=orjson.OPT_INDENT_2))
    if target is not None and plan.recommended is None:
        raise PlanError(words.unreachable(plan))
    return 0


def figures(plan: Plan, calibration: Calibration, inputs: words.Inputs) -> dict[str, Any]:
    """Return what `--json` writes. Times are seconds."""
    return {
        "trace": {"file": inputs.trace, "requests": len(inputs.traffic.times), "seconds": plan.seconds},
        "worker": dataclasses.asdict(calibration),
        "scaler": {"rule": inputs.current.scaling.rule, "value": inputs.current.scaling.value},
        "seed": inputs.seed,
        "target_ttft95": plan.target,
        "recommended": None if plan.recommended is None else dataclasses.asdict(plan.recommended),
        "current": dataclasses.asdict(plan.current),
        "frontier": [dataclasses.asdict(point) for point in plan.frontier],
        "points": [dataclasses.asdict(point) for point in plan.points],
    }


def seconds(option: str, text: str) -> float:
    """Return the seconds that `2s`, `500ms`, `1m` or `2` mean, above 0."""
    match = _TIME.fullmatch(text)
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < value < math.inf:
        raise PlanError(f"{option}: expected a time above 0 as 2s, 500ms or 1m, found {text!r}")
    return value


def _ranges(options: argparse.Namespace) -> Ranges:
    values: dict[str, Any] = {}
    for field, option, least in (
        ("active", "--active", 0), ("most", "--max-workers", 1), ("concurrency", "--concurrency", 1)
    ):  # fmt: skip
        text = getattr(options, option.removeprefix("--").replace("-", "_"))
        if text is not None:
            values[field] = tuple(_whole(option, each, least) for each in text.split(","))
    if options.idle_timeout is not None:
        values["idle"] = tuple(_number("--idle-timeout", each) for each in options.idle_timeout.split(","))
    ranges = Ranges(**values)
    if ranges.active and max(ranges.active) > max(ranges.most):
        raise PlanError(f"--active {options.active}: more than --max-workers, {max(ranges.most)} at most")
    return ranges


def _current(options: argparse.Namespace) -> Scaling:
    if options.scaler not in _RULES:
        raise PlanError(f"--scaler: expected one of {', '.join(_RULES)}, found {options.scaler!r}")
    value = 4.0 if options.scaler_value is None else _number("--scaler-value", options.scaler_value)
    if options.scaler == "request-count" and not value > 0:
        raise PlanError("--scaler-value: expected requests for each worker, above 0, found 0")
    scaling = dataclasses.replace(_DEFAULTS, rule=options.scaler, value=value)
    if options.current is None:
        return scaling
    parts = options.current.split(",")
    if len(parts) != 3:  # noqa: PLR2004 -- as the metavar says
        raise PlanError(f"--current: expected ACTIVE,MAX,IDLE as 0,3,5, found {options.current!r}")
    least, most = _whole("--current", parts[0], 0), _whole("--current", parts[1], 1)
    if most < least:
        raise PlanError(f"--current {options.current}: {most} workers at most are fewer than {least} active ones")
    return dataclasses.replace(scaling, least=least, most=most, idle_timeout=_number("--current", parts[2]))


def _ledger() -> str:
    folder = ROOT / ".coldsnap"
    if not any(folder.glob("**/*.jsonl*")):
        raise PlanError(
            f"--ledger is not given and {folder} has no ledger; name what the endpoint's workers wrote, or run "
            "`coldsnap serve` and `coldsnap bench` against it to have one"
        )
    return str(folder)


def _whole(option: str, text: str, least: int) -> int:
    return _parsed(option, text, int, lambda value: value >= least, f"whole numbers of at least {least}")


def _number(option: str, text: str) -> float:
    return _parsed(option, text, float, lambda value: 0 <= value < math.inf, "numbers of at least 0")


def _parsed(option: str, text: str, kind: Callable[[str], T], right: Callable[[T], bool], expected: str) -> T:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not right(value):
        raise PlanError(f"{option}: expected {expected}, found {text!r}")
    return value


def _writable(option: str, path: Path) -> None:
    """Find out before anything is computed whether a file can be written there."""
    folder = path.absolute().parent
    if path.is_dir():
        raise PlanError(f"{option}: expected a file, {path} is a folder")
    if not folder.is_dir():
        raise PlanError(f"{option}: {path} cannot be written: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PlanError(f"{option}: {path} cannot be written: permission denied")


def _write(option: str, path: Path, text: bytes) -> None:
    try:
        path.write_bytes(text)
    except OSError as error:
        raise PlanError(f"{option}: {path} cannot be written ({error.strerror})") from error


def _note(text: str) -> None:
    print(f"coldsnap: {text}", file=sys.stderr)  # noqa: T201
