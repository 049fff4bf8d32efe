"""A fake engine that keeps time: what a GPU does to an endpoint, without one. Its steps last, and compute nothing.

A step takes a + b*prefill + c*decode + d*attention seconds in which no processor works, so that several workers on
one machine do not slow each other. Requests are batched as vLLM's scheduler does it: those that run first, then those
that wait, within `max_num_seqs` and `max_num_batched_tokens`, a long prompt in parts. What is not fake: the steps are
metered by `step_meter` and charged by the ledger like vLLM's.

What it does not know: a tokenizer (a word is a token), sampling beyond `max_tokens`, OpenAI routes, a cache of keys and
values that gets full.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldsnap.boot import Booted
from coldsnap.cost.accounts import Accounts
from coldsnap.cost.shares import Ledger
from coldsnap.cost.step_meter import StepMeter
from coldsnap.cost.step_model import StepModel, attention
from coldsnap.engine import Delta, EngineInfo, Generation, HttpRequest, HttpResponse, Limits, Meter, Usage
from coldsnap.errors import InvalidInput, NotFound, SettingsError
from coldsnap.settings import Settings
from coldsnap.timeline import Timeline

VARIABLE = "TIMED_ENGINE"
"""Environment variable with a `Timing` as JSON; what it leaves out is as below."""
MODEL = "timed"
_CONTEXT = 32_768
_MAX_TOKENS = 16
_WEIGHTS, _PER_TOKEN = 16e9, 131_072.0
"""Bytes of the model and of a token's keys and values that the ledger's fit begins from: about an 8B's."""


class Timing(BaseModel):
    """How long things take, in seconds, and what fits. The defaults are about an 8B model's on a 48 GB GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: float = Field(0.020, gt=0)
    b: float = Field(0.00012, ge=0)
    c: float = Field(0.0003, ge=0)
    d: float = Field(0.0000002, ge=0)
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    noise: float = Field(0.0, ge=0)
    """How far steps are from that, as the standard deviation of a factor's logarithm."""
    boot: tuple[float, float] = (8.0, 12.0)
    """Least and most of a cold start, each time another in between."""
    gpu: str = "a clock"
    """What the records call the GPU."""

    def step(self, tokens: Iterable[tuple[int, int, int]]) -> float:
        """Return how long a step takes: (prefill, decode, positions so far) of each request in it."""
        seconds = self.a
        for prefill, decode, context in tokens:
            seconds += self.b * prefill + self.c * decode + self.d * attention(prefill + decode, context)
        return seconds


@dataclass(eq=False, slots=True)
class _Sequence:
    """A request in the engine. The first five are what `step_meter` looks at, by vLLM's names."""

    name: str
    num_prompt_tokens: int
    wanted: int
    """Tokens to make."""
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    made: int = 0
    begun: float = 0.0
    """When it was first in a step."""
    first: float = 0.0
    last: float = 0.0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.made


class _Core:
    """Scheduler and steps. A step begins when the one before it was due to end, however late this process wakes.

    That is also what the meter is told: a machine that is busy is not taken for a slow engine.
    """

    def __init__(self, timing: Timing, pipe: int, clock: Callable[[], float]) -> None:
        self._timing = timing
        self._clock = clock
        self._due = 0.0
        """When the latest step ends."""
        self._meter = StepMeter(pipe, lambda: self._due)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._requests: dict[str, _Sequence] = {}
        self._gone: list[str] = []
        """Names that left since the last step."""
        self._task: asyncio.Task[None] | None = None

    def get_num_unfinished_requests(self) -> int:
        """Return how many there are, as `step_meter` asks vLLM's scheduler."""
        return len(self._requests)

    def add(self, sequence: _Sequence) -> None:
        """Take a request; it joins when the step under way ends."""
        self._requests[sequence.name] = sequence
        self._waiting.append(sequence)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def remove(self, sequence: _Sequence) -> None:
        """Abort a request, if it is still there."""
        if self._requests.pop(sequence.name, None) is not None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            else:
                self._running.remove(sequence)
            self._gone.append(sequence.name)

    def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        self._due = self._clock()
        while self._requests:
            tokens = self._schedule(self._clock())
            output = self._note(tokens)
            seconds = self._timing.step(
                (max(0, min(new, each.num_prompt_tokens - each.num_computed_tokens + new)),
                 max(0, min(new, each.num_computed_tokens - each.num_prompt_tokens)), each.num_computed_tokens)
                for each, new in tokens.items()
            )  # fmt: skip
            self._due += seconds * random.lognormvariate(0.0, self._timing.noise)
            await asyncio.sleep(self._due - self._clock())
            self._end(output, tokens)
        self._meter.ended(self._note({}), self)  # as vLLM lets go of those that ended last
        self._task = None

    def _schedule(self, now: float) -> dict[_Sequence, int]:
        """Return how many tokens of which requests are in the next step, and count them as computed."""
        room = self._timing.max_num_batched_tokens
        tokens: dict[_Sequence, int] = {}
        for each in self._running:
            if new := min(room, max(1, each.num_prompt_tokens - each.num_computed_tokens)):
                tokens[each] = new
                room -= new
        while self._waiting and room and len(self._running) < self._timing.max_num_seqs:
            each = self._waiting.popleft()
            self._running.append(each)
            each.begun = now
            tokens[each] = min(room, each.num_prompt_tokens)
            room -= tokens[each]
        for each, new in tokens.items():
            each.num_computed_tokens += new
        return tokens

    def _note(self, tokens: Mapping[_Sequence, int]) -> SimpleNamespace:
        """Tell the meter of a step, in the form of vLLM's `SchedulerOutput`."""
        output = SimpleNamespace(
            finished_req_ids=self._gone, num_scheduled_tokens={each.name: new for each, new in tokens.items()}
        )
        self._gone = []
        self._meter.scheduled(output, {each.name: each for each in tokens}, self._due)
        return output

    def _end(self, output: SimpleNamespace, tokens: Mapping[_Sequence, int]) -> None:
        """Hand out a token to each request whose prompt is computed."""
        now = self._clock()
        finished = [
            each for each in tokens
            if each.num_computed_tokens >= each.num_prompt_tokens and each.name in self._requests
        ]  # fmt: skip
        for each in finished:
            each.made += 1
            each.first = each.first or now
            each.last = now
            if each.made == each.wanted:
                self.remove(each)
                each.complete.set()
        self._meter.ended(output, self)  # before anybody is woken: whoever has a token finds its step in the ledger
        for each in finished:
            each.news.set()


class TimedEngine:
    """The `Engine` of `coldsnap.engine` whose steps last. `interval` is the least time between two deltas."""

    def __init__(
        self, timing: Timing, interval: float, warn: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        limits = Limits(timing.max_num_seqs, timing.max_num_batched_tokens, None)
        self.info = EngineInfo("0", timing.gpu, 1, (MODEL,), _CONTEXT, limits=limits)
        self._interval = interval
        self._clock = clock
        self._accounts = Accounts(Ledger(StepModel(_WEIGHTS, _PER_TOKEN)), None, warn, clock)
        reader = self._accounts.reader
        assert reader is not None
        self._core = _Core(timing, os.open(reader.path, os.O_WRONLY | os.O_NONBLOCK), clock)
        reader.opened()

    async def generate(self, request: Generation, meter: Meter) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`: `max_tokens` times one word."""
        words = request.prompt or " ".join(str(message["content"]) for message in request.messages or ())
        prompt, wanted = len(words.split()), request.sampling.get("max_tokens", _MAX_TOKENS)
        if type(wanted) is not int or wanted < 1:
            sentence = f"expected a whole number of at least 1, found {wanted!r}"
            raise InvalidInput(f"sampling_params.max_tokens: {sentence}", param="sampling_params.max_tokens")
        if not 0 < prompt <= _CONTEXT - wanted:
            raise InvalidInput(
                f"prompt: {prompt} words and {wanted} to come do not fit into {_CONTEXT}", param="prompt"
            )
        account = self._accounts.open(request.id, 1, meter)
        sequence = _Sequence(request.id, prompt, wanted)
        entered = self._clock()
        self._core.add(sequence)
        try:
            while meter.completion_tokens < wanted:
                await sequence.news.wait()
                sequence.news.clear()
                if not meter.completion_tokens:
                    self._accounts.first_output(account)
                    meter.prompt_tokens, meter.sequences = prompt, 1
                    meter.queue_seconds, meter.first_token = sequence.begun - entered, sequence.first
                new, meter.completion_tokens = sequence.made - meter.completion_tokens, sequence.made
                meter.last_token = sequence.last
                meter.finish_reason = "length" if sequence.made == wanted else None
                yield Delta(" word" * new, finish_reason=meter.finish_reason)
                if sequence.made < wanted:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(sequence.complete.wait(), self._interval)
        finally:
            self._core.remove(sequence)
            self._accounts.close(account, aborted=meter.completion_tokens < wanted)

    def http(self, request: HttpRequest, meter: Meter) -> AbstractAsyncContextManager[HttpResponse]:  # noqa: ARG002
        """Refuse: it has no HTTP application."""
        raise NotFound(f"{request.path}: a timed engine serves native jobs only", param="route")

    async def warm_up(self) -> None:
        """Make one token."""
        async for _ in self.generate(Generation("warm-up", prompt="a", sampling={"max_tokens": 1}), Meter()):
            pass

    def usage(self) -> Usage:
        """See `Engine.usage`."""
        return self._accounts.usage()

    def check(self) -> None:
        """Find nothing: there is no process that could be gone."""

    def close(self) -> None:
        """Stop."""
        self._core.close()
        self._accounts.end()


def boot(
    settings: Settings,
    timeline: Timeline,
    environ: MutableMapping[str, str],
    *,
    beside_engine: Mapping[str, Callable[[], object]],
) -> Booted:
    """Start a timed engine in place of `boot.boot`. The cold start lasts as long as its `Timing` says, or longer."""
    try:
        timing = Timing.model_validate_json(environ.get(VARIABLE) or "{}")
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{VARIABLE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    timeline.mark("settings")
    beside_engine["import_sdk"]()
    timeline.mark("import_sdk")
    engine = TimedEngine(timing, settings.chunk_interval_ms / 1000, _warn)
    timeline.mark("configure")
    seconds = random.uniform(*timing.boot)
    time.sleep(max(0.0, seconds - timeline.total))
    timeline.mark("engine")
    return Booted(engine, settings, timeline, None)


def _warn(message: Any) -> None:
    print(f"coldsnap: {message}", flush=True)  # noqa: T201
