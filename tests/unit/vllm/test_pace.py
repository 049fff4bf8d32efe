"""When a stream's consumer gets what, in simulated time: first at once, then when due, the end and errors at once."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from coldsnap.vllm.pace import Pace, PacedQueue, PacedRequest

INTERVAL = 0.02


@dataclass
class Output:
    text: str
    finished: bool = False


class Collector:
    """What vLLM's does, as far as pacing is concerned; `tests/engine/test_vllm_seam.py` holds the real one to it."""

    def __init__(self) -> None:
        self.output: Any = None
        self.ready = asyncio.Event()
        self.closed = False

    def put(self, output: Output | Exception) -> None:
        if self.output is None or isinstance(output, Exception):
            self.output = output
            self.ready.set()
        else:
            self.output = Output(self.output.text + output.text, output.finished)

    async def get(self) -> Output:
        while self.output is None:
            await self.ready.wait()
        output = self.get_nowait()
        assert output is not None
        return output

    def get_nowait(self) -> Output | None:
        output, self.output = self.output, None
        self.ready.clear()
        if isinstance(output, Exception):
            raise output
        return output

    def close(self) -> None:
        self.closed = True


class Queue(PacedQueue, Collector):
    pass


class Detokenizer:
    def __init__(self) -> None:
        self.output_token_ids: list[int] = []

    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)


class State:
    """What vLLM's `RequestState` does: an output of the tokens that it is given."""

    def __init__(self, queue: Queue, stream_interval: int = 1) -> None:
        self.queue = queue
        self.detokenizer = Detokenizer()
        self.stream_interval = stream_interval
        self.sent_tokens_offset = 0

    def make_request_output(self, new_token_ids: list[int], _pooling: Any, finish_reason: Any, _stop: Any) -> Output:
        return Output("".join(map(chr, new_token_ids)), finish_reason is not None)


class Request(PacedRequest, State):
    """With a step of the engine, as vLLM's output processor takes it."""

    queue: Queue

    def step(self, token: str, *, last: bool = False) -> None:
        self.detokenizer.output_token_ids.append(ord(token))
        output = self.make_request_output([ord(token)], None, "stop" if last else None, None)
        if output is not None:
            self.queue.put(output)


def pace(interval: float = INTERVAL) -> Pace:
    return Pace(interval, lambda: asyncio.get_running_loop().time())


def begun(clock: Pace) -> Queue:
    queue = Queue()
    queue.begin(clock)
    return queue


async def feed(queue: Queue, *steps: str | float | Exception) -> None:
    """Let the engine give tokens and errors, and take its time; the last token ends the request."""
    request = Request(queue)
    last = max((i for i, step in enumerate(steps) if isinstance(step, str)), default=-1)
    for number, step in enumerate(steps):
        if isinstance(step, float):
            await asyncio.sleep(step)
        elif isinstance(step, str):
            request.step(step, last=number == last)
        else:
            queue.put(step)


async def read(queue: Queue) -> list[tuple[float, str]]:
    """Return what vLLM's `generate` would yield, with the times, until the end."""
    loop = asyncio.get_running_loop()
    got: list[tuple[float, str]] = []
    while True:
        output = queue.get_nowait() or await queue.get()
        got.append((round(loop.time(), 6), output.text))
        if output.finished:
            queue.close()
            return got


async def run(*steps: str | float | Exception) -> list[tuple[float, str]]:
    queue = begun(pace())
    feeding = asyncio.create_task(feed(queue, *steps))
    got = await read(queue)
    await feeding
    return got


async def test_the_first_output_leaves_at_once_and_the_rest_together() -> None:
    assert await run("a", 0.005, "b", 0.005, "c", 0.01, "d", 1.0, "e") == [(0.0, "a"), (0.02, "bcd"), (1.02, "e")]


async def test_the_end_does_not_wait() -> None:
    assert await run("a", 0.005, "b", 0.001, "c") == [(0.0, "a"), (0.006, "bc")]


async def test_an_output_after_a_pause_does_not_wait() -> None:
    assert await run("a", 0.5, "b", 0.001, "c") == [(0.0, "a"), (0.5, "b"), (0.501, "c")]


async def test_what_is_due_leaves_though_the_engine_is_long_at_its_next_step() -> None:
    got = await run("a", 0.005, "b", 3.0, "c")
    assert [text for _, text in got] == ["a", "b", "c"]
    assert got[1][0] == pytest.approx(0.021)  # due at 0.02; looked for every 4 ms


async def test_a_steady_stream_loses_nothing_and_keeps_its_order() -> None:
    letters = [chr(97 + i % 26) for i in range(300)]
    steps = [step for letter in letters for step in (letter, 0.0013)]
    got = await run(*steps[:-1])
    assert "".join(text for _, text in got) == "".join(letters)
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(got[:-1])]
    assert all(INTERVAL <= gap <= INTERVAL + 0.0013 for gap in gaps)


async def test_an_interval_of_zero_passes_every_output_on() -> None:
    queue = begun(pace(0.0))
    feeding = asyncio.create_task(feed(queue, "a", 0.001, "b", 0.001, "c"))
    assert [text for _, text in await read(queue)] == ["a", "b", "c"]
    await feeding


async def test_an_error_does_not_wait_and_comes_after_what_was_there() -> None:
    queue = begun(pace())
    request = Request(queue)
    request.step("a")
    assert (await queue.get()).text == "a"
    request.step("b")
    request.step("c")
    assert queue.get_nowait() is None
    queue.put(RuntimeError("the engine died"))
    assert (await queue.get()).text == "bc"
    with pytest.raises(RuntimeError, match="died"):
        await queue.get()


async def test_an_error_alone_is_raised() -> None:
    queue = begun(pace())
    queue.put(RuntimeError("at once"))
    with pytest.raises(RuntimeError, match="at once"):
        queue.get_nowait()


async def test_requests_that_share_a_queue_share_its_pace_and_none_of_them_starves() -> None:
    queue = begun(pace())
    one, other = Request(queue), Request(queue)
    one.step("a")
    other.step("A")
    assert (await queue.get()).text == "aA"
    one.step("b")
    other.step("B")
    assert queue.get_nowait() is None
    await asyncio.sleep(INTERVAL)
    one.step("c", last=True)
    other.step("C")
    assert sorted((await queue.get()).text) == sorted("bcBC")
    other.step("D", last=True)
    assert (await queue.get()).text == "D"


async def test_vllms_own_interval_counts_its_tokens_itself() -> None:
    queue = begun(pace())
    request = Request(queue, stream_interval=4)
    request.step("a")
    assert (await queue.get()).text == "a"
    request.step("b", last=True)
    assert (await queue.get()).text == "b"
    assert request.sent_tokens_offset == 0


async def test_many_streams_widen_the_pace_up_to_a_bound_and_ended_ones_do_not_count() -> None:
    clock = pace()
    assert clock.due() == pytest.approx(INTERVAL)
    queues = [begun(clock) for _ in range(30)]
    assert clock.due() == pytest.approx(0.03)
    more = [begun(clock) for _ in range(300)]
    assert clock.due() == pytest.approx(0.035)
    for queue in [*more, *queues]:
        queue.close()
    assert clock.due() == pytest.approx(INTERVAL)
    assert all(queue.closed for queue in queues)


async def test_a_wider_setting_is_kept() -> None:
    assert pace(0.5).due() == 0.5


async def test_a_cancelled_consumer_leaves_nothing_behind() -> None:
    clock = pace()
    queue = begun(clock)
    request = Request(queue)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    request.step("a")
    assert (await queue.get()).text == "a"
    request.step("b")
    queue.close()
    await asyncio.sleep(1.0)
    assert queue.get_nowait() is None
    assert not clock._held


async def test_sweeps_end_with_the_streams() -> None:
    clock = pace()
    for _ in range(3):
        queue = begun(clock)
        await feed(queue, "a", "b", "c", "z")
        assert (await read(queue))[-1][1] == "abcz"
    await asyncio.sleep(1.0)
    assert not clock._sweeping
