"""Asks an endpoint all prompts, and how likely it finds texts. Greedy, so that what differs is the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldsnap.desk.bench.answer import Answer, Failed
from coldsnap.desk.bench.endpoint import Endpoint
from coldsnap.desk.compare.prompts import Line

_ALTERNATIVES = 20
"""Tokens whose probability is told at each place: vLLM's own limit."""


@dataclass(slots=True)
class Spoken(Answer):
    """An answer, with its text."""

    said: str = ""

    def _take(self, event: Any, now: float) -> None:
        super(Spoken, self)._take(event, now)
        choice = (event.get("choices") or [event])[0]
        delta = choice.get("delta")
        self.said += (choice.get("text") if delta is None else delta.get("content")) or ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for a prompt. Seconds from when it was sent."""

    said: str
    ttft: float
    itl: float | None
    e2e: float
    tokens: int | None
    gpu_seconds: float | None


@dataclass(frozen=True, slots=True)
class Round:
    """All prompts, asked once: a reply or a failure for each, and the seconds that all of them took."""

    replies: tuple[Reply | Failed, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What an endpoint expected of a text: of each token but the first, its own log probability and the likeliest."""

    own: tuple[float, ...]
    likeliest: tuple[Mapping[str, float], ...]


async def ask(endpoint: Endpoint, lines: Sequence[Line], at_once: int, within: float) -> Round:
    """Ask every prompt, `at_once` side by side."""
    room = asyncio.Semaphore(at_once)
    begun = time.perf_counter()
    replies = await asyncio.gather(*(_reply(endpoint, line, room, within) for line in lines))
    return Round(tuple(replies), time.perf_counter() - begun)


async def _reply(endpoint: Endpoint, line: Line, room: asyncio.Semaphore, within: float) -> Reply | Failed:
    async with room:
        answer, sent = Spoken(), time.perf_counter()
        try:
            async with asyncio.timeout(within):
                await endpoint.ask(_body(endpoint, line), answer)
            if answer.first is None or answer.last is None or not answer.finished:
                return Failed("cut off", "the answer ended without a finish_reason")
        except Failed as failed:
            return failed
        except TimeoutError:
            return Failed("timeout", f"no whole answer within {within:g} s")
        end, tokens = time.perf_counter(), answer.tokens("completion_tokens")
        itl = (answer.last - answer.first) / (tokens - 1) if tokens and tokens > 1 else None
        return Reply(answer.said, answer.first - sent, itl, end - sent, tokens, answer.cost_of("gpu_seconds"))


def _body(endpoint: Endpoint, line: Line) -> dict[str, Any]:
    dialect = endpoint.dialect
    asked = {"messages": list(line.messages)} if line.messages is not None else {"prompt": line.prompt}
    sampling = {"max_tokens": line.max_tokens, "temperature": 0.0}
    model = {} if dialect.model is None else {"model": dialect.model}
    if dialect.api == "native":
        return model | asked | {"sampling_params": sampling, "stream": True}
    return model | asked | sampling | {"stream": True, "stream_options": {"include_usage": True}}


async def read(endpoint: Endpoint, text: str, within: float) -> Reading:
    """Return what the endpoint expected of a text. Raises `Failed`."""
    body: dict[str, Any] = {
        "prompt": text, "echo": True, "logprobs": _ALTERNATIVES, "max_tokens": 1, "temperature": 0.0,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    body |= {} if endpoint.dialect.model is None else {"model": endpoint.dialect.model}
    try:
        async with asyncio.timeout(within):
            answer = await endpoint.call("/v1/completions", body)
        found, count = answer["choices"][0]["logprobs"], answer["usage"]["prompt_tokens"]
        return Reading(tuple(found["token_logprobs"][1:count]), tuple(found["top_logprobs"][1:count]))
    except TimeoutError as error:
        raise Failed("timeout", f"no answer within {within:g} s") from error
    except (KeyError, IndexError, TypeError) as error:
        raise Failed(
            "not understood", f"/v1/completions gave no log probabilities of the text: {answer!r:.200}"
        ) from error
