"""When an engine counts as hung, on a clock of the test's own."""

from __future__ import annotations

import pytest

from coldsnap.errors import EngineStalled
from coldsnap.vllm.stall import Watchdog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(10.0, clock)


def look(watchdog: Watchdog, clock: Clock, seconds: int, steps: int, *, busy: bool = True) -> None:
    for _ in range(seconds):
        clock.now += 1.0
        watchdog.look(steps, busy=busy)


def test_an_engine_with_requests_and_no_step_is_stalled(watchdog: Watchdog, clock: Clock) -> None:
    look(watchdog, clock, 10, 5)
    with pytest.raises(EngineStalled, match=r"no step for ENGINE_STALL_SECONDS=10; .* send the request again"):
        look(watchdog, clock, 1, 5)


def test_an_idle_engine_is_not_however_long_it_is_idle(watchdog: Watchdog, clock: Clock) -> None:
    look(watchdog, clock, 1000, 5, busy=False)
    look(watchdog, clock, 9, 5)
    with pytest.raises(EngineStalled):  # only now it has had requests for too long
        look(watchdog, clock, 2, 5)


def test_a_step_now_and_then_is_enough(watchdog: Watchdog, clock: Clock) -> None:
    for steps in range(100):
        look(watchdog, clock, 9, steps)
    with pytest.raises(EngineStalled):
        look(watchdog, clock, 11, 99)


def test_time_in_which_the_worker_itself_stood_still_does_not_count(watchdog: Watchdog, clock: Clock) -> None:
    look(watchdog, clock, 5, 5)
    clock.now += 3600.0
    look(watchdog, clock, 2, 5)
    with pytest.raises(EngineStalled):
        look(watchdog, clock, 3, 5)
