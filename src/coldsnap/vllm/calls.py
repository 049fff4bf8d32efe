"""Meters a job's calls of the engine: each call opens an account and is noted in the job's meter."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from coldsnap.engine import Meter
from coldsnap.errors import InvalidInput

if TYPE_CHECKING:
    from coldsnap.cost.accounts import Accounts
    from coldsnap.vllm.grammar import Grammars

METER: ContextVar[Meter | None] = ContextVar("coldsnap_meter", default=None)
"""The meter of the job that runs."""
MADE: ContextVar[list[Any] | None] = ContextVar("coldsnap_calls", default=None)
"""The calls of the engine that the running HTTP request has made."""


class MeteredLLM:
    """Put before vLLM's `AsyncLLM` in a class of both: every request, native or not, is noted in the job's meter."""

    vllm_config: Any
    accounts: Accounts
    grammars: Grammars
    max_n: int
    refusal: Callable[..., Exception]
    """vLLM's error for what a request may not ask: its application makes a 400 of it."""

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """See `AsyncLLM.generate`. Refuses what would make more than `max_n` completions of a job at a time."""
        meter = METER.get() or Meter()
        meter.open += sampling_params.n
        if meter.open > self.max_n:
            raise self.refusal(
                f"n: {meter.open} completions or more are asked for; at most MAX_N={self.max_n} are made at a time for "
                "one job, each prompt's counted",
                parameter="n",
            )
        outputs = super().generate(prompt, sampling_params, request_id, *args, **kwargs)  # type: ignore[misc]
        call = self._metered(outputs, request_id, meter, sampling_params)
        if (calls := MADE.get()) is not None:
            calls.append(call)
        return call

    def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """See `AsyncLLM.encode`."""
        outputs = super().encode(prompt, pooling_params, request_id, *args, **kwargs)  # type: ignore[misc]
        meter = METER.get() or Meter()
        meter.open += 1
        return self._metered(outputs, request_id, meter)

    async def _metered(
        self, outputs: AsyncGenerator[Any, None], request_id: str, meter: Meter, sampling: Any = None
    ) -> AsyncGenerator[Any, None]:
        requests = sampling.n if sampling else 1
        if sampling and sampling.structured_outputs is not None:
            self.grammars.prepare(self.vllm_config)  # where no warm-up has: in the SDK's own loop
            try:
                await self.grammars.check(sampling.structured_outputs)
            except InvalidInput as error:
                named = {"parameter": error.param} if error.param else {}
                raise self.refusal(error.message, **named) from error
        account = self.accounts.open(request_id, requests, meter)
        output, aborted = None, False
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    first = account.first is None
                    if first:
                        self.accounts.first_output(account)
                    _note(meter, output, first=first)
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            aborted = output is None or not output.finished
            raise
        finally:
            meter.open -= requests
            self.accounts.close(account, aborted=aborted)


def _note(meter: Meter, output: Any, *, first: bool) -> None:
    if first:
        meter.prompt_tokens += len(output.prompt_token_ids or ())
        meter.cached_tokens += output.num_cached_tokens or 0
    for part in output.outputs if isinstance(output.outputs, list) else ():  # a pooling output is one object
        meter.completion_tokens += len(part.token_ids)
        if part.finish_reason:
            meter.finish_reason = part.finish_reason
            meter.sequences += 1
    stats = getattr(output, "metrics", None)
    if stats is not None and stats.first_token_ts:
        meter.queue_seconds = max(meter.queue_seconds, stats.scheduled_ts - stats.queued_ts)
        meter.first_token = min(meter.first_token or stats.first_token_ts, stats.first_token_ts)
        meter.last_token = max(meter.last_token, stats.last_token_ts)
