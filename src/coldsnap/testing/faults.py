"""What goes wrong between a worker and the control plane, drawn from a seed so that a test repeats."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from coldsnap.desk.serve.control_plane import LOST


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with a worker's POSTs: seconds of delay, and fractions (0 to 1) answered with an error.

    Each draw depends on the seed, the job's number and the number of its POST, not on how jobs interleave.
    Half the delay passes before the POST counts as arrived, half before it is answered.
    A refused POST has no effect; one that is lost has it, and is answered with 504.
    """

    delay: float = 0.0
    jitter: float = 0.0
    stream_5xx: float = 0.0
    stream_429: float = 0.0
    stream_lost: float = 0.0
    done_5xx: float = 0.0
    done_429: float = 0.0
    done_lost: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.delay < 0 or self.jitter < 0:
            raise ValueError("delay and jitter are seconds, not negative")
        for kind in ("stream", "done"):
            fractions = self._fractions(kind)
            if min(fractions) < 0 or sum(fractions) > 1:
                raise ValueError(f"{kind}_5xx and {kind}_429 and {kind}_lost are fractions whose sum is at most 1")

    def draw(self, kind: Literal["stream", "done"], job_number: int, post_number: int) -> tuple[float, int | None]:
        """Return the delay of one POST and the status that refuses it, if any."""
        dice = random.Random(f"{self.seed}/{kind}/{job_number}/{post_number}")
        delay, roll = self.delay + self.jitter * dice.random(), dice.random()
        for status, fraction in zip((500, 429, LOST), self._fractions(kind), strict=True):
            if roll < fraction:
                return delay, status
            roll -= fraction
        return delay, None

    def _fractions(self, kind: str) -> tuple[float, float, float]:
        if kind == "stream":
            return self.stream_5xx, self.stream_429, self.stream_lost
        return self.done_5xx, self.done_429, self.done_lost
