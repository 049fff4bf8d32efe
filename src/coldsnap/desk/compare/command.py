"""`coldsnap compare`: its options, and its way from them to the figures."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from coldsnap.desk.bench.answer import Failed
from coldsnap.desk.bench.command import key_for
from coldsnap.desk.bench.dialect import Dialect
from coldsnap.desk.bench.endpoint import WANTED, Address, Endpoint
from coldsnap.desk.bench.greeting import open_endpoint
from coldsnap.desk.compare.asking import Reading, Round, ask, read
from coldsnap.desk.compare.prompts import Line
from coldsnap.desk.compare.prompts import read as read_lines
from coldsnap.errors import BenchError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("a", metavar="A", help=f"an endpoint: {WANTED}")
    add("b", metavar="B", help="the other one")
    add("--data", type=Path, required=True, metavar="JSONL", help="what to ask: lines with `prompt` or `messages`, and "
        "`answer` and `max_tokens` where wished; or with `text`, whose likelihood is compared")  # fmt: skip
    add("--key", help="API key of both (default: RUNPOD_API_KEY, for addresses of /v2/)")
    add("--rounds", type=_count, default=5, metavar="N", help="how often each is asked (default: 5)")
    add("--concurrency", type=_count, default=1, metavar="N", help="prompts side by side (default: 1)")
    add("--max-tokens", type=_count, default=64, metavar="N", help="of an answer, where its line says none (64)")
    add("--timeout", type=_count, default=600, metavar="SECONDS", help="give a prompt up after so long (default: 600)")
    add("--html", type=Path, metavar="FILE", help="write a page there")


def run(options: argparse.Namespace) -> int:
    """Read, ask, compare, show."""
    lines = read_lines(options.data, options.max_tokens)
    return asyncio.run(_compare(options, lines))


async def _compare(options: argparse.Namespace, lines: Sequence[Line]) -> int:
    from coldsnap.desk.compare import shown

    asked = [line for line in lines if line.text is None]
    async with AsyncExitStack() as stack:
        sides = [await _opened(stack, name, url, options.key) for name, url in (("A", options.a), ("B", options.b))]
        readings = [await _read(sides, line, options.timeout) for line in lines if line.text is not None]
        rounds: tuple[list[Round], list[Round]] = ([], [])
        if asked:
            for side in sides:  # neither is compared in its first second
                await ask(side, asked, options.concurrency, options.timeout)
        for number in range(options.rounds if asked else 0):
            for place in (0, 1) if number % 2 == 0 else (1, 0):
                rounds[place].append(await ask(sides[place], asked, options.concurrency, options.timeout))
            print(f"coldsnap: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)  # noqa: T201
    comparison = shown.Comparison(options.a, options.b, asked, *rounds, readings)
    comparison.show()
    if options.html is not None:
        try:
            options.html.write_text(comparison.page(), encoding="utf-8")
        except OSError as error:
            raise BenchError(f"--html: {options.html} cannot be written ({error.strerror})") from error
    return 1 if comparison.failures else 0


async def _opened(stack: AsyncExitStack, name: str, url: str, key: str | None) -> Endpoint:
    address = Address.parse(url)
    endpoint = await stack.enter_async_context(
        open_endpoint(address, key_for(address, key, os.environ), Dialect(address.api))
    )
    try:
        served = await endpoint.models()
    except Failed as failed:
        raise BenchError(f"{name}: {address.host}: {failed}") from failed
    endpoint.dialect = replace(endpoint.dialect, model=served[0] if served else None)
    return endpoint


async def _read(sides: Sequence[Endpoint], line: Line, within: float) -> tuple[Reading, Reading]:
    try:
        a, b = [await read(side, str(line.text), within) for side in sides]
    except Failed as failed:
        raise BenchError(f"--data, line {line.number}: text: {failed}") from failed
    if len(a.own) != len(b.own):
        raise BenchError(
            f"--data, line {line.number}: text: A sees {len(a.own)} tokens and B {len(b.own)}; expected the same "
            "tokenizer, without which likelihoods cannot be compared token by token"
        )
    return a, b


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r:.40}")
    return int(text)
