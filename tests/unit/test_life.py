"""A worker's running totals: when they are written, and that they add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from coldsnap.boot import Booted
from coldsnap.cost.books import HEADINGS
from coldsnap.engine import EngineInfo, Usage
from coldsnap.life import Life
from coldsnap.records.sink import LEDGER, Sink
from coldsnap.settings import Settings
from coldsnap.testing.fake_engine import FakeEngine
from coldsnap.timeline import Timeline

INFO = EngineInfo("0.32.0", "NVIDIA H200", 2, ("demo",), 512)


class Bench(FakeEngine):
    """A life of which a test moves the clock and the engine's usage."""

    def __init__(self, folder: Path) -> None:
        super().__init__(info=INFO)
        self.now = 100.0
        self.spent = Usage(busy=0.5, steps=1)
        self.lines: list[str] = []
        timeline = Timeline(lambda: 8.0)
        timeline.mark("engine")
        booted = Booted(self, Settings.read({}), timeline, None)
        self.sink = Sink(folder, self.lines.append)
        self.life = Life(booted, self.sink, clock=lambda: self.now)

    def usage(self) -> Usage:
        return self.spent

    def after(self, seconds: float, **spent: Any) -> None:
        self.now += seconds
        if spent:
            self.spent = Usage(**spent)
        self.life.tick()

    @property
    def written(self) -> list[dict[str, Any]]:
        return [record for record in map(orjson.loads, self.lines) if record["record"] == "worker"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("coldsnap.timeline.process_age", lambda: 8.0)
    return Bench(tmp_path)


def test_the_cold_start_comes_first_and_nothing_before_ready(bench: Bench) -> None:
    bench.life.tick()
    bench.life.drain()
    bench.life.end()
    assert bench.lines == []
    assert bench.life.ready().seconds == 8.0
    assert [orjson.loads(line)["record"] for line in bench.lines] == ["cold_start"]


def test_totals_are_written_every_ten_seconds_of_work_and_every_minute_without(bench: Bench) -> None:
    bench.life.ready()
    bench.after(9.0, busy=1.0, steps=5)
    assert bench.written == []
    bench.after(1.0)
    assert len(bench.written) == 1
    bench.after(59.0)
    assert len(bench.written) == 1
    bench.after(1.0)
    assert len(bench.written) == 2
    bench.life.end()
    assert [record["final"] for record in bench.written] == [False, False, True]


def test_the_totals_can_be_had_at_any_time_and_are_not_written_then(bench: Bench) -> None:
    assert bench.life.totals() is None
    bench.life.ready()
    bench.after(3.0, busy=1.0, steps=5)
    totals = bench.life.totals()
    assert totals is not None
    assert (totals.idle_gpu_seconds, totals.busy_gpu_seconds, totals.final) == (2 * 2.5, 2 * 0.5, False)
    assert bench.written == []


def test_the_parts_add_up_times_the_gpus(bench: Bench) -> None:
    bench.life.ready()
    bench.after(10.0, busy=3.5, overhead={"empty": 0.5, "lost": 0.25}, steps=40, lost_steps=2)
    bench.life.drain()
    bench.now += 2.3
    bench.life.end()
    record = bench.written[-1]
    assert [record[f"{part}_gpu_seconds"] for part in HEADINGS] == pytest.approx([16.0, 6.0, 1.5, 12.5, 4.6])
    assert record["gpu_seconds"] == pytest.approx(40.6)
    assert record["billed_seconds"] == 21
    assert record["usd"] == pytest.approx(21 * 2 * 0.00155)
    assert record["overhead_causes"] == {"empty": 1.0, "lost": 0.5}
    assert (record["steps"], record["lost_steps"], record["estimated"]) == (40, 2, False)


def test_joules_are_counted_from_ready_and_absent_without_counters(bench: Bench) -> None:
    bench.spent = Usage(joules=50.0, request_joules=5.0)
    bench.life.ready()
    bench.after(10.0, steps=2, joules=350.0, request_joules=105.0)
    assert (bench.written[-1]["joules"], bench.written[-1]["request_joules"]) == (300.0, 100.0)
    bench.after(10.0, steps=3)
    assert (bench.written[-1]["joules"], bench.written[-1]["request_joules"]) == (None, None)


def test_what_no_disk_and_no_bucket_took_is_counted(bench: Bench, tmp_path: Path) -> None:
    bench.life.ready()
    bench.sink.tally.unsent, bench.sink.tally.failed_uploads = 7, 2
    (tmp_path / LEDGER).unlink()
    (tmp_path / LEDGER).mkdir()
    bench.after(10.0, steps=2)
    bench.life.end()
    said = [{name: record[name] for name in COUNTS} for record in bench.written]
    assert said == [dict(zip(COUNTS, counts, strict=True)) for counts in ((0, 7, 2), (1, 7, 2))]


COUNTS = ("unwritten_records", "unsent_records", "failed_uploads")
