"""A trial of a grammar is limited in time and memory, whatever the compiler does, and what it needs is said."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from coldsnap.errors import EngineDead, InvalidInput
from coldsnap.processes import children
from coldsnap.vllm.grammar import Grammars, follow


def setup(subject: str) -> Callable[[Any], None]:
    """Return an attempt that does what the constraint says, as a compiler might."""

    def attempt(constraint: Any) -> None:
        match constraint:
            case "burn":
                while True:
                    sum(range(100_000))
            case "sleep":
                time.sleep(3600)
            case "fill":
                bytearray(8 << 30)
            case "crash":
                ctypes.string_at(0)
            case "refuse":
                raise ValueError(f"{subject} cannot be followed")

    return attempt


@pytest_asyncio.fixture
async def grammars(request: pytest.FixtureRequest) -> AsyncIterator[Grammars]:
    grammars = Grammars(setup, most_bytes=1000, seconds=getattr(request, "param", 60))
    grammars.start()
    grammars.prepare("this")
    grammars.prepare("that")  # too late: it is handed over once
    yield grammars
    grammars.close()


async def complaint(grammars: Grammars, constraint: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        await grammars.check(constraint)
    return caught.value.message


@pytest.mark.parametrize(
    ("constraint", "words", "grammars"),
    [
        ("burn", "takes more than GRAMMAR_SECONDS=1 of processor time, or 5 times that by the clock; send", 1),
        ("sleep", "takes more than GRAMMAR_SECONDS=1 of processor time", 1),
        ("fill", "the grammar needs more than 1024 MiB of memory", 60),
        ("crash", "the grammar's compiler fails with signal 11", 60),
        ("refuse", "this cannot be followed", 60),
        ("x" * 2000, "at most GRAMMAR_MAX_BYTES=1000 are taken", 60),
    ],
    indirect=["grammars"],
)
async def test_a_grammar_that_cannot_be_followed_is_refused_and_the_next_is_tried(
    grammars: Grammars, constraint: str, words: str
) -> None:
    assert words in await complaint(grammars, constraint)
    await grammars.check("fine")
    grammars.alive()


@pytest.mark.parametrize("grammars", [1], indirect=True)
async def test_a_trial_that_is_given_up_leaves_no_process_behind(grammars: Grammars) -> None:
    await grammars.check("fine")
    before = len([*children(os.getpid())])
    await asyncio.gather(*(complaint(grammars, "burn") for _ in range(3)))
    assert len([*children(os.getpid())]) <= before


async def test_a_verdict_is_remembered_also_while_it_is_being_found(grammars: Grammars) -> None:
    asked: list[bytes] = []
    ask = grammars._ask

    def counted(message: bytes) -> str:
        asked.append(message)
        return ask(message)

    grammars._ask = counted  # type: ignore[method-assign]
    await asyncio.gather(*(grammars.check("fine") for _ in range(5)))
    await grammars.check("fine")
    assert await complaint(grammars, "refuse") == await complaint(grammars, "refuse")
    assert len(asked) == 2


async def test_a_job_that_is_cancelled_takes_its_trials_verdict_from_nobody(grammars: Grammars) -> None:
    first, second = (asyncio.create_task(grammars.check("fine")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()


async def test_without_the_process_the_worker_is_not_fit(grammars: Grammars) -> None:
    await grammars.check("fine")
    grammars.close()
    grammars._process.join(60)
    assert "is gone" in await complaint(grammars, "another")
    with pytest.raises(EngineDead, match="the process that tries grammars is gone"):
        grammars.alive()


class Grammar:
    """Allows tokens 3 and 5, and ends after six of them."""

    def __init__(self) -> None:
        self.walks: list[list[int]] = [[]]

    def is_terminated(self) -> bool:
        return len(self.walks[-1]) == 6

    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        bitmask[row].words[:] = [0b101000, 0]

    def accept_tokens(self, _name: str, tokens: list[int]) -> bool:
        self.walks[-1] += tokens
        return True

    def reset(self) -> None:
        self.walks.append([])


class Nothing(Grammar):
    """Allows no token at all."""

    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        bitmask[row].words[:] = 0


def test_a_grammar_that_cannot_begin_is_none() -> None:
    with pytest.raises(ValueError, match="leads to no end"):
        follow(Nothing(), [Row()])


class Hidden(Grammar):
    """Blanks at will, tokens 32 to 62, before each of 20 signs that come in a fixed order, tokens 0 to 19."""

    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        signs = [token for token in self.walks[-1] if token < 32]
        bitmask[row].words[:] = [1 << len(signs), 2**31 - 1]


def test_a_grammar_is_followed_past_blanks() -> None:
    grammar = Hidden()
    follow(grammar, [Row()])
    assert grammar.walks[0] == [0, 1, 2, 3, 4, 5]


def test_a_loop_is_followed_round_and_round() -> None:
    class Loop(Grammar):
        """Token 3 for ever, or 5, which leads to the end."""

        def is_terminated(self) -> bool:
            return len(self.walks[-1]) == 50 or 5 in self.walks[-1]

    grammar = Loop()
    follow(grammar, [Row()])
    assert [3] * 50 in grammar.walks


class Row:
    def __init__(self) -> None:
        self.words = np.zeros(2, np.int32)

    def numpy(self) -> Any:
        return self.words


def test_a_grammar_is_followed_along_its_first_tokens_and_at_random_the_same_each_time() -> None:
    walked = []
    for _ in range(2):
        grammar = Grammar()
        follow(grammar, [Row()])
        *walks, _last = grammar.walks
        walked.append(walks)
    assert walked[0] == walked[1]
    assert len(walked[0]) == 8
    assert walked[0][0][0] == 3
    assert {token for walk in walked[0][1:] for token in walk} == {3, 5}
