"""Where a job's cost stands in an OpenAI answer, whatever pieces a stream comes in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from coldsnap.cost.prices import Price
from coldsnap.engine import EngineInfo, Meter
from coldsnap.jobs.bill import Bill, in_answer, in_stream

INFO = EngineInfo("0", "NVIDIA H200", 2, ("m",), 100)
BILL = Bill.of(Meter(gpu_seconds=0.5, prefill_seconds=0.2), INFO, Price(0.001, "test"))


def chunk(content: str, finish: str | None = None) -> str:
    body = {"choices": [{"delta": {"content": content}, "finish_reason": finish}]}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


USAGE = 'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
DONE = "data: [DONE]\n\n"


async def run(*texts: str) -> list[str]:
    async def stream() -> AsyncIterator[str]:
        for text in texts:
            yield text

    return [text async for text in in_stream(stream(), lambda: BILL)]


def events(texts: list[str]) -> list[str]:
    return "".join(texts).split("\n\n")[:-1]


def test_gpu_seconds_are_those_of_all_gpus() -> None:
    assert BILL.fields() == {
        "gpu_seconds": 1.0,
        "prefill_gpu_seconds": 0.4,
        "decode_gpu_seconds": 0.6,
        "usd": 0.001,
        "price_per_second": 0.001,
        "gpu": "NVIDIA H200",
        "estimated": False,
    }


def test_joules_are_there_where_they_were_measured() -> None:
    assert Bill.of(Meter(gpu_seconds=0.5, joules=12.3456789), INFO, Price(None, "")).fields()["joules"] == 12.345679


@pytest.mark.parametrize(
    "texts",
    [
        (chunk("a"), chunk("b", "stop"), DONE),
        (chunk("a"), chunk("b", "stop") + DONE),
        (chunk("a") + chunk("b", "stop"), DONE),
        (chunk("a") + chunk("b", "stop") + DONE,),
        (chunk("a"), chunk("b", "stop"), USAGE, DONE),
        (chunk("a"), chunk("b", "stop"), USAGE + DONE),
        (chunk("a", "length"), chunk("b"), chunk("c", "stop"), DONE),
        (chunk("a"), chunk("b"), DONE),
    ],
)
async def test_only_the_last_chunk_before_done_has_the_cost(texts: tuple[str, ...]) -> None:
    given, got = events(list(texts)), events(await run(*texts))
    at = len(given) - 2
    if texts[-2:] == (chunk("b"), DONE):  # it had left already
        assert got == given
        return
    assert got[:at] + got[at + 1 :] == given[:at] + given[at + 1 :]
    last = json.loads(got[at].removeprefix("data: "))
    assert last.pop("cost") == BILL.fields()
    assert last == json.loads(given[at].removeprefix("data: "))


async def test_a_chunk_that_cannot_be_the_last_is_not_held_back() -> None:
    seen: list[str] = []

    async def stream() -> AsyncIterator[str]:
        yield chunk("a")
        seen.append("after a")
        yield chunk("b")
        yield chunk("c", "stop")
        yield DONE

    async for text in in_stream(stream(), lambda: BILL):
        seen.append(text)
        if len(seen) == 1:
            assert text == chunk("a")
    assert seen[1] == "after a"


@pytest.mark.parametrize(
    "texts",
    [
        ('data: {"error":{"message":"no"}}\n\n', DONE),
        (
            'event: message_delta\ndata: {"delta":{"usage":"}"}}\n\n',
            'event: response.completed\ndata: {"response":null}\n\n',
        ),
        ('event: response.completed\ndata: {"response":{}}\n\n',),
        ('event: response.created\ndata: {"response":{"usage":null}}\n\n',),
        ("event: message_delta\ndata: {}\n\n", "event: message_stop\ndata: {}\n\n"),
        (": a comment\n\n", DONE),
        ("data: [1]\n\n", DONE),
        ('event: message_delta\ndata: {"usage": {"output_tokens": 3}\n\n',),
        (DONE,),
        (chunk("a"), chunk("b", "stop")),
        ("data: {}",),
    ],
)
async def test_errors_and_other_protocols_pass_as_they_are(texts: tuple[str, ...]) -> None:
    assert "".join(await run(*texts)) == "".join(texts)


RESPONSE = {"output": [{"text": 'a "response":{ b'}], "usage": {"total_tokens": 3}}
COMPLETED = {"response": RESPONSE, "sequence_number": 9, "type": "response.completed"}
MESSAGE = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}


def named(body: dict[str, object]) -> str:
    return f"event: {body['type']}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n"


@pytest.mark.parametrize("order", [1, -1])
async def test_a_response_says_its_cost_beside_its_usage(order: int) -> None:
    completed = dict(list(COMPLETED.items())[::order])
    given = named({"type": "response.in_progress", "response": {}}) + named(completed)
    before, event, rest = "".join(await run(given)).split("\n\n")
    assert (before, rest) == (given.split("\n\n")[0], "")
    got = json.loads(event.partition("data: ")[2])
    assert got["response"].pop("cost") == BILL.fields()
    assert got == completed


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
async def test_the_cost_does_not_hang_on_how_vllm_writes_json(separators: tuple[str, str]) -> None:
    given = [
        f"event: {body['type']}\ndata: {json.dumps(body, separators=separators)}\n\n" for body in (COMPLETED, MESSAGE)
    ]
    completed, message = (json.loads(event.partition("data: ")[2]) for event in events(await run(*given)))
    assert completed["response"]["cost"] == message["cost"] == BILL.fields()


async def test_a_message_says_its_cost_beside_its_usage() -> None:
    start, stop = named({"type": "message_start", "usage": {}}), named({"type": "message_stop"})
    got = "".join(await run(start, named(MESSAGE) + stop))
    assert got.startswith(start)
    assert got.endswith(stop)
    event = json.loads(got[len(start) : -len(stop)].partition("data: ")[2])
    assert event.pop("cost") == BILL.fields()
    assert event == MESSAGE


def test_an_answer_without_usage_has_no_cost() -> None:
    assert in_answer({"data": []}, lambda: BILL) == {"data": []}
    assert in_answer([1], lambda: BILL) == [1]
    assert in_answer({"usage": {}}, lambda: BILL) == {"usage": {}, "cost": BILL.fields()}
