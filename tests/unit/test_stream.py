"""Pacing, in simulated time: what leaves when, and what happens to a source whose reader is slow or gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, Iterable

import pytest

from coldsnap.stream import Paced

INTERVAL = 0.02
Step = str | float | Exception
"""What a source does: give a piece, take seconds, raise an error."""


class Source:
    """Plays steps and notes how it ended."""

    def __init__(self, *steps: Step, clean_up: float = 0.0) -> None:
        self._steps = steps
        self._clean_up = clean_up
        self.given: list[tuple[float, str]] = []
        self.cleaned_up: float | None = None

    async def pieces(self) -> AsyncGenerator[str, None]:
        try:
            for step in self._steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    self.given.append((now(), step))
                    yield step
        finally:
            await asyncio.sleep(self._clean_up)
            self.cleaned_up = now()


def now() -> float:
    return round(asyncio.get_running_loop().time(), 6)


def join(pieces: list[str]) -> Iterable[str]:
    if pieces:
        yield "".join(pieces)


def paced(source: Source, interval: float = INTERVAL) -> Paced[str, str]:
    return Paced(source.pieces(), join, lambda: interval)


async def read(
    stream: Paced[str, str], chunks: list[tuple[float, str]] | None = None, *, post: float = 0.0
) -> list[tuple[float, str]]:
    """Return the chunks with the time at which each arrived; `post` is the time that each takes."""
    chunks = [] if chunks is None else chunks
    async for chunk in stream.chunks():
        chunks.append((now(), chunk))
        await asyncio.sleep(post)
    return chunks


async def test_the_first_piece_leaves_at_once_and_the_rest_together() -> None:
    stream = paced(Source("a", 0.005, "b", 0.005, "c", 0.005, "d", 1.0))
    assert await read(stream) == [(0.0, "a"), (0.02, "bcd")]


async def test_a_first_piece_that_comes_late_leaves_when_it_comes() -> None:
    assert await read(paced(Source(3.0, "a", 1.0))) == [(3.0, "a")]


async def test_chunks_of_a_steady_source_are_an_interval_apart() -> None:
    steps: list[Step] = []
    for letter in "abcdefghij":
        steps += [letter, 0.0071]
    chunks = await read(paced(Source(*steps, 1.0)))
    times = [time for time, _ in chunks]
    assert times == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08])
    assert "".join(text for _, text in chunks) == "abcdefghij"


async def test_a_piece_after_a_pause_does_not_wait() -> None:
    assert await read(paced(Source("a", 0.5, "b", 1.0))) == [(0.0, "a"), (0.5, "b")]


async def test_the_last_chunk_is_not_delayed() -> None:
    assert await read(paced(Source("a", 0.005, "b"))) == [(0.0, "a"), (0.005, "b")]


async def test_an_interval_of_zero_passes_every_piece_on() -> None:
    stream = paced(Source("a", 0.001, "b", 0.001, "c"), interval=0.0)
    assert await read(stream) == [(0.0, "a"), (0.001, "b"), (0.002, "c")]


async def test_the_interval_is_asked_for_anew_after_every_chunk() -> None:
    intervals = iter([0.1, 0.3, 9.0, 9.0])
    steps: list[Step] = ["a", *([0.01, "b"] * 60)]
    stream = Paced(Source(*steps).pieces(), join, lambda: next(intervals))
    assert [time for time, _ in await read(stream)] == pytest.approx([0.0, 0.1, 0.4, 0.6])


async def test_an_empty_source_yields_nothing() -> None:
    assert await read(paced(Source())) == []


async def test_pieces_that_make_no_chunk_neither_yield_nor_end_the_stream() -> None:
    stream = Paced(Source("", 0.1, "", 0.1, "a").pieces(), lambda pieces: filter(None, pieces), lambda: INTERVAL)
    assert await read(stream) == [(0.2, "a")]


async def test_one_join_may_make_several_chunks() -> None:
    stream = Paced(Source("a", "b", "c").pieces(), lambda pieces: pieces, lambda: INTERVAL)
    assert await read(stream) == [(0.0, "a"), (0.0, "b"), (0.0, "c")]


async def test_a_slow_consumer_gets_one_chunk_at_a_time_and_does_not_hold_the_source_up() -> None:
    source = Source(*[0.01, "x"] * 100)
    chunks = await read(paced(source), post=0.254)
    assert source.given[-1][0] == pytest.approx(1.0)
    assert [len(text) for _, text in chunks] == [1, 27, 27, 28, 17]
    assert [time for time, _ in chunks] == pytest.approx([0.01, 0.284, 0.558, 0.832, 1.086])


async def test_the_interval_is_counted_from_the_end_of_a_post() -> None:
    chunks = await read(paced(Source(*["x", 0.001] * 100)), post=0.05)
    starts = [time for time, _ in chunks]
    assert starts == pytest.approx([0.0, 0.07, 0.12])  # the last one does not wait


async def test_an_error_comes_after_the_pieces_before_it() -> None:
    chunks: list[tuple[float, str]] = []
    with pytest.raises(RuntimeError, match="broken"):
        await read(paced(Source("a", 0.005, "b", RuntimeError("broken"))), chunks)
    assert chunks == [(0.0, "a"), (0.005, "b")]


async def test_an_error_before_any_piece_is_raised() -> None:
    with pytest.raises(ValueError, match="at once"):
        await read(paced(Source(ValueError("at once"))))


async def stop_after(stream: Paced[str, str], seconds: float, reason: Exception | None = None) -> None:
    await asyncio.sleep(seconds)
    stream.stop(reason)


async def test_a_stop_without_a_reason_ends_the_chunks_quietly() -> None:
    source = Source("a", 10.0, "b")
    stream = paced(source)
    chunks, _ = await asyncio.gather(read(stream), stop_after(stream, 1.0))
    assert chunks == [(0.0, "a")]
    assert source.cleaned_up == 1.0


async def test_a_stop_with_a_reason_raises_it_after_what_was_left() -> None:
    source = Source("a", 0.005, "b", 10.0, "c")
    stream = paced(source)
    stopping = asyncio.create_task(stop_after(stream, 0.01, RuntimeError("drained")))
    chunks: list[tuple[float, str]] = []
    with pytest.raises(RuntimeError, match="drained"):
        await read(stream, chunks)
    assert [text for _, text in chunks] == ["a", "b"]
    assert source.cleaned_up == 0.01
    await stopping


async def test_the_first_reason_counts() -> None:
    stream = paced(Source("a", 10.0))
    await asyncio.sleep(0)
    for reason in (None, RuntimeError("first"), RuntimeError("second")):
        stream.stop(reason)
    with pytest.raises(RuntimeError, match="first"):
        await read(stream)


async def test_a_source_that_survives_its_cancel_does_not_lose_the_reason() -> None:
    async def stubborn() -> AsyncGenerator[str, None]:
        yield "a"
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)

    stream = Paced(stubborn(), join, lambda: INTERVAL)
    stopping = asyncio.create_task(stop_after(stream, 1.0, RuntimeError("drained")))
    with pytest.raises(RuntimeError, match="drained"):
        await read(stream)
    await stopping


async def test_a_reason_comes_before_an_error_of_the_clean_up() -> None:
    async def dirty() -> AsyncGenerator[str, None]:
        yield "a"
        try:
            await asyncio.sleep(10)
        finally:
            raise OSError("cannot clean up")

    stream = Paced(dirty(), join, lambda: INTERVAL)
    stopping = asyncio.create_task(stop_after(stream, 1.0, RuntimeError("drained")))
    with pytest.raises(RuntimeError, match="drained"):
        await read(stream)
    await stopping


async def test_an_error_that_nobody_reads_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    stream = paced(Source("a", 0.1, RuntimeError("broken")))
    consumer = asyncio.create_task(read(stream, post=3600.0))
    await asyncio.sleep(1.0)
    consumer.cancel()
    await asyncio.wait([consumer])
    del stream, consumer
    gc.collect()
    assert caplog.records == []


async def test_a_stop_after_the_end_changes_nothing() -> None:
    stream = paced(Source("a"))
    assert await read(stream) == [(0.0, "a")]
    stream.stop(RuntimeError("too late"))
    assert await read(stream) == []


async def test_a_source_stopped_before_it_began_never_begins() -> None:
    source = Source("a")
    stream = paced(source)
    stream.stop()
    assert await read(stream) == []
    assert source.given == []


async def test_the_source_is_cleaned_up_though_its_consumer_never_comes_back() -> None:
    source = Source(*["x", 0.1] * 100, clean_up=0.3)
    stream = paced(source)
    consumer = asyncio.create_task(read(stream, post=3600.0))
    await asyncio.sleep(1.05)
    stream.stop()
    await asyncio.sleep(0.5)
    assert not consumer.done()
    assert source.cleaned_up == 1.35
    consumer.cancel()


async def test_a_second_stop_does_not_interrupt_the_clean_up() -> None:
    source = Source("a", 10.0, clean_up=1.0)
    stream = paced(source)
    await asyncio.sleep(0.1)
    stream.stop()
    await asyncio.sleep(0.1)
    stream.stop()
    assert await read(stream) == [(0.2, "a")]
    assert source.cleaned_up == 1.1


async def test_the_source_runs_in_one_task_so_that_its_context_variables_hold() -> None:
    tasks = []

    async def source() -> AsyncGenerator[str, None]:
        for _ in range(3):
            tasks.append(asyncio.current_task())
            yield "a"

    await read(Paced(source(), join, lambda: INTERVAL))
    assert len(set(tasks)) == 1
    assert tasks[0] is not asyncio.current_task()
