"""Accounts on frames made by hand: which job pays, when an account closes, what happens without frames."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from coldsnap.cost.accounts import Account, Accounts
from coldsnap.cost.energy import EnergyCounters, Reading
from coldsnap.cost.shares import LOST, TAIL, Ledger, Step
from coldsnap.cost.step_model import StepModel
from coldsnap.cost.step_reader import Frame
from coldsnap.engine import Meter

Tokens = dict[int, tuple[int, int, int]]


class Bench:
    """Accounts, the warnings they gave, and a clock for the steps."""

    def __init__(self, unmetered: str | None = None, energy: EnergyCounters | None = None) -> None:
        self.warnings: list[str] = []
        self.clock = 0.0
        self.wall = 0.0
        """What the equal split goes by."""
        ledger = Ledger(StepModel(1e9, 1e5))
        self.accounts = Accounts(ledger, unmetered, self.warnings.append, lambda: self.wall, energy)

    def open(self, name: str, requests: int = 1) -> tuple[Account, Meter]:
        meter = Meter()
        return self.accounts.open(name, requests, meter), meter

    def frame(
        self,
        tokens: Tokens | None = None,
        begin: dict[int, str] | None = None,
        gone: tuple[int, ...] = (),
        **more: Any,
    ) -> None:
        """Let a step of one second arrive."""
        rows = tokens or {}
        step = Step(
            self.clock, self.clock + 1, np.array(list(rows), dtype=np.intp),
            np.array(list(rows.values()), dtype=float).reshape(-1, 3), np.full(len(rows), 100.0),
        )  # fmt: skip
        self.clock += 1
        events = [
            *((None, number) for number in gone),
            *((name, number) for number, name in (begin or {}).items()),
        ]
        fields: dict[str, Any] = {"lost_steps": 0, "lost_seconds": 0.0} | more
        self.accounts._frame(Frame(step, 0.0, events=tuple(events), **fields))


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_a_call_pays_its_steps_once_it_ends(bench: Bench) -> None:
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.accounts.first_output(account)
    bench.frame({0: (0, 1, 0)})
    bench.accounts.close(account, aborted=False)
    assert (meter.prefill_seconds, meter.gpu_seconds) == pytest.approx((1.0, 2.0))
    assert not meter.estimated
    assert meter.calls[0].done()
    bench.frame({0: (0, 1, 0)})  # scheduled before its end was known
    bench.frame(gone=(0,))
    assert meter.gpu_seconds == pytest.approx(2.0)
    usage = bench.accounts.usage()
    assert (usage.busy, usage.overhead[TAIL]) == pytest.approx((2.0, 1.0))
    assert usage.spent == pytest.approx(4.0)


async def test_an_aborted_call_pays_until_the_engine_lets_go(bench: Bench) -> None:
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.accounts.close(account, aborted=True)
    assert meter.gpu_seconds == 0.0
    bench.frame({0: (0, 1, 0)})
    settled = asyncio.create_task(meter.settle())
    await asyncio.sleep(0)
    assert not settled.done()
    bench.frame(gone=(0,))
    await asyncio.wait_for(settled, 0.1)
    assert meter.gpu_seconds == pytest.approx(2.0)


async def test_a_call_that_is_cut_before_an_output_came_counts_the_tokens_of_its_steps(bench: Bench) -> None:
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.frame({0: (0, 1, 0)})
    bench.frame({0: (0, 1, 0)})
    bench.accounts.close(account, aborted=True)
    bench.frame(gone=(0,))
    assert (meter.prompt_tokens, meter.completion_tokens) == (10, 3)  # the prompt's last step gives the first


async def test_an_aborted_call_waits_no_longer_than_a_second(bench: Bench) -> None:
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.accounts.close(account, aborted=True)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await meter.settle()
    assert loop.time() - begun == pytest.approx(1.0)
    assert meter.gpu_seconds == pytest.approx(1.0)


async def test_a_call_that_is_closed_after_its_job_is_waited_for(bench: Bench) -> None:
    """Starlette drops a response's generator when its client has gone; it is closed a moment later."""
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    settled = asyncio.create_task(meter.settle())
    await asyncio.sleep(0.1)
    bench.accounts.close(account, aborted=True)
    bench.frame(gone=(0,))
    await settled
    assert meter.gpu_seconds == pytest.approx(1.0)


async def test_what_a_call_costs_after_its_jobs_record_is_overhead(bench: Bench) -> None:
    account, meter = bench.open("job")
    await meter.settle()
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.accounts.close(account, aborted=False)
    assert meter.gpu_seconds == 0.0
    usage = bench.accounts.usage()
    assert (usage.busy, usage.overhead[TAIL]) == pytest.approx((0.0, 1.0))


async def test_many_completions_of_one_call_are_one_account(bench: Bench) -> None:
    account, meter = bench.open("job", requests=2)
    bench.frame({0: (10, 0, 0), 1: (10, 0, 0)}, begin={0: "0_job-0123abcd", 1: "1_job-0123abcd"})
    bench.accounts.close(account, aborted=True)
    bench.frame(gone=(0,))
    assert not meter.calls[0].done()
    bench.frame(gone=(1,))
    assert meter.calls[0].done()
    assert meter.gpu_seconds == pytest.approx(1.0)


async def test_several_calls_may_fill_one_meter(bench: Bench) -> None:
    first, meter = bench.open("cmpl-1-0")
    second = bench.accounts.open("cmpl-1-1", 1, meter)
    bench.frame({0: (10, 0, 0), 1: (10, 0, 0)}, begin={0: "cmpl-1-0-0123abcd", 1: "cmpl-1-1-0123abce"})
    bench.accounts.close(first, aborted=False)
    bench.accounts.close(second, aborted=False)
    assert meter.gpu_seconds == pytest.approx(1.0)


async def test_calls_of_the_same_name_are_told_apart_by_the_engines_suffix(bench: Bench) -> None:
    first, one = bench.open("job")
    second, two = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-aaaaaaaa"})
    bench.frame({1: (10, 0, 0)}, begin={1: "job-bbbbbbbb"})
    bench.frame({1: (0, 1, 0)})
    bench.accounts.close(first, aborted=False)
    bench.accounts.close(second, aborted=False)
    assert (one.gpu_seconds, two.gpu_seconds) == pytest.approx((1.0, 2.0))


async def test_ids_as_they_are_where_vllm_does_not_add_to_them(bench: Bench) -> None:
    account, meter = bench.open("job-0123abcd")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.accounts.close(account, aborted=False)
    assert meter.gpu_seconds == pytest.approx(1.0)


async def test_a_call_knows_the_mean_batch_of_its_steps(bench: Bench) -> None:
    account, meter = bench.open("job", requests=2)
    bench.frame({0: (10, 0, 0), 200: (10, 0, 0)}, begin={0: "0_job-0123abcd", 200: "1_job-0123abcd"})
    bench.frame({0: (0, 1, 0), 200: (0, 1, 0), 2: (0, 1, 0), 3: (0, 1, 0)})
    bench.accounts.close(account, aborted=False)
    assert (meter.steps, meter.batch) == (4, 12)


async def test_a_number_that_is_given_again_starts_anew(bench: Bench) -> None:
    bench.frame({0: (10, 0, 0), 1: (10, 0, 0)}, begin={0: "stranger-0123abcd"})
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"}, gone=(0,))
    bench.accounts.close(account, aborted=False)
    assert (meter.steps, meter.batch) == (1, 1)


async def test_what_nobody_asked_for_is_overhead(bench: Bench) -> None:
    bench.frame({0: (10, 0, 0)}, begin={0: "stranger-0123abcd"})
    bench.frame(gone=(0,))
    usage = bench.accounts.usage()
    assert usage.busy == pytest.approx(0.0)
    assert usage.spent == pytest.approx(2.0)


async def test_lost_frames_are_overhead_and_make_their_requests_estimates(bench: Bench) -> None:
    account, meter = bench.open("job")
    bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
    bench.frame({0: (0, 1, 0)}, lost_steps=3, lost_seconds=3.0)
    bench.accounts.close(account, aborted=False)
    later, unharmed = bench.open("later")
    bench.frame({1: (10, 0, 0)}, begin={1: "later-0123abcd"})
    bench.accounts.close(later, aborted=False)
    assert (meter.estimated, unharmed.estimated) == (True, False)
    assert meter.gpu_seconds == pytest.approx(2.0)
    usage = bench.accounts.usage()
    assert (usage.overhead[LOST], usage.lost_steps, usage.estimated) == (3.0, 3, None)


async def test_time_is_split_equally_when_no_step_is_reported(bench: Bench) -> None:
    one, first = bench.open("one")
    two, second = bench.open("two")
    bench.wall += 0.05
    bench.accounts.first_output(one)
    bench.wall += 0.05
    bench.accounts.close(one, aborted=False)
    bench.accounts.close(two, aborted=True)
    assert (first.estimated, second.estimated) == (True, True)
    assert first.gpu_seconds == pytest.approx(0.05)
    assert first.prefill_seconds == pytest.approx(first.gpu_seconds / 2)
    usage = bench.accounts.usage()
    assert usage.busy == pytest.approx(first.gpu_seconds + second.gpu_seconds)
    assert usage.estimated == "a request ran and no step was reported"
    assert len(bench.warnings) == 1


async def test_a_meter_that_breaks_hands_over_to_the_equal_split(bench: Bench) -> None:
    account, meter = bench.open("job")
    aborted, tail = bench.open("aborted")
    bench.frame({0: (10, 0, 0), 1: (10, 0, 0)}, begin={0: "job-0123abcd", 1: "aborted-0123abcd"})
    bench.accounts.first_output(account)
    bench.accounts.close(aborted, aborted=True)
    bench.frame(broken="KeyError: 'x'")
    assert tail.calls[0].done()
    bench.wall += 0.1
    bench.accounts.close(account, aborted=False)
    bench.frame({0: (0, 1, 0)})  # not listened to any more
    assert meter.gpu_seconds == pytest.approx(0.6)
    assert meter.estimated
    usage = bench.accounts.usage()
    assert usage.busy == pytest.approx(meter.gpu_seconds + tail.gpu_seconds)
    assert "KeyError" in bench.warnings[0]


async def test_an_engine_that_cannot_be_metered_is_estimated_from_the_start() -> None:
    bench = Bench("it runs a scheduler of its own")
    account, meter = bench.open("job")
    bench.accounts.first_output(account)
    bench.wall += 0.05
    bench.accounts.close(account, aborted=True)
    assert bench.accounts.reader is None
    assert meter.gpu_seconds == pytest.approx(0.05)
    assert meter.calls[0].done()
    assert meter.estimated


class TestJoules:
    def counters(self) -> EnergyCounters:
        return EnergyCounters([], lambda _: None)

    async def test_a_job_pays_the_energy_of_its_seconds(self) -> None:
        counters = self.counters()
        bench = Bench(energy=counters)
        counters.latest = Reading(0.0, 1000.0)
        account, meter = bench.open("job")
        bench.frame(begin={0: "job-0123abcd"})
        bench.frame({0: (10, 0, 0)})
        counters.latest = Reading(4.0, 1800.0)
        bench.frame({0: (0, 1, 0)})
        bench.accounts.close(account, aborted=False)
        assert meter.joules == pytest.approx(2 * 200.0)
        usage = bench.accounts.usage()
        assert (usage.joules, usage.request_joules) == pytest.approx((800.0, 400.0))

    async def test_without_counters_there_are_none(self) -> None:
        for counters in (None, self.counters()):
            bench = Bench(energy=counters)
            account, meter = bench.open("job")
            bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
            bench.accounts.close(account, aborted=False)
            usage = bench.accounts.usage()
            assert meter.joules is usage.joules is usage.request_joules is None

    async def test_there_are_none_once_a_counter_has_failed_or_costs_are_estimated(self) -> None:
        for fault in ("counter", "frames"):
            counters = self.counters()
            bench = Bench(energy=counters)
            counters.latest = Reading(0.0, 1000.0)
            account, meter = bench.open("job")
            bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
            if fault == "counter":
                counters.latest = None
            else:
                bench.frame(broken="no more frames")
            bench.accounts.close(account, aborted=False)
            assert meter.joules is bench.accounts.usage().joules is None

    async def test_a_job_that_was_torn_down_leaves_its_joules_to_the_worker(self) -> None:
        counters = self.counters()
        bench = Bench(energy=counters)
        counters.latest = Reading(0.0, 1000.0)
        account, meter = bench.open("job")
        bench.frame({0: (10, 0, 0)}, begin={0: "job-0123abcd"})
        counters.latest = Reading(1.0, 1100.0)
        bench.frame({0: (0, 1, 0)})
        meter.final = True
        bench.accounts.close(account, aborted=False)
        assert meter.joules is None
        assert bench.accounts.usage().request_joules == 0.0
