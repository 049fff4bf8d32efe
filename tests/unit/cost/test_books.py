"""The headings of a worker's books, and that nobody who spells them out leaves one out."""

from __future__ import annotations

import re

import pytest

from coldsnap.cost.books import HEADINGS, Headings
from coldsnap.records.schema import Worker
from coldsnap.settings import ROOT


def test_headings_add_up() -> None:
    first, second = Headings(1, 2, 3, 4, 5), Headings(cold=1, drain=2)
    assert first + second == Headings(2, 2, 3, 4, 7)
    assert (first + second).total == first.total + second.total == 18
    assert list(first.by_name().items()) == list(zip(HEADINGS, (1, 2, 3, 4, 5), strict=True))


def test_a_record_has_a_field_for_each() -> None:
    fields = [name.removesuffix("_gpu_seconds") for name in Worker.model_fields if name.endswith("_gpu_seconds")]
    assert tuple(fields) == HEADINGS


@pytest.mark.parametrize(
    ("file", "place", "name"),
    [
        ("serve/page.html", r"const PARTS = \[(.*?)\]", r'"(\w+)"'),
        ("report/page.html.jinja", r"for name, said in \[(.*?)\] %", r'\("(\w+)"'),
        ("report/store.py", r"CREATE TABLE totals(.*?);", r'"(\w+)_gpu_seconds"'),
        ("report/store.py", r"AS price,(.*?)AS gpu_seconds", r" AS (\w+),"),
    ],
)
def test_a_file_that_cannot_have_them_from_here_names_each(file: str, place: str, name: str) -> None:
    text = (ROOT / "src" / "coldsnap" / "desk" / file).read_text("utf-8")
    (found,) = re.findall(place, text, re.DOTALL)
    assert tuple(re.findall(name, found)) == HEADINGS
