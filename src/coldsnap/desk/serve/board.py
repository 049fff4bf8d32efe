"""The jobs of an endpoint and the workers that run them: who waits, who runs what, how each ends.

A job whose worker is gone goes to another, once. It does not know how a worker is spoken to: `control_plane` does.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from coldsnap.desk.serve.job import RUN, RUNSYNC, Bell, Job, JobState, Terms, encode

ATTEMPTS: Final = 2
"""How often a job is tried whose worker ends: the platform retries once."""
NO_INPUT: Final = object()
"""Submitted as a job's input: the job has no `input` field at all. Only a batch take gets it past the SDK."""


class Journal(Protocol):
    """Where durable jobs are written down: `store.Store`."""

    def add(self, job: Job) -> None:
        """Write a new job down; raises when it cannot, and the job is not accepted."""

    def note(self, job: Job) -> None:
        """Write down what has become of a job."""

    def count(self, name: str, number: int) -> None:
        """Write down one of `Board.counts`."""


@dataclass(slots=True)
class Worker:
    """What has been seen of a worker. `first_poll` is `time.monotonic()`."""

    id: str
    first_poll: float | None = None
    taken: int = 0
    pings: int = 0
    unhealthy: str | None = None
    running: set[str] = field(default_factory=set)
    """The jobs that it has taken and not ended."""
    idle_since: float | None = None
    retired: bool = False
    """It gets no more jobs: it is about to be stopped."""
    stops: list[str] = field(default_factory=list)
    """Jobs that it is to stop, and has not been told of."""
    stopped: Bell = field(default_factory=Bell)


class Board:
    """Everything that is known of jobs and workers, changed by clients, by workers and by the fleet."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, Worker] = {}
        self.counts: Counter[str] = Counter()
        """Jobs that reached each end, by its name, and those that were `retried`."""
        self.on_end: Callable[[Job], None] = lambda _: None
        """Called with every job that has ended."""
        self.lost: set[str] = set()
        """Workers whose process has ended."""
        self._journal = journal
        self._queue: deque[Job] = deque()
        self._queued = Bell()
        self._submitted = 0

    def submit(self, job_input: object, *, sync: bool = False, terms: Terms | None = None, **more: Any) -> Job:
        """Queue a job; `sync` gives it the limits of /runsync instead of /run, `more` are fields beside its input."""
        job_id = f"{'sync-' if sync else ''}{uuid.uuid4()}-u1"
        fields: dict[str, object] = {"id": job_id, **more}
        if job_input is not NO_INPUT:
            fields["input"] = job_input
        job = Job(job_id, self._submitted, encode(fields), terms or (RUNSYNC if sync else RUN))
        if self._journal and job.terms.durable:
            self._journal.add(job)
        self._submitted += 1
        self.jobs[job_id] = job
        self._queue.append(job)
        self._queued.ring()
        return job

    def adopt(self, jobs: Iterable[Job], counts: Mapping[str, int]) -> None:
        """Take over jobs of an earlier life, in their order; those that were running wait again."""
        self.counts.update(counts)
        for job in jobs:
            self.jobs[job.id] = job
            self._submitted = max(self._submitted, job.number + 1)
            if job.state is JobState.IN_PROGRESS:
                self.again(job, "the platform was stopped", blame=False)
            elif job.state is JobState.IN_QUEUE:
                self._queue.append(job)
        waiting = sorted(self._queue, key=lambda job: job.number)
        self._queue.clear()
        self._queue.extend(waiting)
        self._queued.ring()

    @property
    def queue(self) -> Collection[Job]:
        """The jobs that wait, the next one first."""
        return self._queue

    def cancel(self, job_id: str, why: str = "the job was cancelled") -> bool:
        """End a job as cancelled and tell its worker over the stop channel; False if it had already ended."""
        return self.stop(self.jobs[job_id], JobState.CANCELLED, why)

    def stop(self, job: Job, state: JobState, why: str) -> bool:
        """End a job from here, as cancelled or timed out; False if it had already ended."""
        if job.done:
            return False
        if job.worker_id is None:
            self._queue.remove(job)
        else:
            worker = self.workers[job.worker_id]
            worker.stops.append(job.id)
            worker.stopped.ring()
        self.end(job, state, error=why)
        return True

    def retry(self, job: Job) -> None:
        """Queue a job again that has ended without completing; what came of it before is gone."""
        job.restart()
        job.attempts = 0
        job.timestamps.submitted = time.monotonic()
        self._count("retried")
        self._queue.append(job)
        self.note(job)
        self._queued.ring()

    def purge(self) -> int:
        """Cancel all jobs that wait; return how many they were."""
        waiting = list(self._queue)
        for job in waiting:
            self.cancel(job.id, "the queue was purged")
        return len(waiting)

    def retire(self, worker_id: str) -> None:
        """Give a worker no more jobs, and hold its polls no longer: it waits them out after SIGTERM."""
        worker = self.workers.setdefault(worker_id, Worker(worker_id))
        worker.retired = True
        self._queued.ring()
        worker.stopped.ring()

    def lose(self, worker_id: str, why: str, *, blame: bool = True) -> None:
        """Learn that a worker's process has ended: its jobs wait again, before all others, or fail.

        Without `blame` the try does not count: the worker was stopped from here.
        """
        worker = self.workers.pop(worker_id, None)
        self.lost.add(worker_id)
        running = [self.jobs[job_id] for job_id in worker.running] if worker else []
        for job in sorted(running, key=lambda job: job.number, reverse=True):
            self.again(job, why, blame=blame)
        self._queued.ring()

    def forget(self, job: Job) -> None:
        """Drop a job that has ended."""
        del self.jobs[job.id]

    def note(self, job: Job) -> None:
        """Write down what has become of a durable job."""
        if self._journal and job.terms.durable:
            self._journal.note(job)

    # What a worker does.

    def see(self, worker_id: str) -> Worker:
        """Return the worker, which is new or was heard of again."""
        return self.workers.setdefault(worker_id, Worker(worker_id))

    def take(self, worker: Worker, most: int) -> list[Job]:
        """Give the worker the next jobs."""
        jobs = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
        worker.taken += len(jobs)
        worker.idle_since = None
        for job in jobs:
            job.take(worker.id)
            worker.running.add(job.id)
            self.note(job)
        return jobs

    def end(self, job: Job, state: JobState, *, output: Any = None, error: str | None = None) -> None:
        """End a job; its worker has one less."""
        worker = self.workers.get(job.worker_id or "")
        if worker:
            worker.running.discard(job.id)
            worker.idle_since = None if worker.running else time.monotonic()
        self._count(state)
        job.end(state, output=output, error=error)
        self.note(job)
        self.on_end(job)

    def again(self, job: Job, why: str, *, blame: bool = True) -> None:
        """Let a job wait again whose worker ends, before all others, or fail."""
        worker = self.workers.get(job.worker_id or "")
        if worker:
            worker.running.discard(job.id)
        if job.read:
            text = f"{why} while it ran the job; some of its output had been delivered, so it was not tried again"
            self.end(job, JobState.FAILED, error=text)
        elif blame and job.attempts >= ATTEMPTS:
            self.end(job, JobState.FAILED, error=f"{why} while it ran the job; it was tried {job.attempts} times")
        else:
            job.restart()
            job.attempts -= not blame
            if blame:
                self._count("retried")
            self._queue.appendleft(job)
            self.note(job)
            self._queued.ring()

    def _count(self, name: str) -> None:
        self.counts[name] += 1
        if self._journal:
            self._journal.count(name, self.counts[name])
