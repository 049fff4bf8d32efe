"""The endpoint as its page shows it: one JSON object, put together when somebody asks and at no other time.

Times are seconds before now, so that no reader needs this machine's clock. Of many jobs the newest are shown, of many
workers the last; sums are over all that this process has had.
"""

from __future__ import annotations

import itertools
import secrets
import time

import orjson

from coldsnap.cost import prices
from coldsnap.cost.books import Headings
from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.fleet import Fleet, WorkerProcess
from coldsnap.desk.serve.job import JobState
from coldsnap.desk.serve.rows import Row, Rows
from coldsnap.desk.serve.split import Account
from coldsnap.desk.serve.watch import Log
from coldsnap.records.schema import ColdStart, Request

_FRESH_SECONDS = 0.2
"""A second page within this time gets the same answer."""
_ENDED_WORKERS = 4


class _Seen:
    """One worker as the page knows it: its process, its log, and the sum of its records."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.log = Log(process.log)
        self.account = Account()


class View:
    """Puts the page's JSON together; each time it reads on where it stopped."""

    def __init__(self, endpoint: Endpoint, fleet: Fleet, price: float | None) -> None:
        self._endpoint = endpoint
        self._fleet = fleet
        self._given_price = price
        self._life = secrets.token_hex(4)
        self._begun = time.monotonic()
        self._workers: dict[str, _Seen] = {}
        self._closed: set[str] = set()
        """Ended workers whose log has been read to its end."""
        self._rows = Rows(endpoint.plane)
        self._made = 0.0
        self._answer = b""

    def stir(self) -> object:
        """Return something that is equal as long as nothing has happened; cheap enough to ask all the time."""
        plane = self._endpoint.plane
        states = tuple((worker.id, self._fleet.state(worker)) for worker in self._fleet.workers.values())
        running = sum(len(worker.running) for worker in plane.workers.values())
        if running or "initializing" in {state for _, state in states}:
            return object()  # text grows, clocks run
        return states, len(plane.queue), plane.counts.total(), len(self._fleet.past), self._endpoint.stopping

    def answer(self) -> bytes:
        """Return the whole as JSON."""
        now = time.monotonic()
        if now - self._made >= _FRESH_SECONDS:
            self._read()
            self._answer = orjson.dumps(self._whole(now))
            self._made = now
        return self._answer

    def _read(self) -> None:
        for process in itertools.chain(self._fleet.past, self._fleet.workers.values()):
            if process.id in self._closed:
                continue
            worker = self._workers.setdefault(process.id, _Seen(process))
            records = worker.log.read()
            for record in records:
                worker.account.add(record)
                if isinstance(record, Request):
                    self._rows.add(record)
            if process.ended is not None and not records:
                self._closed.add(process.id)

    def _whole(self, now: float) -> Row:
        plane, scaling = self._endpoint.plane, self._endpoint.scaling
        workers = list(self._workers.values())
        boots = [each.account.cold_start for each in workers if each.account.cold_start]
        spent, billed, usd = Headings(), 0, 0.0
        for each in workers:
            spent += self._split(each, now)
            seconds = each.account.billed(each.process.begun, each.process.ended or now)
            billed += seconds
            usd += seconds * (self._price(each.account).per_second or 0.0)
        priced = [self._price(account) for each in workers if (account := each.account).cold_start]
        price = priced[-1] if priced else None
        counts = plane.counts
        return {
            "endpoint": plane.endpoint_id,
            "life": self._life,
            "up": round(now - self._begun, 1),
            "stopping": self._endpoint.stopping,
            "trouble": self._endpoint.boots.trouble,
            "scaling": {
                "least": scaling.least,
                "most": scaling.most,
                "idle_timeout": scaling.idle_timeout,
                "rule": scaling.rule,
                "value": scaling.value,
            },
            "engine": _engine(boots[-1]) if boots else None,
            "jobs": {
                "queued": len(plane.queue),
                "waited": _ago(now, next((job.timestamps.submitted for job in plane.queue), None)),
                "running": sum(len(worker.running) for worker in plane.workers.values()),
                "completed": counts[JobState.COMPLETED],
                "failed": counts[JobState.FAILED] + counts[JobState.TIMED_OUT],
                "cancelled": counts[JobState.CANCELLED],
            },
            "workers": [self._worker(each, now) for each in self._shown()],
            "workers_before": max(0, len(self._fleet.past) - _ENDED_WORKERS),
            "unhealthy": self._fleet.count()["unhealthy"],
            "requests": self._rows.newest(now),
            "rate": self._rows.rate(now),
            **self._rows.latency(),
            "spent": _rounded(spent),
            "billed": billed,
            "usd": usd if price is not None and price.per_second is not None else None,
            "price": None if price is None else {"per_second": price.per_second, "origin": price.origin},
        }

    def _price(self, account: Account) -> prices.Price:
        """Return what the worker's GPU costs; nothing while the worker has not said which it has."""
        boot = account.cold_start
        return prices.Price(self._given_price, "") if boot is None else prices.of(boot.gpu, self._given_price)

    def _shown(self) -> list[_Seen]:
        past = [self._workers[each.id] for each in self._fleet.past[-_ENDED_WORKERS:] if each.id in self._workers]
        return [*(self._workers[name] for name in self._fleet.workers if name in self._workers), *reversed(past)]

    def _worker(self, worker: _Seen, now: float) -> Row:
        process, account = worker.process, worker.account
        client = self._endpoint.plane.workers.get(process.id)
        ended = process.ended is not None
        state: str = "ended" if ended else "stopping" if process.stopping else self._fleet.state(process)
        boot = account.cold_start
        return {
            "id": process.id,
            "state": state,
            "why": process.how if ended else client.unhealthy if client else None,
            "asked": process.stopping,
            "ago": _ago(now, process.ended),
            "life": round((process.ended or now) - process.begun, 1),
            "ready": None if process.ready is None else round(process.ready - process.begun, 3),
            "running": len(client.running) if client else 0,
            "taken": client.taken if client else None,
            "idle": _ago(now, client.idle_since) if client else None,
            "says": worker.log.said if boot is None else None,
            "boot": None if boot is None else _boot(boot),
            "spent": _rounded(self._split(worker, now)),
        }

    def _split(self, worker: _Seen, now: float) -> Headings:
        plane = self._endpoint.plane
        client = plane.workers.get(worker.process.id)
        running = [plane.jobs[name].timestamps.taken for name in client.running if name in plane.jobs] if client else []
        since = min((taken for taken in running if taken is not None), default=None)
        return worker.account.split(worker.process.begun, worker.process.ended or now, since)


def _ago(now: float, then: float | None) -> float | None:
    return None if then is None else round(now - then, 1)


def _engine(boot: ColdStart) -> Row:
    return {"model": boot.model, "gpu": boot.gpu, "gpus": boot.gpu_count, "vllm": boot.vllm}


def _boot(boot: ColdStart) -> Row:
    return {
        "seconds": boot.seconds,
        "phases": list(boot.phases.items()),
        "beside": list(boot.beside.items()),
        "source": boot.source,
        "verified": boot.verified,
        "bytes": boot.snapshot_bytes,
    }


def _rounded(headings: Headings) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in headings.by_name().items()}
