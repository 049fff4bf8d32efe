"""What a worker leaves behind: one JSON line per boot and per request, on stdout and in ledger.jsonl.

Prompts and completions are never recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

LEDGER = "ledger.jsonl"


def _now() -> datetime:
    return datetime.now(UTC)


class Record(BaseModel):
    """What every record says. Times are UTC, durations seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    time: AwareDatetime = Field(default_factory=_now)
    worker_id: str
    endpoint_id: str
    gpu: str
    gpu_count: int
    snapshot_digest: str | None
    vllm: str


class ColdStart(Record):
    """One boot: `phases` add up to `seconds`, process start to ready. `beside` ran beside them."""

    record: Literal["cold_start"] = "cold_start"
    boot: Literal["fresh"] = "fresh"
    seconds: float
    phases: dict[str, float]
    beside: dict[str, float]
    snapshot_bytes: int | None
    model: str


class Request(Record):
    """One job, however it ended.

    `ttft_seconds` runs from the job's arrival in this worker to its first token out of the engine, and is
    null if there was none. `itl_seconds` is the mean time between tokens of a completion, null below two.
    `gpu_seconds` is the job's equal share of the engine's busy time, times `gpu_count`.
    """

    record: Literal["request"] = "request"
    job_id: str
    route: str
    model: str
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    ttft_seconds: float | None
    itl_seconds: float | None
    duration_seconds: float
    finish_reason: str | None
    error: str | None = None
    gpu_seconds: float


class Sink:
    """Writes records. A ledger that cannot be written is said once and counted; the worker serves on."""

    def __init__(self, folder: Path, echo: Callable[[str], None]) -> None:
        self._path = folder / LEDGER
        self._echo = echo
        self.unwritten = 0

    def write(self, record: Record) -> None:
        """Append `record` to the ledger and echo its line."""
        line = orjson.dumps(record.model_dump(mode="json")).decode()
        self._echo(line)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode() + b"\n")
        except OSError as error:
            if not self.unwritten:
                print(  # noqa: T201
                    f"coldsnap: COLDSNAP_LEDGER_DIR: {self._path} cannot be written ({error.strerror}); "
                    "records go to stdout only",
                    file=sys.stderr,
                    flush=True,
                )
            self.unwritten += 1
