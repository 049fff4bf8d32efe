"""One worker's engine as continuous batching: between two events its steps are summed in closed form.

A step takes a + b*prefill + c*decode + d*attention seconds, the model that the ledger shares costs by
(`coldsnap.cost.shares`). While the same n requests decode, step j costs s + j*d*n more than none, so that the time of
many steps is a polynomial of degree two, and the step under way at any moment its root.

What it does not know: preemption (a request is let in when all that it will need fits), the prefix cache (every
prompt token is computed), speculative decoding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from coldsnap.cost.step_model import attention


@dataclass(frozen=True, slots=True)
class Speed:
    """What an engine's steps take, in seconds of the engine, and what fits into one."""

    a: float
    """A step."""
    b: float
    """A prefill token."""
    c: float
    """A decode token."""
    d: float
    """A position read by attention."""
    sequences: int = 256
    """Requests in a batch, at most: `max_num_seqs`."""
    tokens: int = 8192
    """Tokens in a step, at most: `max_num_batched_tokens`."""
    cache: float = math.inf
    """Tokens whose keys and values fit."""

    def slower(self, by: float) -> Speed:
        """Return an engine whose steps take `by` times as long."""
        return replace(self, a=self.a * by, b=self.b * by, c=self.c * by, d=self.d * by)


class Batch:
    """Requests in one engine, by number. `end` is when something happens next, infinity when nothing does."""

    __slots__ = (
        "_at", "_decoded", "_first", "_held", "_joining", "_outputs", "_partial", "_prompts", "_reads", "_running",
        "_speed", "_steps", "_waiting", "busy", "end", "widest",
    )  # fmt: skip

    def __init__(self, speed: Speed, prompts: Sequence[int], outputs: Sequence[int]) -> None:
        """`prompts` and `outputs` are tokens by a request's number."""
        self._speed = speed
        self._prompts = prompts
        self._outputs = outputs
        self._running: list[tuple[int, int]] = []
        """A heap of (decode step that is a request's last, its number)."""
        self._waiting: deque[int] = deque()
        self._joining: list[int] = []
        """Requests whose prompt is complete when the step under way is."""
        self._partial = 0
        """Tokens of the first waiting prompt that have been computed."""
        self._decoded = 0
        """Decode steps so far."""
        self._reads = 0
        """Positions that the next decode step reads, of all requests."""
        self._held = 0
        """Tokens in the cache once all running requests are complete."""
        self._at = 0.0
        self._steps = 0
        """Steps from `_at` to `end`; 0 if one of them has prefill, or none is under way."""
        self._first: list[int] = []
        self.end = math.inf
        self.busy = 0.0
        """Seconds in which steps ran, up to the last event."""
        self.widest = 0
        """Requests that decoded together, at most."""

    def add(self, number: int, now: float) -> None:
        """Give the engine a request: it joins when the step under way ends."""
        self._waiting.append(number)
        if self.end == math.inf:
            self._at = now
            self._begin()
        elif self._steps > 1 and len(self._waiting) == 1 and self._fits(number):
            self._steps = self._until(now)
            self.end = self._at + self._lasting(self._steps)

    def advance(self) -> tuple[list[int], list[int]]:
        """Go to `end`; return the requests that have their first token there, and those that have their last."""
        self.busy += self.end - self._at
        self._at = self.end
        running, steps = self._running, self._steps or 1
        self._reads += steps * len(running)
        self._decoded += steps
        finished = []
        while running and running[0][0] <= self._decoded:
            number = heappop(running)[1]
            finished.append(number)
            size = self._prompts[number] + self._outputs[number]
            self._reads -= size
            self._held -= size
        first, self._joining = self._joining, []
        for number in first:
            prompt, output = self._prompts[number], self._outputs[number]
            if output == 1:
                finished.append(number)
                self._held -= prompt + output
            else:
                heappush(running, (self._decoded + output - 1, number))
                self._reads += prompt + 1
        self.widest = max(self.widest, len(running))
        self._begin()
        return first, finished

    def _begin(self) -> None:
        """Plan the next step with prefill, or as many without as pass before a request ends."""
        speed, count = self._speed, len(self._running)
        if self._waiting and (self._partial or self._fits(self._waiting[0])):
            self._steps = 0
            self.end = self._at + self._prefill(speed.a + speed.c * count + speed.d * self._reads)
        elif count:
            self._steps = self._running[0][0] - self._decoded
            self.end = self._at + self._lasting(self._steps)
        else:
            self.end = math.inf

    def _fits(self, number: int) -> bool:
        """Whether there is room for one more; a request alone always has it."""
        count, speed = len(self._running) + len(self._joining), self._speed
        size = self._held + self._prompts[number] + self._outputs[number]
        return not count or (count < speed.sequences and size <= speed.cache)

    def _prefill(self, seconds: float) -> float:
        """Take prompts into a step of `seconds` without them; return how long it is with them."""
        speed, waiting, room = self._speed, self._waiting, max(1, self._speed.tokens - len(self._running))
        while waiting and room and (self._partial or self._fits(waiting[0])):
            number = waiting[0]
            prompt = self._prompts[number]
            if not self._partial:
                self._held += prompt + self._outputs[number]
            new = min(prompt - self._partial, room)
            self._partial += new
            room -= new
            seconds += speed.b * new + speed.d * attention(new, self._partial)
            if self._partial == prompt:
                waiting.popleft()
                self._joining.append(number)
                self._partial = 0
        return seconds

    def _lasting(self, steps: int) -> float:
        """Return how long the next decode steps take together."""
        speed, count = self._speed, len(self._running)
        return steps * (speed.a + speed.c * count + speed.d * (self._reads + count * (steps - 1) / 2))

    def _until(self, now: float) -> int:
        """Return how many decode steps end the one that is under way at `now`, of those that are planned."""
        speed, count = self._speed, len(self._running)
        half = speed.d * count / 2
        linear = speed.a + speed.c * count + speed.d * self._reads - half
        past = now - self._at
        if half > linear * 1e-9:
            steps = (math.sqrt(linear * linear + 4 * half * past) - linear) / (2 * half)
        else:
            steps = past / linear
        return max(1, min(self._steps, math.ceil(steps - 1e-9)))
