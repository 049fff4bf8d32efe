"""The border to the inference engine: what goes in, what comes out, and nothing of vLLM or the SDK.

Everything that crosses is plain data of ours, so that the engine's front end may live in this process
(`vllm.engine.VllmEngine`) or, one day, in another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

_SETTLE_SECONDS = 1.5
"""How long a job's record waits for the engine; what it misses is overhead."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step of the engine can hold, and what all requests together can."""

    max_num_seqs: int
    """Requests in a step."""
    max_num_batched_tokens: int
    """Tokens computed in a step."""
    kv_cache_tokens: int | None
    """Tokens whose keys and values fit, None if the engine does not say."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is being served, and on what."""

    version: str
    """vLLM's version."""
    gpu: str
    """The accelerator's name as the platform reports it, or the processor's on a CPU."""
    gpu_count: int
    """GPUs that one second of this worker occupies; 1 on a CPU."""
    models: tuple[str, ...]
    """Names that a request may ask for; the first is the default."""
    max_model_len: int
    """Tokens of context: prompt and completion together."""
    weights_digest: str | None = None
    """Digest of the snapshot, if one was verified."""
    limits: Limits | None = None
    start_method: Literal["fork", "spawn"] | None = None
    """How the engine's process was started, `fork` or `spawn`, if it has one."""


@dataclass(slots=True)
class Meter:
    """What the engine notes of one job while it runs. Readable at any time, also after a cancel.

    Times are seconds of the monotonic clock (`time.monotonic`); 0.0 means not yet.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float = 0.0
    asked: float = 0.0
    """When the engine was first asked for something."""
    begun: bool = False
    """Whether the engine has begun with it: until then it waits in the engine's queue."""
    first_token: float = 0.0
    last_token: float = 0.0
    gpu_seconds: float = 0.0
    """The job's share of the engine's steps; one GPU's, however many the engine has."""
    prefill_seconds: float = 0.0
    """The part of `gpu_seconds` that went into the prompt; the rest is decoding."""
    steps: int = 0
    batch: int = 0
    """Engine steps that the job's requests were in, and how many requests were in each, summed."""
    joules: float | None = None
    """The job's share of the GPUs' energy, None where they report none."""
    estimated: bool = False
    """Whether some of it is an equal split by time, or some step's report was lost."""
    calls: list[asyncio.Future[None]] = field(default_factory=list)
    """A future for each call of the engine, done once the call is accounted for."""
    final: bool = False
    """Whether the job's record has been written: seconds that come later are overhead."""
    open: int = 0
    """Completions that the engine is at: `n`, times the prompts of a batched request."""
    sequences: int = 0
    """Completions started: `n`, times the prompts of a batched request."""
    finish_reason: str | None = None
    warnings: list[str] = field(default_factory=list)
    """What was done other than the job asked, in sentences."""

    async def settle(self) -> None:
        """Make the meter final once the engine has let go of what was aborted: a step or two."""
        try:
            if calls := [call for call in self.calls if not call.done()]:
                await asyncio.wait(calls, timeout=_SETTLE_SECONDS)
        finally:
            self.final = True


@dataclass(frozen=True, slots=True)
class Generation:
    """One native request. Exactly one of `prompt` and `messages` is set."""

    id: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """vLLM's `SamplingParams` by name; the engine checks names, types and ranges."""
    template: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template, such as `enable_thinking`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one completion since its last delta; whole characters only."""

    text: str
    index: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request to the engine's own HTTP application."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """The application's answer. `chunks` ends when the body does; leaving early aborts the request."""

    status: int
    content_type: str
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Fit:
    """How long a step takes, as the engine's ledger has learnt it: T = a + b*prefill + c*decode + d*attention.

    Seconds per step, per prefill token, per decode token, per position read. `residual` is the root mean square
    of (predicted - measured)/measured over the remembered steps, None before any.
    """

    a: float
    b: float
    c: float
    d: float
    residual: float | None
    steps: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What the engine's steps have cost since its boot, in seconds of the engine, not yet times its GPUs."""

    busy: float = 0.0
    """Requests' shares."""
    overhead: Mapping[str, float] = field(default_factory=dict)
    """By cause."""
    steps: int = 0
    lost_steps: int = 0
    metering: float = 0.0
    """What the metering itself took, inside the steps."""
    fit: Fit | None = None
    joules: float | None = None
    """What the GPUs report to have used since the engine's boot, None where they report nothing."""
    request_joules: float | None = None
    """The part of `joules` that was charged to requests."""
    estimated: str | None = None
    """Why some shares are an equal split by time instead of measured steps, if some are."""

    @property
    def spent(self) -> float:
        """Seconds in which the engine ran."""
        return self.busy + sum(self.overhead.values())


class Engine(Protocol):
    """A booted engine. Every method raises only errors of `coldsnap.errors`."""

    info: EngineInfo

    def generate(self, request: Generation, meter: Meter) -> AsyncGenerator[Delta, None]:
        """Yield deltas until every completion has finished. Closing the generator aborts the request."""

    def http(self, request: HttpRequest, meter: Meter) -> AbstractAsyncContextManager[HttpResponse]:
        """Call the engine's OpenAI-compatible application in-process."""

    async def warm_up(self) -> None:
        """Take the first-request costs (lazy imports, tokenizer, one engine step) before a user does."""

    def usage(self) -> Usage:
        """Return what the engine's steps have cost since its boot."""

    def check(self) -> None:
        """Raise `EngineDead` if the engine's process is known to be gone, `EngineStalled` if it makes no steps."""

    def close(self) -> None:
        """Stop the engine and its processes."""
