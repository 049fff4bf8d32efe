"""Small jobs that ask for endless work: refused by name, and the next job is as fast as ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from coldsnap.testing import JobFailed

from .worker import CORPUS, EMOJI_ONLY, PATIENCE, Worker, text, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

HI = [user("hi")]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}
NESTED = "(" * 24 + "a" + "*)" * 24
"""Compiles at once; what may come next takes the longer the more levels there are, here for ever."""
MANY_READINGS = 'root ::= s s s s\ns ::= "a" s s | [a-z] s s s | [a-z]+ | "b" s | ""'
GRAMMARS: dict[str, tuple[dict[str, Any], str]] = {
    # What it is: the constraint, and the words with which it is refused.
    "100,000 alternatives": ({"regex": "|".join(f"w{i}" for i in range(100_000))}, "GRAMMAR_MAX_BYTES=100000"),
    "100,000 choices": ({"choice": [f"w{i}" for i in range(100_000)]}, "GRAMMAR_MAX_BYTES=100000"),
    "an enumeration of 100,000": ({"json": {"enum": [f"w{i}" for i in range(100_000)]}}, "GRAMMAR_MAX_BYTES=100000"),
    "stars in stars": ({"regex": NESTED}, "GRAMMAR_SECONDS=2"),
    "a rule of many readings": ({"grammar": MANY_READINGS}, "GRAMMAR_SECONDS=2"),
    "a schema that is its own": ({"json": {"$ref": "#"}}, "structured_outputs"),
    "a rule that is its own": ({"grammar": "root ::= root"}, "structured_outputs"),
}


async def core_at_rest(worker: Worker) -> None:
    """Return once the engine's core has used next to nothing for a second; fail if it burns on."""
    for _ in range(5):
        used = worker.core_cpu_seconds()
        await asyncio.sleep(1)
        if worker.core_cpu_seconds() - used < 0.1:
            return
    pytest.fail("the engine's core is busy, five seconds after the last job")


@pytest.mark.parametrize("name", GRAMMARS)
async def test_a_grammar_that_costs_too_much_is_refused_and_burns_nothing(worker: Worker, name: str) -> None:
    constraint, words = GRAMMARS[name]
    before = worker.core_cpu_seconds()
    error = await worker.refused({"prompt": "hi", "sampling_params": {"structured_outputs": constraint}})
    assert (error["code"], error["param"]) == (400, "sampling_params.structured_outputs"), error
    assert words in error["message"]
    await core_at_rest(worker)
    assert worker.core_cpu_seconds() - before < 1


HUGE = {"type": "object", "properties": {f"p{i}": {"enum": [f"{i}{j}" for j in range(20)]} for i in range(2000)}}
FORMAT = {"type": "json_schema", "name": "x", "schema": HUGE}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "structured_outputs": ("chat/completions", {"messages": HI, "structured_outputs": {"regex": NESTED}}),
    "response_format": (
        "chat/completions",
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": HUGE}}},
    ),
    "a stream": (
        "chat/completions",
        {"messages": HI, "stream": True, "structured_outputs": {"grammar": MANY_READINGS}},
    ),
    "completions": ("completions", {"prompt": "hi", "structured_outputs": {"regex": NESTED}}),
    "responses": ("responses", {"input": "hi", "text": {"format": FORMAT}}),
}


@pytest.mark.parametrize("name", WAYS)
async def test_the_same_holds_for_every_way_that_leads_to_the_engine(worker: Worker, name: str) -> None:
    route, body = WAYS[name]
    job = worker.plane.submit({"openai_route": f"/v1/{route}", "openai_input": body})
    try:
        answer = "".join(await job.result(PATIENCE))  # a stream has begun before its grammar is read
    except JobFailed as failure:
        answer = failure.error
    assert "GRAMMAR_" in answer
    assert '"code":400' in answer.replace(" ", "")
    await core_at_rest(worker)


async def test_a_good_grammar_is_followed_while_bad_ones_are_tried(worker: Worker) -> None:
    bombs = [
        worker.plane.submit({"prompt": "hi", "sampling_params": {"structured_outputs": {"regex": f"{i}{NESTED}"}}})
        for i in range(4)
    ]
    plain = text(await worker.ask(EMOJI_ONLY).result(PATIENCE))
    assert plain == CORPUS[EMOJI_ONLY]
    sampling = {
        "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True},
        "max_tokens": 60,
        "temperature": 0,
    }
    job = worker.plane.submit({"messages": [user("hi")], "sampling_params": sampling})
    assert json.loads(text(await job.result(PATIENCE)))["a"] in {"yes", "no"}
    for bomb in bombs:
        with pytest.raises(JobFailed, match="GRAMMAR_SECONDS"):
            await bomb.result(PATIENCE)
