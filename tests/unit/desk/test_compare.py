"""`coldsnap compare`: what it reads, and what it calls a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from coldsnap.desk.compare.asking import Reading, Reply, Round
from coldsnap.desk.compare.figures import Difference, differences, divergence
from coldsnap.desk.compare.prompts import Line, read
from coldsnap.errors import BenchError


def lines(count: int, answer: str | None = None) -> list[Line]:
    return [Line(number, "Hi", None, None, answer, 8) for number in range(count)]


def rounds(ttfts: Sequence[float], said: str = "a") -> list[Round]:
    """Five rounds in which each prompt had one of the times."""
    return [Round(tuple(Reply(said, ttft, None, 1.0, 8, None) for ttft in ttfts), 2.0) for _ in range(5)]


def of(name: str, found: Sequence[Difference]) -> Difference:
    return next(each for each in found if each.name == name)


def test_what_all_pairs_agree_on_is_a_difference_and_what_they_do_not_is_none() -> None:
    base = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    slower = of("TTFT", differences(lines(6), rounds(base), rounds([1.1 * value for value in base]), []))
    assert slower.verdict == "B is worse"
    assert (slower.change, slower.low, slower.high) == pytest.approx((0.1, 0.1, 0.1))  # pairs: their spread is no noise
    assert of("TTFT", differences(lines(6), rounds(base), rounds(base[::-1]), [])).verdict == "no difference seen"


def test_of_few_pairs_nothing_is_said() -> None:
    assert of("TTFT", differences(lines(4), rounds([1.0] * 4), rounds([9.0] * 4), [])).verdict == "too few pairs to say"


def test_answers_are_held_to_what_they_should_be_and_more_is_better() -> None:
    found = differences(lines(6, "b"), rounds([1.0] * 6), rounds([1.0] * 6, said=" b\n"), [])
    right = of("answers that match", found)
    assert (right.a, right.b, right.change, right.verdict) == (0.0, 1.0, 1.0, "B is better")


def test_perplexity_is_that_of_all_tokens_together() -> None:
    short, long = Reading((-1.0,), ({},)), Reading((-2.0, -2.0, -2.0), ({}, {}, {}))
    found = of("perplexity", differences([], [], [], [(short, short), (long, long)]))
    assert found.a == found.b == pytest.approx(math.exp(7 / 4))


def test_the_divergence_is_a_lower_bound_and_zero_where_nothing_differs() -> None:
    p, q = (0.5, 0.3, 0.1, 0.1), (0.2, 0.25, 0.35, 0.2)
    whole = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    a, b = ({str(place): math.log(value) for place, value in enumerate(each[:3])} for each in (p, q))
    del b["2"]  # another one was likelier there
    found = divergence([(Reading((-1.0,), (a,)), Reading((-1.0,), (b,)))])
    assert found is not None
    assert 0 < found < whole
    assert divergence([(Reading((-1.0,), (a,)), Reading((-1.0,), (a,)))]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", ":1: expected a JSON object"),
        ('{"answer": "a"}', ":1: expected an object with one of `prompt`, `messages` and `text`"),
        ('{"prompt": "a", "text": "b"}', ":1: expected an object with one of"),
        ('{"prompt": ""}', ":1: prompt: expected a text, found ''"),
        ('{"prompt": "a", "max_token": 3}', ":1: 'max_token' is not known"),
        ('{"messages": []}', ":1: messages: expected a list of objects, found []"),
        ('{"prompt": "a", "max_tokens": 0}', ":1: max_tokens: expected a whole number above 0, found 0"),
        ("", ": expected lines of JSON, found none"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(row + "\n", encoding="utf-8")
    with pytest.raises(BenchError) as error:
        read(path, 64)
    assert said in error.value.message
