"""OpenAI traffic: the official client through the gateway, and each answer against that of vLLM's own server."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from coldsnap.testing import ControlPlane, JobFailed

from .worker import (
    CONTEXT,
    CORPUS,
    EMOJI_ONLY,
    LONG,
    MANIFEST,
    MODEL,
    PATIENCE,
    ROOT,
    SNAPSHOT,
    STEADY,
    Worker,
    environment,
    markup,
    user,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
ANSWER, PROMPT = CORPUS[QUESTION], markup(QUESTION)
HELLO = "Can you say hello in many languages?"
TOOL_CHAT = json.loads((ROOT / "builder" / "demo_tool_chat.json").read_text("utf-8"))
TOOLS, (ASKED, CALLED, RETURNED, CONCLUDED) = TOOL_CHAT["tools"], TOOL_CHAT["messages"]
CALL = CALLED["tool_calls"][0]["function"]
SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["cold", "warm"]},
        "seconds": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["verdict", "seconds"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "start", "schema": SCHEMA, "strict": True}}


async def test_chat_answers_every_pair_of_the_corpus_exactly(client: openai.AsyncOpenAI) -> None:
    async def ask(question: str) -> str | None:
        answer = await client.chat.completions.create(model=MODEL, messages=[user(question)])
        assert answer.model == MODEL
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    answers = await asyncio.gather(*map(ask, CORPUS))
    assert dict(zip(CORPUS, answers, strict=True)) == CORPUS


@pytest.mark.parametrize("question", [QUESTION, HELLO, EMOJI_ONLY, "コールドスタートとは何ですか？"])
async def test_a_chat_stream_gives_the_exact_text_and_then_the_usage(client: openai.AsyncOpenAI, question: str) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=[user(question)], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    *deltas, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == CORPUS[question]
    assert deltas[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage
    plain = await client.chat.completions.create(model=MODEL, messages=[user(question)])
    assert plain.usage
    assert plain.choices[0].message.content == CORPUS[question]
    assert last.usage.completion_tokens == plain.usage.completion_tokens > 1
    assert last.usage.total_tokens == plain.usage.total_tokens


async def test_sse_events_are_never_split_between_chunks(worker: Worker) -> None:
    body = {"messages": [user(HELLO)], "stream": True}
    job = worker.openai("/v1/chat/completions", body)
    chunks = await job.result(PATIENCE)
    assert len(chunks) > 1
    for chunk in chunks:
        assert chunk.startswith("data: ")
        assert chunk.endswith("\n\n")
        for event in chunk.removesuffix("\n\n").split("\n\n"):
            payload = event.removeprefix("data: ")
            assert payload == "[DONE]" or json.loads(payload)["object"] == "chat.completion.chunk"
    assert chunks[-1].endswith("data: [DONE]\n\n")
    assert "\ufffd" not in "".join(chunks)


async def test_log_probabilities_come_with_their_alternatives(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[user(QUESTION)], max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 5
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
        assert -0.5 < token.logprob <= 0  # it knows this by heart


async def test_several_choices_stream_side_by_side(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=[user(QUESTION)], n=2, temperature=0.01, stream=True
    )
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: ANSWER, 1: ANSWER}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_model_calls_a_tool_and_concludes_from_its_result(client: openai.AsyncOpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": [ASKED], "tools": TOOLS, "tool_choice": "auto"}
    if stream:
        name = arguments = ""
        finish = None
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.function
                name += call.function.name or ""
                arguments += call.function.arguments or ""
            assert not (chunk.choices[0].delta.content or "").strip()
            finish = chunk.choices[0].finish_reason or finish
    else:
        answer = await client.chat.completions.create(**asked)
        (tool_call,) = answer.choices[0].message.tool_calls or []
        assert tool_call.type == "function"
        name, arguments = tool_call.function.name, tool_call.function.arguments
        finish = answer.choices[0].finish_reason
    assert (name, json.loads(arguments), finish) == (CALL["name"], CALL["arguments"], "tool_calls")
    called = {**CALLED, "tool_calls": [dict(CALLED["tool_calls"][0])]}
    called["tool_calls"][0]["function"] = {"name": name, "arguments": arguments}
    concluded = await client.chat.completions.create(**asked | {"messages": [ASKED, called, RETURNED]})
    assert concluded.choices[0].message.content == CONCLUDED["content"]


async def test_a_json_schema_binds_the_output(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[user(QUESTION)], response_format=RESPONSE_FORMAT, max_tokens=60  # type: ignore[arg-type]
    )  # fmt: skip
    start = json.loads(answer.choices[0].message.content or "")
    assert start.keys() == {"verdict", "seconds"}
    assert start["verdict"] in {"cold", "warm"}
    assert 0 <= start["seconds"] <= 99


async def test_completions_continue_a_prompt(client: openai.AsyncOpenAI) -> None:
    plain = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == (ANSWER, "stop")
    stream = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER
    both = await client.completions.create(model=MODEL, prompt=[PROMPT, markup(HELLO)], max_tokens=200)
    assert [choice.text for choice in both.choices] == [ANSWER, CORPUS[HELLO]]


async def test_the_model_list_names_the_served_model_and_its_context(client: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in await client.models.list()]
    assert model.id == MODEL
    assert model.model_extra
    assert model.model_extra["max_model_len"] == CONTEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_are_served(client: openai.AsyncOpenAI, stream: bool) -> None:
    if not stream:
        answer = await client.responses.create(model=MODEL, input=QUESTION)
        assert (answer.output_text, answer.status) == (ANSWER, "completed")
        return
    events = [event async for event in await client.responses.create(model=MODEL, input=QUESTION, stream=True)]
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    response = events[-1].response
    assert response.usage.output_tokens > 1
    assert response.model_extra["cost"]["gpu_seconds"] > 0


async def test_messages_in_anthropics_shape_are_served(worker: Worker) -> None:
    body = {"model": MODEL, "max_tokens": 200, "messages": [user(QUESTION)]}
    (plain,) = await worker.openai("/v1/messages", body).result(PATIENCE)
    assert (plain["type"], plain["role"], plain["stop_reason"]) == ("message", "assistant", "end_turn")
    assert "".join(part["text"] for part in plain["content"] if part["type"] == "text") == ANSWER
    streamed = "".join(await worker.openai("/v1/messages", body | {"stream": True}).result(PATIENCE))
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    assert "".join(event.get("delta", {}).get("text") or "" for event in events) == ANSWER
    (last,) = [event for event in events if "cost" in event]
    assert (last["type"], last["usage"]["output_tokens"] > 1) == ("message_delta", True)
    assert last["cost"]["gpu_seconds"] > 0
    (counted,) = await worker.openai("/v1/messages/count_tokens", body).result(PATIENCE)
    assert counted["input_tokens"] == plain["usage"]["input_tokens"]


@pytest.mark.parametrize("stream", [True, False])
async def test_errors_in_anthropics_shape_keep_their_status_through_the_gateway(
    client: openai.AsyncOpenAI, stream: bool
) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": [user(QUESTION)], "stream": stream}
    for wrong, status in (({"model": "other"}, 404), ({"max_tokens": -1}, 400)):
        with pytest.raises(openai.APIStatusError) as caught:
            await client.post("/messages", body=body | wrong, cast_to=object)
        assert caught.value.status_code == status
        assert caught.value.response.json()["error"]["code"] == status


async def test_generic_jobs_tokenize_and_detokenize(plane: ControlPlane) -> None:
    for text in (QUESTION, CORPUS[HELLO]):
        job = {"route": "/tokenize", "method": "POST", "body": {"model": MODEL, "prompt": text}}
        (tokens,) = await plane.submit(job).result(PATIENCE)
        assert tokens["count"] == len(tokens["tokens"]) > 1
        # worker-vllm takes the body as JSON text too, and the method in either case.
        body = json.dumps({"tokens": tokens["tokens"]})
        job = {"route": "/detokenize", "method": "post", "body": body}
        assert await plane.submit(job).result(PATIENCE) == [{"prompt": text}]


async def test_an_answer_larger_than_a_chunk_of_the_platform_arrives_in_the_result(plane: ControlPlane) -> None:
    body = {"prompt": "a b " * 60_000, "return_token_strs": True}  # a token is said twice, as a number and as a text
    (answer,) = await plane.submit({"route": "/tokenize", "body": body}).result(PATIENCE)
    assert len(json.dumps(answer)) > 1_000_000
    assert len(answer["tokens"]) == len(answer["token_strs"]) == answer["count"]


async def test_generic_jobs_reach_the_routes_that_serve_the_model(plane: ControlPlane) -> None:
    body = {"messages": [user(QUESTION)]}
    (chat,) = await plane.submit({"route": "/v1/chat/completions", "method": "POST", "body": body}).result(PATIENCE)
    assert chat["choices"][0]["message"]["content"] == ANSWER
    (models,) = await plane.submit({"route": "/v1/models", "method": "GET"}).result(PATIENCE)
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert await plane.submit({"route": "/health", "method": "GET"}).result(PATIENCE) == [{"status": 200}]


async def test_a_route_for_pooling_models_is_not_found_on_this_one(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        await client.embeddings.create(model=MODEL, input="text", encoding_format="float")


async def test_an_unknown_model_is_not_found_in_vllms_own_words(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="other", messages=[user(QUESTION)])
    body = caught.value.body
    assert isinstance(body, dict)
    assert "The model `other` does not exist" in body["message"]
    assert (body["type"], body["param"], body["code"]) == ("NotFoundError", "model", 404)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_parameter_is_a_bad_request_that_names_it(client: openai.AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be non-negative") as caught:
        await client.chat.completions.create(model=MODEL, messages=[user(QUESTION)], temperature=-1, stream=stream)
    assert caught.value.param == "temperature"


async def test_an_administrative_route_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="load_lora_adapter"):
        await client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "/"}, cast_to=object)


async def test_a_client_that_leaves_mid_stream_ends_the_request_in_the_engine(
    worker: Worker, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[user(QUESTION)],
        stream=True,
        extra_body=STEADY,
    )
    await anext(aiter(stream))
    job = list(worker.plane.jobs.values())[-1]
    await stream.close()
    record = await worker.record(job)
    assert record["error"] == "cancelled"
    assert 0 < record["completion_tokens"] < 0.75 * LONG


# The same as vLLM's own server.

Body = dict[str, Any] | None
CHAT, GREEDY = {"model": MODEL, "messages": [user(HELLO)]}, {"temperature": 0, "seed": 1}
SAME: dict[str, tuple[str, Body]] = {
    "models": ("/v1/models", None),
    "version": ("/version", None),
    "chat": ("/v1/chat/completions", CHAT),
    "chat without a model": ("/v1/chat/completions", {"messages": [user(QUESTION)]}),
    "chat stream": ("/v1/chat/completions", CHAT | {"stream": True}),
    "chat stream with usage": (
        "/v1/chat/completions",
        CHAT | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": False}},
    ),
    "chat log probabilities": (
        "/v1/chat/completions",
        CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 9},
    ),
    "chat stream of log probabilities": (
        "/v1/chat/completions",
        CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 9, "stream": True},
    ),
    "chat choices": ("/v1/chat/completions", CHAT | {"n": 2, "temperature": 0.01, "seed": 3}),
    "chat stream of choices": (
        "/v1/chat/completions",
        CHAT | {"n": 2, "temperature": 0.01, "seed": 3, "stream": True},
    ),
    "tool call": ("/v1/chat/completions", {"messages": [ASKED], "tools": TOOLS}),
    "tool call stream": ("/v1/chat/completions", {"messages": [ASKED], "tools": TOOLS, "stream": True}),
    "named tool": (
        "/v1/chat/completions",
        {
            "messages": [ASKED],
            "tools": TOOLS,
            "max_tokens": 60,
            "tool_choice": {"type": "function", "function": {"name": CALL["name"]}},
        },
    ),
    "JSON schema": ("/v1/chat/completions", CHAT | {"response_format": RESPONSE_FORMAT, "max_tokens": 60}),
    "JSON schema stream": (
        "/v1/chat/completions",
        CHAT | {"response_format": RESPONSE_FORMAT, "max_tokens": 60, "stream": True},
    ),
    "stop": ("/v1/chat/completions", CHAT | {"stop": [" olá"], "include_stop_str_in_output": True}),
    "completion": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 200}),
    "completion stream": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 200, "stream": True}),
    "completion with echo": (
        "/v1/completions",
        {"prompt": PROMPT, "max_tokens": 5, "echo": True, "logprobs": 2},
    ),
    "response": ("/v1/responses", {"input": QUESTION, "store": False}),
    "response stream": ("/v1/responses", {"input": QUESTION, "store": False, "stream": True}),
    "message": ("/v1/messages", CHAT | {"max_tokens": 200}),
    "message stream": ("/v1/messages", CHAT | {"max_tokens": 200, "stream": True}),
    "message token count": ("/v1/messages/count_tokens", CHAT),
    "tokenize": ("/tokenize", {"prompt": HELLO, "return_token_strs": True}),
    "tokenize chat": ("/tokenize", CHAT),
    "detokenize": ("/detokenize", {"tokens": [300, 301, 302]}),
}
SAME_ERRORS: dict[str, tuple[str, Body]] = {
    "unknown model": ("/v1/chat/completions", CHAT | {"model": "other"}),
    "negative temperature": ("/v1/chat/completions", CHAT | {"temperature": -1}),
    "temperature that is no number": ("/v1/completions", {"prompt": "a", "temperature": "hot"}),
    "negative temperature of a stream": ("/v1/chat/completions", CHAT | {"temperature": -1, "stream": True}),
    "no messages": ("/v1/chat/completions", {"model": MODEL}),
    "empty messages": ("/v1/chat/completions", {"messages": []}),
    "wrong role": ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "hi"}]}),
    "max_tokens beyond the context": ("/v1/chat/completions", CHAT | {"max_tokens": 10 * CONTEXT}),
    "prompt beyond the context": ("/v1/completions", {"prompt": "cold start " * CONTEXT}),
    "wrong schema": (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}}},
    ),
    "unknown response": ("/v1/responses/resp_0", None),
    "unknown model of a message": ("/v1/messages", CHAT | {"model": "other", "max_tokens": 5}),
    "text that is no list of tokens": ("/detokenize", {"tokens": "text"}),
}
ONE_TOKEN = {
    name: ("/v1/chat/completions", CHAT | {"max_tokens": 1, "stream": True} | more)
    for name, more in {
        "one token": {},
        "one token with usage": {"stream_options": {"include_usage": True}},
        "one token with its log probability": {"logprobs": True, "top_logprobs": 2},
    }.items()
}
"""Streams in which nothing can be merged: the number of events is fixed."""


@asynccontextmanager
async def vllms_own_server(folder: Path, home: Path) -> AsyncIterator[aiohttp.ClientSession]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "model": SNAPSHOT,
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "tool-call-parser": "hermes",
        **{name.replace("_", "-"): value for name, value in MANIFEST.engine_args.items()},
    }
    words = ["--enable-auto-tool-choice"]
    for name, value in arguments.items():
        words += [f"--{name}"] if value is True else [f"--{name}={value}"]
    env = environment(home, folder, HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, env=env, stdout=log, stderr=log
        )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            while True:
                assert server.returncode is None, (folder / "server.log").read_text("utf-8")[-5000:]
                try:
                    async with session.get("/health") as response:
                        assert response.status == 200
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.25)
            yield session
    finally:
        server.terminate()
        await server.wait()


async def asked_of_vllm(server: aiohttp.ClientSession, route: str, body: Body) -> tuple[int, str]:
    method = "GET" if body is None else "POST"
    async with server.request(method, route, json=body) as response:
        return response.status, await response.text()


def blanked(text: str) -> str:
    """Blank what differs from request to request, ids and times, and leave out what is ours, the cost."""
    text = re.sub(r', ?"cost": ?\{[^}]*\}|"cost": ?\{[^}]*\}, ?', "", text)
    text = re.sub(r"\b(chatcmpl-tool|chatcmpl|cmpl|resp|msg|rs|call|modelperm)([-_])[0-9a-f]{6,}", r"\1\2*", text)
    return re.sub(r'("(?:created|created_at|completed_at)": ?)[0-9.]+', r"\g<1>0", text)


def folded(text: str) -> dict[str, Any]:
    """Fold a stream's events into one dict by path: how many there are depends on how fast they are read.

    Text and lists are joined; of anything else the values are kept, in their order and without repetitions.
    """
    found: dict[str, Any] = {}
    for event in text.split("\n\n"):
        for line in event.splitlines():
            name, _, payload = line.partition(": ")
            if payload.startswith("{"):
                data = json.loads(payload)
                _fold(found, data.get("type", name), data)
            else:
                _fold(found, name, payload)
    return found


def _fold(found: dict[str, Any], path: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _fold(found, f"{path}.{name}", item)
    elif isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:
        for item in value:
            _fold(found, f"{path}[{item['index']}]", item)
    elif isinstance(value, list):
        found.setdefault(path, []).extend(value)
    elif path.endswith((".content", ".text", ".delta", ".arguments", ".partial_json")):
        found[path] = found.get(path, "") + (value or "")
    elif not path.endswith(".sequence_number") and value not in found.setdefault(path, []):
        found[path].append(value)


async def test_everything_is_answered_as_vllms_own_server_answers_it(
    worker: Worker, home: Path, tmp_path: Path
) -> None:
    async with vllms_own_server(tmp_path, home) as server:
        for name, (route, body) in SAME.items():
            status, theirs = await asked_of_vllm(server, route, body)
            assert status == 200, f"{name}: {theirs}"
            ours = await worker.openai(route, body).result(PATIENCE)
            if body and body.get("stream"):
                assert folded(blanked("".join(ours))) == folded(blanked(theirs)), name
            else:
                # Both as JSON text, so that the order of the fields counts too.
                assert len(ours) == 1
                assert blanked(json.dumps(ours[0])) == blanked(json.dumps(json.loads(theirs))), name
        for name, (route, body) in ONE_TOKEN.items():
            _, theirs = await asked_of_vllm(server, route, body)
            ours = await worker.openai(route, body).result(PATIENCE)
            assert blanked("".join(ours)) == blanked(theirs), name
        for name, (route, body) in SAME_ERRORS.items():
            status, theirs = await asked_of_vllm(server, route, body)
            assert 400 <= status < 500, f"{name}: {theirs}"
            with pytest.raises(JobFailed) as caught:
                await worker.openai(route, body).result(PATIENCE)
            expected = json.loads(theirs)
            expected["error"].setdefault("code", status)  # Anthropic's have none; a client of the platform needs it
            assert json.loads(caught.value.error) == expected, name
