"""The workers of an endpoint: processes that run the handler, as many as the scaler wants.

A worker leads a process group but no session: Linux shares processors out among sessions (sched_autogroup), and
an engine's would starve this one. It ends with this process, whatever ends that.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from coldsnap.desk.serve.boots import Boots, prune, reason, tail
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.scaler import wanted
from coldsnap.foundation.plural import plural

State = Literal["initializing", "idle", "running", "throttled", "unhealthy"]
Turn = Literal["started", "ready", "ended"]
STATES: tuple[State, ...] = ("initializing", "idle", "running", "throttled", "unhealthy")

_LOOK_SECONDS = 0.1
_BOOT_SECONDS = 420.0
"""The platform's limit for a worker to begin taking jobs."""
_STOP_SECONDS = 45.0
"""From SIGTERM to SIGKILL for a worker that is not needed any more: DRAIN_SECONDS and some."""
_LAST_POSTS_SECONDS = 0.2
"""What a worker sent just before its end is read first."""
_LOG_ROOM = 100_000
"""Bytes on a disk, below which a worker may have ended because it could not write its log."""
_SET_PARENT_DEATH_SIGNAL = 1


@dataclass(slots=True)
class WorkerProcess:
    """A worker's process, from its start to its end."""

    id: str
    process: asyncio.subprocess.Process
    log: Path
    begun: float = field(default_factory=time.monotonic)
    ready: float | None = None
    """`time.monotonic()` when it first asked for jobs."""
    stopping: bool = False
    overdue: bool = False
    """It was killed because it took no jobs in time."""
    ended: float | None = None
    how: str = ""
    """How the process ended, in words."""


class Fleet:
    """Starts and stops workers while `run` runs."""

    def __init__(
        self, endpoint: Endpoint, handler: Path, environ: Mapping[str, str], logs: Path, say: Callable[[str], None]
    ) -> None:
        self.workers: dict[str, WorkerProcess] = {}
        self.past: list[WorkerProcess] = []
        """Those that have ended, in that order."""
        self.on_turn: Callable[[WorkerProcess, Turn], None] = lambda _worker, _turn: None
        """Called at each turn of a worker's life."""
        self._endpoint = endpoint
        self._plane: ControlPlane = endpoint.plane
        self._boots: Boots = endpoint.boots
        self._handler = handler
        self._environ = environ
        self._logs = logs
        self._say = say
        self._watches: set[asyncio.Task[None]] = set()
        self._started = 0
        self._missing = 0
        """Workers that are wanted and wait for a boot to be tried again."""

    async def run(self) -> None:
        """Keep as many workers as are wanted, until the endpoint stops. Cancelled, it could lose one that starts."""
        prune(list(self._logs.glob("worker-*.log")))  # of earlier lives
        while not self._endpoint.stopping:
            self._look()
            await self._scale()
            await asyncio.sleep(_LOOK_SECONDS)

    async def stop(self, seconds: float, hurry: asyncio.Event) -> None:
        """End every worker: running jobs have `seconds`, or until `hurry`."""
        for worker in self.workers.values():
            self._retire(worker)
        ending: asyncio.Future[Any] = asyncio.gather(*self._watches)
        hurried: asyncio.Future[Any] = asyncio.create_task(hurry.wait())
        await asyncio.wait([ending, hurried], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        for worker in self.workers.values():
            _kill_group(worker.process.pid)
        await ending

    def state(self, worker: WorkerProcess) -> State:
        """Return the platform's word for what a worker does."""
        if worker.ready is None:
            return "unhealthy" if self._boots.trouble else "initializing"
        client = self._plane.workers.get(worker.id)
        return "running" if client and client.running else "idle"

    def count(self) -> dict[str, int]:
        """Return the workers as /health counts them.

        `unhealthy` are those that wait for another boot, and after some that failed also one that boots. `throttled`
        is always 0: it is the platform's word for a machine without room, and here there is one machine.
        """
        counts = Counter(self.state(worker) for worker in self.workers.values() if not worker.stopping)
        counts["unhealthy"] += self._missing
        if self._boots.failed and not counts.total():
            counts["unhealthy"] = 1
        return {**{name: counts[name] for name in STATES}, "ready": counts["idle"] + counts["running"]}

    def _look(self) -> None:
        now = time.monotonic()
        for worker in self.workers.values():
            client = self._plane.workers.get(worker.id)
            if worker.ready is None and client and client.first_poll is not None:
                worker.ready = client.first_poll
                self._boots.succeed()
                self.on_turn(worker, "ready")
                self._say(f"{worker.id} takes jobs, {worker.ready - worker.begun:.1f} s after its start")
            elif worker.ready is None and now - worker.begun > _BOOT_SECONDS:
                worker.overdue = True
                _kill_group(worker.process.pid)

    async def _scale(self) -> None:
        scaling = self._endpoint.scaling
        alive = [worker for worker in self.workers.values() if not worker.stopping]
        starting = sum(worker.ready is None for worker in alive)
        number = wanted(scaling, self._endpoint.load(len(alive), starting))
        self._missing = max(0, number - len(alive)) if self._boots.failed else 0
        if number > len(alive):
            if not self._boots.failed:
                for _ in range(number - len(alive)):
                    await self._start()
            elif not starting and not self._boots.pause:
                await self._start()
            return
        idle = [worker for worker in alive if self._idle(worker) >= scaling.idle_timeout]
        for worker in idle[: len(alive) - number]:
            self._say(f"{worker.id} was idle for {scaling.idle_timeout:g} s and is stopped")
            self._retire(worker)

    def _idle(self, worker: WorkerProcess) -> float:
        """Return for how many seconds a worker has had nothing to do; below 0 if it has."""
        client = self._plane.workers.get(worker.id)
        return -1.0 if client is None or client.idle_since is None else time.monotonic() - client.idle_since

    async def _start(self) -> None:
        self._started += 1
        worker_id = f"worker-{self._started}"
        log = self._logs / f"{worker_id}.log"
        environ = {**self._environ, **self._plane.environment(worker_id)}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as file:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    self._handler,
                    env=environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    preexec_fn=_lead_group_and_end_with_parent,
                )
        except OSError as error:  # no room, no more processes: it may pass
            self._endpoint.boot_failed(f"{worker_id} could not be started: {error}")
            self._say(f"{self._boots.trouble or self._boots.why}; the next in {self._boots.pause:.0f} s")
            return
        worker = self.workers[worker_id] = WorkerProcess(worker_id, process, log)
        self.on_turn(worker, "started")
        self._say(f"{worker_id} starts: process {process.pid}, log {log}")
        watch = asyncio.create_task(self._watch(worker))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _watch(self, worker: WorkerProcess) -> None:
        code = await worker.process.wait()
        _kill_group(worker.process.pid)  # the SDK's ping process outlives a worker that is killed
        await asyncio.sleep(_LAST_POSTS_SECONDS)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        worker.ended, worker.how = time.monotonic(), how
        self.past.append(self.workers.pop(worker.id))
        self.on_turn(worker, "ended")
        stopping = self._endpoint.stopping
        self._plane.lose(worker.id, f"{worker.id} {'was stopped' if stopping else how}", blame=not stopping)
        if worker.stopping:
            return
        if worker.overdue:
            how = f"took no jobs within {_BOOT_SECONDS:g} s and was killed"
        else:
            how += _no_room(self._logs)
        if worker.ready is None:
            cause = None if worker.overdue else reason(worker.log)
            self._endpoint.boot_failed(cause or f"{worker.id} {how}")
            self._missing += 1  # until the next look
            prune([each.log for each in self.past if each.ready is None])
        if worker.ready is not None or self._boots.trouble is None:
            end = "".join(f"\n    {line}" for line in tail(worker.log))
            self._say(f"{worker.id} {how}; " + (f"the end of its log:{end}" if end else "its log is empty"))
        else:
            waiting = len(self._plane.queue)
            queue = f"; waiting for one: {plural(waiting, 'job')}" if waiting else ""
            self._say(f"{self._boots.trouble} ({worker.log}); the next in {self._boots.pause:.0f} s{queue}")

    def _retire(self, worker: WorkerProcess) -> None:
        if worker.stopping:
            return
        worker.stopping = True
        self._plane.retire(worker.id)
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(_STOP_SECONDS, self._kill_if_there, worker)

    def _kill_if_there(self, worker: WorkerProcess) -> None:
        if worker.id in self.workers:
            _kill_group(worker.process.pid)


def _no_room(logs: Path) -> str:
    """Return what to add where a worker ended: the SDK does when it cannot print, and cannot say so."""
    with contextlib.suppress(OSError):  # the folder was removed
        free = shutil.disk_usage(logs).free
        if free < _LOG_ROOM:
            return f", and the disk of its log, {logs}, has {free} bytes left"
    return ""


_libc = ctypes.CDLL(None)


def _lead_group_and_end_with_parent() -> None:
    """Run in the child before it becomes the worker. (uvloop knows no `process_group`.)"""
    os.setpgrp()
    if sys.platform == "linux":
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
