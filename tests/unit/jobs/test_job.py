"""Jobs: what is refused and how it is said, how chunks are cut, and whole lives of jobs on a fake engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldsnap.engine import Delta, EngineInfo, Generation, HttpRequest
from coldsnap.errors import ColdsnapError, Draining, EngineDead, InvalidInput, NotFound, RouteRefused
from coldsnap.jobs.job import Chunk, Jobs, _join, _whole_events
from coldsnap.jobs.request import Http, Native, parse
from coldsnap.records.sink import Sink
from coldsnap.settings import Settings
from coldsnap.testing.fake_engine import Answer, FakeEngine

MODELS = ("demo", "alias")
USER = {"role": "user", "content": "Hi"}
MEGABYTE = 1_000_000


def parsed(content: Any) -> Native | Http:
    return parse({"id": "job-1", "input": content}, MODELS)


def refusal(content: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as raised:
        parsed(content)
    assert raised.value.status in {400, 403, 404, 405}
    assert len(raised.value.message) < 2000
    return raised.value


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


class TestGoodInput:
    def test_a_prompt(self) -> None:
        assert parsed({"prompt": "Hi"}) == Native(Generation("job-1", "Hi", None, {}, {}), stream=False, model="demo")

    def test_messages_with_everything(self) -> None:
        content = {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": [{"type": "text", "text": "Really."}]},
                USER,
                {"role": "assistant", "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": "", "tool_call_id": "1"},
            ],
            "sampling_params": {"max_tokens": 5},
            "stream": True,
            "model": "alias",
            "chat_template_kwargs": {"enable_thinking": False},
        }
        generation = Generation("job-1", None, content["messages"], {"max_tokens": 5}, {"enable_thinking": False})
        assert parsed(content) == Native(generation, stream=True, model="alias")

    def test_null_counts_as_not_given(self) -> None:
        content = {
            "prompt": "Hi",
            "messages": None,
            "sampling_params": None,
            "stream": None,
            "model": None,
            "chat_template_kwargs": None,
        }
        assert parsed(content) == parsed({"prompt": "Hi"})

    def test_an_openai_request(self) -> None:
        body = {"model": "alias", "messages": [USER], "stream": True}
        assert parsed({"openai_route": "/v1/chat/completions", "openai_input": body}) == Http(
            HttpRequest("POST", "/v1/chat/completions", "", orjson.dumps(body)), stream=True, model="alias"
        )

    def test_an_openai_request_without_a_route_is_a_chat(self) -> None:
        request = parsed({"openai_input": {"messages": [USER]}})
        assert isinstance(request, Http)
        assert (request.request.method, request.request.path) == ("POST", "/v1/chat/completions")

    @pytest.mark.parametrize("empty", [{}, None, ""])
    def test_an_openai_get_comes_with_an_empty_input(self, empty: Any) -> None:
        assert parsed({"openai_route": "/v1/models", "openai_input": empty}) == Http(
            HttpRequest("GET", "/v1/models"), stream=False, model="demo"
        )

    def test_a_generic_request(self) -> None:
        assert parsed({"route": "/tokenize", "body": {"prompt": "ü"}, "method": "post"}) == Http(
            HttpRequest("POST", "/tokenize", "", '{"prompt":"ü"}'.encode()), stream=False, model="demo"
        )

    def test_a_body_may_be_json_text(self) -> None:
        assert parsed({"route": "/tokenize", "body": '{ "prompt": "ü" }'}) == parsed(
            {"route": "/tokenize", "body": {"prompt": "ü"}}
        )

    def test_a_query_is_handed_on(self) -> None:
        request = parsed({"route": "/v1/responses/resp_1?include=a&x=?", "method": "GET"})
        assert isinstance(request, Http)
        assert (request.request.path, request.request.query) == ("/v1/responses/resp_1", "include=a&x=?")

    def test_a_response_is_cancelled_by_a_post_without_a_body(self) -> None:
        request = parsed({"openai_route": "/v1/responses/resp_1/cancel", "openai_input": {}})
        assert isinstance(request, Http)
        assert request.request.method == "POST"

    def test_ten_megabytes_are_parsed_in_no_time(self) -> None:
        began = time.process_time()
        for content in (
            {"prompt": "日" * (10 * MEGABYTE // 3)},
            {"messages": [USER] * 100_000},
            {"openai_input": {"prompt": "x" * (10 * MEGABYTE)}},
        ):
            parsed(content)
        assert time.process_time() - began < 2.0


class TestBadInput:
    @pytest.mark.parametrize("job", [{}, {"id": "x"}, {"input": None}])
    def test_no_input(self, job: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput, match=r"^input: .*found nothing$") as raised:
            parse(job, MODELS)
        assert raised.value.param == "input"

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ([], "an empty list"),
            ([1], "a list"),
            ("", "an empty text"),
            ("Hi", "a text"),
            (3, "a number"),
            (0.5, "a number"),
            (True, "true or false"),
        ],
    )
    def test_an_input_that_is_no_object(self, content: Any, found: str) -> None:
        error = refusal(content)
        assert error.param == "input"
        assert error.message.endswith(f"found {found}")

    @pytest.mark.parametrize(
        ("content", "param", "phrase"),
        [
            ({}, "prompt", "neither"),
            ({"stream": True}, "prompt", "neither"),
            ({"prompt": None, "messages": None}, "prompt", "neither"),
            ({"prompt": "Hi", "messages": [USER]}, "messages", "both"),
            ({"prompt": ""}, "prompt", "an empty text"),
            ({"prompt": []}, "prompt", "an empty list"),
            ({"prompt": 3}, "prompt", "a number"),
            ({"prompt": ["Hi"]}, "prompt", "a list"),
            ({"prompt": {"text": "Hi"}}, "prompt", "an object"),
            ({"prompt": False}, "prompt", "true or false"),
            ({"messages": []}, "messages", "an empty list"),
            ({"messages": {}}, "messages", "an empty object"),
            ({"messages": "Hi"}, "messages", "a text"),
            ({"messages": USER}, "messages", "an object"),
            ({"messages": [USER, "Hi"]}, "messages[1]", "a text"),
            ({"messages": [None]}, "messages[0]", "nothing"),
            ({"messages": [{}]}, "messages[0].role", "None"),
            ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role", "'robot'"),
            ({"messages": [USER, {"role": "User", "content": "Hi"}]}, "messages[1].role", "'User'"),
            ({"messages": [{"role": 3, "content": "Hi"}]}, "messages[0].role", "3"),
            ({"messages": [{"role": "user"}]}, "messages[0].content", "nothing"),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a number"),
            ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content", "an empty object"),
            ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content", "nothing"),
            ({"prompt": "Hi", "sampling_params": []}, "sampling_params", "an empty list"),
            ({"prompt": "Hi", "sampling_params": "hot"}, "sampling_params", "a text"),
            ({"prompt": "Hi", "stream": "true"}, "stream", "a text"),
            ({"prompt": "Hi", "stream": 1}, "stream", "a number"),
            ({"prompt": "Hi", "model": ["demo"]}, "model", "a list"),
            ({"prompt": "Hi", "chat_template_kwargs": 1}, "chat_template_kwargs", "a number"),
            (
                {"prompt": "Hi", "chat_template_kwargs": dict.fromkeys("a" * i for i in range(101))},
                "chat_template_kwargs",
                "101 names",
            ),
            ({"prompt": "Hi", "temperature": 1}, "temperature", "sampling_params"),
            ({"prompt": "Hi", "Prompt": "Hi"}, "Prompt", "unknown"),
            ({"prompt": "Hi", "": 1}, "", "unknown"),
        ],
    )
    def test_a_wrong_field_of_a_native_job_is_named(self, content: Any, param: str, phrase: str) -> None:
        error = refusal(content)
        assert error.param == param
        assert error.message.startswith(f"{param}: ") or error.message.startswith("input: ")
        assert phrase in error.message
        assert error.status == 400

    @pytest.mark.parametrize("role", [["user"], {"name": "user"}])
    def test_a_role_that_is_no_text_is_named(self, role: Any) -> None:
        assert refusal({"messages": [{"role": role, "content": "Hi"}]}).param == "messages[0].role"

    @pytest.mark.parametrize("model", ["", "gpt-4", "demo ", "Demo", "../demo"])
    def test_an_unknown_model_is_named_with_those_served(self, model: str) -> None:
        error = refusal({"prompt": "Hi", "model": model})
        assert isinstance(error, NotFound)
        assert (error.param, error.status) == ("model", 404)
        assert error.message == f"model: {model!r} is not served here; served: demo, alias"

    @pytest.mark.parametrize(
        ("content", "param"),
        [
            ({"openai_route": 3}, "openai_route"),
            ({"openai_route": None}, "openai_route"),
            ({"openai_route": ""}, "openai_route"),
            ({"openai_route": "v1/models"}, "openai_route"),
            ({"openai_route": "http://x/v1/models"}, "openai_route"),
            ({"openai_route": "/v1/chat/completions", "openai_input": [1]}, "openai_input"),
            ({"openai_route": "/v1/chat/completions", "openai_input": 3}, "openai_input"),
            ({"openai_route": "/v1/chat/completions", "openai_input": "{"}, "openai_input"),
            ({"openai_route": "/v1/chat/completions", "openai_input": "[]"}, "openai_input"),
            ({"openai_route": "/v1/chat/completions", "prompt": "Hi"}, "prompt"),
            ({"openai_route": "/v1/models", "method": "GET"}, "method"),
            ({"route": 3}, "route"),
            ({"route": "tokenize"}, "route"),
            ({"route": "/tokenize", "body": "{'prompt': 'Hi'}"}, "body"),
            ({"route": "/tokenize", "body": '{"prompt": "Hi"'}, "body"),
            ({"route": "/tokenize", "body": '{"prompt": "\\ud800"}'}, "body"),
            ({"route": "/tokenize", "body": "NaN"}, "body"),
            ({"route": "/tokenize", "body": [{}]}, "body"),
            ({"route": "/tokenize", "body": True}, "body"),
            ({"route": "/tokenize", "body": {"prompt": "Hi"}, "method": 3}, "method"),
            ({"route": "/tokenize", "body": {"prompt": "Hi"}, "method": "GET"}, "method"),
            ({"route": "/tokenize", "body": {"prompt": "Hi"}, "method": ""}, "method"),
            ({"route": "/v1/models", "body": {"x": 1}}, "method"),
            ({"route": "/tokenize", "body": {}, "headers": {}}, "headers"),
            ({"route": "/tokenize", "prompt": "Hi"}, "prompt"),
        ],
    )
    def test_a_wrong_field_of_a_routed_job_is_named(self, content: Any, param: str) -> None:
        error = refusal(content)
        assert error.param == param
        assert error.message.startswith((f"{param}: ", "GET /", "POST /", " /"))

    @pytest.mark.parametrize(
        ("content", "param"),
        [
            ({"openai_route": "/sleep", "openai_input": {}}, "route"),
            ({"route": "/v1/load_lora_adapter", "body": {"lora_name": "x", "lora_path": "/"}}, "route"),
            ({"route": "/metrics"}, "route"),
            ({"route": "/collective_rpc?x=1", "method": "POST"}, "route"),
        ],
    )
    def test_an_administrative_route_is_refused(self, content: Any, param: str) -> None:
        error = refusal(content)
        assert isinstance(error, RouteRefused)
        assert (error.param, error.status) == (param, 403)

    @pytest.mark.parametrize("route", ["/v1/unknown", "/", "/v1/chat/completions/", "/v1/models/../../sleep"])
    def test_an_unknown_route_is_not_found(self, route: str) -> None:
        error = refusal({"openai_route": route, "openai_input": {"x": 1}})
        assert (error.param, error.status) == ("route", 404)

    @pytest.mark.parametrize("bad", ["a\0b", "\ud800", "x\udfff", "\0"], ids=ascii)
    @pytest.mark.parametrize(
        ("content", "param"),
        [
            ({"prompt": "BAD"}, "prompt"),
            ({"messages": [USER, {"role": "user", "content": "BAD"}]}, "messages[1].content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "BAD"}]}]},
                "messages[0].content[0].text",
            ),
            ({"messages": [{"role": "BAD", "content": "Hi"}]}, "messages[0].role"),
            ({"prompt": "Hi", "sampling_params": {"stop": ["x", "BAD"]}}, "sampling_params.stop[1]"),
            ({"prompt": "Hi", "sampling_params": {"BAD": 1}}, "sampling_params (a key)"),
            ({"prompt": "Hi", "model": "BAD"}, "model"),
            ({"prompt": "Hi", "BAD": 1}, "input (a key)"),
            ({"openai_route": "/v1/BAD"}, "openai_route"),
            ({"openai_input": {"prompt": ["BAD"]}}, "openai_input.prompt[0]"),
            ({"openai_input": {"messages": [{"BAD": "x"}]}}, "openai_input.messages[0] (a key)"),
            ({"route": "/tokenize", "body": '{"prompt": "BAD"}'}, "body"),
            ({"route": "/tokenize", "method": "BAD"}, "method"),
        ],
    )
    def test_what_no_tokenizer_can_read_is_named_wherever_it_is(self, content: Any, param: str, bad: str) -> None:
        def planted(value: Any) -> Any:
            if isinstance(value, dict):
                return {planted(key): planted(item) for key, item in value.items()}
            if isinstance(value, list):
                return [planted(item) for item in value]
            return value.replace("BAD", bad) if isinstance(value, str) else value

        error = refusal(planted(content))
        assert error.param == param
        assert error.message.startswith(f"{param}: contains a ")
        orjson.dumps(error.body())  # raises if anything bad is left in it

    def test_a_null_character_escaped_in_a_body_of_json_text_is_named(self) -> None:
        error = refusal({"route": "/tokenize", "body": '{"prompt": "a\\u0000b"}'})
        assert error.param == "body.prompt"

    @pytest.mark.parametrize(
        "value", [2**64, -(2**63) - 1, nested(300), nested(900)], ids=["large", "small", "deep", "deeper"]
    )
    def test_json_that_cannot_be_handed_on_is_named(self, value: Any) -> None:
        assert (refusal({"openai_input": {"messages": [USER], "seed": value}}).param or "").startswith(
            "openai_input.seed"
        )

    def test_input_nested_without_end_is_named(self) -> None:
        error = refusal({"prompt": "Hi", "sampling_params": {"x": nested(100_000)}})
        assert (error.param or "").startswith("sampling_params.x")
        assert "100 levels" in error.message
        assert len(error.message) < 300

    @pytest.mark.parametrize(
        "content",
        [
            {"prompt": "Hi", "x" * MEGABYTE: 1},
            {"messages": [{"role": "x" * MEGABYTE, "content": "Hi"}]},
            {"openai_route": "x" * MEGABYTE},
            {"openai_route": "/" + "x" * MEGABYTE},
            {"route": "/tokenize", "body": {"x": 1}, "method": "x" * MEGABYTE},
            {"prompt": "Hi", "model": "x" * MEGABYTE},
            {"prompt": "Hi", "sampling_params": {"x" * MEGABYTE: "\0"}},
        ],
        ids=["key", "role", "route", "path", "method", "model", "nested key"],
    )
    def test_an_endless_name_is_cut(self, content: Any) -> None:
        assert len(refusal(content).param or "") < 200


class TestJoin:
    def test_texts_of_a_completion_are_put_together(self) -> None:
        assert list(_join([Delta("a"), Delta("b"), Delta(""), Delta("c", finish_reason="stop")])) == [{"text": "abc"}]

    def test_completions_are_kept_apart(self) -> None:
        deltas: list[Any] = [Delta("a", 1), Delta("x", 0), Delta("b", 1), Delta("y", 0)]
        assert sorted(_join(deltas), key=str) == [{"text": "ab", "index": 1}, {"text": "xy"}]

    def test_nothing_new_makes_no_chunk(self) -> None:
        assert list(_join([])) == []
        assert list(_join([Delta("", finish_reason="stop")])) == []

    def test_the_result_comes_last_and_carries_the_rest_of_the_text(self) -> None:
        result = {"text": "", "finish_reason": "stop"}
        assert list(_join([Delta("a"), Delta("b", 1), Delta("c"), result])) == [
            {"text": "b", "index": 1},
            {"text": "ac", "finish_reason": "stop"},
        ]
        assert list(_join([result])) == [result]

    def test_a_rest_too_long_for_the_result_leaves_before_it(self) -> None:
        result = {"text": "", "finish_reason": "stop"}
        assert list(_join([Delta("x" * 100_000), result])) == [{"text": "x" * 100_000}, result]

    def test_events_are_put_together_whole(self) -> None:
        assert list(_join(["data: 1\n\n", "data: 2\n\n"])) == ["data: 1\n\ndata: 2\n\n"]

    @pytest.mark.parametrize("character", ["x", "ü", "日", "🚀", '"', "\n", "\x01"], ids=ascii)
    def test_a_long_text_leaves_in_chunks_below_a_megabyte(self, character: str) -> None:
        chunks = list(_join([Delta(character * 700_000)]))
        assert "".join(chunk["text"] for chunk in chunks if isinstance(chunk, dict)) == character * 700_000
        for chunk in chunks:  # as the SDK writes them, and as we do
            assert len(json.dumps({"output": chunk}, ensure_ascii=False).encode()) < MEGABYTE
            assert len(orjson.dumps({"output": chunk})) < MEGABYTE

    def test_many_events_leave_in_chunks_below_a_megabyte(self) -> None:
        events: list[Any] = [f"data: {'日' * size}\n\n" for size in (100_000, 50_000, 20_000, 150_000, 1, 2)]
        chunks = [chunk for chunk in _join(events) if isinstance(chunk, str)]
        assert "".join(chunks) == "".join(events)
        assert len(chunks) == 3
        assert all(chunk.startswith("data: ") and chunk.endswith("\n\n") for chunk in chunks)
        assert all(len(orjson.dumps({"output": chunk})) < MEGABYTE for chunk in chunks)


# No line feeds within, as in vLLM's JSON: an event ends with two of them.
event_texts = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))


class TestWholeEvents:
    @staticmethod
    async def cut(body: bytes, cuts: list[int]) -> list[str]:
        ends = [*sorted({min(cut, len(body)) for cut in cuts}), len(body)]

        async def chunks() -> AsyncIterator[bytes]:
            begin = 0
            for end in ends:
                yield body[begin:end]
                begin = end

        return [events async for events in _whole_events(chunks())]

    @given(st.lists(event_texts, min_size=1), st.lists(st.integers(min_value=0, max_value=300)))
    async def test_events_are_never_split_wherever_the_body_is(self, texts: list[str], cuts: list[int]) -> None:
        events = [f"data: {text}\n\n" for text in texts]
        pieces = await self.cut("".join(events).encode(), cuts)
        assert "".join(pieces) == "".join(events)
        boundaries = {sum(map(len, events[:i])) for i in range(len(events) + 1)}
        position = 0
        for piece in pieces:
            position += len(piece)
            assert position in boundaries

    async def test_a_body_that_comes_byte_by_byte_is_put_together(self) -> None:
        body = 'data: {"text":"日本 🚀"}\n\ndata: [DONE]\n\n'
        encoded = body.encode()
        pieces = await self.cut(encoded, list(range(len(encoded))))
        assert pieces == ['data: {"text":"日本 🚀"}\n\n', "data: [DONE]\n\n"]

    async def test_an_event_leaves_as_soon_as_it_is_whole(self) -> None:
        arrived = []

        async def chunks() -> AsyncIterator[bytes]:
            yield b"data: 1\n\ndata: "
            arrived.append("first")
            yield b"2\n\n"

        async for events in _whole_events(chunks()):
            if not arrived:
                assert events == "data: 1\n\n"

    async def test_what_is_left_without_an_end_is_not_lost(self) -> None:
        assert await self.cut(b"data: 1\n\ndata: 2", []) == ["data: 1\n\n", "data: 2"]

    async def test_an_empty_body_has_no_events(self) -> None:
        assert await self.cut(b"", []) == []


class Worker:
    """Jobs on a fake engine, with everything that they leave behind."""

    def __init__(self, engine: FakeEngine, folder: Path, **environ: str) -> None:
        self.engine = engine
        self.lines: list[str] = []
        self.fatal: list[ColdsnapError] = []
        settings = Settings.read({"COLDSNAP_LEDGER_DIR": str(folder), "RUNPOD_POD_ID": "pod", **environ})
        self.jobs = Jobs(engine, settings, Sink(folder, self.lines.append), self.fatal.append)

    async def run(self, content: Any, job_id: str = "job-1") -> list[Chunk]:
        return [chunk async for chunk in self.jobs.handle({"id": job_id, "input": content})]

    async def timed(self, content: Any) -> list[tuple[float, Chunk]]:
        loop = asyncio.get_running_loop()
        handle = self.jobs.handle({"id": "job-1", "input": content})
        return [(round(loop.time(), 6), chunk) async for chunk in handle]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.lines]


def error_of(chunks: list[Chunk]) -> dict[str, Any]:
    """Return the OpenAI error that the last chunk carries: one JSON string, and nothing else."""
    last = chunks[-1]
    assert isinstance(last, dict)
    assert list(last) == ["error"]
    assert isinstance(last["error"], str)
    body: dict[str, Any] = orjson.loads(last["error"])
    return body["error"]  # type: ignore[no-any-return]


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "cached_tokens": 0,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


class TestNative:
    async def test_a_stream_gives_its_text_as_it_comes_and_then_the_result(self, tmp_path: Path) -> None:
        script = [
            Delta("Cold "),
            0.005,
            Delta("sn"),
            0.005,
            Delta("ap"),
            1.0,
            Delta(".", finish_reason="stop"),
        ]
        worker = Worker(FakeEngine(script), tmp_path)
        *texts, (end, last) = await worker.timed({"prompt": "What is it?", "stream": True})
        assert texts == [(0.0, {"text": "Cold "}), (0.005, {"text": "sn"}), (0.01, {"text": "ap"})]
        assert end == 1.01
        assert isinstance(last, dict)
        assert last.pop("cost")["gpu_seconds"] == last.pop("gpu_seconds") >= 0
        assert last == {"text": ".", "finish_reason": "stop", "usage": usage(3, 4)}

    async def test_without_stream_there_is_one_dict(self, tmp_path: Path) -> None:
        script = [Delta("日"), 0.1, Delta("本"), 0.1, Delta("", finish_reason="length")]
        (chunk,) = await Worker(FakeEngine(script), tmp_path).run({"messages": [USER]})
        assert isinstance(chunk, dict)
        assert chunk.pop("cost")["gpu_seconds"] == chunk.pop("gpu_seconds") >= 0
        assert chunk == {"text": "日本", "finish_reason": "length", "usage": usage(1, 3)}

    async def test_the_engine_gets_what_was_asked(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine([Delta("x", finish_reason="stop")]), tmp_path)
        await worker.run({"prompt": "Hi", "sampling_params": {"n": 1}, "model": "fake-alias"}, "job-7")
        assert worker.engine.requests == [Generation("job-7", "Hi", None, {"n": 1}, {})]

    @pytest.mark.parametrize("stream", [True, False])
    async def test_several_completions_come_with_their_index_and_choices(self, tmp_path: Path, *, stream: bool) -> None:
        script = [
            Delta("a"),
            Delta("x", 1),
            Delta("b", finish_reason="stop"),
            Delta("y", 1, finish_reason="length"),
        ]
        chunks = await Worker(FakeEngine(script), tmp_path).run({"prompt": "Hi", "stream": stream})
        *texts, last = chunks
        assert isinstance(last, dict)
        choices = [{"index": 0, "finish_reason": "stop"}, {"index": 1, "finish_reason": "length"}]
        if stream:
            assert texts == [{"text": "xy", "index": 1}]
        else:
            assert texts == []
            choices = [choice | {"text": text} for choice, text in zip(choices, ("ab", "xy"), strict=True)]
        assert last["choices"] == choices
        assert (last["text"], last["finish_reason"]) == ("ab", "stop")

    async def test_an_error_of_the_engine_comes_after_the_text_before_it(self, tmp_path: Path) -> None:
        script = [Delta("a"), InvalidInput("prompt: too long", param="prompt")]
        worker = Worker(FakeEngine(script), tmp_path)
        chunks = await worker.run({"prompt": "Hi", "stream": True})
        assert chunks[:-1] == [{"text": "a"}]
        assert error_of(chunks) == {
            "message": "prompt: too long",
            "type": "BadRequestError",
            "param": "prompt",
            "code": 400,
        }
        assert worker.records[-1]["error"] == "BadRequestError"
        assert worker.fatal == []

    async def test_an_error_that_nobody_foresaw_ends_the_job_only(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine([ZeroDivisionError("oops")]), tmp_path)
        error = error_of(await worker.run({"prompt": "Hi"}))
        assert (error["code"], error["message"]) == (500, "ZeroDivisionError: oops")
        assert worker.records[-1]["error"] == "ZeroDivisionError"
        worker.engine.script = (Delta("fine", finish_reason="stop"),)
        assert (await worker.run({"prompt": "Hi"}))[0]["text"] == "fine"  # type: ignore[index]

    async def test_a_dead_engine_ends_the_job_and_is_told(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine([Delta("a"), EngineDead("the engine process is gone")]), tmp_path)
        assert error_of(await worker.run({"prompt": "Hi", "stream": True}))["type"] == "EngineDeadError"
        assert [type(error) for error in worker.fatal] == [EngineDead]

    async def test_a_bad_job_costs_nothing_and_the_next_one_is_served(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine([Delta("fine", finish_reason="stop")]), tmp_path)
        for content in (None, {}, {"prompt": "\ud800"}, {"route": "/sleep"}, {"prompt": "x", "model": "y"}):
            assert 400 <= error_of(await worker.run(content))["code"] < 500
            assert (await worker.run({"prompt": "Hi"}))[0]["text"] == "fine"  # type: ignore[index]
        assert len(worker.engine.requests) == 5
        assert worker.fatal == []
        assert not worker.jobs.running


NATIVE_STREAM = {"prompt": "Hi", "stream": True}
CHAT = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [USER]}}
CHAT_STREAM = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [USER], "stream": True}}


class TestHttp:
    def worker(self, folder: Path, *steps: bytes | float | Exception, **fields: Any) -> Worker:
        return Worker(FakeEngine(answers={"/v1/chat/completions": Answer(steps, **fields)}), folder)

    async def test_a_json_answer_is_one_dict(self, tmp_path: Path) -> None:
        worker = self.worker(tmp_path, b'{"choices": [{"text": "\xe6', b'\x97\xa5"}]}')
        assert await worker.run(CHAT) == [{"choices": [{"text": "日"}]}]
        assert worker.records[-1]["route"] == "/v1/chat/completions"

    async def test_a_stream_is_passed_on_in_whole_events(self, tmp_path: Path) -> None:
        steps = (b'data: "\xe6\x97', 0.5, b'\xa5"\n\ndata: 2', 0.5, b"\n\n", 0.001, b"data: [DONE]\n\n")
        worker = self.worker(tmp_path, *steps, content_type="text/event-stream; charset=utf-8")
        chunks = await worker.timed(CHAT_STREAM)
        assert chunks == [(0.5, 'data: "日"\n\n'), (1.0, "data: 2\n\n"), (1.001, "data: [DONE]\n\n")]
        assert worker.records[-1]["stream"] is True

    async def test_the_cost_stands_beside_usage_and_can_be_left_out(self, tmp_path: Path) -> None:
        answer = Answer((b'{"usage":{"total_tokens":3}}',))
        for environ, fields in (({}, ["usage", "cost"]), ({"COST_IN_RESPONSE": "false"}, ["usage"])):
            worker = Worker(FakeEngine(answers={"/v1/chat/completions": answer}), tmp_path, **environ)
            (body,) = await worker.run(CHAT)
            assert list(body) == fields
            native = Worker(FakeEngine([Delta("x", finish_reason="stop")]), tmp_path, **environ)
            (last,) = await native.run({"prompt": "a"})
            assert ("cost" in last) == ("cost" in fields)
            assert "gpu_seconds" in last

    async def test_a_streams_last_chunk_has_the_cost(self, tmp_path: Path) -> None:
        chunk = b'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
        worker = self.worker(tmp_path, chunk, b"data: [DONE]\n\n", content_type="text/event-stream")
        text = "".join(map(str, await worker.run(CHAT_STREAM)))
        assert text.startswith('data: {"choices":[{"finish_reason":"stop"}],"cost":{"gpu_seconds":')
        assert text.endswith("}}\n\ndata: [DONE]\n\n")

    async def test_an_empty_answer_says_its_status(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine(answers={"/health": Answer((), content_type="")}), tmp_path)
        assert await worker.run({"route": "/health"}) == [{"status": 200}]

    async def test_an_error_answer_goes_back_as_it_is(self, tmp_path: Path) -> None:
        body = {"error": {"message": "no", "type": "NotFoundError", "param": "model", "code": 404}}
        worker = self.worker(tmp_path, orjson.dumps(body), status=404)
        assert error_of(await worker.run(CHAT_STREAM)) == body["error"]
        assert worker.records[-1]["error"] == "NotFoundError"

    @pytest.mark.parametrize("kind", ["invalid_request_error", None])
    async def test_so_does_one_of_anthropics_form(self, tmp_path: Path, kind: str | None) -> None:
        body = {"type": "error", "error": {"type": kind, "message": "no"}}
        worker = self.worker(tmp_path, orjson.dumps(body), status=400)
        assert error_of(await worker.run(CHAT)) == {"type": kind, "message": "no", "code": 400}

    async def test_an_error_does_not_repeat_a_whole_job(self, tmp_path: Path) -> None:
        body = {"error": {"type": "Bad Request", "message": "x" * 30_000, "param": None, "code": 400}}
        error = error_of(await self.worker(tmp_path, orjson.dumps(body), status=400).run(CHAT))
        assert error["message"] == "x" * 2000 + "…"

    async def test_a_route_that_this_model_has_not_is_not_found(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine(), tmp_path)
        error = error_of(await worker.run({"route": "/v1/embeddings", "body": {"input": "x"}}))
        assert (error["code"], error["type"], error["param"]) == (404, "NotFoundError", "route")
        assert error["message"].startswith("/v1/embeddings: ")

    @pytest.mark.parametrize("content", [b"<html>", b"", b"\xff\xfe", b"[]", b"null", b'{"error": null}'])
    async def test_an_error_answer_of_any_form_is_an_openai_error(self, tmp_path: Path, content: bytes) -> None:
        error = error_of(await self.worker(tmp_path, content, status=502).run(CHAT))
        assert error["code"] == 502
        assert error["type"]

    async def test_a_4xx_of_another_form_is_the_callers_error(self, tmp_path: Path) -> None:
        worker = self.worker(tmp_path, b'{"message": "bad role", "id": "1"}', status=400)
        error = error_of(await worker.run(CHAT))
        assert (error["code"], error["type"]) == (400, "BadRequestError")

    async def test_an_answer_that_is_not_json_is_an_error(self, tmp_path: Path) -> None:
        assert error_of(await self.worker(tmp_path, b"<html>").run(CHAT))["code"] == 500

    async def test_an_answer_that_is_a_list_is_not_lost(self, tmp_path: Path) -> None:
        assert await self.worker(tmp_path, b"[1, 2]").run(CHAT) == [[1, 2]]

    @pytest.mark.parametrize("fields", [{"status": 500}, {"content_type": "text/event-stream"}])
    async def test_an_engine_that_died_meanwhile_is_told(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        worker = self.worker(tmp_path, b"data: 1\n\n", **fields)
        worker.engine.dead = True
        assert error_of(await worker.run(CHAT_STREAM))["type"] == "EngineDeadError"
        assert [type(error) for error in worker.fatal] == [EngineDead]

    async def test_an_application_that_breaks_in_mid_stream_ends_the_job_with_an_error(self, tmp_path: Path) -> None:
        steps = (b"data: 1\n\n", 0.1, RuntimeError("broke"))
        worker = self.worker(tmp_path, *steps, content_type="text/event-stream")
        chunks = await worker.run(CHAT_STREAM)
        assert chunks[0] == "data: 1\n\n"
        assert error_of(chunks)["message"] == "RuntimeError: broke"


class TestCancel:
    LONG = (Delta("a"), *(0.1, Delta("b")) * 1000)

    async def platform(self, worker: Worker, post: float) -> None:
        """Do as the SDK does: wait for every chunk's POST, and hold the generator even when cancelled."""
        self.held = worker.jobs.handle({"id": "job-1", "input": {"prompt": "Hi", "stream": True}})
        async for _ in self.held:
            await asyncio.sleep(post)

    @pytest.mark.parametrize("post", [0.0, 3600.0], ids=["between chunks", "inside a POST"])
    async def test_a_cancelled_job_leaves_the_engine_at_once(self, tmp_path: Path, post: float) -> None:
        worker = Worker(FakeEngine(self.LONG), tmp_path)
        task = asyncio.create_task(self.platform(worker, post))
        await asyncio.sleep(1)
        assert worker.engine.aborted == []
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
        assert worker.engine.aborted == worker.engine.requests
        (record,) = worker.records
        assert (record["error"], record["finish_reason"]) == ("cancelled", None)
        assert record["completion_tokens"] > 5
        assert not worker.jobs.running

    async def test_an_http_request_is_left_too(self, tmp_path: Path) -> None:
        answer = Answer((b"data: 1\n\n", 3600.0), content_type="text/event-stream")
        worker = Worker(FakeEngine(answers={"/v1/completions": answer}), tmp_path)
        content = {"openai_route": "/v1/completions", "openai_input": {"prompt": "Hi", "stream": True}}
        task = asyncio.create_task(worker.run(content))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
        assert [request.path for request in worker.engine.aborted if isinstance(request, HttpRequest)] == [
            "/v1/completions"
        ]
        assert worker.records[-1]["error"] == "cancelled"

    async def test_a_reader_that_stops_in_the_middle_ends_the_job(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine(self.LONG), tmp_path)
        handle = worker.jobs.handle({"id": "job-1", "input": {"prompt": "Hi", "stream": True}})
        assert await anext(handle) == {"text": "a"}
        await handle.aclose()
        await asyncio.sleep(0.01)
        assert worker.engine.aborted == worker.engine.requests

    async def test_a_drain_ends_every_job_with_its_reason(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine(self.LONG), tmp_path)
        running = [asyncio.create_task(worker.run({"prompt": "Hi", "stream": True})) for _ in range(3)]
        await asyncio.sleep(1)
        worker.jobs.stop(Draining("the worker was stopped"))
        for chunks in await asyncio.gather(*running):
            assert error_of(chunks)["code"] == 503
            assert chunks[0] == {"text": "a"}
        assert len(worker.engine.aborted) == 3
        assert worker.fatal == []

    async def test_a_drain_does_not_touch_the_jobs_after_it(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine([0.1, Delta("fine", finish_reason="stop")]), tmp_path)
        worker.jobs.stop(Draining("the worker was stopped"))
        assert (await worker.run({"prompt": "Hi"}))[0]["text"] == "fine"  # type: ignore[index]

    async def test_a_job_cancelled_as_it_arrives_has_a_record_too(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine(self.LONG), tmp_path)
        task = asyncio.create_task(self.platform(worker, 0.0))
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
        assert [record["error"] for record in worker.records] == ["cancelled"]


SECRET = "nobody may read this → 秘密"
ANSWERS = {
    "/v1/completions": Answer((b'{"text": "%s"}' % SECRET.encode(),)),
    "/v1/chat/completions": Answer((b"data: %s\n\n" % SECRET.encode(),), content_type="text/event-stream"),
    "/tokenize": Answer((b'{"error": {"message": "%s", "type": "x"}}' % SECRET.encode(),), status=400),
    "/classify": Answer((RuntimeError(SECRET),)),
}


class TestRecord:
    async def test_it_says_what_became_of_the_job(self, tmp_path: Path) -> None:
        info = EngineInfo("0.32.0", "fake GPU", 2, ("demo", "alias"), 512, "d" * 64)
        engine = FakeEngine([Delta("a"), 0.01, Delta("b", finish_reason="stop")], info=info)
        worker = Worker(engine, tmp_path)
        chunks = await worker.run({"prompt": "one two", "model": "alias", "stream": True}, "job-9")
        (record,) = worker.records
        said = {
            "job_id": "job-9",
            "route": "native",
            "model": "alias",
            "stream": True,
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "finish_reason": "stop",
            "error": None,
            "worker_id": "pod",
            "gpu": "fake GPU",
            "gpu_count": 2,
            "snapshot_digest": "d" * 64,
            "vllm": "0.32.0",
        }
        assert {name: record[name] for name in said} == said
        assert 0 <= record["ttft_seconds"] <= record["duration_seconds"]
        assert record["itl_seconds"] >= 0
        last = chunks[-1]
        assert isinstance(last, dict)
        assert record["gpu_seconds"] == last["gpu_seconds"]

    async def test_gpu_seconds_count_every_gpu(self, tmp_path: Path) -> None:
        one = FakeEngine([Delta("x", finish_reason="stop")])
        many = FakeEngine(one.script, info=replace(one.info, gpu_count=1_000_000))
        worker = Worker(many, tmp_path)
        await worker.run({"prompt": "Hi"})
        assert worker.records[-1]["gpu_seconds"] > worker.records[-1]["duration_seconds"]

    async def test_every_job_has_exactly_one(self, tmp_path: Path) -> None:
        worker = Worker(FakeEngine([0.1, Delta("x", finish_reason="stop")]), tmp_path)
        contents = [
            {"prompt": "Hi"},
            {"prompt": "Hi", "stream": True},
            {},
            {"route": "/metrics"},
            {"route": "/health"},
        ]
        await asyncio.gather(*(worker.run(content, f"job-{i}") for i, content in enumerate(contents)))
        assert sorted(record["job_id"] for record in worker.records) == [f"job-{i}" for i in range(5)]
        assert (tmp_path / "ledger.jsonl").read_text().splitlines() == worker.lines

    @pytest.mark.parametrize(
        "script",
        [
            [],
            [Delta("x")],
        ],
    )
    async def test_below_two_tokens_there_is_no_time_between_tokens(self, tmp_path: Path, script: list[Delta]) -> None:
        worker = Worker(FakeEngine([*script, InvalidInput("cut")]), tmp_path)
        await worker.run({"prompt": "Hi"})
        assert worker.records[-1]["completion_tokens"] == len(script)
        assert worker.records[-1]["itl_seconds"] is None

    @pytest.mark.parametrize(
        "content",
        [
            {"prompt": SECRET},
            {"prompt": SECRET, "stream": True},
            {"messages": [{"role": "user", "content": SECRET}]},
            {"messages": [{"role": SECRET, "content": SECRET}]},
            {"prompt": SECRET, "model": SECRET},
            {"prompt": SECRET, SECRET: 1},
            {"prompt": "Hi", "sampling_params": {"stop": [SECRET]}},
            {"openai_route": "/v1/completions", "openai_input": {"prompt": SECRET}},
            {"openai_route": "/v1/chat/completions", "openai_input": {"messages": SECRET, "stream": True}},
            {"route": "/tokenize", "body": {"prompt": SECRET}},
            {"route": "/tokenize?" + SECRET, "body": {"prompt": "Hi"}},
            {"route": "/classify", "body": {"input": SECRET}},
            {"route": "/" + SECRET},
            {"route": "/sleep/" + SECRET},
            {"route": "/tokenize", "body": SECRET},
            {"route": "/tokenize", "method": SECRET},
            {"openai_route": "/v1/embeddings", "openai_input": {"input": SECRET}},
            {"openai_route": "/v1/completions", "openai_input": {"prompt": SECRET, "model": SECRET}},
            SECRET,
            [SECRET],
        ],
        ids=str,
    )
    async def test_it_never_holds_what_a_job_said_or_heard(self, tmp_path: Path, content: Any) -> None:
        script = [Delta(SECRET), Delta(SECRET, finish_reason="stop")]
        worker = Worker(FakeEngine(script, ANSWERS), tmp_path)
        await worker.run(content)
        assert len(worker.records) == 1
        said = (tmp_path / "ledger.jsonl").read_text() + "".join(worker.lines)
        for part in ("nobody may read", "秘密", json.dumps("秘密")[1:-1]):
            assert part not in said


class TestReaders:
    async def test_one_slow_reader_does_not_hold_another_up(self, tmp_path: Path) -> None:
        script = [*(Delta("x"), 0.01) * 100, Delta("", finish_reason="stop")]
        worker = Worker(FakeEngine(script), tmp_path)

        async def stuck() -> None:
            async for _ in worker.jobs.handle({"id": "stuck", "input": NATIVE_STREAM}):
                await asyncio.sleep(3600)

        task = asyncio.create_task(stuck())
        times = [time for time, _ in await worker.timed(NATIVE_STREAM)]
        assert times[-1] == pytest.approx(1.0)
        assert worker.records[0]["completion_tokens"] == worker.records[1]["completion_tokens"] == 101
        task.cancel()
