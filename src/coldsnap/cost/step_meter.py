"""What each engine step computed for whom, and how long it took, measured beside vLLM's scheduler.

`make_scheduler` runs in the engine core's process. It derives from the scheduler class that vLLM would have
picked, so async scheduling stays, and imports nothing of vLLM. When a step ends it writes one frame into a
FIFO, before the step's outputs are queued: whoever has an output finds its frame already there. It never
waits: a frame that finds the pipe full is dropped and counted in the next one. `step_reader` reads them.

Step k lasts from the end of step k-1, or its own scheduling if nothing was under way, to its end. So no
instant counts twice, also when async scheduling has two steps in flight.

A frame: header, events (a request's id and its number, or a number that is free again), decodes (number,
context), others (number, prefill, decode, recomputed, context), all little-endian. What does not fit what is
expected here of the scheduler ends the metering with a frame that says so; the engine goes on.
"""

from __future__ import annotations

import copy
import os
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VARIABLE = "COLDSNAP_STEPS"
"""Environment variable with the FIFO's path: the way into a process that vLLM starts."""
FACTORY = "coldsnap.cost.step_meter.make_scheduler"
"""Value of vLLM's `scheduler_cls`."""

HEADER = struct.Struct("<IddfIdIHH")
"""Bytes that follow, start, end, seconds of metering, frames and seconds lost before, bytes of events,
decodes, others. No decodes and no others is an empty step; `BROKEN` decodes is the last frame, whose events
are the reason."""
EVENT = struct.Struct("<?II")
"""Whether the request begins, its number, bytes of its id that follow."""
BROKEN = 0xFFFF

now = time.monotonic


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """Return vLLM's own scheduler, metered if the environment names a FIFO that somebody reads."""
    config = copy.copy(vllm_config.scheduler_config)
    config.scheduler_cls = None
    base = config.get_scheduler_cls()
    try:
        fd = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_NONBLOCK)
    except (KeyError, OSError):  # the front end notices that no frame comes
        return base(vllm_config=vllm_config, **kwargs)
    scheduler = type(f"Metered{base.__name__}", (_Metered, base), {})(vllm_config=vllm_config, **kwargs)
    scheduler.step_meter = StepMeter(fd)
    return scheduler


class _Metered:
    step_meter: StepMeter

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = now()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc] # the base is vLLM's
        self.step_meter.scheduled(output, self.requests, begun)
        return output

    def update_from_output(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(output, *args, **kwargs)  # type: ignore[misc] # the base is vLLM's
        self.step_meter.ended(output, self)
        return outputs


class _Request:
    """What the meter remembers of a request from step to step. Positions are counted in tokens."""

    __slots__ = ("frontier", "last", "number", "plain", "preemptions", "prompt")

    def __init__(self, number: int, prompt: int, preemptions: int) -> None:
        self.number = number
        self.prompt = prompt
        self.last = -1
        """Position up to which tokens are computed after the latest step."""
        self.preemptions = preemptions
        self.frontier = 0
        """Position reached before the latest preemption: tokens up to here are computed again."""
        self.plain = prompt
        """Position from which on every token is a newly decoded one."""


@dataclass(slots=True)
class _Scheduled:
    output: Any
    begun: float
    events: bytes
    decodes: array[int]
    others: array[int]


class StepMeter:
    """Writes a frame for each step of a scheduler. No failure of its own ever reaches the scheduler."""

    def __init__(self, fd: int, clock: Callable[[], float] = now) -> None:
        self._fd = fd
        self._clock = clock
        self._rest = b""
        self._requests: dict[str, _Request] = {}
        self._free: list[int] = []
        self._numbers = 0
        self._steps: deque[_Scheduled] = deque()
        self._unsent = b""
        self._lost = 0
        self._lost_seconds = 0.0
        self._end = 0.0
        self._going_on = False
        self._own = 0.0
        self._broken: bytes | None = None
        """The last frame, empty once it is written."""

    def scheduled(self, output: Any, requests: Any, begun: float) -> None:
        """Note a step that `schedule` has put together, beginning at `begun`."""
        entered = self._clock()
        if self._broken is None:
            try:
                self._steps.append(self._note(output, requests, begun))
            except Exception as error:  # noqa: BLE001 -- another vLLM may differ: that costs the numbers only
                self._give_up(error)
        self._own += self._clock() - entered

    def ended(self, output: Any, scheduler: Any) -> None:
        """Write the frame of a step whose results are in."""
        entered = self._clock()
        if self._broken is None:
            try:
                self._finish(output, entered, going_on=scheduler.get_num_unfinished_requests() > 0)
            except Exception as error:  # noqa: BLE001 -- as above
                self._give_up(error)
        if self._broken and self._write(self._broken):
            self._broken = b""
        self._own += self._clock() - entered

    def _note(self, output: Any, requests: Any, begun: float) -> _Scheduled:
        events = bytearray()
        for name in output.finished_req_ids:
            number = (self._requests.get(name) or self._announce(name, 0, 0, events)).number
            del self._requests[name]
            self._free.append(number)
            events += EVENT.pack(False, number, 0)
        decodes: list[int] = []
        others: list[int] = []
        numbered, decode = self._requests, decodes.append
        for name, new in output.num_scheduled_tokens.items():
            request = requests[name]
            computed = request.num_computed_tokens  # after this step: `schedule` has advanced it already
            state = numbered.get(name)
            if new == 1 and state is not None and state.last == computed - 1 >= state.plain:
                decode(state.number)
                decode(computed)
            else:
                if state is None:
                    state = self._announce(name, request.num_prompt_tokens, request.num_preemptions, events)
                others += state.number, *self._classify(state, request, new), computed
            state.last = computed
        return _Scheduled(output, begun, bytes(events), array("I", decodes), array("I", others))

    def _announce(self, name: str, prompt: int, preemptions: int, events: bytearray) -> _Request:
        if self._free:
            number = self._free.pop()
        else:
            number, self._numbers = self._numbers, self._numbers + 1
        state = self._requests[name] = _Request(number, prompt, preemptions)
        encoded = name.encode()
        events += EVENT.pack(True, number, len(encoded)) + encoded
        return state

    def _classify(self, state: _Request, request: Any, new: int) -> tuple[int, int, int]:
        """Return how many of the `new` tokens are prefill, decode and recomputed."""
        computed = request.num_computed_tokens
        start = computed - new
        if request.num_preemptions != state.preemptions:
            # `last` counts rejected drafts and tokens in flight too, which are no part of the request.
            state.preemptions = request.num_preemptions
            state.frontier = max(state.frontier, min(state.last, request.num_tokens))
            state.plain = max(state.prompt, state.frontier)
        fresh = max(start, state.frontier)
        again = min(computed, fresh) - start
        prefill = max(0, min(computed, state.prompt) - fresh)
        return prefill, new - again - prefill, again

    def _finish(self, output: Any, end: float, *, going_on: bool) -> None:
        step = self._steps.popleft()
        while step.output is not output:  # a step without results, as after an error: its time is the next one's
            self._unsent += step.events
            step = self._steps.popleft()
        start = self._end if self._going_on else max(step.begun, self._end)
        self._end, self._going_on = end, going_on
        self._unsent += step.events
        body = self._unsent + step.decodes.tobytes() + step.others.tobytes()
        header = HEADER.pack(
            HEADER.size - 4 + len(body), start, end, self._own, self._lost, self._lost_seconds,
            len(self._unsent), len(step.decodes) // 2, len(step.others) // 5,
        )  # fmt: skip
        self._own = 0.0
        if self._write(header + body):
            self._unsent, self._lost, self._lost_seconds = b"", 0, 0.0
        else:
            self._lost += 1
            self._lost_seconds += end - start

    def _write(self, frame: bytes) -> bool:
        """Put the frame into the pipe or drop it. The pipe may take a part; the rest goes first next time."""
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
            self._rest = frame[os.write(self._fd, frame) :]
        except OSError:  # full, or the front end is gone
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".encode()[:1000]
        size = HEADER.size - 4 + len(reason)
        header = HEADER.pack(size, 0.0, 0.0, 0.0, self._lost, self._lost_seconds, len(reason), BROKEN, 0)
        self._broken = header + reason
        self._steps.clear()
