"""What goes wrong between a worker and the control plane, drawn from a seed so that a test repeats."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with a worker's POSTs: seconds of delay, and fractions (0 to 1) answered with an error.

    Each draw depends on the seed, the job's number and the number of its POST, not on how jobs interleave.
    Half the delay passes before the POST counts as arrived, half before it is answered.
    A refused POST has no effect.
    """

    delay: float = 0.0
    jitter: float = 0.0
    stream_5xx: float = 0.0
    stream_429: float = 0.0
    done_5xx: float = 0.0
    done_429: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.delay < 0 or self.jitter < 0:
            raise ValueError("delay and jitter are seconds, not negative")
        for kind, server, throttled in (
            ("stream", self.stream_5xx, self.stream_429),
            ("done", self.done_5xx, self.done_429),
        ):
            if min(server, throttled) < 0 or server + throttled > 1:
                raise ValueError(f"{kind}_5xx and {kind}_429 are fractions whose sum is at most 1")

    def draw(self, kind: Literal["stream", "done"], job_number: int, post_number: int) -> tuple[float, int | None]:
        """Return the delay of one POST and the status that refuses it, if any."""
        dice = random.Random(f"{self.seed}/{kind}/{job_number}/{post_number}")
        delay, roll = self.delay + self.jitter * dice.random(), dice.random()
        server = self.stream_5xx if kind == "stream" else self.done_5xx
        throttled = self.stream_429 if kind == "stream" else self.done_429
        return delay, 500 if roll < server else 429 if roll < server + throttled else None
