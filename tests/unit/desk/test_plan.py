"""The plan's model against hand-computed cases, a naive simulation of every step, and queueing theory."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldsnap.desk.plan.batch import Batch, Speed
from coldsnap.desk.plan.frontier import Point, pareto
from coldsnap.desk.plan.simulation import LOOK_SECONDS, Choice, Outcome, Traffic, WorkerModel, simulate
from coldsnap.desk.serve.scaler import Scaling

SPEED = Speed(a=0.010, b=0.0001, c=0.0005, d=0.0)
BOOT, STOP = 5.0, 0.25


def run_batch(speed: Speed, traffic: Traffic) -> tuple[np.ndarray, np.ndarray]:
    """Return when each request has its first and its last token on one engine without limits around it."""
    batch = Batch(speed, traffic.prompts, traffic.outputs)
    first, last = np.zeros(len(traffic.times)), np.zeros(len(traffic.times))

    def until(time: float) -> None:
        while batch.end < time:
            at = batch.end
            begun, ended = batch.advance()
            first[begun] = at
            last[ended] = at

    for number, time in enumerate(traffic.times):
        until(time)
        batch.add(number, time)
    until(math.inf)
    return first, last


def every_step(speed: Speed, traffic: Traffic) -> tuple[np.ndarray, np.ndarray]:  # noqa: C901 -- no shortcut is the point
    """The same as `run_batch`, one step after the other and request by request, as the ledger's model says."""
    count = len(traffic.times)
    first, last = np.zeros(count), np.zeros(count)
    coming, waiting = deque(range(count)), deque[int]()
    computed, made = [0] * count, [0] * count
    running: list[int] = []
    now = -1.0
    while coming or waiting or running:
        while coming and traffic.times[coming[0]] <= now:
            waiting.append(coming.popleft())
        if not waiting and not running:  # the first begins at once, alone
            now = traffic.times[coming[0]]
            waiting.append(coming.popleft())
        seconds = speed.a
        for number in running:
            seconds += speed.c + speed.d * (traffic.prompts[number] + made[number])
        room = max(1, speed.tokens - len(running))
        entered: list[int] = []
        held = {number: traffic.prompts[number] + traffic.outputs[number] for number in running}
        while waiting and room:
            number = waiting[0]
            size = traffic.prompts[number] + traffic.outputs[number]
            fits = len(held) < speed.sequences and sum(held.values()) + size <= speed.cache
            if not computed[number] and held and not fits:
                break
            held[number] = size
            new = min(room, traffic.prompts[number] - computed[number])
            computed[number] += new
            room -= new
            reads = sum(range(computed[number] - new + 1, computed[number] + 1))
            seconds += speed.b * new + speed.d * reads / min(new, 64)
            if computed[number] == traffic.prompts[number]:
                waiting.popleft()
                entered.append(number)
        now += seconds
        for number in running:
            made[number] += 1
        for number in entered:
            made[number] = 1
            first[number] = now
        for number in [*running, *entered]:
            if made[number] == traffic.outputs[number]:
                last[number] = now
        running = [number for number in [*running, *entered] if made[number] < traffic.outputs[number]]
    return first, last


traffics = st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=25).map(
    lambda rows: Traffic(
        np.cumsum([gap for gap, _, _ in rows]).tolist(), [row[1] for row in rows], [row[2] for row in rows]
    )
)


class TestBatch:
    def test_a_request_alone_takes_its_prefill_and_its_steps(self) -> None:
        first, last = run_batch(SPEED, Traffic([1.0], [100], [11]))
        assert first[0] == pytest.approx(1 + 0.010 + 100 * 0.0001)
        assert last[0] == pytest.approx(first[0] + 10 * (0.010 + 0.0005))

    def test_a_second_request_joins_at_the_end_of_the_step_under_way(self) -> None:
        # Request 0: prefill until 0.020, then steps of 10.5 ms. Request 1 comes at 0.032, in the second of them.
        first, last = run_batch(SPEED, Traffic([0.0, 0.032], [100, 50], [100, 3]))
        begins = 0.020 + 2 * 0.0105
        assert first[1] == pytest.approx(begins + 0.010 + 0.0005 + 50 * 0.0001)
        assert last[1] == pytest.approx(first[1] + 2 * 0.011)
        assert last[0] == pytest.approx(last[1] + (99 - 2 - 1 - 2) * 0.0105)

    def test_attention_makes_each_step_longer_than_the_one_before(self) -> None:
        speed = replace(SPEED, d=1e-5)
        first, last = run_batch(speed, Traffic([0.0], [64], [4]))
        assert first[0] == pytest.approx(0.010 + 64 * 0.0001 + 1e-5 * (64 * 65 / 2) / 64)
        assert last[0] == pytest.approx(first[0] + 3 * 0.0105 + 1e-5 * (65 + 66 + 67))

    def test_a_full_batch_lets_the_next_wait_for_the_first_to_end(self) -> None:
        first, last = run_batch(replace(SPEED, sequences=1), Traffic([0.0, 0.001], [10, 10], [5, 5]))
        assert first[1] == pytest.approx(last[0] + 0.010 + 10 * 0.0001)

    @settings(max_examples=150, deadline=None)
    @given(
        traffic=traffics, d=st.sampled_from([0.0, 1e-6, 1e-4]), sequences=st.sampled_from([2, 256]),
        tokens=st.sampled_from([64, 8192]), cache=st.sampled_from([500.0, math.inf]),
    )  # fmt: skip
    def test_many_steps_at_once_are_the_same_as_each_in_turn(
        self, traffic: Traffic, d: float, sequences: int, tokens: int, cache: float
    ) -> None:
        speed = replace(SPEED, d=d, sequences=sequences, tokens=tokens, cache=cache)
        for found, expected in zip(run_batch(speed, traffic), every_step(speed, traffic), strict=True):
            assert found == pytest.approx(expected, rel=1e-7)


def outcome(traffic: Traffic, scaling: Scaling, concurrency: int = 128, model: WorkerModel | None = None) -> Outcome:
    return simulate(traffic, Choice(scaling, concurrency), model or WorkerModel(SPEED, [BOOT], 0.0, STOP))


def service(prompt: int, output: int) -> float:
    """Return how long a request alone takes."""
    return 0.010 + prompt * 0.0001 + (output - 1) * 0.0105


class TestScaling:
    def test_from_zero_the_first_request_waits_for_a_boot(self) -> None:
        found = outcome(Traffic([0.0], [100], [11]), Scaling(0, 1, 2.0))
        assert found.ttft[0] == pytest.approx(BOOT + 0.020)
        assert found.total[0] == pytest.approx(BOOT + service(100, 11))
        assert found.boots == 1
        ends = math.ceil((found.seconds + 2.0) / LOOK_SECONDS) * LOOK_SECONDS + STOP
        assert found.lives.tolist() == pytest.approx([ends])
        assert found.billed == math.ceil(ends)
        assert (found.cold, found.busy) == (BOOT, pytest.approx(service(100, 11)))

    @pytest.mark.parametrize(("gap", "boots"), [(1.5, 1), (2.6, 2)])
    def test_a_worker_ends_after_its_idle_timeout_and_not_before(self, gap: float, boots: int) -> None:
        done = BOOT + service(100, 11)
        found = outcome(Traffic([0.0, done + gap], [100, 100], [11, 11]), Scaling(0, 1, 2.0))
        assert found.boots == boots
        assert found.ttft[1] == pytest.approx(0.020 if boots == 1 else BOOT + 0.020, abs=LOOK_SECONDS)

    def test_active_workers_are_there_and_stay(self) -> None:
        found = outcome(Traffic([0.0, 100.0], [100, 100], [11, 11]), Scaling(2, 2, 1.0))
        assert found.ttft.tolist() == pytest.approx([0.020, 0.020])
        assert found.boots == 0
        assert found.billed == pytest.approx(2 * found.seconds)
        assert (found.active, found.flex) == (pytest.approx(found.billed), 0.0)

    def test_by_queue_delay_one_worker_more_comes_when_a_job_has_waited(self) -> None:
        # One slot a worker, jobs of about 10.5 s: the second waits 4 s, then a boot.
        found = outcome(Traffic([0.0, 0.5, 0.6], [10] * 3, [1000] * 3), Scaling(1, 3, 5.0), concurrency=1)
        assert found.ttft[0] == pytest.approx(0.011)
        assert found.ttft[1] == pytest.approx(4.0 + BOOT, abs=2.5 * LOOK_SECONDS)
        assert found.ttft[2] == pytest.approx(service(10, 1000) - 0.6 + 0.011, abs=1e-6)
        assert (found.boots, found.peak) == (2, 3)

    def test_by_request_count_there_is_a_worker_for_so_many_requests(self) -> None:
        found = outcome(Traffic([0.0] * 10, [10] * 10, [1000] * 10), Scaling(0, 5, 5.0, "request-count", 4.0), 4)
        assert (found.boots, found.peak) == (3, 3)
        assert found.ttft.max() == pytest.approx(BOOT + 0.014, abs=LOOK_SECONDS)

    def test_the_first_that_asks_takes_all_that_wait_and_that_it_may(self) -> None:
        found = outcome(Traffic([0.0] * 6, [10] * 6, [5] * 6), Scaling(0, 1, 5.0), concurrency=4)
        # The first starts the engine, alone; the next three join in the step after it.
        assert found.ttft[:4] == pytest.approx([BOOT + 0.011] + [BOOT + 0.011 + 0.0135] * 3)
        assert found.widest == 4
        assert found.total[:4] == pytest.approx([BOOT + 0.0605] + [BOOT + 0.072] * 3)
        assert found.ttft[4] == pytest.approx(BOOT + 0.072 + 0.011)

    def test_the_same_seed_draws_the_same_boots(self) -> None:
        traffic = Traffic([20.0 * i for i in range(30)], [10] * 30, [5] * 30)
        model = WorkerModel(SPEED, [3.0, 4.0, 5.0])
        runs = [simulate(traffic, Choice(Scaling(0, 1, 1.0)), model, seed).ttft.tolist() for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]


class TestQueueingTheory:
    def wait(self, prompts: list[int], load: float) -> float:
        """Return the mean wait of Poisson arrivals before one server, a job at a time."""
        rng = random.Random(3)
        speed = Speed(a=1e-12, b=1e-6, c=0.0, d=0.0, tokens=10**9)
        mean = float(np.mean(prompts)) * 1e-6
        times = np.cumsum([rng.expovariate(load / mean) for _ in prompts]).tolist()
        found = outcome(Traffic(times, prompts, [1] * len(prompts)), Scaling(1, 1), 1, WorkerModel(speed, [1.0]))
        return float(np.mean(found.ttft - np.array(prompts) * 1e-6)) / mean

    def test_constant_jobs_wait_as_in_an_m_d_1_queue(self) -> None:
        for load in (0.3, 0.7):
            assert self.wait([1_000_000] * 100_000, load) == pytest.approx(load / (2 * (1 - load)), rel=0.03)

    def test_exponential_jobs_wait_as_in_an_m_m_1_queue(self) -> None:
        rng = random.Random(4)
        prompts = [1 + int(rng.expovariate(1e-6)) for _ in range(100_000)]
        for load in (0.3, 0.6):
            assert self.wait(prompts, load) == pytest.approx(load / (1 - load), rel=0.05)

    def test_slots_without_cost_to_each_other_lose_as_many_as_erlang_says(self) -> None:
        """M/D/c with c = 3 slots: the mean wait is close to half of M/M/3's, Erlang's C over c*mu - lambda."""
        rng = random.Random(5)
        speed = Speed(a=0.01, b=0.0, c=0.0, d=0.0)
        seconds, slots, load = 1.0, 3, 0.7
        rate = slots * load / seconds
        times = np.cumsum([rng.expovariate(rate) for _ in range(40_000)]).tolist()
        found = outcome(Traffic(times, [1] * 40_000, [100] * 40_000), Scaling(1, 1), slots, WorkerModel(speed, [1.0]))
        offered = slots * load
        tail = offered**slots / math.factorial(slots) / (1 - load)
        waits = tail / (sum(offered**k / math.factorial(k) for k in range(slots)) + tail)
        expected = waits / (slots / seconds - rate) / 2
        assert float(np.mean(found.ttft)) - 0.01 == pytest.approx(expected, rel=0.12)


scalings = st.builds(
    lambda least, more, idle, rule, value: Scaling(least, max(1, least + more), idle, rule, value),
    st.integers(0, 2), st.integers(0, 3), st.sampled_from([0.0, 0.3, 2.0, 50.0]),
    st.sampled_from(["queue-delay", "request-count"]), st.sampled_from([0.5, 2.0, 4.0]),
)  # fmt: skip


class TestLaws:
    @settings(max_examples=150, deadline=None)
    @given(
        traffic=traffics, scaling=scalings, concurrency=st.sampled_from([1, 3, 128]), stretch=st.sampled_from([1, 30])
    )
    def test_every_request_is_served_once_and_every_second_is_somebodys(
        self, traffic: Traffic, scaling: Scaling, concurrency: int, stretch: int
    ) -> None:
        traffic = replace(traffic, times=[time * stretch for time in traffic.times])
        found = outcome(traffic, scaling, concurrency)
        prefill = np.array([0.010 + 0.0001 * prompt for prompt in traffic.prompts])
        assert (found.ttft >= prefill - 1e-9).all()
        assert (found.total - found.ttft >= 0.0105 * (np.array(traffic.outputs) - 1) - 1e-9).all()
        assert found.peak <= scaling.most
        assert len(found.lives) == found.boots + scaling.least
        assert found.lives.sum() <= found.billed < found.lives.sum() + len(found.lives) + 1e-6
        assert found.busy + found.cold <= found.lives.sum() + 1e-6
        alone = [service(*sizes) for sizes in zip(traffic.prompts, traffic.outputs, strict=True)]
        assert max(alone) - 1e-9 <= found.busy <= sum(alone) + 1e-9
        assert found.flex + found.active == pytest.approx(max(found.billed, found.active))
        assert found.widest <= concurrency

    @settings(max_examples=60, deadline=None)
    @given(traffic=traffics, idle=st.floats(0.0, 20.0), more=st.floats(0.1, 100.0))
    def test_a_longer_idle_timeout_boots_no_more_often(self, traffic: Traffic, idle: float, more: float) -> None:
        traffic = replace(traffic, times=[time * 30 for time in traffic.times])
        boots = [outcome(traffic, Scaling(0, 1, each), 1).boots for each in (idle, idle + more)]
        assert boots[1] <= boots[0]

    @settings(max_examples=60, deadline=None)
    @given(traffic=traffics, by=st.floats(1.0, 3.0))
    def test_a_slower_engine_answers_nobody_sooner(self, traffic: Traffic, by: float) -> None:
        slow = replace(SPEED, a=SPEED.a * by, b=SPEED.b * by, c=SPEED.c * by)
        ttft = [
            outcome(traffic, Scaling(1, 1), 1, WorkerModel(speed, [BOOT])).ttft for speed in (SPEED, slow)
        ]  # fmt: skip
        assert (ttft[1] >= ttft[0] - 1e-9).all()

    @settings(max_examples=60, deadline=None)
    @given(traffic=traffics, workers=st.integers(1, 4))
    def test_one_more_worker_lets_nobody_wait_longer(self, traffic: Traffic, workers: int) -> None:
        ttft = [outcome(traffic, Scaling(count, count), 1).ttft for count in (workers, workers + 1)]
        assert (ttft[1] <= ttft[0] + 1e-9).all()


class TestFrontier:
    @given(st.lists(st.tuples(st.floats(1, 100), st.floats(0.01, 100)), min_size=1, max_size=30))
    def test_nothing_beats_a_point_of_the_frontier_and_all_else_is_beaten_or_hardly_better(
        self, pairs: list[tuple[float, float]]
    ) -> None:
        points = [point(cost, ttft) for cost, ttft in pairs]
        found = pareto(points)
        for each in found:
            assert not any(
                other.cost <= each.cost and other.ttft95 < each.ttft95 and other is not each and other.cost < each.cost
                for other in points
            )
        for other in points:
            assert any(each.cost <= other.cost and each.ttft95 * 0.98 <= other.ttft95 for each in found)
        assert [each.cost for each in found] == sorted(each.cost for each in found)

    def test_what_is_recommended_stays(self) -> None:
        points = [point(1, 10.0), point(2, 9.9), point(3, 5.0)]
        assert pareto(points) == (points[0], points[2])
        assert pareto(points, points[1]) == tuple(points)


def point(cost: float, ttft95: float) -> Point:
    return Point(0, 1, 5.0, 8, cost, None, ttft95, ttft95, ttft95, ttft95, 0, 1, 1, 0.5, 0.5)
