"""What a worker leaves behind: JSON lines per boot, request and worker, on stdout and in ledger.jsonl.

Prompts and completions are never recorded. `python -m coldsnap.records.schema` prints the JSON Schema of a line.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from coldsnap.caches.boot_caches import State
from coldsnap.engine import EngineInfo, Fit, Limits
from coldsnap.settings import Settings
from coldsnap.snapshot.sources import Kind

LEDGER = "ledger.jsonl"

Boot = Literal["fresh", "revived", "warm"]


def _now() -> datetime:
    return datetime.now(UTC)


class Record(BaseModel):
    """What every record says. Times are UTC, durations seconds.

    `monotonic` is the worker's monotonic clock: it orders the records of one boot, whatever happens to the
    time of day. GPU-seconds are seconds times `gpu_count`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    time: AwareDatetime = Field(default_factory=_now)
    monotonic: float = Field(default_factory=lambda: round(time.monotonic(), 6))
    worker_id: str
    endpoint_id: str
    gpu: str
    gpu_count: int
    snapshot_digest: str | None
    vllm: str


class ColdStart(Record):
    """One boot: `phases` add up to `seconds`, process start to ready. `beside` ran beside them.

    `source` is where the model was found; `verified` that every file's BLAKE3 digest was compared with a manifest.
    `fetched_bytes` came over the network at `fetch_gb_per_second` (1e9 bytes); null where vLLM downloads itself.
    `read_gb_per_second` is how fast all of `snapshot_bytes` were read and hashed, `disk_read_bytes` what of it the disk
    had to deliver: the rest was in the page cache. Null where nothing was read again (fetched, or unverified).
    `limits` are the engine's, `max_concurrency` is how many jobs the worker takes at once: `coldsnap plan` needs them.
    `cache` is what became of the compile caches' bundle (`cache_bundle` is its fingerprint, `cache_bytes` its size):
    found, missing, `refused` because it is damaged or another's, `late`, `failed` or not asked for; `cache_because`.
    A `revived` worker went through none: its process was frozen, suspended or restored (`revival`) and was away
    for `away_seconds`, which its books leave out.
    """

    record: Literal["cold_start"] = "cold_start"
    boot: Boot = "fresh"
    revival: Literal["frozen", "suspended", "restored"] | None = None
    away_seconds: float = 0.0
    seconds: float
    phases: dict[str, float]
    beside: dict[str, float]
    snapshot_bytes: int | None
    source: Kind
    verified: bool
    fetched_bytes: int | None
    fetch_gb_per_second: float | None
    read_gb_per_second: float | None = None
    disk_read_bytes: int | None = None
    cache: State = "off"
    cache_because: str | None = None
    cache_bundle: str | None = None
    cache_bytes: int | None = None
    model: str
    limits: Limits | None = None
    max_concurrency: int | None = None


class Request(Record):
    """One job, however it ended.

    `ttft_seconds` runs from the job's arrival in this worker to its first token out of the engine, and is
    null if there was none. `itl_seconds` is the mean time between tokens of a completion, null below two.
    `gpu_seconds` is the job's share of the engine's steps, its marginal cost: an aborted job pays until the
    engine has let go of it. `mean_batch` is how many requests shared a step of the engine with it, itself
    included, as the mean over its steps; null if none was seen. `estimated` if the share is an equal split by
    time, or a step's report was lost. `fit` is the model of a step that the shares go by.
    `joules` is the job's share of the energy that the GPUs report, by its seconds; null where they report none.
    """

    record: Literal["request"] = "request"
    job_id: str
    boot: Boot = "warm"
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
    prefill_gpu_seconds: float
    decode_gpu_seconds: float
    mean_batch: float | None
    joules: float | None
    usd: float | None
    price_per_second: float | None
    estimated: bool
    fit: Fit | None


class Worker(Record):
    """A worker's running totals since its process started; the `final` one is written when it ends.

    `gpu_seconds` is the sum of the five below it: up to ready, requests' shares, what the engine ran for
    nobody (by cause), waiting for jobs, and waiting after SIGTERM. `billed_seconds` is the worker's life
    rounded up; `usd` its price: an estimate. `joules` is what the GPUs report since ready, `request_joules` what of
    it was requests'; null where they report none. `metering_seconds`, inside the engine's steps, went into
    measuring them. `unwritten_records` reached stdout but no disk. `unsent_records` of this worker wait on disk
    for the bucket after `failed_uploads`, null without `LEDGER_S3_URI`.
    """

    record: Literal["worker"] = "worker"
    final: bool
    gpu_seconds: float
    cold_gpu_seconds: float
    busy_gpu_seconds: float
    overhead_gpu_seconds: float
    idle_gpu_seconds: float
    drain_gpu_seconds: float
    overhead_causes: dict[str, float]
    joules: float | None
    request_joules: float | None
    billed_seconds: int
    usd: float | None
    price_per_second: float | None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    lost_steps: int
    metering_seconds: float
    unwritten_records: int
    unsent_records: int | None
    failed_uploads: int
    estimated: bool
    estimated_because: str | None
    fit: Fit | None


Line = Annotated[ColdStart | Request | Worker, Field(discriminator="record")]


def origin(settings: Settings, info: EngineInfo) -> dict[str, Any]:
    """Return the fields that say which worker a record is from."""
    return {
        "worker_id": settings.worker_id,
        "endpoint_id": settings.endpoint_id,
        "gpu": info.gpu,
        "gpu_count": info.gpu_count,
        "snapshot_digest": info.weights_digest,
        "vllm": info.version,
    }


def stamps() -> dict[str, Any]:
    """Return the fields that say when a record was written."""
    return {"time": _now(), "monotonic": round(time.monotonic(), 6)}


def schema() -> str:
    """Return the JSON Schema of a line of the ledger."""
    found = TypeAdapter(Line).json_schema(mode="serialization")
    return orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


@dataclass(slots=True)
class Tally:
    """Totals of the request records written, and what became of all records."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unwritten: int = 0
    """Records that the ledger's disk did not take."""
    unsent: int | None = None
    """Records that wait for a bucket after an upload that failed, None if there is no bucket."""
    failed_uploads: int = 0

    def add(self, record: Request) -> None:
        """Count one."""
        self.requests += 1
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.completion_tokens += record.completion_tokens


class Sink:
    """Writes records. A ledger that cannot be written is said once and counted; the worker serves on."""

    def __init__(self, folder: Path, echo: Callable[[str], None]) -> None:
        self._path = folder / LEDGER
        self._echo = echo
        self._turning = threading.Lock()
        self._torn = False
        self.lines = 0
        """Records in the file that is being written to."""
        self.tally = Tally()
        self.watchers: list[Callable[[Record], None]] = []
        """Called with every record, in the thread that writes it."""
        self._boot: Boot = "fresh"
        self.on_job: Callable[[], None] = lambda: None
        """Called as a job arrives: it may be what the worker was revived for."""

    def turn(self, path: Path) -> int:
        """Write into `path` from now on; return how many records the file until now has got.

        Once this has returned nothing is written to that file any more. May be called from any thread.
        """
        with self._turning:
            lines, self._path, self.lines, self._torn = self.lines, path, 0, False
        return lines

    def next_job(self) -> Boot:
        """Return how the worker came to a job that has just arrived."""
        self.on_job()
        boot, self._boot = self._boot, "warm"
        return boot

    def write(self, record: Record) -> None:
        """Append `record` to the ledger and echo its line."""
        if isinstance(record, Request):
            self.tally.add(record)
        elif isinstance(record, ColdStart):
            self._boot = record.boot
        for watcher in self.watchers:
            watcher(record)
        line = orjson.dumps(record.model_dump(mode="json"))
        self._echo(line.decode())
        with self._turning:
            try:
                self._append(line + b"\n")
            except OSError as error:
                if not self.tally.unwritten:
                    print(  # noqa: T201
                        f"coldsnap: COLDSNAP_LEDGER_DIR: {self._path} cannot be written ({error.strerror}); "
                        "records go to stdout only",
                        file=sys.stderr,
                        flush=True,
                    )
                self.tally.unwritten += 1
            else:
                self.lines += 1

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            if self._torn:  # a disk that was full took the beginning of a line: it must not spoil the next
                line = b"\n" + line
            written = file.write(line)
        self._torn = 0 < written < len(line)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    sys.stdout.write(schema())
