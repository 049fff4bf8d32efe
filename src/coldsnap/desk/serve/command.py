"""`coldsnap serve`: an endpoint on this machine, with workers that run the unmodified handler."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import sys
from pathlib import Path

from starlette.requests import Request
from starlette.routing import Route

from coldsnap.desk.serve.api import Api
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.fleet import Fleet
from coldsnap.desk.serve.page import Page, link
from coldsnap.desk.serve.pushes import Pushes
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.desk.serve.scrape import Scrape
from coldsnap.desk.serve.server import served
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.throttle import Throttle
from coldsnap.desk.serve.view import View
from coldsnap.errors import Refused, ServeError
from coldsnap.foundation.plural import plural
from coldsnap.settings import ROOT, Settings

_SCALER_VALUES = {"queue-delay": 4.0, "request-count": 4.0}
"""The platform's defaults: seconds in the queue, requests for each worker."""
_DRAIN_SECONDS = 10.0
"""For running jobs after the first Ctrl-C. Those that do not end run again after the next start."""
_POLL_SECONDS = 20.0
_SHARED = ("GPU_PRICE_PER_SECOND", "MAX_QUEUE", "MAX_QUEUE_SECONDS")
"""Settings of the workers that count here too: the page's price, and the bounds of a queue."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `coldsnap serve`, named like an endpoint's settings."""
    parser.add_argument("--port", type=_integer(0, 65_535), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--key", help="API key (default: a random one, kept in the state file)")
    parser.add_argument("--endpoint", default="local", help="the endpoint's id in addresses (default: local)")
    parser.add_argument("--workers", type=_integer(0), default=1, help="active workers, always there (default: 1)")
    parser.add_argument("--max-workers", type=_integer(1), help="most workers (default: --workers, at least 1)")
    parser.add_argument(
        "--idle-timeout",
        type=_number,
        default=5.0,
        help="seconds after which an idle worker above --workers ends (default: 5)",
    )
    parser.add_argument(
        "--scaler",
        choices=sorted(_SCALER_VALUES),
        default="queue-delay",
        help="when to add workers (default: queue-delay)",
    )
    parser.add_argument(
        "--scaler-value", type=_number, help="seconds in the queue, or requests for each worker (default: 4)"
    )
    parser.add_argument(
        "--handler", type=Path, default=ROOT / "handler.py", help="what a worker runs (default: the clone's)"
    )
    parser.add_argument(
        "--private-webhooks",
        action="store_true",
        help="call webhooks on this machine and its network too (default: public addresses only)",
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / ".coldsnap" / "serve.db",
        help="file of the jobs and the key; logs go beside it (default: .coldsnap/serve.db in the clone)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    import uvloop

    most = options.max_workers if options.max_workers is not None else max(options.workers, 1)
    if most < options.workers:
        raise ServeError(f"--max-workers {most}: fewer than --workers {options.workers}")
    if not options.handler.is_file():
        problem = "that is not a file" if options.handler.exists() else "there is no such file"
        raise ServeError(f"--handler {options.handler}: {problem}")
    if not (options.endpoint.isascii() and options.endpoint.replace("-", "").isalnum()):
        raise ServeError(f"--endpoint {options.endpoint!r}: letters, digits and - are expected")
    if options.key is not None and not (options.key.isascii() and options.key.isprintable() and options.key.strip()):
        raise ServeError("--key: printable ASCII characters are expected")
    value = _SCALER_VALUES[options.scaler] if options.scaler_value is None else options.scaler_value
    if options.scaler == "request-count" and value < 1:
        raise ServeError(f"--scaler-value {value:g}: at least 1 request for each worker is expected")
    scaling = Scaling(options.workers, most, options.idle_timeout, options.scaler, value)
    uvloop.run(_serve(options, scaling))
    return 0


async def _serve(options: argparse.Namespace, scaling: Scaling) -> None:
    """Start from the inside: state, worker protocol, clock, workers, API; end in reverse."""
    settings = Settings.read({name: os.environ.get(name, "") for name in _SHARED})
    listener = _listener(options.host, options.port)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, signalled)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        store = stack.enter_context(Store(options.state, _say))
        key = options.key or store.kept("key", lambda: f"rpa_{secrets.token_urlsafe(24)}")
        plane = ControlPlane(poll_seconds=_POLL_SECONDS, endpoint_id=options.endpoint, journal=store)
        await stack.enter_async_context(plane)
        endpoint = await stack.enter_async_context(
            Endpoint(
                plane,
                store,
                scaling,
                _say,
                private_webhooks=options.private_webhooks,
                max_queue=settings.max_queue,
                max_queue_seconds=settings.max_queue_seconds,
            )
        )
        logs = options.state.parent / "workers"
        pushes = await stack.enter_async_context(Pushes(lambda worker_id: worker_id in fleet.workers, _say))
        fleet = Fleet(endpoint, options.handler.absolute(), pushes.environment(os.environ), logs, _say)
        api = Api(endpoint, fleet, key, Throttle())
        metrics = Scrape(endpoint, fleet, pushes, _named_local if _private(listener) else api.authorize)
        page = Page(View(endpoint, fleet, settings.gpu_price_per_second), api.authorize)
        app = api.application(Route("/metrics", metrics.answer), *page.routes())
        await stack.enter_async_context(served(app, listener))
        stack.callback(page.close)
        _greet(listener, options.endpoint, key, len(plane.queue))
        scaler = asyncio.create_task(fleet.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({scaler, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        endpoint.stop()
        await asyncio.wait({scaler})
        running = sum(len(worker.running) for worker in plane.workers.values())
        if running:
            _say(f"{plural(running, 'job')} may run on for {_DRAIN_SECONDS:g} s; Ctrl-C again stops them at once")
        await fleet.stop(_DRAIN_SECONDS, hurry)
        endpoint.stop()
        scaler.result()
        if left := [job for job in plane.queue if job.terms.durable]:
            _say(f"waiting in {options.state} for the next start: {plural(len(left), 'job')}")


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        has_number = error.errno is not None and error.errno > 0  # a name that is not found has a number below
        why = os.strerror(error.errno or 0) if has_number else str(error.strerror).partition(" (")[0]
        raise ServeError(f"--host {host} --port {port}: {why}") from error


def _private(listener: socket.socket) -> bool:
    """Whether only this machine reaches the endpoint: its metrics then need no key, as Prometheus expects."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _named_local(request: Request) -> None:
    """Refuse a request under another name: a page in a browser whose name leads to this machine."""
    if request.url.hostname not in {"localhost", "127.0.0.1", "::1"}:
        raise Refused(421, "the Host header names another machine; without a key /metrics is for this one")


def _greet(listener: socket.socket, endpoint: str, key: str, waiting: int) -> None:
    host, port = listener.getsockname()[:2]
    _say(f"page {link(host, port, key)}")
    base = f"http://{host}:{port}/v2"
    _say(f"endpoint {base}/{endpoint}, OpenAI {base}/{endpoint}/openai/v1, key {key}")
    if waiting:
        _say(f"waiting from before: {plural(waiting, 'job')}")


def _integer(least: int, most: int | None = None) -> type[int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, found {number}")
        return number

    parse.__name__ = "integer"
    return parse  # type: ignore[return-value]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number, at least 0, found {text}")
    return number


def _say(message: str) -> None:
    print(f"coldsnap: {message}", file=sys.stderr, flush=True)  # noqa: T201
