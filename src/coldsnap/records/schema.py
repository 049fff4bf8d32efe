"""The schema of what a worker writes down: a record per boot, per request and of the worker's running totals.

Prompts and completions are never recorded. `python -m coldsnap.records.schema` prints the JSON Schema of a line.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from coldsnap.cost.books import HEADINGS, Headings
from coldsnap.engine import EngineInfo, Fit, Limits
from coldsnap.settings import Settings

Boot = Literal["fresh", "revived", "warm"]
"""How the worker came to a job: just booted, back from a freeze, or neither."""
SourceKind = Literal["image", "volume", "platform-cache", "local", "s3", "hub"]
"""Where a boot found its model."""
CacheState = Literal["off", "hit", "miss", "refused", "late", "failed"]
"""What became of a boot's bundle of compile caches."""


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
    `start_method` is how the engine's process was started: `spawn` imports vLLM once more.
    `limits` are the engine's, `max_concurrency` is how many jobs the worker takes at once: `coldsnap plan` needs them.
    `cache` is what became of the compile caches' bundle (`cache_bundle` is its fingerprint, `cache_bytes` its size):
    found, missing, `refused` because it is damaged or another's, `late`, `failed` or not asked for; `cache_because`.
    `degraded` names the patches of vLLM and the SDK that were left out, because the installed release is not one that
    they were tried with: all is served, slower, or by estimated costs.
    `image` is `restored` if the process came out of a process image with everything imported, else `image_because`
    says why that was not used, if one was tried.
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
    source: SourceKind
    verified: bool
    fetched_bytes: int | None
    fetch_gb_per_second: float | None
    read_gb_per_second: float | None = None
    disk_read_bytes: int | None = None
    cache: CacheState = "off"
    cache_because: str | None = None
    cache_bundle: str | None = None
    cache_bytes: int | None = None
    model: str
    start_method: Literal["fork", "spawn"] | None = None
    limits: Limits | None = None
    max_concurrency: int | None = None
    degraded: list[str] = Field(default_factory=list)
    image: Literal["restored", "plain"] = "plain"
    image_because: str | None = None


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

    def headings(self) -> Headings:
        """Return the GPU-seconds by heading."""
        return Headings(**{name: getattr(self, f"{name}_gpu_seconds") for name in HEADINGS})


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
    content = TypeAdapter(Line).json_schema(mode="serialization")
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


if __name__ == "__main__":
    sys.stdout.write(schema())
