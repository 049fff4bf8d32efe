"""A trace: when requests came and how many tokens they had, as JSON lines, one request each.

Three formats are told apart by the fields of their first line: coldsnap's own (`time` in seconds,
`prompt_tokens`, `output_tokens`), a worker's ledger, and Mooncake's public one (`timestamp` in milliseconds,
`input_length`, `output_length`). Other fields are not looked at; gzip is recognised.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from coldsnap.errors import TraceError
from coldsnap.foundation.plural import plural

_GZIP = b"\x1f\x8b"
_MOST_TIME = 1e13
_MOST_TOKENS = 10_000_000
"""What is above is a slip, and would be simulated or sent for ever."""
_SHOWN = 60
"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it came, in seconds after the first one, and its tokens, each at least 1."""

    time: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Format:
    time: str
    prompt: str
    output: str
    seconds: float
    """What one unit of `time` is."""


_OWN = _Format("time", "prompt_tokens", "output_tokens", 1.0)
_MOONCAKE = _Format("timestamp", "input_length", "output_length", 1e-3)
_Line = tuple[str, Mapping[str, Any]]
"""Where a line is, and the object in it."""


def read(place: str | Path, note: Callable[[str], None] | None = None) -> Iterator[Arrival]:
    """Yield the requests in the order of their arrival, a trace as it is read, a ledger once it was read whole.

    A request of a ledger came `duration_seconds` before its record was written. Those that never got to tokens of
    both kinds, refused or cancelled, are left out, and `note` is told how many. Raises `TraceError`, which names
    the file, the line and the field.
    """
    lines = _lines(Path(place))
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{place}: the trace is empty; expected a JSON object with a request on every line")
    where, fields = first
    rest = _again(first, lines)
    if "record" in fields:
        yield from _ledger(str(place), rest, note)
        return
    columns = max((_OWN, _MOONCAKE), key=lambda each: sum(name in fields for name in (each.time, each.prompt)))
    if columns.time not in fields and columns.prompt not in fields:
        raise TraceError(
            f"{where}: expected {_named(_OWN)}, or {_named(_MOONCAKE)}, or the records of a ledger; "
            f"found {', '.join(map(repr, fields)) or 'no fields'}"
        )
    begin: float | None = None
    before = -math.inf
    for where, fields in rest:
        time = _number(where, fields, columns.time) * columns.seconds
        if time < before:
            raise TraceError(
                f"{where}: {columns.time}: {fields[columns.time]} is earlier than on the line before; "
                "sort the trace by its time"
            )
        begin = time if begin is None else begin
        before = time
        yield Arrival(time - begin, _tokens(where, fields, columns.prompt), _tokens(where, fields, columns.output))


def _ledger(place: str, lines: Iterable[_Line], note: Callable[[str], None] | None) -> Iterator[Arrival]:
    arrivals: list[Arrival] = []
    left_out = 0
    for where, fields in lines:
        kind = fields.get("record")
        if kind != "request":
            if kind not in {"cold_start", "worker"}:
                raise TraceError(
                    f"{where}: record: expected cold_start, request or worker, found {_said(fields, 'record')}"
                )
            continue
        ended = _moment(where, fields)
        arrived = ended - _number(where, fields, "duration_seconds")
        tokens = [_tokens(where, fields, name, least=0) for name in ("prompt_tokens", "completion_tokens")]
        if all(tokens):
            arrivals.append(Arrival(arrived, *tokens))
        else:
            left_out += 1
    if not arrivals:
        besides = f", {left_out} without tokens" if left_out else ""
        raise TraceError(f"{place}: no request in this ledger could be replayed{besides}; expected records of requests")
    if left_out and note is not None:
        note(f"{place}: {plural(left_out, 'request')} without tokens left out")
    arrivals.sort(key=lambda each: each.time)
    for each in arrivals:
        yield Arrival(each.time - arrivals[0].time, each.prompt_tokens, each.output_tokens)


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the object of every line that is not empty."""
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if packed else raw, start=1):
                if not (text := line.strip()):
                    continue
                where = f"{path}, line {number}"
                try:
                    fields = orjson.loads(text)
                except orjson.JSONDecodeError as error:
                    raise TraceError(f"{where}: expected a JSON object, found no JSON: {error}") from error
                if not isinstance(fields, dict):
                    raise TraceError(f"{where}: expected a JSON object, found {text.decode()[:_SHOWN]}")
                yield where, fields
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}, line {number + 1}: the compressed file breaks off here") from error
    except OSError as error:
        raise TraceError(f"{path}: the trace cannot be read ({error.strerror or error})") from error


def _again(first: _Line, rest: Iterator[_Line]) -> Iterator[_Line]:
    yield first
    yield from rest


def _number(where: str, fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TIME:
        raise TraceError(
            f"{where}: {name}: expected a number of at least 0{_most(value, _MOST_TIME)}, found {_said(fields, name)}"
        )
    return float(value)


def _tokens(where: str, fields: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= _MOST_TOKENS:
        expectation = f"a whole number of at least {least}{_most(value, _MOST_TOKENS)}"
        raise TraceError(f"{where}: {name}: expected {expectation}, found {_said(fields, name)}")
    return value


def _most(value: Any, most: float) -> str:
    return f" and at most {most:,.0f}" if isinstance(value, int | float) and value > most else ""


def _moment(where: str, fields: Mapping[str, Any]) -> float:
    try:
        moment = datetime.fromisoformat(fields["time"])
        if moment.tzinfo is None:
            raise ValueError  # noqa: TRY301 -- the same sentence
    except (KeyError, TypeError, ValueError) as error:
        text = _said(fields, "time")
        raise TraceError(f"{where}: time: expected a time of ISO 8601 with its zone, found {text}") from error
    return moment.timestamp()


def _said(fields: Mapping[str, Any], name: str) -> str:
    return f"{fields[name]!r:.{_SHOWN}}" if name in fields else "no such field"


def _named(format_: _Format) -> str:
    unit = "seconds" if format_.seconds == 1 else "milliseconds"
    return f"{format_.time} ({unit}), {format_.prompt} and {format_.output}"
