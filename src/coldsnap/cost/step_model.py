"""How long a step takes: T = a + b*prefill + c*decode + d*attention, fitted online, none of them below zero.

Least squares on relative errors (each step weighted by 1/T), so that one stalled step of a second does not
outweigh a thousand of a millisecond. Old steps are forgotten exponentially. With four unknowns, non-negative
least squares is solved exactly by trying all 2^4 active sets on the 4x4 normal equations (Lawson and Hanson,
1974, ch. 23, state the optimality conditions).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldsnap.engine import Fit

Floats = NDArray[np.float64]

_TILE = 64.0
"""Query tokens that share one read of the keys and values, as in FlashAttention (Dao et al., 2022)."""
_RIDGE_TOKENS = 256.0
"""Tokens whose arithmetic takes as long as reading the weights once: the ridge of the roofline (Williams,
Waterman and Patterson, 2009), about 300 for a datacentre GPU in bf16, less elsewhere. Only a start."""
_REMEMBERED_STEPS = 2000.0
_TRUST = 0.01
"""How many typical steps the first guess weighs: it decides what steps leave open, such as b before any prefill."""
_SOLVE_EVERY = 32

_ACTIVE = np.array(list(product((False, True), repeat=4)))
"""(16, 4) which coefficients are above zero."""
_BOTH_ACTIVE = _ACTIVE[:, :, None] & _ACTIVE[:, None, :]
_PINNED = np.eye(4) * ~_ACTIVE[:, :, None]
"""An inactive coefficient's row becomes u = 0."""


def attention(new: Any, context: Any, least: Callable[[Any, float], Any] = min) -> Any:
    """Return what d multiplies: the positions read for a request's `new` tokens, `context` positions in all then.

    The new tokens' positions are summed, over a tile: a decode reads its whole context for one token, a prefill's
    tokens share a read, a tile at a time. For arrays `least` is `numpy.minimum`.
    """
    return new * (2 * context - new + 1) / (2 * least(new, _TILE))


class StepModel:
    """Learns a, b, c, d from (work, duration) of steps. `coefficients` is (a, b, c, d), never negative."""

    def __init__(self, weights_bytes: float, kv_bytes_per_token: float) -> None:
        """Start from what a step moves: the weights once, and per token its context's keys and values.

        Both in bytes and above zero. Only their ratio counts, the bandwidth is learnt from the first step.
        """
        token = weights_bytes / _RIDGE_TOKENS
        self._unit = np.array([weights_bytes, token, token, kv_bytes_per_token], dtype=np.float64)
        self._gram = np.zeros((4, 4))
        self._moment = np.zeros(4)
        self._weight = 0.0
        self._steps = 0
        self.coefficients: Floats = self._unit / weights_bytes

    def learn(self, work: Floats, duration: float) -> None:
        """Take in a step: `work` is (4,) as `ledger.Step.work`, `duration` in seconds."""
        if duration <= 0:
            return
        row = work * self._unit / duration
        keep = 1 - 1 / _REMEMBERED_STEPS
        self._gram = self._gram * keep + np.outer(row, row)
        self._moment = self._moment * keep + row
        self._weight = self._weight * keep + 1
        self._steps += 1
        if self._steps % _SOLVE_EVERY == 0 or self._steps & (self._steps - 1) == 0:  # at first 1, 2, 4, 8, 16
            self.coefficients = self._solve() * self._unit

    def fit(self) -> Fit:
        """Return the coefficients in use and how well they predict."""
        a, b, c, d = map(float, self.coefficients)
        residual = None
        if self._weight:
            u = self.coefficients / self._unit
            square = float(u @ self._gram @ u - 2 * u @ self._moment) + self._weight
            residual = math.sqrt(max(square, 0.0) / self._weight)
        return Fit(a, b, c, d, residual, self._steps)

    def _solve(self) -> Floats:
        """Return u >= 0 that minimises u'Gu - 2h'u + trust*|u - s|^2; s scales the start to the steps."""
        scale = float(self._moment.sum() / self._gram.sum())
        trust = _TRUST * float(self._gram.trace()) / self._weight
        gram = self._gram + np.eye(4) * trust
        moment = self._moment + trust * scale
        candidates = np.linalg.solve(_BOTH_ACTIVE * gram + _PINNED, (_ACTIVE * moment)[:, :, None])[:, :, 0]
        cost = np.einsum("ki,ij,kj->k", candidates, gram, candidates) - 2 * candidates @ moment
        cost[(candidates < 0).any(axis=1)] = np.inf
        best: Floats = candidates[int(np.argmin(cost))]
        return best
