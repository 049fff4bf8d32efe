"""Which settings are worth their price: every combination is simulated, those that no other beats remain.

One setting beats another if it costs no more and its p95 of the time to the first token is no longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from coldsnap.desk.plan.calibration import Calibration
from coldsnap.desk.plan.simulation import Choice, Outcome, Traffic, simulate
from coldsnap.desk.serve.scaler import Scaling

_WORTH_A_LINE = 0.98
"""A dearer setting whose p95 is not at least 2% shorter is no line of its own."""
SLOWER = 1.1
"""What is shown is simulated again with steps that take so many times as long: how much hangs on their cost."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """What is tried. Without `active` it follows from how many workers the trace keeps busy."""

    active: tuple[int, ...] | None = None
    most: tuple[int, ...] = (1, 2, 3, 5, 10)
    idle: tuple[float, ...] = (1.0, 5.0, 15.0, 60.0, 300.0)
    concurrency: tuple[int, ...] = (8, 32, 128)


@dataclass(frozen=True, slots=True)
class Point:
    """A setting and what it would have cost and done. Times are seconds; `usd` is None without a price."""

    active: int
    most: int
    idle: float
    concurrency: int
    gpu_seconds: float
    usd: float | None
    ttft50: float
    ttft95: float
    ttft99: float
    total95: float
    """p95 from a request's arrival to its last token."""
    boots: int
    peak: int
    """Workers at the same time, at most."""
    widest: int
    """Requests decoded together, at most."""
    utilisation: float
    """Of the billed seconds, those with a step under way."""
    slots: float
    """Of the slots of ready workers, those that were taken: jobs at once, or in a step."""
    slower95: float | None = None
    """`ttft95` if steps took `SLOWER` times as long; None where it was not simulated."""

    @property
    def cost(self) -> float:
        """What settings are compared by: dollars where there is a price."""
        return self.gpu_seconds if self.usd is None else self.usd


@dataclass(frozen=True)
class Plan:
    """Everything that a plan shows."""

    points: tuple[Point, ...]
    """All that were simulated; those that are shown have `slower95`."""
    frontier: tuple[Point, ...]
    """Those that no other beats, the cheapest first."""
    current: Point
    target: float | None
    """Seconds that the p95 of the time to the first token may take."""
    recommended: Point | None
    """The cheapest within the target; None without a target, and if none is."""
    seconds: float
    """From the trace's first request to its last."""
    took: float
    """Seconds that the search took."""

    @property
    def best(self) -> Point:
        """The setting with the shortest p95."""
        return min(self.points, key=lambda point: (point.ttft95, point.cost))


def search(
    traffic: Traffic,
    calibration: Calibration,
    current: Choice,
    ranges: Ranges,
    *,
    target: float | None = None,
    seed: int = 0,
) -> Plan:
    """Simulate every combination of the ranges, then other concurrencies where that may help.

    More workers than were ever there at once change nothing, so they are not tried. What will be shown is simulated
    once more, with slower steps.
    """
    begun = time.perf_counter()
    tried: dict[Choice, Point] = {}

    def look(choice: Choice) -> Point:
        if choice not in tried:
            tried[choice] = summary(simulate(traffic, choice, calibration.worker, seed), calibration)
        return tried[choice]

    now = look(current)
    base = replace(current.scaling, least=0, most=max(ranges.most))
    active = ranges.active or _actives(simulate(traffic, replace(current, scaling=base), calibration.worker, seed))
    for least in sorted({min(each, max(ranges.most)) for each in active}):
        _try(look, current, least, ranges)
    for point in pareto(tried.values()):
        for concurrency in ranges.concurrency:
            look(replace(_choice(current, point), concurrency=concurrency))
    within_target = [point for point in tried.values() if target is not None and point.ttft95 <= target]
    recommended = min(within_target, key=lambda point: (point.cost, point.ttft95), default=None)
    slow = calibration.worker.slower(SLOWER)
    points_of_table = {
        point: replace(point, slower95=_p95(simulate(traffic, _choice(current, point), slow, seed)))
        for point in {*pareto(tried.values(), recommended), now}
    }
    points = tuple(points_of_table.get(point, point) for point in tried.values())
    recommended = points_of_table[recommended] if recommended is not None else None
    length = float(traffic.times[-1]) if traffic.times else 0.0
    took = time.perf_counter() - begun
    return Plan(points, pareto(points, recommended), points_of_table[now], target, recommended, length, took)


def _choice(current: Choice, point: Point) -> Choice:
    scaling = replace(current.scaling, least=point.active, most=point.most, idle_timeout=point.idle)
    return Choice(scaling, point.concurrency)


def _p95(outcome: Outcome) -> float:
    return float(np.percentile(outcome.ttft, 95))


def _try(look: Callable[[Choice], Point], current: Choice, least: int, ranges: Ranges) -> None:
    """Try idle timeouts and limits of workers with so many that are always there."""
    for idle in ranges.idle:
        for most in sorted(ranges.most):
            if most < max(least, 1) or (most == least and idle != ranges.idle[0]):
                continue  # the timeout is for workers above those that are always there
            scaling = replace(current.scaling, least=least, most=most, idle_timeout=idle)
            if look(replace(current, scaling=scaling)).peak < most:
                break


def _actives(outcome: Outcome) -> tuple[int, ...]:
    """Return numbers of active workers to try: none, one, and about as many as the trace keeps alive."""
    mean = outcome.billed / outcome.seconds if outcome.seconds else 0.0
    return tuple(sorted({0, 1, math.floor(mean), math.ceil(mean), min(outcome.peak, 2 * math.ceil(mean))}))


def pareto(points: Iterable[Point], keep: Point | None = None) -> tuple[Point, ...]:
    """Return the points that no other beats, the cheapest first, without those that are hardly better; but `keep`."""
    front: list[Point] = []
    best = math.inf
    for point in sorted(points, key=lambda point: (point.cost, point.ttft95)):
        if point.ttft95 < best * _WORTH_A_LINE or point is keep:
            front.append(point)
            best = min(best, point.ttft95)
    return tuple(front)


def summary(outcome: Outcome, calibration: Calibration) -> Point:
    """Return what came of a setting in figures."""
    scaling: Scaling = outcome.choice.scaling
    ttft = np.percentile(outcome.ttft, (50, 95, 99)).tolist()
    return Point(
        active=scaling.least,
        most=scaling.most,
        idle=scaling.idle_timeout,
        concurrency=outcome.choice.concurrency,
        gpu_seconds=(outcome.flex + outcome.active) * calibration.gpu_count,
        usd=calibration.usd(outcome.flex, outcome.active),
        ttft50=ttft[0],
        ttft95=ttft[1],
        ttft99=ttft[2],
        total95=float(np.percentile(outcome.total, 95)),
        boots=outcome.boots,
        peak=outcome.peak,
        widest=outcome.widest,
        utilisation=outcome.busy / outcome.billed if outcome.billed else 0.0,
        slots=outcome.occupancy(calibration.worker.speed.sequences),
    )
