"""Shares each engine step's seconds among the requests in it. Pure: no clock, no vLLM, no I/O.

A step of wall time T computes tokens for a set B of requests. Its fixed cost a, reading the weights once, is
everybody's; what a request adds is its own:

    phi_i = a/|B| + x_i,    x_i = b*prefill_i + c*decode_i + d*attention_i

That is the Shapley value (Shapley, 1953) of the cost game v(S) = a + sum of x_i over S, v({}) = 0: the fixed
cost is an airport game with one runway (Littlechild and Owen, 1973), the rest is additive. What is charged is
T*phi_i/sum(phi), so a step is conserved also where the model is wrong. `step_model` finds a, b, c, d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coldsnap.cost.step_model import StepModel, attention
from coldsnap.engine import Usage

Floats = NDArray[np.float64]

PREFILL, DECODE, RECOMPUTED = 0, 1, 2
"""Columns of `Step.tokens` and of a step's shares."""

RECOMPUTE, EMPTY, TAIL, LOST = "recompute", "empty", "tail", "lost"
"""Causes of overhead: tokens computed again after a preemption; steps in which nothing could run; what a
request still cost after its account was closed; steps whose frames did not arrive."""


@dataclass(frozen=True)
class Step:
    """One step of the engine with n requests. Times are seconds of the monotonic clock."""

    start: float
    end: float
    numbers: NDArray[np.intp]
    """(n,) the requests' numbers, small and distinct; a number is used again once its request is gone."""
    tokens: Floats
    """(n, 3) tokens computed: prefill, decode, and those that had been computed before a preemption."""
    context: Floats
    """(n,) positions computed so far, this step's included."""
    plain: bool = False
    """Whether each request decoded one token and nothing else, as in most steps: a shorter formula does then."""

    @cached_property
    def new(self) -> Floats:
        """(n,) tokens computed, of whatever kind."""
        new: Floats = self.tokens.sum(axis=1)
        return new

    @cached_property
    def attention(self) -> Floats:
        """(n,) tokens times context, in reads of one position."""
        reads: Floats = attention(self.new, self.context, np.minimum)
        return reads

    @property
    def work(self) -> Floats:
        """(4,) what a, b, c, d multiply: 1, prefill, decode and attention of all requests."""
        if self.plain:
            return np.array([1.0, 0.0, len(self.numbers), self.context.sum()])
        tokens = self.tokens.sum(axis=0)
        total = tokens[PREFILL] + tokens[RECOMPUTED]
        return np.array([1.0, total, tokens[DECODE], self.attention.sum()])


def shares(step: Step, coefficients: Floats) -> Floats:
    """Split the step's duration; return seconds of shape (n, 3): for prefill, decode and recomputed tokens.

    They sum to the duration. A request's part of the fixed cost and of attention follows its tokens, so what
    a preempted request computes again falls into the third column, which is nobody's: overhead.
    """
    a, b, c, d = coefficients
    new = step.new
    common = (a / len(new) + d * step.attention) / new
    phi: Floats = common[:, None] + np.array([b, c, b])
    phi *= step.tokens
    total = phi.sum()
    if not total > 0:  # a step that the model calls free
        phi = step.tokens / new[:, None]
        total = phi.sum()
    phi *= (step.end - step.start) / total
    return phi


def decode_shares(step: Step, coefficients: Floats) -> Floats:
    """Split a plain step's duration; return seconds of shape (n,), equal to the decode column of `shares`."""
    a, _, c, d = coefficients.tolist()
    phi: Floats = d * step.context
    phi += a / len(phi) + c
    total = float(phi.sum())
    if not total > 0:  # a step that the model calls free
        return np.full(len(phi), (step.end - step.start) / len(phi))
    phi *= (step.end - step.start) / total
    return phi


class Ledger:
    """Keeps the seconds charged to each request until they are taken for a job or written off as overhead."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._rows = np.zeros((64, 2))
        self._busy = 0.0
        self._overhead = dict.fromkeys((RECOMPUTE, EMPTY, TAIL, LOST), 0.0)
        self._steps = 0
        self._lost = 0
        self._metering = 0.0

    @property
    def lost_steps(self) -> int:
        """How many steps are known by their duration only: their frames were lost."""
        return self._lost

    @property
    def held(self) -> Floats:
        """(n,) seconds charged to each numbered request that no job has been billed for yet."""
        seconds: Floats = self._rows.sum(axis=1)
        return seconds

    @property
    def spent(self) -> float:
        """Seconds charged so far, to requests and to overhead."""
        return self._busy + sum(self._overhead.values())

    def charge(self, step: Step, metering: float = 0.0) -> None:
        """Charge one step, of which `metering` seconds went into measuring it, and learn from it."""
        self._steps += 1
        self._metering += metering
        duration = step.end - step.start
        if not len(step.numbers):
            self._overhead[EMPTY] += duration
            return
        if (highest := int(step.numbers.max())) >= len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros((highest + 1, 2))))
        if step.plain:
            self._rows[step.numbers, DECODE] += decode_shares(step, self._model.coefficients)
            self._busy += duration
        else:
            parts = shares(step, self._model.coefficients)
            self._rows[step.numbers] += parts[:, :RECOMPUTED]
            again = float(parts[:, RECOMPUTED].sum())
            self._overhead[RECOMPUTE] += again
            self._busy += duration - again
        self._model.learn(step.work, duration)

    def lose(self, steps: int, seconds: float) -> None:
        """Count steps of which only the duration is known."""
        self._lost += steps
        self._overhead[LOST] += seconds

    def take(self, number: int) -> tuple[float, float]:
        """Return the request's prefill and decode seconds since they were last taken."""
        if number >= len(self._rows):
            return 0.0, 0.0
        prefill, decode = self._rows[number].tolist()
        self._rows[number] = 0.0
        return prefill, decode

    def write_off(self, seconds: float) -> None:
        """Turn seconds that were taken, and have no owner, into overhead."""
        self._busy -= seconds
        self._overhead[TAIL] += seconds

    def usage(self) -> Usage:
        """Return the totals so far."""
        overhead = dict(self._overhead)
        return Usage(self._busy, overhead, self._steps, self._lost, self._metering, self._model.fit())
