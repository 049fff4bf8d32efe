"""Plans when requests are sent and how long they are, whatever the endpoint makes of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coldsnap.desk.bench.lengths import Lengths
from coldsnap.desk.trace import Arrival


@dataclass(frozen=True, slots=True)
class Call:
    """A request to be. `at` is when it is to be sent, in seconds from the start; None: as soon as there is room."""

    number: int
    at: float | None
    prompt_tokens: int
    output_tokens: int


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yield the times of arrivals, `rate` a second on average, each independent of those before."""
    draw, now = random.Random(f"arrivals {seed}"), 0.0  # noqa: S311 -- load, not secrets
    while True:
        now += draw.expovariate(rate)
        yield now


def drawn(times: Iterable[float | None], prompt: Lengths, output: Lengths, seed: int) -> Iterator[Call]:
    """Yield a call for each time. Lengths have a generator of their own: a rate does not change them."""
    draw = random.Random(f"lengths {seed}")  # noqa: S311 -- load, not secrets
    for number, at in enumerate(times):
        yield Call(number, at, prompt.draw(draw), output.draw(draw))


def replayed(trace: Iterable[Arrival], speed: float) -> Iterator[Call]:
    """Yield a trace's requests, `speed` times as fast."""
    for number, each in enumerate(trace):
        yield Call(number, each.time / speed, each.prompt_tokens, each.output_tokens)


def limited(calls: Iterable[Call], requests: int | None, seconds: float | None) -> Iterator[Call]:
    """Yield at most so many, and none that is to be sent later than `seconds`."""
    timely = itertools.takewhile(lambda call: seconds is None or call.at is None or call.at <= seconds, calls)
    return itertools.islice(timely, requests)
