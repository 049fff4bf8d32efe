"""Checks an endpoint before a load: address, key and model, and how it counts a prompt's tokens.

What fails here would fail for every request, so it is said once, by the option that is wrong.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from http import HTTPStatus

from coldsnap.desk.bench.answer import Answer, Failed
from coldsnap.desk.bench.dialect import Dialect
from coldsnap.desk.bench.endpoint import WANTED, Address, Endpoint
from coldsnap.desk.bench.jobs import Jobs
from coldsnap.desk.bench.prompts import TEXT, WORDS, Prompt, Prompts
from coldsnap.errors import BenchError

_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


@dataclass(frozen=True, slots=True)
class Greeting:
    """What an endpoint said. `seconds` is what its first answer took, with a cold start if there was one."""

    model: str | None
    seconds: float
    prompts: Prompts


async def greet(endpoint: Endpoint, *, seed: int, within: float, key: bool) -> Greeting:
    """Ask for models, a tokenizer and an answer; set the dialect's model. Raises `BenchError`."""
    try:
        async with asyncio.timeout(within):
            begun = time.perf_counter()
            endpoint.dialect = replace(endpoint.dialect, model=_model(endpoint, await endpoint.models()))
            first = Prompts(seed)
            prompt: Prompt = WORDS[0]
            if endpoint.dialect.takes_ids and (ids := sorted(set(await endpoint.tokenize(TEXT)))):
                first = Prompts(seed, ids)
                prompt = ids[:1]
            fixed = await _prompt_tokens(endpoint, prompt)
            seconds = time.perf_counter() - begun
            if not first.exact:
                first = await _calibrated(endpoint, seed, fixed)
            return Greeting(endpoint.dialect.model, seconds, first)
    except Failed as failed:
        raise _explained(failed, endpoint.address, endpoint.dialect.model, key=key) from failed
    except TimeoutError as error:
        raise BenchError(
            f"--timeout: {endpoint.address.host} gave no answer within {within:g} s; is there a worker that boots?"
        ) from error


def open_endpoint(address: Address, key: str | None, dialect: Dialect) -> Endpoint:
    """Return the endpoint at an address."""
    return Endpoint(address, key, dialect) if address.openai else Jobs(address, key, dialect)


def _model(endpoint: Endpoint, served: list[str] | None) -> str | None:
    model = endpoint.dialect.model
    if not served:
        if model is None and endpoint.address.openai:
            raise BenchError(
                f"--model: {endpoint.address.openai} does not list its models; name one, if the address is right: "
                f"expected {WANTED}"
            )
        return model
    if model is None:
        return served[0]
    if model not in served:
        raise BenchError(
            f"--model: {model!r:.200} is not served by {endpoint.address.host}; served: {', '.join(served)}"
        )
    return model


async def _prompt_tokens(endpoint: Endpoint, prompt: Prompt) -> int | None:
    """Return the tokens of a prompt by the server's count."""
    answer = Answer()
    await endpoint.ask(endpoint.dialect.body(prompt, 1), answer)
    if not answer.finished:
        raise Failed("cut off", "its first answer ended without a finish_reason")
    return answer.tokens("prompt_tokens")


async def _calibrated(endpoint: Endpoint, seed: int, one: int | None) -> Prompts:
    """Return a maker of prompts that knows what a word takes, where the server tells."""
    every = await _prompt_tokens(endpoint, TEXT)
    if one is None or every is None or every <= one:
        return Prompts(seed)
    each = (every - one) / (len(WORDS) - 1)
    return Prompts(seed, fixed=one - each, each=each)


def _explained(failed: Failed, address: Address, model: str | None, *, key: bool) -> BenchError:
    """Return the error that names the option."""
    host, failure = address.host, f"{failed.kind}: {failed.detail}" if failed.detail else failed.kind
    if failed.status in _REFUSED:
        what = "the key" if key else "a request without a key"
        return BenchError(f"--key: {host} refuses {what} ({failure}); --key or RUNPOD_API_KEY gives it")
    if failed.kind == "host unknown":
        return BenchError(f"URL: the host of {address.url} is not known ({failed.detail}); expected {WANTED}")
    if failed.kind == "no connection":
        return BenchError(f"URL: {host} takes no connection ({failed.detail}); is the server up, and is this its port?")
    if failed.kind == "TLS":
        return BenchError(f"URL: {host} cannot be reached by https:// ({failed.detail})")
    if model is not None and "model" in failed.detail and failed.status == HTTPStatus.NOT_FOUND:
        return BenchError(f"--model: {failed.detail}")
    if failed.status == HTTPStatus.NOT_FOUND:
        return BenchError(f"URL: {address.url} is not there ({failure}); expected {WANTED}")
    return BenchError(f"URL: the first request to {address.url} failed ({failure})")
