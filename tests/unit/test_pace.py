"""When a stream's consumer gets what, in simulated time: first at once, then when due, the end and errors at once."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from coldsnap.pace import Pace, PacedQueue

INTERVAL = 0.02


@dataclass
class Output:
    text: str
    finished: bool = False


class Collector:
    """What vLLM's does, as far as pacing is concerned; `tests/engine/test_vllm_seam.py` holds the real one to it."""

    def __init__(self) -> None:
        self.output: Any = None
        self.closed = False

    def put(self, output: Output) -> None:
        self.output.text += output.text
        self.output.finished |= output.finished

    def close(self) -> None:
        self.closed = True


class Queue(PacedQueue, Collector):
    pass


def pace(interval: float = INTERVAL) -> Pace:
    return Pace(interval, lambda: asyncio.get_running_loop().time())


def begun(clock: Pace) -> Queue:
    queue = Queue()
    queue.begin(clock)
    return queue


async def feed(queue: Queue, *steps: str | float | Exception) -> None:
    """Put texts and errors, and sleep; the last text ends the request."""
    last = max((i for i, step in enumerate(steps) if isinstance(step, str)), default=-1)
    for number, step in enumerate(steps):
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            queue.put(Output(step, number == last) if isinstance(step, str) else step)


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
    assert got[1][0] == pytest.approx(0.025)  # due at 0.02; looked for every 10 ms


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
    await feed(queue, "a", "b", "c", "z")
    queue = begun(pace())
    queue.put(Output("a"))
    assert (await queue.get()).text == "a"
    queue.put(Output("b"))
    queue.put(RuntimeError("the engine died"))
    assert (await queue.get()).text == "b"
    with pytest.raises(RuntimeError, match="died"):
        await queue.get()


async def test_an_error_alone_is_raised() -> None:
    queue = begun(pace())
    queue.put(RuntimeError("at once"))
    with pytest.raises(RuntimeError, match="at once"):
        queue.get_nowait()


async def test_what_was_put_before_the_pace_began_is_not_lost() -> None:
    queue = Queue()
    queue.output = Output("early")
    queue.begin(pace())
    assert (await queue.get()).text == "early"


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
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    queue.put(Output("a"))
    assert queue.get_nowait().text == "a"
    queue.put(Output("b"))
    queue.close()
    await asyncio.sleep(1.0)


async def test_sweeps_end_with_the_streams() -> None:
    clock = pace()
    for _ in range(3):
        queue = begun(clock)
        await feed(queue, "a", "b", "c", "z")
        assert (await read(queue))[-1][1] == "abcz"
    await asyncio.sleep(1.0)
    assert not clock._sweeping
