"""What differs between two endpoints, from paired runs, with intervals.

Both answered the same prompts in the same rounds, so a prompt's two values are a pair: pairs are drawn again and again
with replacement (bootstrap, Efron, 1979), and 95% of the differences so found are the interval. One that holds zero
means that no difference was seen, which is not to say that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from coldsnap.desk.bench.answer import Failed
from coldsnap.desk.compare.asking import Reading, Reply, Round
from coldsnap.desk.compare.prompts import Line

_DRAWS = 4000
LEAST = 5
"""Pairs below which nothing is said: an interval of so few is too narrow."""

Floats = NDArray[np.float64]
Unit = Literal["seconds", "per second", "share", "number"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of A and of B, and how far B's is from A's."""

    name: str
    unit: Unit
    pairs: int
    a: float
    b: float
    change: float
    """B over A, less one; of shares the difference."""
    low: float
    high: float
    less_is_better: bool

    @property
    def verdict(self) -> str:
        """Say what was seen."""
        if self.pairs < LEAST:
            return "too few pairs to say"
        if self.low <= 0 <= self.high:
            return "no difference seen"
        return "B is better" if (self.change < 0) == self.less_is_better else "B is worse"


def differences(
    lines: Sequence[Line], a: Sequence[Round], b: Sequence[Round], readings: Sequence[tuple[Reading, Reading]]
) -> list[Difference]:
    """Return the figures that both sides have."""
    found: list[Difference] = []
    if readings:
        weights = [len(ours.own) for ours, _ in readings]
        losses = [[-sum(reading.own) for reading in pair] for pair in readings]
        found.append(_perplexity([loss[0] for loss in losses], [loss[1] for loss in losses], weights))
    expected = [place for place, line in enumerate(lines) if line.answer is not None]
    if expected:
        right = [[_right(rounds[0], place, lines[place]) for place in expected] for rounds in (a, b)]
        found.append(_difference("answers that match", "share", right[0], right[1], less_is_better=False))
    of_reply: Mapping[str, Callable[[Reply], float | None]] = {
        "TTFT": lambda reply: reply.ttft,
        "ITL": lambda reply: reply.itl,
        "whole answer": lambda reply: reply.e2e,
        "GPU-seconds of a request": lambda reply: reply.gpu_seconds,
    }
    for name, field in of_reply.items():
        means = [(_mean(a, place, field), _mean(b, place, field)) for place in range(len(lines))]
        pairs = [(ours, theirs) for ours, theirs in means if ours is not None and theirs is not None]
        if pairs:
            found.append(_difference(name, "seconds", *map(list, zip(*pairs, strict=True)), less_is_better=True))
    rates = [[_rate(each) for each in rounds] for rounds in (a, b)]
    if lines:
        found.append(_difference("output tokens a second", "per second", *rates, less_is_better=False))
    return found


def divergence(pairs: Sequence[tuple[Reading, Reading]]) -> float | None:
    """Return the mean KL divergence of B from A, in nats a token: a lower bound.

    Only the likeliest tokens are told. Those that both told are taken one by one and all others as one, and to merge
    outcomes can only make a divergence smaller.
    """
    values = [
        _kl(ours, theirs)
        for a, b in pairs
        for ours, theirs in zip(a.likeliest, b.likeliest, strict=True)
    ]  # fmt: skip
    return sum(values) / len(values) if values else None


def same_answers(a: Sequence[Round], b: Sequence[Round]) -> tuple[int, int]:
    """Return how many answers of the first round are the same text, and how many both gave."""
    both = [
        (ours.said, theirs.said)
        for ours, theirs in zip(a[0].replies, b[0].replies, strict=True)
        if isinstance(ours, Reply) and isinstance(theirs, Reply)
    ]
    return sum(ours == theirs for ours, theirs in both), len(both)


def _kl(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    common = a.keys() & b.keys()
    p, q = [math.exp(a[token]) for token in common], [math.exp(b[token]) for token in common]
    p.append(max(1 - sum(p), 1e-9))
    q.append(max(1 - sum(q), 1e-9))
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def _mean(rounds: Sequence[Round], place: int, field: Callable[[Reply], float | None]) -> float | None:
    replies = (each.replies[place] for each in rounds)
    values = [value for reply in replies if isinstance(reply, Reply) and (value := field(reply)) is not None]
    return sum(values) / len(values) if values else None


def _rate(each: Round) -> float:
    return sum(reply.tokens or 0 for reply in each.replies if isinstance(reply, Reply)) / each.seconds


def _right(first: Round, place: int, line: Line) -> float:
    reply = first.replies[place]
    return float(not isinstance(reply, Failed) and reply.said.strip() == (line.answer or "").strip())


def _difference(name: str, unit: Unit, a: Sequence[float], b: Sequence[float], *, less_is_better: bool) -> Difference:
    ours, theirs = np.array(a), np.array(b)

    def change(drawn_a: Floats, drawn_b: Floats) -> Floats:
        means_a, means_b = drawn_a.mean(axis=-1), drawn_b.mean(axis=-1)
        changed: Floats = means_b - means_a if unit == "share" else means_b / np.maximum(means_a, 1e-12) - 1
        return changed

    drawn = _draws(len(ours))
    low, high = np.quantile(change(ours[drawn], theirs[drawn]), (0.025, 0.975))
    at = float(change(ours, theirs))
    return Difference(name, unit, len(ours), float(ours.mean()), float(theirs.mean()), at, low, high, less_is_better)


def _perplexity(a: Sequence[float], b: Sequence[float], tokens: Sequence[int]) -> Difference:
    losses, counts = np.array([a, b]), np.array(tokens)
    drawn = _draws(len(counts))
    means = losses[:, drawn].sum(axis=-1) / counts[drawn].sum(axis=-1)
    low, high = np.quantile(np.exp(means[1] - means[0]) - 1, (0.025, 0.975))
    ours, theirs = np.exp(losses.sum(axis=-1) / counts.sum()).tolist()
    return Difference("perplexity", "number", len(counts), ours, theirs, theirs / ours - 1, low, high, True)


def _draws(count: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).integers(count, size=(_DRAWS, count))
