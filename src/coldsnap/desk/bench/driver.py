"""Sends the calls of a schedule and notes what became of each.

In an open loop a call is due when the schedule says so, however busy the endpoint is, and its times count from
then: a client that falls behind must not hide it (coordinated omission). In a closed loop a call is due when
there is room for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from coldsnap.desk.bench.answer import Answer, Failed
from coldsnap.desk.bench.endpoint import Endpoint
from coldsnap.desk.bench.prompts import Prompts
from coldsnap.desk.bench.schedule import Call

_COARSE_SECONDS = 0.004
"""uvloop's timers are whole milliseconds: the rest of a wait is slept by a thread, to a tenth of one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call. Times are seconds from the start of the load; a failed one has `error`, its kind."""

    number: int
    due: float
    sent: float
    end: float
    first: float | None
    last: float | None
    gap: float | None
    """The longest wait between two outputs."""
    text: bool
    wished_prompt_tokens: int
    wished_output_tokens: int
    prompt_tokens: int | None
    output_tokens: int | None
    gpu_seconds: float | None = None
    prefill_gpu_seconds: float | None = None
    decode_gpu_seconds: float | None = None
    usd: float | None = None
    error: str | None = None
    detail: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds from when it was due to its first output."""
        return None if self.first is None else self.first - self.due

    @property
    def e2e(self) -> float:
        """Seconds from when it was due to the end of its answer."""
        return self.end - self.due

    @property
    def itl(self) -> float | None:
        """Mean seconds between two tokens; None where all came at once or their number is not known."""
        between = (self.output_tokens or 0) - 1
        if self.first is None or self.last is None or self.gap is None or between < 1:
            return None
        return (self.last - self.first) / between


@dataclass(slots=True)
class Run:
    """A load while it runs and after it. `cpu` is this process's own CPU-seconds."""

    outcomes: list[Outcome] = field(default_factory=list)
    sent: int = 0
    running: int = 0
    most_running: int = 0
    failed: int = 0
    tokens: int = 0
    unfinished: int = 0
    """Requests that were cut off when the load was stopped."""
    seconds: float = 0.0
    cpu: float = 0.0


class Driver:
    """Runs one load. `stop` ends it: what is in flight is cut off, what is done stays. `run` is live."""

    def __init__(self, endpoint: Endpoint, prompts: Prompts, timeout: float, stop: asyncio.Event) -> None:
        self._endpoint = endpoint
        self._prompts = prompts
        self._timeout = timeout
        self._stop = stop
        self._begin = 0.0
        self.run = Run()

    async def drive(self, calls: Iterable[Call], concurrency: int | None, seconds: float | None = None) -> Run:
        """Send the calls, at most `concurrency` at a time, none after `seconds`; return what became of them."""
        run, begin_cpu = self.run, time.process_time()
        self._begin = time.perf_counter()
        sending = asyncio.create_task(self._all(calls, concurrency, seconds))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not sending.done():
            sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        run.seconds = time.perf_counter() - self._begin
        run.cpu = time.process_time() - begin_cpu
        return run

    async def _all(self, calls: Iterable[Call], concurrency: int | None, seconds: float | None) -> None:
        room = asyncio.Semaphore(concurrency) if concurrency else None
        with ThreadPoolExecutor(1, "pace") as pace:
            async with asyncio.TaskGroup() as tasks:
                for call in calls:
                    prompt = self._prompts.make(call.prompt_tokens)  # before it is due
                    body = self._endpoint.dialect.body(prompt, call.output_tokens)
                    if call.at is not None:
                        await self._until(call.at, pace)
                    if room is not None:
                        await room.acquire()
                    now = self._now()
                    if seconds is not None and call.at is None and now > seconds:
                        return
                    tasks.create_task(self._one(call, body, now if call.at is None else call.at, room))

    async def _until(self, at: float, pace: ThreadPoolExecutor) -> None:
        if (left := at - self._now()) > _COARSE_SECONDS:
            await asyncio.sleep(left - _COARSE_SECONDS / 2)
        if (left := at - self._now()) > 0:
            await asyncio.get_running_loop().run_in_executor(pace, time.sleep, left)

    async def _one(self, call: Call, body: dict[str, Any], due: float, room: asyncio.Semaphore | None) -> None:
        run, answer, sent = self.run, Answer(), self._now()
        run.sent += 1
        run.running += 1
        run.most_running = max(run.most_running, run.running)
        failed: Failed | None = None
        try:
            async with asyncio.timeout(self._timeout):
                await self._endpoint.ask(body, answer)
            if not answer.finished:
                failed = Failed("cut off", "the answer ended without a finish_reason")
        except Failed as error:
            failed = error
        except TimeoutError:
            failed = Failed("timeout", f"no whole answer within {self._timeout:g} s")
        except asyncio.CancelledError:
            run.unfinished += 1
            raise
        finally:
            run.running -= 1
            if room is not None:
                room.release()
        self._note(call, answer, (due, sent, self._now()), failed)

    def _note(self, call: Call, answer: Answer, times: tuple[float, float, float], failed: Failed | None) -> None:
        due, sent, end = times
        outcome = Outcome(
            number=call.number,
            due=due,
            sent=sent,
            end=end,
            first=None if answer.first is None else answer.first - self._begin,
            last=None if answer.last is None else answer.last - self._begin,
            gap=answer.gap if answer.outputs > 1 else None,
            text=answer.text,
            wished_prompt_tokens=call.prompt_tokens,
            wished_output_tokens=call.output_tokens,
            prompt_tokens=answer.tokens("prompt_tokens"),
            output_tokens=answer.tokens("completion_tokens"),
            gpu_seconds=answer.cost_of("gpu_seconds"),
            prefill_gpu_seconds=answer.cost_of("prefill_gpu_seconds"),
            decode_gpu_seconds=answer.cost_of("decode_gpu_seconds"),
            usd=answer.cost_of("usd"),
            error=failed.kind if failed else None,
            detail=failed.detail if failed else "",
        )
        self.run.outcomes.append(outcome)
        self.run.failed += failed is not None
        self.run.tokens += outcome.output_tokens or 0

    def _now(self) -> float:
        return time.perf_counter() - self._begin
