"""The step meter on a scheduler that behaves as vLLM's does, through a real FIFO."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coldsnap.cost import step_meter
from coldsnap.cost.step_reader import Frame, StepReader


class FakeRequest:
    def __init__(self, prompt: int) -> None:
        self.num_prompt_tokens = prompt
        self.num_tokens = prompt
        self.num_computed_tokens = 0
        self.num_preemptions = 0


class FakeScheduler:
    """What the meter sees of vLLM's scheduler; a test says what each step holds."""

    def __init__(self, vllm_config: Any, **_: Any) -> None:
        self.requests: dict[str, FakeRequest] = {}
        self.finished: set[str] = set()

    def schedule(self, plan: dict[str, int]) -> Any:
        for name, new in plan.items():
            self.requests[name].num_computed_tokens += new
        finished, self.finished = self.finished, set()
        return SimpleNamespace(num_scheduled_tokens=plan, finished_req_ids=finished)

    def update_from_output(self, output: Any) -> str:
        return "outputs"

    def get_num_unfinished_requests(self) -> int:
        return len(self.requests)

    def add(self, name: str, prompt: int, cached: int = 0) -> FakeRequest:
        request = self.requests[name] = FakeRequest(prompt)
        request.num_computed_tokens = cached
        return request

    def finish(self, name: str) -> None:
        del self.requests[name]
        self.finished.add(name)

    def step(self, **plan: int) -> None:
        assert self.update_from_output(self.schedule(plan)) == "outputs"


class Bench:
    """A metered scheduler and what has been read of it, ids in place of numbers."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.names: dict[int, str] = {}
        self.reader = StepReader(self._frame)

    def scheduler(self) -> Any:
        class Config:
            scheduler_cls: str | None = step_meter.FACTORY

            def get_scheduler_cls(self) -> type:
                assert self.scheduler_cls is None
                return FakeScheduler

        config = SimpleNamespace(scheduler_config=Config())
        scheduler = step_meter.make_scheduler(config)
        assert config.scheduler_config.scheduler_cls == step_meter.FACTORY
        return scheduler

    def _frame(self, frame: Frame) -> None:
        for name, number in frame.events:
            if name is None:
                del self.names[number]
            else:
                assert number not in self.names
                self.names[number] = name
        self.frames.append(frame)

    def last(self) -> dict[str, tuple[float, ...]]:
        """Return the latest step as {request: (prefill, decode, recomputed, context)}."""
        self.reader.drain()
        step = self.frames[-1].step
        rows = zip(step.numbers.tolist(), step.tokens.tolist(), step.context.tolist(), strict=True)
        return {self.names[number]: (*tokens, context) for number, tokens, context in rows}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench()
    monkeypatch.setenv(step_meter.VARIABLE, bench.reader.path)
    yield bench
    bench.reader.opened()


def test_prefill_in_chunks_then_decodes(bench: Bench) -> None:
    scheduler = bench.scheduler()
    bench.reader.opened()
    assert not Path(bench.reader.path).exists()
    scheduler.add("a", 100, cached=32)
    scheduler.add("b", 5)
    scheduler.step(a=40, b=5)
    assert bench.last() == {"a": (40, 0, 0, 72), "b": (5, 0, 0, 5)}
    scheduler.step(a=28, b=1)
    assert bench.last() == {"a": (28, 0, 0, 100), "b": (0, 1, 0, 6)}
    scheduler.step(b=1, a=1)
    assert bench.last() == {"a": (0, 1, 0, 101), "b": (0, 1, 0, 7)}


def test_what_a_preemption_throws_away_is_recomputed_not_new(bench: Bench) -> None:
    scheduler = bench.scheduler()
    request = scheduler.add("a", 10)
    scheduler.step(a=10)
    for _ in range(5):
        request.num_tokens += 1
        scheduler.step(a=1)
    request.num_preemptions, request.num_computed_tokens, request.num_tokens = 1, 0, 16
    scheduler.step(a=12)
    assert bench.last() == {"a": (0, 0, 12, 12)}
    scheduler.step(a=4)  # up to 15 had been computed; the last output token had not
    assert bench.last() == {"a": (0, 1, 3, 16)}
    scheduler.step(a=1)
    assert bench.last() == {"a": (0, 1, 0, 17)}


def test_a_preempted_prefill_goes_on_where_it_was(bench: Bench) -> None:
    scheduler = bench.scheduler()
    request = scheduler.add("a", 100)
    scheduler.step(a=60)
    request.num_preemptions, request.num_computed_tokens = 1, 16  # one block was still cached
    scheduler.step(a=84)
    assert bench.last() == {"a": (40, 0, 44, 100)}


def test_rejected_drafts_are_decodes_and_no_recomputation(bench: Bench) -> None:
    scheduler = bench.scheduler()
    request = scheduler.add("a", 10)
    scheduler.step(a=10)
    scheduler.step(a=4)
    assert bench.last() == {"a": (0, 4, 0, 14)}
    request.num_computed_tokens -= 3
    scheduler.step(a=4)
    assert bench.last() == {"a": (0, 4, 0, 15)}
    request.num_computed_tokens -= 2
    scheduler.step(a=1)
    assert bench.last() == {"a": (0, 1, 0, 14)}


def test_steps_in_flight_together_share_no_instant(bench: Bench) -> None:
    scheduler = bench.scheduler()
    scheduler.add("a", 8)
    flight = [scheduler.schedule({"a": 8})]
    for _ in range(4):
        flight.append(scheduler.schedule({"a": 1}))
        scheduler.update_from_output(flight.pop(0))
    scheduler.finish("a")
    scheduler.update_from_output(flight.pop(0))
    scheduler.step()
    bench.reader.drain()
    steps = [frame.step for frame in bench.frames]
    assert len(steps) == 6
    assert sum(step.tokens[:, 1].sum() for step in steps) == 4
    for before, after in pairwise(steps):
        assert before.start < before.end <= after.start
    assert steps[1].start == steps[0].end
    assert bench.names == {}


def test_idle_time_is_in_no_step(bench: Bench) -> None:
    scheduler = bench.scheduler()
    scheduler.add("a", 8)
    scheduler.step(a=8)
    scheduler.step(a=1)
    scheduler.finish("a")
    scheduler.step()
    scheduler.add("b", 8)
    between = step_meter.now()
    scheduler.step(b=8)
    bench.reader.drain()
    first, second, _, last = (frame.step for frame in bench.frames)
    assert second.start == first.end
    assert last.start >= between


def test_numbers_are_used_again_and_an_unscheduled_request_comes_and_goes(bench: Bench) -> None:
    scheduler = bench.scheduler()
    for name in ("a", "b", "waiting"):
        scheduler.add(name, 4)
    scheduler.step(a=4, b=4)
    scheduler.finish("a")
    scheduler.finish("waiting")
    scheduler.add("c", 4)
    scheduler.step(b=1, c=4)
    assert bench.last() == {"b": (0, 1, 0, 5), "c": (4, 0, 0, 4)}
    assert "waiting" in [name for name, _ in bench.frames[-1].events]
    assert max(bench.names) <= 2


def test_a_full_pipe_loses_frames_but_no_request_and_no_time(bench: Bench) -> None:
    scheduler = bench.scheduler()
    count = 600  # so that frames are longer than what a pipe takes whole or not at all
    for i in range(count):
        scheduler.add(f"r{i}", 4)
    scheduler.step(**{f"r{i}": 4 for i in range(count)})
    plan = {f"r{i}": 1 for i in range(count)}
    for _ in range(300):
        scheduler.step(**plan)
    scheduler.finish("r0")
    scheduler.add("late", 4)
    del plan["r0"]
    scheduler.step(**plan, late=4)
    bench.reader.drain()
    assert len(bench.frames) < 300
    scheduler.step(**plan, late=1)
    assert bench.last()["late"] == (0, 1, 0, 5)
    assert "r0" not in bench.names.values()
    frame = bench.frames[-1]
    assert len(bench.frames) + frame.lost_steps == 303
    lost = frame.step.start - bench.frames[-2].step.end
    assert frame.lost_seconds == pytest.approx(lost)


def test_a_scheduler_that_differs_ends_the_metering_and_nothing_else(bench: Bench) -> None:
    scheduler = bench.scheduler()
    request = scheduler.add("a", 8)
    scheduler.step(a=8)
    del request.num_preemptions
    del request.num_prompt_tokens
    scheduler.step(a=3)
    scheduler.step(a=1)
    bench.reader.drain()
    assert [bool(frame.broken) for frame in bench.frames] == [False, True]
    assert bench.frames[-1].broken is not None
    assert "num_preemptions" in bench.frames[-1].broken


def test_without_a_reader_the_scheduler_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setenv(step_meter.VARIABLE, bench.reader.path)
    bench.reader.opened()
    assert type(bench.scheduler()) is FakeScheduler
    monkeypatch.delenv(step_meter.VARIABLE)
    assert type(bench.scheduler()) is FakeScheduler


async def test_frames_are_read_while_the_loop_runs(bench: Bench) -> None:
    import asyncio

    scheduler = bench.scheduler()
    scheduler.add("a", 8)
    bench.reader.listen()
    bench.reader.listen()
    for _ in range(3):
        scheduler.step(a=1)
        await asyncio.sleep(0.05)
    assert len(bench.frames) == 3


def test_an_id_of_any_length_is_metered(bench: Bench) -> None:
    scheduler = bench.scheduler()
    name = "x" * 100_000
    scheduler.add(name, 3)
    scheduler.step(**{name: 3})
    bench.reader.drain()
    scheduler.step()  # the pipe had room for a part
    assert bench.last() == {}
    assert bench.names == {0: name}
