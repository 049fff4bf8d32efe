"""How many workers an endpoint should have: the platform's two documented rules, as pure functions.

Where the platform's documentation says nothing: the first worker of an endpoint that has none starts at once, and
by queue delay one worker starts at a time, the next when the last one takes jobs and the queue is still slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Rule = Literal["queue-delay", "request-count"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """An endpoint's settings. `value` is seconds in the queue, or requests for each worker."""

    least: int = 1
    most: int = 1
    idle_timeout: float = 5.0
    rule: Rule = "queue-delay"
    value: float = 4.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be done, low priority left out, and by whom."""

    queued: int
    oldest: float
    """Seconds that the first in the queue has waited."""
    running: int
    workers: int
    starting: int
    """How many of the workers do not take jobs yet."""


def wanted(scaling: Scaling, load: Load) -> int:
    """Return how many workers there should be; fewer than there are only lets idle ones end."""
    if scaling.rule == "request-count":
        number = math.ceil((load.queued + load.running) / scaling.value)
    elif not load.queued:
        number = 0
    elif load.workers == 0 or (load.oldest > scaling.value and not load.starting):
        number = load.workers + 1
    else:
        number = load.workers
    return min(max(number, scaling.least), scaling.most)
