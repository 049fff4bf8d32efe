"""A long body with a wrong item is refused at that item, and at once."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from coldsnap.engine import HttpRequest
from coldsnap.errors import InvalidInput
from coldsnap.vllm.bodies import LONG_BYTES, Bodies

application = FastAPI()


class Text(BaseModel):
    text: str


class Turn(BaseModel):
    role: str
    content: str | list[Text]


class Body(BaseModel):
    turns: list[Turn | int]
    type: str = "list"


@application.post("/turns")
async def turns(body: Body, other: int = 0) -> None:
    """Take what `Bodies` is asked about."""


def post(body: Any, path: str = "/turns") -> HttpRequest:
    return HttpRequest("POST", path, "", orjson.dumps(body))


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"turns": [1] * 2000 + [None]}, "turns.2000.Turn"),
        ({"turns": [None] * 2000}, "turns.0.Turn"),
        ({"turns": [{"role": "user", "content": [{"text": "a"}, {}] * 1000}]}, "turns.0.Turn.content.str"),
    ],
)
def test_the_first_wrong_item_is_named(body: Any, where: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Bodies(application).check(post(body))
    assert caught.value.param == where
    assert caught.value.message.startswith(f"{where}: ")


@pytest.mark.parametrize(
    "body",
    [
        {"turns": [1] * 2000},
        {"turns": [{"role": "user", "content": "a" * LONG_BYTES}]},
        {"turns": [None]},  # short: the application says all of it
        {"turns": 5, "type": "x" * LONG_BYTES},  # no item of a list
    ],
)
def test_all_else_is_left_to_the_application(body: Any) -> None:
    bodies = Bodies(application)
    for path in ("/turns", "/elsewhere"):
        assert bodies.check(post(body, path)) is None  # and raises nothing


def test_a_list_is_left_at_its_first_wrong_item() -> None:
    bodies, wrong = Bodies(application), {"turns": [None] * 2000}
    with pytest.raises(InvalidInput):
        bodies.check(post(wrong))
    with pytest.raises(ValidationError) as caught:
        bodies._validators["/turns"].validate_python(wrong)
    assert caught.value.error_count() == 2  # neither a turn nor a number
