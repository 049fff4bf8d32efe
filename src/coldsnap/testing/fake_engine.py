"""An engine that plays a script: for tests of what stands on the `Engine` protocol, without vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from coldsnap.engine import Delta, EngineInfo, Generation, HttpRequest, HttpResponse, Meter, Usage
from coldsnap.errors import EngineDead

_Given = TypeVar("_Given")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the fake's HTTP application answers: pieces of the body, seconds to wait, an error to raise."""

    steps: tuple[bytes | float | Exception, ...]
    status: int = 200
    content_type: str = "application/json"


_NOT_FOUND = Answer((b'{"detail":"Not Found"}',), status=404)


class FakeEngine:
    """Gives every native request `script`, and every HTTP request the answer that `answers` has for its path.

    A script's steps are deltas, seconds to wait and errors to raise. `requests` are those that came,
    `aborted` those that were left before their script had ended.
    """

    def __init__(
        self,
        script: Iterable[Delta | float | Exception] = (),
        answers: Mapping[str, Answer] | None = None,
        info: EngineInfo | None = None,
    ) -> None:
        self.info = info or EngineInfo("0", "fake", 1, ("fake-model", "fake-alias"), max_model_len=1024)
        self.script = tuple(script)
        self.answers = answers or {}
        self.requests: list[Generation | HttpRequest] = []
        self.aborted: list[Generation | HttpRequest] = []
        self.dead = False
        self.closed = False

    async def generate(self, request: Generation, meter: Meter) -> AsyncGenerator[Delta, None]:
        """Play the script; every delta counts as one token, every word of the prompt as another."""
        with self._noted(request, meter):
            words = request.prompt or " ".join(str(message["content"]) for message in request.messages or ())
            meter.prompt_tokens = len(words.split())
            async for delta in _play(self.script):
                meter.last_token = time.monotonic()
                meter.first_token = meter.first_token or meter.last_token
                meter.completion_tokens += 1
                if delta.finish_reason:
                    meter.finish_reason = delta.finish_reason
                    meter.sequences += 1
                yield delta

    @contextlib.asynccontextmanager
    async def http(self, request: HttpRequest, meter: Meter) -> AsyncIterator[HttpResponse]:
        """Give the answer for the request's path, or 404."""
        answer = self.answers.get(request.path, _NOT_FOUND)
        with self._noted(request, meter):
            yield HttpResponse(answer.status, answer.content_type, _play(answer.steps))

    async def warm_up(self) -> None:
        """Do nothing: the fake is always warm."""

    def usage(self) -> Usage:
        """Return that nothing was metered: the fake has no steps."""
        return Usage()

    def check(self) -> None:
        """Raise `EngineDead` once `dead` is set."""
        if self.dead:
            raise EngineDead("the engine process is gone")

    def close(self) -> None:
        """Remember the call."""
        self.closed = True

    @contextlib.contextmanager
    def _noted(self, request: Generation | HttpRequest, meter: Meter) -> Iterator[None]:
        self.requests.append(request)
        start = time.monotonic()
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request)
            raise
        finally:
            meter.gpu_seconds += time.monotonic() - start


async def _play(steps: Iterable[_Given | float | Exception]) -> AsyncIterator[_Given]:
    for step in steps:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, float | int):
            await asyncio.sleep(step)
        else:
            yield step
