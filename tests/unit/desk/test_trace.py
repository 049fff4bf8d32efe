"""Traces: their formats, and what is said about one that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from coldsnap.desk.trace import Arrival, read
from coldsnap.errors import TraceError

OWN = {"time": 1.5, "prompt_tokens": 12, "output_tokens": 3}
MOONCAKE = {"timestamp": 2000, "input_length": 900, "output_length": 7, "hash_ids": [1, 2]}
REQUEST = {
    "record": "request",
    "time": "2026-11-21T08:00:10Z",
    "duration_seconds": 4.0,
    "prompt_tokens": 20,
    "completion_tokens": 8,
}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def test_a_trace_counts_its_times_from_the_first_request(tmp_path: Path) -> None:
    path = write(tmp_path, OWN, "", {**OWN, "time": 4, "model": "other fields are not looked at"})
    assert list(read(path)) == [Arrival(0.0, 12, 3), Arrival(2.5, 12, 3)]


def test_mooncakes_times_are_milliseconds(tmp_path: Path) -> None:
    path = write(tmp_path, MOONCAKE, {**MOONCAKE, "timestamp": 3500})
    assert list(read(path)) == [Arrival(0.0, 900, 7), Arrival(1.5, 900, 7)]


def test_a_trace_may_be_compressed(tmp_path: Path) -> None:
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(write(tmp_path, OWN).read_bytes()))
    assert list(read(str(packed))) == [Arrival(0.0, 12, 3)]
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(TraceError, match=r"trace\.jsonl\.gz, line \d: the compressed file breaks off here"):
        list(read(packed))


def test_requests_of_a_ledger_are_ordered_by_their_arrival_and_those_without_tokens_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"record": "cold_start"},
        REQUEST,
        {**REQUEST, "duration_seconds": 9.5, "prompt_tokens": 21},
        {**REQUEST, "completion_tokens": 0},
        {"record": "worker"},
    )
    notes: list[str] = []
    assert list(read(path, notes.append)) == [Arrival(0.0, 21, 8), Arrival(5.5, 20, 8)]
    assert notes == [f"{path}: 1 request without tokens left out"]


def test_what_is_read_before_a_wrong_line_is_yielded_before_its_error(tmp_path: Path) -> None:
    requests = read(write(tmp_path, OWN, "{"))
    assert next(requests) == Arrival(0.0, 12, 3)
    with pytest.raises(TraceError, match="line 2"):
        next(requests)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), ": the trace is empty; expected a JSON object with a request on every line"),
        ((OWN, "{"), ", line 2: expected a JSON object, found no JSON: "),
        (("[1]",), r", line 1: expected a JSON object, found \[1\]"),
        (({"a": 1},), r", line 1: expected time \(seconds\), .* or timestamp \(milliseconds\), .*; found 'a'"),
        (({},), ", line 1: .*; found no fields"),
        ((OWN, {"time": 2, "prompt_tokens": 1}), ", line 2: output_tokens: .* of at least 1, found no such field"),
        (({**OWN, "time": None},), ", line 1: time: expected a number of at least 0, found None"),
        (({**OWN, "time": 1e300},), ", line 1: time: expected .* and at most 10,000,000,000,000, found 1e"),
        (
            ({**OWN, "prompt_tokens": 10**12},),
            ", line 1: prompt_tokens: .* and at most 10,000,000, found 1000000000000",
        ),
        (({"prompt_tokens": 1, "output_tokens": 1},), ", line 1: time: .*, found no such field"),
        (({**OWN, "time": True},), ", line 1: time: expected a number of at least 0, found True"),
        (({**OWN, "time": -1},), ", line 1: time: expected a number of at least 0, found -1"),
        (({**OWN, "prompt_tokens": 1.5},), ", line 1: prompt_tokens: expected a whole number of at least 1, found 1.5"),
        (({**OWN, "output_tokens": 0},), ", line 1: output_tokens: expected a whole number of at least 1, found 0"),
        (({**OWN, "output_tokens": "3"},), ", line 1: output_tokens: expected a whole number of at least 1, found '3'"),
        ((OWN, {**OWN, "time": 1}), ", line 2: time: 1 is earlier than on the line before; sort the trace by its time"),
        ((MOONCAKE, {"timestamp": 2001}), ", line 2: input_length: .*, found no such field"),
        ((MOONCAKE, OWN), ", line 2: timestamp: expected a number of at least 0, found no such field"),
        (({"record": "worker"},), ": no request in this ledger could be replayed; expected records of requests"),
        (({**REQUEST, "completion_tokens": 0},), ": no request in this ledger could be replayed, 1 without tokens"),
        (({**REQUEST, "time": "2026-11-21T08:00:10"},), ", line 1: time: expected a time of ISO 8601 with its zone"),
        (({**REQUEST, "duration_seconds": None},), ", line 1: duration_seconds: expected a number .*, found None"),
        ((REQUEST, OWN), ", line 2: record: expected cold_start, request or worker, found no such field"),
    ],
)
def test_a_wrong_trace_is_an_error_that_names_the_line_and_the_field(
    tmp_path: Path, lines: tuple[Any, ...], message: str
) -> None:
    path = write(tmp_path, *lines) if lines else tmp_path / "trace.jsonl"
    path.touch()
    with pytest.raises(TraceError, match=f"^{path}{message}"):
        list(read(path))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="the trace cannot be read \\(No such file or directory\\)"):
        next(read(tmp_path / "none"))
