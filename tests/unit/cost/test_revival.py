"""Freezing, suspending and restoring a worker, told by its clocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from coldsnap.boot import Booted
from coldsnap.cost.books import HEADINGS
from coldsnap.cost.revival import Clocks, Revival, Watch
from coldsnap.engine import EngineInfo, Usage
from coldsnap.jobs.job import Jobs
from coldsnap.life import Life
from coldsnap.records.sink import Sink
from coldsnap.settings import Settings
from coldsnap.testing.fake_engine import FakeEngine
from coldsnap.timeline import Timeline

INFO = EngineInfo("0.32.0", "NVIDIA H200", 2, ("demo",), 512)


class Machine:
    """Clocks that a test moves."""

    def __init__(self) -> None:
        self.clocks = Clocks(100.0, 5000.0, 1_790_000_000.0, 20.0)

    def runs(self, seconds: float) -> None:
        self._add(seconds, seconds, seconds)

    def computes(self, seconds: float) -> None:
        self._add(seconds, seconds, seconds, seconds)

    def sleeps(self, seconds: float) -> None:
        self._add(0.0, seconds, seconds)

    def is_a_checkpoint(self, seconds: float) -> None:
        self._add(0.0, 0.0, seconds)

    def _add(self, *seconds: float) -> None:
        moved = zip(dataclasses.astuple(self.clocks), (*seconds, 0.0), strict=False)
        self.clocks = Clocks(*(clock + by for clock, by in moved))


@pytest.mark.parametrize(
    ("happens", "found"),
    [
        (lambda machine: machine.runs(600.0), Revival("frozen", 599.0, 599.0)),
        (lambda machine: machine.sleeps(600.0), Revival("suspended", 600.0, 0.0)),
        (lambda machine: machine.is_a_checkpoint(600.0), Revival("restored", 600.0, 0.0)),
        (lambda machine: machine.runs(1.0), None),
        (lambda machine: machine.runs(9.0), None),  # the processor was busy with something else
        (lambda machine: machine.computes(60.0), None),  # one call held the loop
        (lambda machine: machine.sleeps(0.5), None),
        (lambda machine: machine.is_a_checkpoint(-3600.0), None),  # the time of day was put right
        (lambda machine: machine.is_a_checkpoint(2.0), None),
    ],
)
def test_the_clocks_tell_how_a_process_was_away(happens: Callable[[Machine], None], found: Revival | None) -> None:
    machine = Machine()
    watch = Watch(machine.clocks, every=1.0)
    happens(machine)
    seen = watch.look(machine.clocks)
    if found is None or seen is None:
        assert seen is found
    else:
        assert seen.cause == found.cause
        assert dataclasses.astuple(seen)[1:] == pytest.approx(dataclasses.astuple(found)[1:])
    machine.runs(1.0)
    assert watch.look(machine.clocks) is None


class Worker:
    """A worker that is ready, with its ledger."""

    def __init__(self, folder: Path) -> None:
        self.machine = Machine()
        self.spent = Usage(busy=0.5, steps=1)
        self.lines: list[str] = []
        engine = FakeEngine(info=INFO)
        engine.usage = lambda: self.spent  # type: ignore[method-assign]
        timeline = Timeline(lambda: 8.0)
        timeline.mark("engine")
        sink = Sink(folder, self.lines.append)
        booted = Booted(engine, Settings.read({}), timeline, None)
        self.life = Life(booted, sink, lambda: self.machine.clocks.monotonic, lambda: self.machine.clocks)
        self.jobs = Jobs(engine, booted.settings, sink, lambda _: None)
        self.life.ready()

    async def job(self) -> dict[str, Any]:
        job = {"id": "a", "input": {"prompt": "a"}}
        assert [chunk async for chunk in self.jobs.handle(job)]
        return self.records("request")[-1]

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in map(orjson.loads, self.lines) if record["record"] == kind]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr("coldsnap.timeline.process_age", lambda: 8.0)
    return Worker(tmp_path)


async def test_a_job_says_whether_its_worker_was_booted_revived_or_warm(worker: Worker) -> None:
    assert [(await worker.job())["boot"] for _ in range(3)] == ["fresh", "warm", "warm"]
    worker.machine.is_a_checkpoint(3600.0)
    assert [(await worker.job())["boot"] for _ in range(2)] == ["revived", "warm"]
    boots = [(record["boot"], record["revival"], record["away_seconds"]) for record in worker.records("cold_start")]
    assert boots == [("fresh", None, 0.0), ("revived", "restored", 3600.0)]


def test_a_revival_is_written_also_if_no_job_comes(worker: Worker) -> None:
    worker.machine.sleeps(60.0)
    worker.life.tick()
    worker.life.tick()
    revived = worker.records("cold_start")[1:]
    assert [record["revival"] for record in revived] == ["suspended"]
    assert (revived[0]["seconds"], revived[0]["phases"], revived[0]["beside"]) == (0.0, {}, {})


@pytest.mark.parametrize("away", ["sleeps", "is_a_checkpoint", "runs"])
def test_the_books_close_without_the_time_away(worker: Worker, away: str) -> None:
    for seconds in range(5):
        worker.machine.runs(1.0)
        worker.spent = Usage(busy=0.5 + 0.25 * seconds, steps=2 + seconds)
        worker.life.tick()
    getattr(worker.machine, away)(3600.0)
    worker.life.tick()
    worker.machine.runs(2.0)
    worker.life.drain()
    worker.machine.runs(3.0)
    worker.life.end()
    record = worker.records("worker")[-1]
    lived = 8.0 + 5.0 + 2.0 + 3.0 + (1.0 if away == "runs" else 0.0)  # a look that was due is not a freeze
    assert record["gpu_seconds"] == pytest.approx(2 * lived)
    assert sum(record[f"{part}_gpu_seconds"] for part in HEADINGS) == pytest.approx(record["gpu_seconds"])
    assert record["idle_gpu_seconds"] == pytest.approx(2 * (lived - 8.0 - 1.0 - 3.0))
    assert record["drain_gpu_seconds"] == pytest.approx(2 * 3.0)
