"""The endpoint as its page shows it: one JSON object, put together when somebody asks and at no other time.

Times are seconds before now, so that no reader needs this machine's clock. Of many jobs the newest are shown, of many
workers the last; sums are over all that this process has had.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import orjson

from coldsnap import prices
from coldsnap.platform.endpoint import Endpoint
from coldsnap.platform.fleet import Fleet, WorkerProcess
from coldsnap.platform.job import Job, JobState
from coldsnap.platform.split import Account, Split
from coldsnap.platform.transcript import Transcript
from coldsnap.platform.watch import Log
from coldsnap.records import ColdStart, Request

_FRESH_SECONDS = 0.2
"""A second page within this time gets the same answer."""
_ROWS = 32
_OF_THEM_QUEUED = 6
_KNOWN = 256
"""Rows, and records of requests, that are kept for later."""
_ENDED_WORKERS = 4
_LATENCIES = 200
_LIVE = {JobState.IN_QUEUE, JobState.IN_PROGRESS}

_Row = dict[str, Any]


class _Seen:
    """What is known of one worker: its process, its log, and the sum of it."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.log = Log(process.log)
        self.account = Account()


class View:
    """Reads on where it stopped the last time."""

    def __init__(self, endpoint: Endpoint, fleet: Fleet, price: float | None) -> None:
        self._endpoint = endpoint
        self._fleet = fleet
        self._given_price = price
        self._life = secrets.token_hex(4)
        self._begun = time.monotonic()
        self._workers: dict[str, _Seen] = {}
        self._closed: set[str] = set()
        """Ended workers whose log has been read to its end."""
        self._requests: dict[str, Request] = {}
        self._ttft: deque[float] = deque(maxlen=_LATENCIES)
        self._itl: deque[float] = deque(maxlen=_LATENCIES)
        self._transcripts: dict[str, Transcript] = {}
        self._rows: dict[str, _Row] = {}
        """As they were when their job was last seen, by job, oldest first."""
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
            seen = self._workers.setdefault(process.id, _Seen(process))
            records = seen.log.read()
            for record in records:
                seen.account.add(record)
                if isinstance(record, Request):
                    self._remember(record)
            if process.ended is not None and not records:
                self._closed.add(process.id)

    def _remember(self, record: Request) -> None:
        self._requests[record.job_id] = record
        _forget_oldest(self._requests)
        if record.ttft_seconds is not None:
            self._ttft.append(record.ttft_seconds)
        if record.itl_seconds is not None:
            self._itl.append(record.itl_seconds)

    def _whole(self, now: float) -> _Row:
        plane, scaling = self._endpoint.plane, self._endpoint.scaling
        seen = list(self._workers.values())
        boots = [each.account.cold_start for each in seen if each.account.cold_start]
        spent, billed, usd = Split(), 0, 0.0
        for each in seen:
            spent.add(self._split(each, now))
            seconds = each.account.billed(each.process.begun, each.process.ended or now)
            billed += seconds
            usd += seconds * (self._price(each.account).per_second or 0.0)
        priced = [self._price(account) for each in seen if (account := each.account).cold_start]
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
            "requests": self._newest(now),
            "ttft": _latency(self._ttft),
            "itl": _latency(self._itl),
            "spent": _split(spent),
            "billed": billed,
            "usd": usd if price is not None and price.per_second is not None else None,
            "price": None if price is None else {"per_second": price.per_second, "origin": price.origin},
        }

    def _price(self, account: Account) -> prices.Price:
        """Return what the worker's GPU costs; nothing while the worker has not said which it has."""
        boot = account.cold_start
        return prices.Price(self._given_price, "") if boot is None else prices.of(boot.gpu, self._given_price)

    # Workers.

    def _shown(self) -> list[_Seen]:
        past = [self._workers[each.id] for each in self._fleet.past[-_ENDED_WORKERS:] if each.id in self._workers]
        return [*(self._workers[name] for name in self._fleet.workers if name in self._workers), *reversed(past)]

    def _worker(self, seen: _Seen, now: float) -> _Row:
        process, account = seen.process, seen.account
        known = self._endpoint.plane.workers.get(process.id)
        ended = process.ended is not None
        state: str = "ended" if ended else "stopping" if process.stopping else self._fleet.state(process)
        boot = account.cold_start
        return {
            "id": process.id,
            "state": state,
            "why": process.how if ended else known.unhealthy if known else None,
            "asked": process.stopping,
            "ago": _ago(now, process.ended),
            "life": round((process.ended or now) - process.begun, 1),
            "ready": None if process.ready is None else round(process.ready - process.begun, 3),
            "running": len(known.running) if known else 0,
            "taken": known.taken if known else None,
            "idle": _ago(now, known.idle_since) if known else None,
            "says": seen.log.said if boot is None else None,
            "boot": None if boot is None else _boot(boot),
            "spent": _split(self._split(seen, now)),
        }

    def _split(self, seen: _Seen, now: float) -> Split:
        plane = self._endpoint.plane
        known = plane.workers.get(seen.process.id)
        running = [plane.jobs[name].timestamps.taken for name in known.running if name in plane.jobs] if known else []
        since = min((taken for taken in running if taken is not None), default=None)
        return seen.account.split(seen.process.begun, seen.process.ended or now, since)

    # Requests.

    def _newest(self, now: float) -> _Row:
        plane = self._endpoint.plane
        running = [plane.jobs[name] for worker in plane.workers.values() for name in worker.running]
        running.sort(key=lambda job: job.number, reverse=True)
        waiting = list(itertools.islice(reversed(plane.jobs.values()), 2 * _ROWS))
        queued = [job for job in waiting if job.state is JobState.IN_QUEUE][:_OF_THEM_QUEUED]
        ended = [job for job in waiting if job.done]
        live = {name for name, row in self._rows.items() if row["state"] in _LIVE and name in plane.jobs}
        for job in reversed([*queued, *running[:_ROWS], *ended, *(plane.jobs[name] for name in live)]):
            self._rows[job.id] = self._row(job, now)
        _forget_oldest(self._rows)
        _forget_oldest(self._transcripts)
        rows = [self._rows[job.id] for job in [*queued, *running[: _ROWS - len(queued)]]]
        rest = [row for row in self._rows.values() if row["state"] not in _LIVE]
        rest.sort(key=lambda row: row["number"], reverse=True)
        rows += rest[: _ROWS - len(rows)]
        rows.sort(key=lambda row: row["number"], reverse=True)
        return {
            "rows": rows,
            "queued_more": len(plane.queue) - len(queued),
            "running_more": max(0, len(running) - (_ROWS - len(queued))),
        }

    def _row(self, job: Job, now: float) -> _Row:
        if (transcript := self._transcripts.get(job.id)) is None:
            transcript = self._transcripts[job.id] = Transcript(job)
        transcript.follow(job)
        times, record = job.timestamps, self._requests.get(job.id)
        taken = times.taken
        ttft = times.first_chunk - taken if taken is not None and times.first_chunk is not None else None
        row: _Row = {
            "id": job.id,
            "number": job.number,
            "state": job.state,
            "worker": job.worker_id,
            "route": transcript.route,
            "question": transcript.question,
            "text": transcript.text,
            "characters": transcript.characters,
            "waited": round((now if taken is None else taken) - times.submitted, 3),
            "took": None if taken is None else round((times.done or now) - taken, 3),
            "ttft": ttft,
            "error": None if job.error is None else job.error[:500],
            "attempts": job.attempts,
        }
        if record is not None and job.done:
            row |= {
                "ttft": record.ttft_seconds,
                "itl": record.itl_seconds,
                "prompt": record.prompt_tokens,
                "tokens": record.completion_tokens,
                "gpu_seconds": record.gpu_seconds,
                "usd": record.usd,
            }
        return row


def _forget_oldest(known: dict[str, Any]) -> None:
    while len(known) > _KNOWN:
        del known[next(iter(known))]


def _ago(now: float, then: float | None) -> float | None:
    return None if then is None else round(now - then, 1)


def _engine(boot: ColdStart) -> _Row:
    return {"model": boot.model, "gpu": boot.gpu, "gpus": boot.gpu_count, "vllm": boot.vllm}


def _boot(boot: ColdStart) -> _Row:
    return {
        "seconds": boot.seconds,
        "phases": list(boot.phases.items()),
        "beside": list(boot.beside.items()),
        "source": boot.source,
        "verified": boot.verified,
        "bytes": boot.snapshot_bytes,
    }


def _split(split: Split) -> dict[str, float]:
    parts = {
        "cold": split.cold,
        "busy": split.busy,
        "overhead": split.overhead,
        "idle": split.idle,
        "drain": split.drain,
    }
    return {name: round(part, 3) for name, part in parts.items()}


def _latency(values: Iterable[float]) -> _Row:
    """Return the values as they came, and quantiles that are values (nearest rank)."""
    found = list(values)
    ordered = sorted(found)

    def quantile(share: float) -> float | None:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

    return {"count": len(found), "p50": quantile(0.5), "p95": quantile(0.95), "values": [round(x, 5) for x in found]}
