"""`coldsnap bench`: its options, checked before anything is sent, and the way from them to the figures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from coldsnap.desk.bench.dialect import APIS, Dialect
from coldsnap.desk.bench.driver import Driver
from coldsnap.desk.bench.endpoint import Address
from coldsnap.desk.bench.jobs import Jobs
from coldsnap.desk.bench.lengths import FORMS, Lengths
from coldsnap.desk.bench.schedule import Call, drawn, limited, poisson, replayed
from coldsnap.desk.bench.slo import Slo
from coldsnap.errors import BenchError
from coldsnap.foundation.plural import plural

_REQUESTS = 100
_WARM_UP_AT_ONCE = 8
_INTERRUPTED = 130


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("url", metavar="URL", help="…/v2/<endpoint> (native jobs), …/v2/<endpoint>/openai/v1, or …/v1 of any server")
    add("--key", help="API key (default: RUNPOD_API_KEY, for addresses of /v2/)")
    add("--model", help="the model's name (default: the first that the endpoint lists)")
    add("--api", metavar="|".join(APIS), help="what to speak; OpenAI requests can be jobs (default: by the address)")
    add("--rate", metavar="N", help="open loop: N requests a second on average, at random (Poisson)")
    add("--concurrency", metavar="N", help="closed loop: N requests side by side; with --rate or --trace the most")
    add("--trace", metavar="FILE", help="replay a trace: JSON lines, a ledger, or Mooncake's format; .gz too")
    add("--speed", metavar="X", default="1", help="replay X times as fast (default: 1)")
    add("--prompt-tokens", metavar="LENGTH", default="128", help=f"{FORMS} (default: 128)")
    add("--output-tokens", metavar="LENGTH", default="64", help="likewise (default: 64)")
    add("--requests", metavar="N", help=f"how many (default: {_REQUESTS}, or the whole trace, unless --duration)")
    add("--duration", metavar="SECONDS", help="send no more after so long")
    add("--warmup", metavar="N", default="4", help="requests beforehand that are in no figure (default: 4)")
    add("--seed", metavar="N", help="draw the same arrivals, lengths and prompts again (default: random, and told)")
    add("--slo", metavar="TERMS", help="count what keeps to it: ttft=200ms,itl=30ms,e2e=2s")
    add(
        "--timeout", metavar="SECONDS", default="600", help="give a request up, as failed, after so long (default: 600)"
    )
    add("--stop-at-eos", action="store_true", help="let answers end where the model ends them; lengths are the most")
    add("--extra", metavar="JSON", default="{}", help='fields for the requests, e.g. {"temperature": 0}')
    add("--json", metavar="FILE", help="write the figures and every request there")
    add("--html", metavar="FILE", help="write a page with plots there")


@dataclass(frozen=True, slots=True)
class Plan:
    """The options, checked."""

    address: Address
    dialect: Dialect
    key: str | None
    rate: float | None
    concurrency: int | None
    trace: Path | None
    speed: float
    prompt: Lengths
    output: Lengths
    requests: int | None
    duration: float | None
    warm_up: int
    seed: int
    slo: Slo | None
    timeout: float

    @classmethod
    def of(cls, options: argparse.Namespace, environ: Mapping[str, str]) -> Plan:
        """Check the options. Raises `BenchError`."""
        address = Address.parse(options.url)
        api = options.api or address.api
        if api not in APIS:
            raise BenchError(f"--api: expected one of {', '.join(APIS)}, found {api!r:.40}")
        if api == "native" and address.openai:
            raise BenchError(f"--api native: {options.url} takes OpenAI requests; native jobs go to …/v2/<endpoint>")
        key = key_for(address, options.key, environ)
        trace = Path(options.trace) if options.trace else None
        if trace is None and options.rate is None and options.concurrency is None:
            raise BenchError(
                "--rate, --concurrency or --trace: expected one of them, which says when requests are sent"
            )
        if trace is not None and options.rate is not None:
            raise BenchError("--rate: a trace has its own times; --speed makes them faster")
        try:
            extra = orjson.loads(options.extra)
        except orjson.JSONDecodeError as error:
            raise BenchError(f"--extra: expected a JSON object: {error}") from error
        if not isinstance(extra, dict):
            raise BenchError(f"--extra: expected a JSON object, found {options.extra!r:.60}")
        duration = None if options.duration is None else _number("--duration", options.duration)
        requests = None if options.requests is None else _whole("--requests", options.requests, 1)
        if requests is None and duration is None and trace is None:
            requests = _REQUESTS
        return cls(
            address,
            Dialect(api, options.model, not options.stop_at_eos, extra),
            key,
            None if options.rate is None else _number("--rate", options.rate),
            None if options.concurrency is None else _whole("--concurrency", options.concurrency, 1),
            trace,
            _number("--speed", options.speed),
            Lengths.parse(options.prompt_tokens, "--prompt-tokens"),
            Lengths.parse(options.output_tokens, "--output-tokens"),
            requests,
            duration,
            _whole("--warmup", options.warmup, 0),
            _whole("--seed", options.seed, 0) if options.seed is not None else random.SystemRandom().randrange(10**6),
            None if options.slo is None else Slo.parse(options.slo),
            _number("--timeout", options.timeout),
        )

    @property
    def open_loop(self) -> bool:
        """Whether requests have times of their own."""
        return self.trace is not None or self.rate is not None

    def calls(self) -> Iterator[Call]:
        """Return the schedule."""
        if self.trace is not None:
            from coldsnap.desk import trace

            calls = replayed(trace.read(self.trace), self.speed)
        else:
            times = poisson(self.rate, self.seed) if self.rate is not None else iter(lambda: None, 0)
            calls = drawn(times, self.prompt, self.output, self.seed)
        return limited(calls, self.requests, self.duration)

    def said(self) -> str:
        """Say in words what is sent."""
        many = f"{self.requests} requests" if self.requests else "requests"
        many += f" for {self.duration:g} s" if self.duration is not None else ""
        at_most = f", at most {self.concurrency} at a time" if self.concurrency else ""
        if self.trace is not None:
            return f"{many} of {self.trace.name}, {self.speed:g} times as fast{at_most}"
        how = f"at {self.rate:g} a second{at_most}" if self.rate is not None else f"{self.concurrency} side by side"
        return f"{many} {how}, prompts of {self.prompt} tokens, answers of {self.output}"

    def about(self, model: str | None, first_answer_seconds: float, *, exact: bool) -> dict[str, Any]:
        """Return what a reader of the figures is told about the load."""
        return {
            "url": self.address.url,
            "api": self.dialect.api,
            "transport": "openai" if self.address.openai else "jobs",
            "model": model,
            "load": self.said(),
            "seed": self.seed,
            "slo": None if self.slo is None else self.slo.most,
            "begun": datetime.now(UTC),
            "first_answer_seconds": first_answer_seconds,
            "prompts": "token ids" if exact else "words",
        }


def key_for(address: Address, key: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the API key to send: the one that was given, else the platform's to a platform's address."""
    key = key or (environ.get("RUNPOD_API_KEY") if address.jobs else None)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
        raise BenchError("--key: expected printable ASCII characters without spaces around them")
    return key


def run(options: argparse.Namespace) -> int:
    """Check, greet, load, show."""
    plan = Plan.of(options, os.environ)
    for option, path in (("--json", options.json), ("--html", options.html)):
        if path is not None:
            _writable(option, Path(path))
    if plan.trace is not None:
        from coldsnap.desk import trace

        for _ in trace.read(plan.trace, _say):  # what is wrong in its last line must not come out amid the load
            pass
    import uvloop

    return uvloop.run(_bench(plan, options))


async def _bench(plan: Plan, options: argparse.Namespace) -> int:
    from coldsnap.desk.bench import terminal
    from coldsnap.desk.bench.figures import summarise
    from coldsnap.desk.bench.greeting import greet, open_endpoint

    if options.html is not None:
        from coldsnap.desk.bench import page  # now, while nothing is measured
    stop = asyncio.Event()
    async with open_endpoint(plan.address, plan.key, plan.dialect) as endpoint:
        greeting = await greet(endpoint, seed=plan.seed, within=plan.timeout, key=plan.key is not None)
        _say(f"{plan.address.host} serves {greeting.model or 'its model'}; first answer after {greeting.seconds:.1f} s")
        if not greeting.prompts.exact:
            _say("prompts are made of words: their tokens are near the wish, and reported as the server counts them")
        with _interruptible(stop):
            await _warm_up(plan, Driver(endpoint, greeting.prompts, plan.timeout, stop))
            driver = Driver(endpoint, greeting.prompts, plan.timeout, stop)
            begun = datetime.now(UTC)
            async with terminal.progress(driver.run):
                done = await driver.drive(plan.calls(), plan.concurrency, plan.duration)
    summary = summarise(done, plan.slo, open_loop=plan.open_loop, exact=plan.dialect.exact)
    if isinstance(endpoint, Jobs) and (note := endpoint.note()):
        summary = replace(summary, notes=(*summary.notes, note))
    about = plan.about(greeting.model, greeting.seconds, exact=greeting.prompts.exact) | {"begun": begun}
    terminal.show(about, summary)
    if options.json is not None:
        report = {"schema_version": 1, **about, "summary": summary, "requests": done.outcomes}
        _write(
            "--json", Path(options.json), orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        )
    if options.html is not None:
        _write("--html", Path(options.html), page.render(about, summary, done.outcomes).encode())
    if stop.is_set():
        return _INTERRUPTED
    return 0 if summary.succeeded else 1


async def _warm_up(plan: Plan, driver: Driver) -> None:
    calls = [replace(call, at=None) for call in limited(plan.calls(), plan.warm_up, None)]
    run = await driver.drive(calls, plan.concurrency or _WARM_UP_AT_ONCE)
    if run.failed:
        first = next(each for each in run.outcomes if each.error)
        _say(f"{plural(run.failed, 'warm-up request')} failed, the first with {first.error}: {first.detail}")


@contextlib.contextmanager
def _interruptible(stop: asyncio.Event) -> Iterator[None]:
    """Let Ctrl-C end the load and show what there is; a second one ends the program."""
    loop = asyncio.get_running_loop()

    def once() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, once)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _writable(option: str, path: Path) -> None:
    """Find out now whether a file can be written, without changing it."""
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise BenchError(f"{option}: {path} cannot be written ({error.strerror})") from error
    if not there:
        path.unlink()


def _write(option: str, path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BenchError(f"{option}: {path} cannot be written ({error.strerror})") from error


def _number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise BenchError(f"{option}: expected a number above 0, found {text!r:.40}")
    return number


def _whole(option: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise BenchError(f"{option}: expected a whole number of at least {least}, found {text!r:.40}")
    return int(text)


def _say(message: str) -> None:
    print(f"coldsnap: {message}", file=sys.stderr, flush=True)  # noqa: T201
