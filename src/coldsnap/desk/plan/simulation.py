"""An endpoint under a trace, event by event: arrivals, the queue, the scaler, boots, batches, idle timeouts.

How many workers there should be is asked of `platform.scaler`, the same function that `coldsnap serve` asks; who
gets a job, and when a worker ends, is as in `platform.control_plane` and `platform.fleet`. The workers that are
always there (`Scaling.least`) are ready when the trace begins. The same seed gives the same boots.

What it does not know: failures, time limits, refusals for a full queue, throttled GPUs, workers that share a GPU.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from coldsnap.desk.plan.batch import Batch, Speed
from coldsnap.desk.serve.scaler import Load, Scaling, wanted
from coldsnap.desk.trace import Arrival

Floats = NDArray[np.float64]

LOOK_SECONDS = 0.1
"""How often the platform looks at its workers, as `platform.fleet` does."""

_ROUNDING = 1e-6
"""Seconds within which two moments are one."""
_LOOK, _READY, _BATCH = range(3)


@dataclass(frozen=True, slots=True)
class Traffic:
    """A trace by columns: seconds since its beginning, ascending, and tokens."""

    times: Sequence[float]
    prompts: Sequence[int]
    outputs: Sequence[int]

    @classmethod
    def of(cls, arrivals: Iterable[Arrival]) -> Traffic:
        """Return the columns of arrivals."""
        requests = [(each.time, each.prompt_tokens, each.output_tokens) for each in arrivals]
        times, prompts, outputs = zip(*requests, strict=True) if requests else ((), (), ())
        return cls(times, prompts, outputs)


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """What a worker does with time, in seconds."""

    speed: Speed
    boots: Sequence[float]
    """Cold starts that were seen, from the process's start until it takes jobs: one is drawn for each boot."""
    front: float = 0.0
    """Of a job, before its first token, around the engine's steps."""
    stop: float = 0.0
    """From the decision to end a worker to its end."""

    def slower(self, by: float) -> WorkerModel:
        """Return a worker whose steps take `by` times as long."""
        return replace(self, speed=self.speed.slower(by))


@dataclass(frozen=True, slots=True)
class Choice:
    """An endpoint's settings."""

    scaling: Scaling
    concurrency: int = 128
    """Jobs that a worker takes at once: MAX_CONCURRENCY."""


@dataclass(frozen=True)
class Outcome:
    """What came of a choice. Times are seconds, arrays are in the order of the trace."""

    choice: Choice
    ttft: Floats
    """From a request's arrival at the endpoint to its first token."""
    total: Floats
    """From its arrival to its last token."""
    seconds: float
    """From the beginning of the trace to the last token."""
    lives: Floats
    """(workers,) each from its start to its end, or to the last token if it stays."""
    billed: float
    """The lives of workers, those that ended rounded up to the second, as the platform does."""
    busy: float
    """Of them, with a step under way."""
    cold: float
    """Of them, until ready."""
    served: float
    """Seconds that jobs spent in workers, summed."""
    boots: int
    peak: int
    """Workers at the same time, at most."""
    widest: int
    """Requests that one engine decoded together, at most."""

    @property
    def flex(self) -> float:
        """Billed seconds above those of the workers that are always there."""
        return max(0.0, self.billed - self.active)

    @property
    def active(self) -> float:
        """Seconds of the workers that are always there."""
        return self.choice.scaling.least * self.seconds

    def occupancy(self, sequences: int) -> float:
        """Return the part of the slots that was taken while workers were ready: jobs at once, or in a step."""
        slots = min(self.choice.concurrency, sequences) * (float(self.lives.sum()) - self.cold)
        return self.served / slots if slots > 0 else 0.0


class _Worker:
    __slots__ = ("batch", "begun", "boots_until", "idle_since", "ready", "running", "version")

    def __init__(self, batch: Batch, begun: float) -> None:
        self.batch = batch
        self.begun = begun
        self.boots_until = begun
        self.ready = False
        self.idle_since = math.inf
        """Infinity while it has something to do, or boots."""
        self.running = 0
        self.version = 0
        """Events of an earlier one no longer count."""


def simulate(traffic: Traffic, choice: Choice, model: WorkerModel, seed: int = 0) -> Outcome:
    """Run the whole trace, and on until every worker that may end has ended."""
    return _Simulation(traffic, choice, model, seed).run()


class _Simulation:
    def __init__(self, traffic: Traffic, choice: Choice, model: WorkerModel, seed: int) -> None:
        self._traffic = traffic
        self._choice = choice
        self._scaling = choice.scaling
        self._model = model
        self._random = random.Random(seed)  # noqa: S311 -- nothing secret
        self._events: list[tuple[float, int, int, _Worker | None, int]] = []
        self._order = 0
        self._queue: deque[int] = deque()
        self._workers: list[_Worker] = []
        self._polling: deque[_Worker] = deque()
        """Workers that would take a job, the one that has waited longest first."""
        self._next_look = math.inf
        self._overdue = False
        """An idle worker was kept beyond its timeout: each job that ends may change that."""
        count = len(traffic.times)
        self._first = np.zeros(count)
        self._last = np.zeros(count)
        self._ended: list[float] = []
        self._busy = self._cold = self._served = 0.0
        self._boots = self._peak = self._widest = 0

    def run(self) -> Outcome:
        for _ in range(self._scaling.least):
            worker = self._add(0.0)
            self._take_jobs(worker, 0.0)
        events, times = self._events, self._traffic.times
        for number, time in enumerate(times):
            while events and events[0][0] <= time:
                self._handle()
            self._queue.append(number)
            if self._polling:
                self._dispatch(time)
            if self._queue or self._scaling.rule == "request-count":
                self._look_by(time)
        while events:
            self._handle()
        arrivals = np.asarray(times, dtype=np.float64)
        seconds = float(max(self._last.max(initial=0.0), arrivals.max(initial=0.0)))
        stayed = [max(seconds, worker.boots_until) - worker.begun for worker in self._workers]
        return Outcome(
            choice=self._choice,
            ttft=self._first - arrivals,
            total=self._last - arrivals,
            seconds=seconds,
            lives=np.array(self._ended + stayed),
            billed=sum(map(math.ceil, self._ended)) + sum(stayed),
            busy=self._busy + sum(worker.batch.busy for worker in self._workers),
            widest=max([self._widest, *(worker.batch.widest for worker in self._workers)]),
            cold=self._cold,
            served=self._served,
            boots=self._boots,
            peak=self._peak,
        )

    def _handle(self) -> None:
        time, _, kind, worker, version = heappop(self._events)
        if kind == _BATCH:
            assert worker is not None
            if version == worker.version:
                self._advance(worker, time)
        elif kind == _READY:
            assert worker is not None
            self._take_jobs(worker, time)
            self._look_by(time)
        elif time == self._next_look:
            self._next_look = math.inf
            self._scale(time)

    def _push(self, time: float, kind: int, worker: _Worker | None = None, version: int = 0) -> None:
        self._order += 1
        heappush(self._events, (time, self._order, kind, worker, version))

    # Jobs.

    def _take_jobs(self, worker: _Worker, now: float) -> None:
        worker.ready = True
        worker.idle_since = now
        self._polling.append(worker)
        self._look_by(now + self._scaling.idle_timeout)
        if self._queue:
            self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        """Give what waits to those that ask: the first takes all that it may, and asks again as the last."""
        queue, polling = self._queue, self._polling
        while queue and polling:
            worker = polling.popleft()
            batch, before = worker.batch, worker.batch.end
            count = min(self._choice.concurrency - worker.running, len(queue))
            for _ in range(count):
                batch.add(queue.popleft(), now)
            worker.running += count
            self._served -= count * now
            worker.idle_since = math.inf
            if worker.running < self._choice.concurrency:
                polling.append(worker)
            if batch.end != before:
                worker.version += 1
                self._push(batch.end, _BATCH, worker, worker.version)

    def _advance(self, worker: _Worker, now: float) -> None:
        first, finished = worker.batch.advance()
        at = now + self._model.front
        for number in first:
            self._first[number] = at
        if finished:
            for number in finished:
                self._last[number] = at
            if worker.running == self._choice.concurrency:
                self._polling.append(worker)
            worker.running -= len(finished)
            self._served += len(finished) * at
            if not worker.running:
                worker.idle_since = at
                self._look_by(at + self._scaling.idle_timeout)
            if self._overdue:
                self._look_by(now)
        worker.version += 1
        if worker.batch.end < math.inf:
            self._push(worker.batch.end, _BATCH, worker, worker.version)
        if finished and self._queue:
            self._dispatch(now)

    # Workers.

    def _look_by(self, time: float) -> None:
        """Have the scaler look at the first of its moments at or after `time`."""
        if time >= self._next_look:
            return
        moment = math.ceil(time / LOOK_SECONDS - _ROUNDING) * LOOK_SECONDS
        if moment < self._next_look:
            self._next_look = moment
            self._push(moment, _LOOK)

    def _scale(self, now: float) -> None:
        scaling, queue, workers = self._scaling, self._queue, self._workers
        starting = sum(not worker.ready for worker in workers)
        oldest = self._traffic.times[queue[0]] if queue else now
        running = sum(worker.running for worker in workers)
        number = wanted(scaling, Load(len(queue), now - oldest, running, len(workers), starting))
        self._overdue = False
        if number > len(workers):
            for _ in range(number - len(workers)):
                self._boot(now)
                starting += 1
        else:
            idle = [worker for worker in workers if now - worker.idle_since >= scaling.idle_timeout - _ROUNDING]
            many = len(workers) - number
            for worker in idle[:many]:
                self._end(worker, now)
            self._overdue = len(idle) > many and len(workers) > scaling.least
        if queue and not starting and len(workers) < scaling.most:
            self._look_by(max(now + LOOK_SECONDS, oldest + scaling.value))
        if len(workers) > scaling.least:
            due = (worker.idle_since + scaling.idle_timeout for worker in workers)
            self._look_by(min((time for time in due if time > now + _ROUNDING), default=math.inf))

    def _boot(self, now: float) -> None:
        seconds = self._random.choice(self._model.boots)
        self._boots += 1
        self._cold += seconds
        worker = self._add(now)
        worker.boots_until = now + seconds
        self._push(worker.boots_until, _READY, worker)

    def _add(self, now: float) -> _Worker:
        worker = _Worker(Batch(self._model.speed, self._traffic.prompts, self._traffic.outputs), now)
        self._workers.append(worker)
        self._peak = max(self._peak, len(self._workers))
        return worker

    def _end(self, worker: _Worker, now: float) -> None:
        self._workers.remove(worker)
        self._polling.remove(worker)
        self._busy += worker.batch.busy
        self._widest = max(self._widest, worker.batch.widest)
        self._ended.append(now + self._model.stop - worker.begun)
