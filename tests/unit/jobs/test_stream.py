"""A stream handed on, in simulated time: what leaves when, and a source whose reader is slow or gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, Iterable

import pytest

from coldsnap.jobs.stream import Relay

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


def relayed(source: Source) -> Relay[str, str]:
    return Relay(source.pieces(), join)


async def read(
    stream: Relay[str, str], chunks: list[tuple[float, str]] | None = None, *, post: float = 0.0
) -> list[tuple[float, str]]:
    """Return the chunks with the time at which each arrived; `post` is the time that each takes."""
    chunks = [] if chunks is None else chunks
    async for chunk in stream.chunks():
        chunks.append((now(), chunk))
        await asyncio.sleep(post)
    return chunks


async def test_every_piece_leaves_at_once_while_its_reader_keeps_up() -> None:
    stream = relayed(Source("a", 0.005, "b", 0.5, "c", 1.0))
    assert await read(stream) == [(0.0, "a"), (0.005, "b"), (0.505, "c")]


async def test_what_accumulates_during_a_post_leaves_together() -> None:
    stream = relayed(Source("a", 0.005, "b", 0.005, "c", 0.5, "d", 1.0))
    assert await read(stream, post=0.1) == [(0.0, "a"), (0.1, "bc"), (0.51, "d")]


async def test_an_empty_source_yields_nothing() -> None:
    assert await read(relayed(Source())) == []


async def test_pieces_that_make_no_chunk_neither_yield_nor_end_the_stream() -> None:
    stream = Relay(Source("", 0.1, "", 0.1, "a").pieces(), lambda pieces: filter(None, pieces))
    assert await read(stream) == [(0.2, "a")]


async def test_one_join_may_make_several_chunks() -> None:
    stream = Relay(Source("a", "b", "c").pieces(), lambda pieces: pieces)
    assert await read(stream) == [(0.0, "a"), (0.0, "b"), (0.0, "c")]


async def test_a_slow_consumer_gets_one_chunk_at_a_time_and_does_not_hold_the_source_up() -> None:
    source = Source(*[0.01, "x"] * 100)
    chunks = await read(relayed(source), post=0.254)
    assert source.given[-1][0] == pytest.approx(1.0)
    assert [len(text) for _, text in chunks] == [1, 25, 25, 26, 23]
    assert [time for time, _ in chunks] == pytest.approx([0.01, 0.264, 0.518, 0.772, 1.026])


async def test_an_error_comes_after_the_pieces_before_it() -> None:
    chunks: list[tuple[float, str]] = []
    with pytest.raises(RuntimeError, match="broken"):
        await read(relayed(Source("a", 0.005, "b", RuntimeError("broken"))), chunks)
    assert chunks == [(0.0, "a"), (0.005, "b")]


async def test_an_error_before_any_piece_is_raised() -> None:
    with pytest.raises(ValueError, match="at once"):
        await read(relayed(Source(ValueError("at once"))))


async def stop_after(stream: Relay[str, str], seconds: float, reason: Exception | None = None) -> None:
    await asyncio.sleep(seconds)
    stream.stop(reason)


async def test_a_stop_without_a_reason_ends_the_chunks_quietly() -> None:
    source = Source("a", 10.0, "b")
    stream = relayed(source)
    chunks, _ = await asyncio.gather(read(stream), stop_after(stream, 1.0))
    assert chunks == [(0.0, "a")]
    assert source.cleaned_up == 1.0


async def test_a_stop_with_a_reason_raises_it_after_what_was_left() -> None:
    source = Source("a", 0.005, "b", 10.0, "c")
    stream = relayed(source)
    stopping = asyncio.create_task(stop_after(stream, 0.01, RuntimeError("drained")))
    chunks: list[tuple[float, str]] = []
    with pytest.raises(RuntimeError, match="drained"):
        await read(stream, chunks)
    assert [text for _, text in chunks] == ["a", "b"]
    assert source.cleaned_up == 0.01
    await stopping


async def test_the_first_reason_counts() -> None:
    stream = relayed(Source("a", 10.0))
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

    stream = Relay(stubborn(), join)
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

    stream = Relay(dirty(), join)
    stopping = asyncio.create_task(stop_after(stream, 1.0, RuntimeError("drained")))
    with pytest.raises(RuntimeError, match="drained"):
        await read(stream)
    await stopping


async def test_an_error_that_nobody_reads_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    stream = relayed(Source("a", 0.1, RuntimeError("broken")))
    consumer = asyncio.create_task(read(stream, post=3600.0))
    await asyncio.sleep(1.0)
    consumer.cancel()
    await asyncio.wait([consumer])
    del stream, consumer
    gc.collect()
    assert caplog.records == []


async def test_a_stop_after_the_end_changes_nothing() -> None:
    stream = relayed(Source("a"))
    assert await read(stream) == [(0.0, "a")]
    stream.stop(RuntimeError("too late"))
    assert await read(stream) == []


async def test_a_source_stopped_before_it_began_never_begins() -> None:
    source = Source("a")
    stream = relayed(source)
    stream.stop()
    assert await read(stream) == []
    assert source.given == []


async def test_the_source_is_cleaned_up_though_its_consumer_never_comes_back() -> None:
    source = Source(*["x", 0.1] * 100, clean_up=0.3)
    stream = relayed(source)
    consumer = asyncio.create_task(read(stream, post=3600.0))
    await asyncio.sleep(1.05)
    stream.stop()
    await asyncio.sleep(0.5)
    assert not consumer.done()
    assert source.cleaned_up == 1.35
    consumer.cancel()


async def test_a_second_stop_does_not_interrupt_the_clean_up() -> None:
    source = Source("a", 10.0, clean_up=1.0)
    stream = relayed(source)
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

    await read(Relay(source(), join))
    assert len(set(tasks)) == 1
    assert tasks[0] is not asyncio.current_task()
