"""The equal split of busy time: nothing is lost, nothing is counted twice, and nobody is favoured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldsnap.cost.equal_split import EqualSplit


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Stay:
    """A request: when it enters the engine, and for how long it stays."""

    enter: float
    seconds: float


seconds = st.floats(min_value=0.0, max_value=1e4, allow_subnormal=False)
stays = st.lists(st.builds(Stay, seconds, seconds), min_size=1, max_size=30)


def played(stays: list[Stay]) -> tuple[EqualSplit, list[float]]:
    """Return the split after all requests have come and gone, and each one's share."""
    clock = Clock()
    split = EqualSplit(clock)
    events = [(stay.enter, 0, i) for i, stay in enumerate(stays)]
    events += [(stay.enter + stay.seconds, 1, i) for i, stay in enumerate(stays)]
    marks: dict[int, float] = {}
    shares = [0.0] * len(stays)
    for time, leaves, i in sorted(events):
        clock.now = 1000.0 + time
        if leaves:
            shares[i] = split.leave(marks[i])
        else:
            marks[i] = split.enter()
    return split, shares


def covered(stays: list[Stay]) -> float:
    """Return the length of the union of the stays."""
    total, end = 0.0, 0.0
    for stay in sorted(stays, key=lambda stay: stay.enter):
        begin = max(stay.enter, end)
        end = max(end, stay.enter + stay.seconds)
        total += end - begin if end > begin else 0.0
    return total


@given(stays)
def test_the_shares_add_up_to_the_busy_time(stays: list[Stay]) -> None:
    split, shares = played(stays)
    assert sum(shares) == pytest.approx(split.busy_seconds, abs=1e-6)


@given(stays)
def test_the_engine_is_busy_while_anybody_is_inside(stays: list[Stay]) -> None:
    split, _ = played(stays)
    assert split.busy_seconds == pytest.approx(covered(stays), abs=1e-6)


@given(stays)
def test_nobody_pays_more_than_their_stay_or_less_than_an_equal_part(stays: list[Stay]) -> None:
    _, shares = played(stays)
    for stay, share in zip(stays, shares, strict=True):
        assert stay.seconds / len(stays) - 1e-6 <= share <= stay.seconds + 1e-6


@given(st.builds(Stay, seconds, seconds), st.integers(min_value=1, max_value=20), stays)
def test_requests_that_come_and_go_together_pay_the_same(twin: Stay, twins: int, others: list[Stay]) -> None:
    _, shares = played([twin] * twins + others)
    assert shares[:twins] == pytest.approx([shares[0]] * twins, abs=1e-9)


@given(st.builds(Stay, seconds, seconds))
def test_a_request_alone_pays_all_of_its_stay(stay: Stay) -> None:
    _, shares = played([stay])
    assert shares == pytest.approx([stay.seconds], abs=1e-6)


@given(stays)
def test_the_order_of_the_requests_does_not_matter(stays: list[Stay]) -> None:
    assert played(stays[::-1])[1] == pytest.approx(played(stays)[1][::-1], abs=1e-6)


def test_overlapping_requests_share_only_the_overlap() -> None:
    split, shares = played([Stay(0, 10), Stay(6, 10)])
    assert shares == [6 + 4 / 2, 4 / 2 + 6]
    assert split.busy_seconds == 16


def test_an_empty_engine_costs_nobody_anything() -> None:
    split, shares = played([Stay(0, 1), Stay(1000, 1)])
    assert shares == [1, 1]
    assert split.busy_seconds == 2


def test_busy_time_counts_up_to_the_last_event_while_requests_run() -> None:
    clock = Clock()
    split = EqualSplit(clock)
    split.enter()
    clock.now += 5
    split.enter()
    assert split.busy_seconds == 5


def test_the_default_clock_runs() -> None:
    split = EqualSplit()
    assert 0 <= split.leave(split.enter()) < 1
