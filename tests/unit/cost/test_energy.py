"""Joules: that they add up to what was measured, whoever ends when, and that none are made up."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldsnap.cost.energy import EnergyCounters, EnergyShares
from coldsnap.cost.shares import Ledger, Step
from coldsnap.cost.step_model import StepModel
from coldsnap.testing.fake_nvml import FakeNvml


def charge(ledger: Ledger, start: float, seconds: float, *numbers: int) -> None:
    """Charge a step to requests that decode a token each, at equal cost."""
    n = len(numbers)
    tokens = np.zeros((n, 3))
    tokens[:, 1] = 1
    ledger.charge(Step(start, start + seconds, np.array(numbers, np.intp), tokens, np.ones(n)))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(StepModel(1e9, 1.0))


def test_an_interval_is_shared_by_seconds_and_the_idle_rest_is_the_workers(ledger: Ledger) -> None:
    energy = EnergyShares(ledger)
    charge(ledger, 0.0, 0.4, 0, 1)
    charge(ledger, 0.4, 0.2, 1)
    charge(ledger, 0.6, 0.1)  # an empty step: overhead
    energy.measured(100.0, 1.0)
    assert energy.take(0) == pytest.approx(20.0)
    assert energy.take(1) == pytest.approx(40.0)
    assert energy.of_requests == pytest.approx(60.0)
    assert energy.total == 100.0


def test_who_ends_between_two_readings_pays_the_last_power_and_the_rest_evens_out(ledger: Ledger) -> None:
    energy = EnergyShares(ledger)
    charge(ledger, 0.0, 1.0, 0, 1)
    energy.measured(100.0, 1.0)
    charge(ledger, 1.0, 0.4, 0, 1)
    assert energy.take(0) == pytest.approx(50.0 + 0.2 * 100.0)
    ledger.take(0)
    charge(ledger, 1.4, 0.6, 1)
    energy.measured(300.0, 1.0)
    assert energy.take(1) == pytest.approx(50.0 + 280.0)
    assert energy.of_requests == pytest.approx(energy.total) == 400.0


def test_what_was_billed_ahead_and_not_used_is_not_billed_again(ledger: Ledger) -> None:
    energy = EnergyShares(ledger)
    charge(ledger, 0.0, 1.0, 0, 1)
    energy.measured(400.0, 1.0)
    charge(ledger, 1.0, 0.9, 0)
    assert energy.take(0) == pytest.approx(200.0 + 360.0)
    ledger.take(0)
    charge(ledger, 1.9, 0.1, 1)
    energy.measured(100.0, 1.0)  # 260 J were billed ahead
    charge(ledger, 2.0, 1.0, 1)
    energy.measured(300.0, 1.0)
    assert energy.take(1) == pytest.approx(200.0 + 40.0)
    assert energy.of_requests == pytest.approx(energy.total)


def test_what_ran_before_the_first_reading_has_no_joules(ledger: Ledger) -> None:
    charge(ledger, 0.0, 5.0, 0)
    energy = EnergyShares(ledger)
    charge(ledger, 5.0, 0.5, 0)
    energy.measured(100.0, 1.0)
    assert energy.take(0) == pytest.approx(50.0)
    assert energy.take(10_000) == 0.0


def test_joules_without_an_owner_are_the_workers_own(ledger: Ledger) -> None:
    energy = EnergyShares(ledger)
    charge(ledger, 0.0, 1.0, 0)
    energy.measured(100.0, 1.0)
    energy.write_off(energy.take(0))
    assert (energy.of_requests, energy.total) == (0.0, 100.0)


step = st.tuples(st.just("step"), st.floats(1e-4, 0.2), st.sets(st.integers(0, 99), max_size=6))
take = st.tuples(st.just("take"), st.integers(0, 120), st.none())
read = st.tuples(st.just("read"), st.floats(0.0, 500.0), st.floats(0.0, 0.3))


@given(st.lists(st.one_of(step, take, read), max_size=60))
def test_requests_and_worker_have_what_was_measured(events: list[tuple[str, float, object]]) -> None:
    ledger = Ledger(StepModel(1e9, 1.0))
    energy = EnergyShares(ledger)
    now = last = highest = taken = ahead = 0.0
    for kind, value, more in events:
        if kind == "step":
            charge(ledger, now, value, *sorted(more))  # type: ignore[call-overload]
            now += value
        elif kind == "take":
            joules = energy.take(int(value))
            assert joules >= 0
            ahead += sum(ledger.take(int(value))) * highest
            taken += joules
        else:
            now += float(more) + 1e-3  # type: ignore[arg-type]
            energy.measured(value, now - last)
            highest, last = max(highest, value / (now - last)), now
    assert energy.of_requests == pytest.approx(taken + energy._owed.sum())
    assert energy.of_worker >= -1e-9
    rest = energy.total - energy.of_requests - energy.of_worker
    assert rest == pytest.approx(energy._pool, abs=1e-6)
    assert rest >= -ahead - 1e-6
    # A last interval in which nobody ended and the power stayed closes the books.
    charge(ledger, now, 1.0, 0)
    energy.measured(1.0 - rest if rest < 0 else 1.0, 1.0)
    assert energy.of_requests + energy.of_worker == pytest.approx(energy.total)


class TestCounters:
    def counters(self, nvml: FakeNvml) -> tuple[EnergyCounters, list[str]]:
        said: list[str] = []
        return EnergyCounters([1, 0], said.append, lambda: nvml), said

    def until_read(self, nvml: FakeNvml, readings: int) -> None:
        end = time.monotonic() + 20
        while nvml.readings < readings:
            assert time.monotonic() < end
            time.sleep(0.01)

    def test_all_gpus_count(self) -> None:
        nvml = FakeNvml(millijoules=[1000, 2500])
        counters, said = self.counters(nvml)
        assert counters.latest is None
        counters.start()
        self.until_read(nvml, 3)
        nvml.millijoules[0] = 9000
        self.until_read(nvml, 7)
        counters.end()
        assert counters.latest is not None
        assert counters.latest.joules == 11.5
        assert said == []

    @pytest.mark.parametrize("then", [None, 10])
    def test_a_counter_that_fails_or_goes_back_ends_the_joules(self, then: int | None) -> None:
        nvml = FakeNvml(millijoules=[1000, 2500])
        counters, said = self.counters(nvml)
        counters.start()
        self.until_read(nvml, 2)
        nvml.millijoules[0] = then
        counters._thread.join(20)
        counters.end()
        assert counters.latest is None
        assert len(said) == 1

    def test_one_gpu_without_a_counter_is_enough_for_none(self) -> None:
        nvml = FakeNvml(millijoules=[None, 2500])
        counters, said = self.counters(nvml)
        counters.start()
        counters._thread.join(20)
        assert counters.latest is None
        assert said == ["no joules in costs and records: Not Supported"]
