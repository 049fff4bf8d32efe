"""Bad input: a job that is wrong ends with an error that names the field; the next is served."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from tokenizers import Tokenizer

from coldsnap.testing import NO_INPUT, JobFailed

from .test_cancel import assert_engine_falls_idle
from .worker import CONTEXT, CORPUS, MODEL, PATIENCE, SNAPSHOT, Worker, text, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT = "/v1/chat/completions"
HI = [user("hi")]


def messages(content: Any, role: Any = "user", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} | fields]}


def sampling(**values: Any) -> dict[str, Any]:
    return {"prompt": "hi", "sampling_params": values}


def chat(**fields: Any) -> dict[str, Any]:
    return {"openai_route": CHAT, "openai_input": {"messages": HI, "max_tokens": 5} | fields}


NATIVE: dict[str, tuple[object, str]] = {
    # What it is: the job's input, and the words with which the error must name the field.
    "a number": (5, "input: expected an object"),
    "nothing": (None, "input: expected an object"),
    "a list": ([{"prompt": "hi"}], "input: expected an object"),
    "a text": ("hi", "input: expected an object"),
    "no input": (NO_INPUT, "input: expected an object"),
    "an empty object": ({}, "exactly one of prompt and messages, found neither"),
    "both": ({"prompt": "hi", "messages": HI}, "exactly one of prompt and messages, found both"),
    "an unknown field": ({"prompt": "hi", "temperature": 1}, "temperature: unknown field"),
    "an empty prompt": ({"prompt": ""}, "prompt: expected a text that is not empty"),
    "a prompt that is no text": ({"prompt": ["hi"]}, "prompt: expected a text"),
    "empty messages": ({"messages": []}, "messages: expected a list that is not empty"),
    "messages that are no list": ({"messages": "hi"}, "messages: expected a list"),
    "a message that is no object": ({"messages": [*HI, "hi"]}, r"messages\[1\]: expected an object"),
    "a wrong role": (messages("hi", "robot"), r"messages\[0\]\.role: expected one of .*'robot'"),
    "no role": ({"messages": [{"content": "hi"}]}, r"messages\[0\]\.role: expected one of"),
    "a role that is no text": (messages("hi", ["user"]), r"messages\[0\]\.role: expected one of"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: expected"),
    "content that is a number": (messages(5), r"messages\[0\]\.content: expected"),
    "a part that is a number": (messages([5]), r"messages\[0\]\.content\[0\]: expected"),
    "a part that is a list": (messages([{"type": "text", "text": "hi"}, []]), r"messages\[0\]\.content\[1\]"),
    "a part whose text is a number": (messages([{"type": "text", "text": 5}]), r"messages\[0\]\.content\[0\]"),
    "a part of an unknown type": (messages([{"type": "smell"}]), "'smell'"),
    "an image": (
        messages([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
        "messages: .*not a multimodal model",
    ),
    "tool calls that are no list": (messages(None, "assistant", tool_calls=5), "tool_calls"),
    "stream that is a text": ({"messages": HI, "stream": "yes"}, "stream: expected true or false"),
    "sampling_params that are a list": ({"prompt": "hi", "sampling_params": [1]}, "sampling_params: expected"),
    "template arguments that are a number": (
        {"messages": HI, "chat_template_kwargs": 5},
        "chat_template_kwargs: expected",
    ),
    "a chat template of the job's own": (
        {"messages": HI, "chat_template_kwargs": {"chat_template": "{{ messages }}"}},
        "chat_template",
    ),
    "tools that are a number": ({"messages": HI, "chat_template_kwargs": {"tools": 5}}, "chat_template_kwargs"),
    # Sampling parameters: unknown, of a wrong type, out of range.
    "a misspelt parameter": (sampling(temprature=1), "sampling_params.temprature: .*'temperature'"),
    "an internal parameter": (sampling(output_kind=2), "sampling_params.output_kind: unknown"),
    "arguments of the engine's extensions": (sampling(extra_args={"kv_transfer_params": 5}), "extra_args"),
    "log probabilities": (sampling(logprobs=1), "sampling_params.logprobs: .*OpenAI"),
    "temperature that is a text": (sampling(temperature="hot"), "sampling_params.temperature: Expected `float`"),
    "negative temperature": (sampling(temperature=-1), "temperature must be non-negative"),
    "top_p of 2": (sampling(top_p=2), "top_p must be in"),
    "top_k of -5": (sampling(top_k=-5), "top_k must be"),
    "min_p of 3": (sampling(min_p=3), "min_p must be in"),
    "max_tokens of 0": (sampling(max_tokens=0), "max_tokens must be at least 1"),
    "negative max_tokens": (sampling(max_tokens=-3), "max_tokens must be at least 1"),
    "max_tokens that is a text": (sampling(max_tokens="5"), "sampling_params.max_tokens: Expected `int"),
    "max_tokens that is true": (sampling(max_tokens=True), "sampling_params.max_tokens: Expected `int"),
    "min_tokens above max_tokens": (sampling(min_tokens=9, max_tokens=3), "min_tokens must be less"),
    "no choices": (sampling(n=0), "^sampling_params\\.n: n must be at least 1"),
    "more choices than a job may have": (
        sampling(n=33, temperature=1),
        "n: 33 completions or more are asked for; at most MAX_N=32",
    ),
    "too many choices": (sampling(n=100_000), "n must be at most"),
    "a stop string that is a number": (sampling(stop=5), "sampling_params.stop: Expected"),
    "an empty stop string": (sampling(stop=["", "x"]), "^sampling_params\\.stop: stop cannot contain an empty"),
    "a stop token that is no number": (sampling(stop_token_ids=["a"]), r"stop_token_ids\[0\]: Expected `int`"),
    "a stop token that does not exist": (sampling(stop_token_ids=[10**9]), "stop_token_ids"),
    "a seed that is a text": (sampling(seed="x"), "sampling_params.seed: Expected `int"),
    "a seed beyond 64 bits": (sampling(seed=2**70), "sampling_params.seed"),
    "a penalty of 9": (sampling(presence_penalty=9), "^sampling_params\\.presence_penalty: "),
    "a repetition penalty of 0": (sampling(repetition_penalty=0), "repetition_penalty must be"),
    "a bias of no token": (sampling(logit_bias={"x": 1}), "sampling_params.logit_bias: Expected `int`"),
    "a bias of a token that does not exist": (sampling(logit_bias={"999999": 1}), "logit_bias"),
    "no allowed token": (sampling(allowed_token_ids=[]), "allowed_token_ids"),
    "a schema that is none": (sampling(structured_outputs={"json": "{"}), "structured_outputs"),
    "a regular expression that is none": (sampling(structured_outputs={"regex": "("}), "structured_outputs"),
    "structured outputs that are a list": (sampling(structured_outputs=[1]), r"sampling_params\.structured_outputs: "),
    "an empty grammar": (sampling(structured_outputs={"grammar": ""}), r"sampling_params\.structured_outputs: "),
    "a schema that is its own": (
        sampling(structured_outputs={"json": {"$ref": "#"}}),
        r"sampling_params\.structured_outputs: ",
    ),
    "a schema that the engine's grammars cannot follow": (
        sampling(structured_outputs={"json": {"type": "integer", "multipleOf": 5}}),
        r"^sampling_params\.structured_outputs: .*needs the guidance backend and the engine has xgrammar",
    ),
    "a repetition that is none": (
        sampling(repetition_detection={"max_pattern_size": -1}),
        "^sampling_params: max_pattern_size, ",
    ),
    "no choice to choose from": (sampling(structured_outputs={"choice": []}), "structured_outputs"),
    # Text that is too long, or that no tokenizer can read.
    "a prompt beyond the context": ({"prompt": "cold start " * CONTEXT}, f"prompt: .*{CONTEXT} tokens"),
    "messages beyond the context": (messages("cold start " * CONTEXT), f"messages: .*{CONTEXT} tokens"),
    "a prompt of 10 MB": ({"prompt": "cold start 日本 " * 560_000}, f"prompt: .*{CONTEXT} tokens"),
    "a message of 10 MB": (messages("cold start 日本 " * 560_000), f"messages: .*{CONTEXT} tokens"),
    "a prompt of 10 MB without a space": ({"prompt": "x" * 10_000_000}, f"prompt: .*{CONTEXT} tokens"),
    "200,000 messages": ({"messages": HI * 200_000}, f"messages: .*{CONTEXT} tokens"),
    "a lone surrogate": ({"prompt": "hi \ud83d"}, "prompt: .*lone surrogate at position 3"),
    "a lone surrogate in a message": (messages("\udc00"), r"messages\[0\]\.content: .*lone surrogate"),
    "a lone surrogate in a key": ({"prompt": "hi", "\ud800": 1}, "lone surrogate"),
    "a lone surrogate in a stop string": (sampling(stop=["\ud800"]), r"sampling_params\.stop\[0\]: .*surrogate"),
    "a null character": ({"prompt": "a\0b"}, "prompt: .*null character at position 1"),
    "a null character in a part": (messages([{"type": "text", "text": "\0"}]), r"content\[0\]\.text: .*null"),
    "lists in lists in lists": (sampling(stop=json.loads("[" * 400 + "]" * 400)), "sampling_params.stop"),
}


@pytest.mark.parametrize("name", NATIVE)
async def test_a_native_job_ends_with_one_json_string_that_names_the_field(worker: Worker, name: str) -> None:
    job_input, words = NATIVE[name]
    error = await worker.refused(job_input)
    assert error["type"] == "BadRequestError"
    assert error["code"] == 400
    assert len(error["message"]) < 2000
    assert re.search(words, error["message"]), error


async def test_a_grammar_that_the_engine_would_give_up_is_an_error_and_no_empty_answer(worker: Worker) -> None:
    error = await worker.refused(sampling(structured_outputs={"grammar": "root ::= root"}))
    assert (error["code"], error["param"]) == (400, "sampling_params.structured_outputs")


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
async def test_a_number_that_json_cannot_carry_is_refused(worker: Worker, value: bytes) -> None:
    for template in (
        b'{"id": "%s", "input": {"prompt": "hi", "sampling_params": {"temperature": %b}}}',
        b'{"id": "%s", "input": {"openai_route": "/v1/completions", "openai_input": {"prompt": "hi", "top_p": %b}}}',
    ):
        job = worker.plane.submit({})
        job.payload = template % (job.id.encode(), value)
        with pytest.raises(JobFailed, match=r"temperature|top_p"):
            await job.result(PATIENCE)


async def test_an_unknown_model_is_not_found(worker: Worker) -> None:
    error = await worker.refused({"messages": HI, "model": "other"})
    assert error == {
        "message": f"model: 'other' is not served here; served: {MODEL}",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


OPENAI: dict[str, tuple[object, int, str, str]] = {
    # The job's input, and the answer's code, type and words.
    "no messages": ({"openai_route": CHAT, "openai_input": {"model": MODEL}}, 400, "Bad Request", "body.messages"),
    "no body": ({"openai_route": CHAT}, 405, "MethodNotAllowedError", f"GET {CHAT}: expected POST"),
    "empty messages": (chat(messages=[]), 400, "BadRequestError", "conversation|messages"),
    "messages that are a text": (chat(messages="hi"), 400, "Bad Request", "body.messages"),
    "a wrong role": (chat(messages=[{"role": "robot", "content": "hi"}]), 400, "BadRequestError", "role robot"),
    "no role": (chat(messages=[{"content": "hi"}]), 400, "Bad Request", "role"),
    "an unknown model": (chat(model="other"), 404, "NotFoundError", "The model `other` does not exist"),
    "a model that is a number": (chat(model=5), 400, "Bad Request", "body.model"),
    "negative temperature": (chat(temperature=-1), 400, "BadRequestError", "temperature must be"),
    "negative temperature of a stream": (
        chat(temperature=-1, stream=True),
        400,
        "BadRequestError",
        "temperature must be",
    ),
    "temperature that is a text": (chat(temperature="hot"), 400, "Bad Request", "body.temperature"),
    "stream that is a text": (chat(stream="maybe"), 400, "Bad Request", "body.stream"),
    "max_tokens beyond the context": (chat(max_tokens=10 * CONTEXT), 400, "BadRequestError", "max_tokens"),
    "too many log probabilities": (chat(logprobs=True, top_logprobs=99), 400, "BadRequestError", "logprobs"),
    "a response format without a schema": (
        chat(response_format={"type": "json_schema"}),
        400,
        "BadRequestError",
        "response_format",
    ),
    "a tool without a function": (chat(tools=[{"type": "function"}]), 400, "Bad Request", "body.tools.0.function"),
    "a seed beyond 64 bits": (chat(seed=2**70), 400, "BadRequestError", "seed"),
    "structured outputs that are a list": (
        chat(structured_outputs=[1]),
        400,
        "BadRequestError",
        "^openai_input.structured_outputs: expected an object, found a list",
    ),
    "arguments of a connector between engines": (
        chat(vllm_xargs={"kv_transfer_params": "x"}),
        400,
        "BadRequestError",
        "^openai_input.vllm_xargs.kv_transfer_params: not open to jobs",
    ),
    "more choices than a job may have": (chat(n=33, temperature=1), 400, "BadRequestError", "at most MAX_N=32"),
    "more prompts than a job may have": (
        {"openai_route": "/v1/completions", "openai_input": {"prompt": ["hi"] * 33}},
        400,
        "BadRequestError",
        "at most MAX_N=32",
    ),
    "a text of 2 MB to tokenize": (
        {"route": "/tokenize", "body": {"prompt": "cold start " * 200_000}},
        400,
        "BadRequestError",
        "^body: 22000[0-9]+ bytes; /tokenize takes 1000000",
    ),
    "a million tokens to detokenize": (
        {"route": "/detokenize", "body": {"tokens": [1000] * 1_000_000}},
        400,
        "BadRequestError",
        "^body: [0-9]+ bytes; /detokenize takes 1000000",
    ),
    "a chat template of the job's own": (chat(chat_template="x"), 400, "BadRequestError", "template"),
    "a prompt of 10 MB": (
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "cold start " * 900_000}},
        400,
        "BadRequestError",
        f"{CONTEXT} tokens",
    ),
    "a message of 10 MB": (
        chat(messages=[user("cold start 日本 " * 560_000)]),
        400,
        "BadRequestError",
        f"{CONTEXT} tokens",
    ),
    "a prompt of 10 MB in tokens": (
        {"openai_route": "/v1/completions", "openai_input": {"prompt": [1000] * 1_600_000}},
        400,
        "BadRequestError",
        f"{CONTEXT} tokens",
    ),
    "a token that does not exist": (
        {"openai_route": "/v1/completions", "openai_input": {"prompt": [10**9]}},
        400,
        "BadRequestError",
        "Token id",
    ),
    "a lone surrogate": (chat(messages=[user("\ud800")]), 400, "BadRequestError", r"messages\[0\]\.content"),
    "a null character": (chat(messages=[user("a\0")]), 400, "BadRequestError", r"messages\[0\]\.content"),
    "malformed JSON in a body": (
        {"route": "/tokenize", "method": "POST", "body": '{"prompt": "hi"'},
        400,
        "BadRequestError",
        "^body: expected a JSON object",
    ),
    "malformed JSON in openai_input": (
        {"openai_route": CHAT, "openai_input": "{"},
        400,
        "BadRequestError",
        "^openai_input: expected a JSON object",
    ),
    "a body that is a list": ({"route": "/tokenize", "body": [1]}, 400, "BadRequestError", "^body: expected"),
    "a route that is a number": ({"openai_route": 5}, 400, "BadRequestError", "^openai_route: expected a path"),
    "a route with a host": (
        {"openai_route": "http://localhost/metrics"},
        400,
        "BadRequestError",
        "^openai_route: expected a path",
    ),
    "an unknown route": ({"openai_route": "/v1/nothing"}, 404, "NotFoundError", "/v1/nothing: no such route"),
    "a route of another model": (
        {"openai_route": "/v1/embeddings", "openai_input": {"input": "hi"}},
        404,
        "NotFoundError",
        "/v1/embeddings: this model does not serve it",
    ),
    "a wrong method": ({"route": "/v1/models", "method": "POST"}, 405, "MethodNotAllowedError", "/v1/models"),
    "an unknown method": (
        {"route": "/tokenize", "method": "BREW", "body": {"prompt": "hi"}},
        405,
        "MethodNotAllowedError",
        "/tokenize: expected POST",
    ),
    "a GET of a route that is posted to": (
        {"openai_route": "/v1/chat/completions", "openai_input": {}},
        405,
        "MethodNotAllowedError",
        "GET /v1/chat/completions: expected POST",
    ),
    "a GET of a generic route": ({"route": "/tokenize"}, 405, "MethodNotAllowedError", "/tokenize: expected POST"),
    "a method that is a number": ({"route": "/tokenize", "method": 5}, 400, "BadRequestError", "^method: expected"),
    "an unknown field": ({"route": "/v1/models", "headers": {}}, 400, "BadRequestError", "^headers: unknown field"),
}


@pytest.mark.parametrize("name", OPENAI)
async def test_an_openai_job_ends_with_an_openai_error(worker: Worker, name: str) -> None:
    job_input, code, kind, words = OPENAI[name]
    error = await worker.refused(job_input)
    assert (error["code"], error["type"]) == (code, kind), error
    assert re.search(words, error["message"]), error


ADMINISTRATIVE = (
    "/metrics", "/docs", "/openapi.json", "/load", "/ping", "/invocations", "/sleep", "/wake_up", "/server_info",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/reset_prefix_cache",
    "/collective_rpc", "/scale_elastic_ep", "/inference/v1/generate", "/pause", "/update_weights",
)  # fmt: skip
DISGUISED = (
    "//metrics", "/metrics/", "/METRICS", "/%6detrics", "/v1/../metrics", "/v1/models/../../metrics",
    "/v1/models/", "/v1/models\n", "/v1/models#x", "/health/../metrics", "/v1/responses/../../metrics",
    "/v1/responses/x%2f..%2f..%2fmetrics", "/v1/responses/{response_id}", "/v1/modéls", "/", "/\ufeff",
)  # fmt: skip


async def test_administrative_routes_are_refused_by_both_shapes_and_all_methods(worker: Worker) -> None:
    jobs = [
        worker.plane.submit(job_input)
        for route in ADMINISTRATIVE
        for job_input in (
            {"openai_route": route, "openai_input": {}},
            {"openai_route": route, "openai_input": {"level": 1, "model": MODEL}},
            {"route": route, "method": "GET"},
            {"route": route, "method": "POST", "body": {}},
        )
    ]
    for job in jobs:
        with pytest.raises(JobFailed, match="not open to jobs") as caught:
            await job.result(PATIENCE)
        error = json.loads(caught.value.error)["error"]
        assert (error["type"], error["code"]) == ("PermissionDeniedError", 403)


async def test_a_route_in_disguise_reaches_nothing(worker: Worker) -> None:
    for job in [worker.plane.submit({"openai_route": route, "openai_input": {}}) for route in DISGUISED]:
        with pytest.raises(JobFailed) as caught:
            await job.result(PATIENCE)
        assert json.loads(caught.value.error)["error"]["code"] in {400, 403, 404}


async def test_bad_jobs_among_good_ones_disturb_none(worker: Worker) -> None:
    # The SDK itself loses a job without input when only one slot is free (a single take); the platform has none.
    bad = [given for given, _ in NATIVE.values() if given is not NO_INPUT and len(repr(given)) < 10_000]
    good = {question: worker.ask(question) for question in CORPUS}
    failing = [worker.plane.submit(job_input) for job_input in bad]
    for failed in failing:
        with pytest.raises(JobFailed):
            await failed.result(PATIENCE)
    for question, job in good.items():
        assert text(await job.result(PATIENCE)) == CORPUS[question]


async def test_a_huge_prompt_does_not_hold_up_a_running_stream(worker: Worker) -> None:
    """By processor time, which a busy machine does not stretch: what the process with the event loop can be held up by.

    Ten megabytes have to be read, whatever they are; a job that is refused for a field's name shows what that takes.
    To turn them into tokens would take many times as much, in whichever thread.
    """
    huge = "cold start 日本 " * 560_000

    async def spent(job_input: object, words: str) -> float:
        begun = worker.front_cpu_seconds()
        with pytest.raises(JobFailed, match=words):
            await worker.plane.submit(job_input).result(PATIENCE)
        return worker.front_cpu_seconds() - begun

    begun = time.process_time()
    Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json")).encode(huge[: len(huge) // 10])
    tokens = 10 * (time.process_time() - begun)
    reading = await spent({"txt": huge}, "txt: unknown field")
    for job_input in (messages(huge), {"prompt": huge}):
        refusing = await spent(job_input, f"{CONTEXT} tokens")
        assert refusing < reading + tokens / 4


async def test_nothing_bad_is_left_in_the_engine(worker: Worker) -> None:
    """A request that failed half-way into the engine must not keep it busy."""
    await assert_engine_falls_idle(worker)
