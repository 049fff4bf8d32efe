"""The ledger's arithmetic: what the shares must fulfil whatever the step, and that the books close."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coldsnap.cost.books import Books
from coldsnap.cost.shares import DECODE, EMPTY, LOST, RECOMPUTE, TAIL, Ledger, Step, decode_shares, shares
from coldsnap.cost.step_model import StepModel
from coldsnap.engine import Usage

Tokens = tuple[int, int, int]

seconds = st.floats(1e-6, 10.0)
coefficient = st.one_of(st.just(0.0), st.floats(1e-9, 1e-2))
coefficients = st.tuples(coefficient, coefficient, coefficient, coefficient).map(np.array)
request_tokens = st.tuples(st.integers(0, 4000), st.integers(0, 8), st.integers(0, 4000)).filter(any)
batch = st.lists(st.tuples(request_tokens, st.integers(0, 100_000)), min_size=1, max_size=12)


def make_step(requests: list[tuple[Tokens, int]], duration: float = 0.01, start: float = 0.0) -> Step:
    """Return a step; a request is its (prefill, decode, recomputed) tokens and the context before them."""
    tokens = np.array([each for each, _ in requests], dtype=float).reshape(-1, 3)
    before = np.array([context for _, context in requests], dtype=float)
    return Step(start, start + duration, np.arange(len(requests)), tokens, before + tokens.sum(axis=1))


# Shares.


@given(batch, coefficients, seconds)
def test_a_step_is_conserved(requests: list[tuple[Tokens, int]], theta: np.ndarray, duration: float) -> None:
    step = make_step(requests, duration)
    parts = shares(step, theta)
    assert parts.sum() == pytest.approx(step.end - step.start, rel=1e-9)
    assert (parts >= 0).all()


@given(batch, coefficients, seconds)
def test_equal_requests_pay_equally(requests: list[tuple[Tokens, int]], theta: np.ndarray, duration: float) -> None:
    parts = shares(make_step([*requests, requests[0]], duration), theta)
    assert parts[0] == pytest.approx(parts[-1])


@given(batch, coefficients, seconds)
def test_order_does_not_matter(requests: list[tuple[Tokens, int]], theta: np.ndarray, duration: float) -> None:
    forth, back = make_step(requests, duration), make_step(requests[::-1], duration)
    assert shares(forth, theta) == pytest.approx(shares(back, theta)[::-1])


@given(batch, coefficients, st.sampled_from([0, 1]))
def test_more_tokens_never_cost_less(requests: list[tuple[Tokens, int]], theta: np.ndarray, column: int) -> None:
    (tokens, context), *others = requests
    tokens = (*tokens[:2], 0)
    assume(any(tokens))
    more = list(tokens)
    more[column] += 10
    before = shares(make_step([(tokens, context), *others]), theta)[0].sum()
    after = shares(make_step([(tuple(more), context), *others]), theta)[0].sum()  # type: ignore[list-item]
    assume(theta.any())
    assert after >= before * (1 - 1e-9)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=12), coefficients, seconds)
def test_a_step_that_only_decodes_is_charged_in_short_as_it_is_at_length(
    contexts: list[int], theta: np.ndarray, duration: float
) -> None:
    step = make_step([((0, 1, 0), context) for context in contexts], duration)
    plain = replace(step, plain=True)
    assert decode_shares(plain, theta) == pytest.approx(shares(step, theta)[:, DECODE])
    assert plain.work == pytest.approx(step.work)
    ledgers = Ledger(StepModel(1e9, 1e3)), Ledger(StepModel(1e9, 1e3))
    for ledger, each in zip(ledgers, (plain, step), strict=True):
        for _ in range(3):
            ledger.charge(each, 1e-6)
    assert ledgers[0].held == pytest.approx(ledgers[1].held)
    assert ledgers[0].usage().busy == pytest.approx(ledgers[1].usage().busy)


@given(batch, coefficients)
def test_who_adds_nothing_pays_only_the_fixed_part(requests: list[tuple[Tokens, int]], theta: np.ndarray) -> None:
    """A null player of the marginal game: decoding is free, so only a/|B| is left."""
    theta = theta * [1, 1, 0, 0]
    assume(theta[0] > 0)
    step = make_step([*requests, ((0, 1, 0), 10)])
    parts = shares(step, theta)
    work = theta @ step.work
    expected = (step.end - step.start) * theta[0] / len(step.numbers) / work
    assert parts[-1].sum() == pytest.approx(expected)


def test_without_a_fixed_part_a_null_player_pays_nothing() -> None:
    parts = shares(make_step([((100, 0, 0), 0), ((0, 1, 0), 50)]), np.array([0.0, 1.0, 0.0, 0.0]))
    assert parts[1].sum() == 0.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(request_tokens, st.integers(0, 100_000)), min_size=1, max_size=6), coefficients)
def test_shares_are_the_shapley_value(requests: list[tuple[Tokens, int]], theta: np.ndarray) -> None:
    """Against the definition: a request's marginal cost, averaged over all orders of arrival."""
    assume(theta.any())
    players = range(len(requests))

    @cache
    def worth(coalition: frozenset[int]) -> float:
        members = [requests[i] for i in sorted(coalition)]
        return float(theta @ make_step(members).work) if members else 0.0

    values = np.zeros(len(requests))
    for order in permutations(players):
        before: frozenset[int] = frozenset()
        for player in order:
            values[player] += worth(before | {player}) - worth(before)
            before |= {player}
    values /= math.factorial(len(requests))
    assume(values.sum() > 0)
    step = make_step(requests, duration=float(values.sum()))
    assert shares(step, theta).sum(axis=1) == pytest.approx(values, rel=1e-6, abs=values.sum() * 1e-9)


def test_recomputed_tokens_are_overhead_with_their_part_of_the_rest() -> None:
    parts = shares(make_step([((0, 0, 100), 0), ((0, 1, 0), 100)]), np.array([1e-3, 1e-5, 1e-5, 0.0]))
    assert parts[0, :2].sum() == 0.0
    assert parts[0, 2] > parts[1, 1] > 0


def test_attention_counts_reads_of_a_position() -> None:
    step = make_step([((3, 0, 0), 4), ((0, 1, 0), 9), ((128, 0, 0), 0)])
    assert step.attention.tolist() == [(5 + 6 + 7) / 3, 10, 128 * 129 / 2 / 64]


# The books.


@given(st.lists(st.tuples(batch, seconds, seconds), max_size=20), st.data())
def test_every_second_has_one_owner(
    timeline: list[tuple[list[tuple[Tokens, int]], float, float]], data: st.DataObject
) -> None:
    """Steps with gaps between them, some lost, some empty, some requests let go early, and a drain."""
    ledger = Ledger(StepModel(1e9, 1e5))
    started, ready = 100.0, 107.0
    books = Books(started, ready, ledger.usage())
    clock, idle, paid = ready, 0.0, 0.0
    for requests, gap, duration in timeline:
        clock, idle = clock + gap, idle + gap
        kind = data.draw(st.sampled_from(["step", "empty", "lost", "tail"]))
        step = make_step(requests if kind in {"step", "tail"} else [], duration, clock)
        clock = step.end
        if kind == "lost":
            ledger.lose(1, step.end - step.start)
            continue
        ledger.charge(step)
        for number in step.numbers.tolist():
            taken = sum(ledger.take(number))
            if kind == "tail":
                ledger.write_off(taken)
            else:
                paid += taken
    usage = ledger.usage()
    totals = books.totals(clock, usage)
    assert totals.total == pytest.approx(clock - started)
    assert totals.total == pytest.approx(
        totals.headings.cold
        + totals.headings.busy
        + totals.headings.overhead
        + totals.headings.idle
        + totals.headings.drain
    )
    assert totals.headings.busy == pytest.approx(paid)
    assert totals.headings.idle == pytest.approx(idle, abs=1e-6)
    assert totals.billed >= totals.total > totals.billed - 1
    assert set(usage.overhead) == {RECOMPUTE, EMPTY, LOST, TAIL}


def test_what_ran_before_ready_is_cold_start_and_a_drain_holds_only_what_is_not_run() -> None:
    ledger = Ledger(StepModel(1e9, 1e5))
    ledger.charge(make_step([((10, 0, 0), 0)], 1.0, start=5.0))
    books = Books(0.0, 7.0, ledger.usage())
    ledger.charge(make_step([((10, 0, 0), 0)], 2.0, start=8.0))
    books.drain(12.0, ledger.usage())
    books.drain(13.0, Usage())
    ledger.charge(make_step([((10, 0, 0), 0)], 1.5, start=12.0))
    totals = books.totals(15.0, ledger.usage())
    assert (totals.headings.cold, totals.headings.busy, totals.headings.idle, totals.headings.drain) == pytest.approx(
        (7.0, 3.5, 3.0, 1.5)
    )


def test_a_number_is_grown_into_and_taken_once() -> None:
    ledger = Ledger(StepModel(1e9, 1e5))
    step = make_step([((10, 0, 0), 0)], 1.0)
    ledger.charge(Step(step.start, step.end, np.array([1000]), step.tokens, step.context))
    assert ledger.take(1000) == pytest.approx((1.0, 0.0))
    assert ledger.take(1000) == ledger.take(5000) == (0.0, 0.0)


# The model of a step.


def steps_of(theta: np.ndarray, count: int, noise: float = 0.0) -> list[tuple[np.ndarray, float]]:
    rng = np.random.default_rng(1)
    steps = []
    for _ in range(count):
        prefill = rng.integers(0, 400) * (rng.random() < 0.2)
        decode = rng.integers(0, 64)
        work = np.array([1.0, prefill, decode, decode * rng.integers(10, 500) + prefill**2 / 2])
        steps.append((work, float(theta @ work) * float(1 + noise * rng.standard_normal())))
    return steps


@pytest.mark.parametrize("theta", [[2e-3, 1e-5, 2e-5, 3e-8], [5e-4, 3e-6, 8e-5, 0.0], [0.0, 1e-5, 1e-5, 1e-9]])
def test_the_fit_finds_what_made_the_steps(theta: list[float]) -> None:
    model = StepModel(2e9, 1e5)
    for work, duration in steps_of(np.array(theta), 3000, noise=0.02):
        model.learn(work, duration)
    fit = model.fit()
    assert [fit.a, fit.b, fit.c, fit.d] == pytest.approx(theta, rel=0.1, abs=theta[1] / 5)
    assert 0.015 < fit.residual < 0.05
    assert fit.steps > 2900  # those that took no time teach nothing


@given(st.lists(st.tuples(st.tuples(*[st.integers(0, 10_000)] * 3), seconds), min_size=1, max_size=80))
def test_no_coefficient_is_ever_negative(steps: list[tuple[tuple[int, int, int], float]]) -> None:
    model = StepModel(2e9, 1e5)
    for work, duration in steps:
        model.learn(np.array([1.0, *work]), duration)
        assert (model.coefficients >= 0).all()
        assert np.isfinite(model.coefficients).all()
        assert model.coefficients.any()


def test_what_the_steps_leave_open_stays_as_the_sizes_have_it() -> None:
    """Lone decodes at a constant context say nothing about prefill; its price follows the decodes' scale."""
    model = StepModel(1e9, 1e5)
    start = model.fit()
    for _ in range(200):
        model.learn(np.array([1.0, 0.0, 1.0, 100.0]), 0.004)
    fit = model.fit()
    assert fit.b / fit.a == pytest.approx(start.b / start.a, rel=0.05)
    assert fit.a + fit.c + 100 * fit.d == pytest.approx(0.004, rel=0.01)


def test_one_stalled_step_does_not_spoil_the_fit() -> None:
    theta = np.array([2e-3, 1e-5, 2e-5, 3e-8])
    model = StepModel(2e9, 1e5)
    for i, (work, duration) in enumerate(steps_of(theta, 1000)):
        model.learn(work, 5.0 if i == 500 else duration)
    assert model.coefficients[:3] == pytest.approx(theta[:3], rel=0.1)
