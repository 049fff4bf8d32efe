"""Hostile jobs by the thousand: each ends with an answer or with an error that has a name, and the worker lives.

Every field of every request that the worker takes, with values of every kind that JSON has: far more than anybody
thinks of by hand. `make test` takes one in ten, `make hostile` all, and more examples of Hypothesis.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldsnap.jobs.request import NATIVE
from coldsnap.testing import Job, JobFailed
from coldsnap.vllm.sampling import INTERNAL

from .test_bombs import GRAMMARS, WAYS
from .worker import CORPUS, EMOJI_ONLY, MODEL, PATIENCE, Worker, text, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

WHOLE = bool(os.environ.get("HOSTILE"))
EVERY = 1 if WHOLE else 10
"""Which jobs of the corpus are run: every first, every tenth."""
EXAMPLES = 1000 if WHOLE else 50
AT_ONCE = 48

HI = [user("hi")]
VALUES: dict[str, Any] = {
    "null": None, "true": True, "false": False, "0": 0, "-1": -1, "7": 7, "2^31": 2**31, "2^63": 2**63,
    "2^64": 2**64, "-2^63-1": -(2**63) - 1, "0.5": 0.5, "1e308": 1e308, "-1e-320": -1e-320, "empty text": "",
    "text": "x", "long text": "x" * 100_000, "null character": "\0", "surrogate": "\ud800", "direction": "\u202e\u2066",
    "template": "{{ 7 * 7 }}{% raw %}", "path": "../../etc/passwd", "command": "$(id);`id`", "special": "<|im_end|>",
    "empty list": [], "list of nulls": [None] * 5, "list of lists": [[], [[]]], "long list": [0] * 10_000,
    "list of texts": ["a", ""], "list of objects": [{}], "empty object": {}, "object": {"a": 1}, "empty key": {"": {}},
    "prototype": {"__proto__": {"a": 1}, "constructor": {"prototype": {}}}, "wide": {f"k{i}": i for i in range(1000)},
    "deep": json.loads("[" * 60 + "]" * 60), "too deep": json.loads('{"a":' * 150 + "1" + "}" * 150),
}  # fmt: skip
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    # Route -> vLLM's model of its request, and a request that is right.
    "/v1/chat/completions": (
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest",
        {"messages": HI, "max_tokens": 2},
    ),
    "/v1/completions": (
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest",
        {"prompt": "hi", "max_tokens": 2},
    ),
    "/v1/responses": (
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest",
        {"input": "hi", "max_output_tokens": 2},
    ),
    "/v1/messages": (
        "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest",
        {"model": MODEL, "messages": HI, "max_tokens": 2},
    ),
    "/tokenize": ("vllm.entrypoints.serve.tokenize.protocol:TokenizeChatRequest", {"messages": HI}),
    "/detokenize": ("vllm.entrypoints.serve.tokenize.protocol:DetokenizeRequest", {"tokens": [40]}),
}


def fields(model: str) -> list[str]:
    module, _, name = model.partition(":")
    return sorted(getattr(importlib.import_module(module), name).model_fields)


def sampling_fields() -> list[str]:
    names: list[str] = importlib.import_module("vllm.sampling_params").SamplingParams.__struct_fields__
    return sorted(name for name in names if not name.startswith("_") and name not in INTERNAL)


def systematic() -> Iterator[tuple[str, Any]]:
    """Yield each field with each value, in a job that is right otherwise, and what it is called."""
    for kind, value in VALUES.items():
        yield f"input {kind}", value
        for name in NATIVE:
            yield f"native {name} {kind}", {"prompt": "hi", "sampling_params": {"max_tokens": 2}, name: value}
        for name in sampling_fields():
            yield f"sampling {name} {kind}", {"prompt": "hi", "sampling_params": {"max_tokens": 2, name: value}}
        for name in ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"):
            message = {"role": "user", "content": "hi", name: value}
            yield f"message {name} {kind}", {"messages": [message], "sampling_params": {"max_tokens": 2}}
        for name in ("route", "method", "body"):
            yield (
                f"generic {name} {kind}",
                {"route": "/tokenize", "method": "POST", "body": {"prompt": "hi"}, name: value},
            )
        for name in ("openai_route", "openai_input"):
            yield f"openai {name} {kind}", {"openai_route": "/v1/models", "openai_input": {}, name: value}
        for name in ("regex", "json", "choice", "grammar", "json_object", "structural_tag", "whitespace_pattern"):
            constraint = {"regex": "a", name: value} if name == "whitespace_pattern" else {name: value}
            sampling = {"max_tokens": 2, "structured_outputs": constraint}
            yield f"constraint {name} {kind}", {"prompt": "hi", "sampling_params": sampling}
        for route, (model, body) in ROUTES.items():
            for name in fields(model):
                job = {"openai_route": route, "openai_input": body | {name: value}}
                yield f"{route} {name} {kind}", job


def thought_up() -> Iterator[tuple[str, Any]]:
    """Yield jobs that somebody has thought of: nested places, and values that only make sense there."""
    chat = ROUTES["/v1/chat/completions"][1]
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": function}
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    bodies: dict[str, dict[str, Any]] = {
        "remote image": {"messages": [{"role": "user", "content": [image]}]},
        "local file": {
            "messages": [{"role": "user", "content": [{**image, "image_url": {"url": "file:///etc/passwd"}}]}]
        },
        "audio": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]},
        "adapter by path": {"model": "../../adapters/x"},
        "template of its own": {"chat_template": "{{ cycler.__init__.__globals__ }}"},
        "template in its arguments": {"chat_template_kwargs": {"chat_template": "{{ 1 }}", "tokenize": False}},
        "format of none": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        "format of a type that is none": {"response_format": {"type": "xml"}},
        "schema with a remote reference": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://x/y"}}}
        },
        "schema without end": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
            }
        },
        "tool without a name": {"tools": [{"type": "function", "function": {}}]},
        "tool twice": {"tools": [tool, tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool that is not there": {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "choice without tools": {"tool_choice": "required"},
        "tools of 2,000": {"tools": [tool] * 2000},
        "answers to no call": {"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]},
        "calls that are no JSON": {
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}],
                },
            ]
        },
        "bias of everything": {"logit_bias": {str(token): 100 for token in range(1278)}},
        "bias that is no number": {"logit_bias": {"1": "x"}},
        "stop of 10,000": {"stop": ["x"] * 10_000},
        "bad words": {"bad_words": ["", " ", "x" * 10_000]},
        "processor": {"logits_processors": ["os.system"]},
        "beam search": {"use_beam_search": True, "n": 500},
        "prompt as embeddings": {"prompt_embeds": "AAAA"},
        "rank": {"data_parallel_rank": 99},
        "an empty list for an object": {"structured_outputs": []},
        "options of a stream without one": {"stream_options": {"include_usage": True}},
        "options that are none": {
            "stream": True,
            "stream_options": {"include_usage": "x", "continuous_usage_stats": 5},
        },
        "echo and log probabilities": {"echo": True, "logprobs": True, "top_logprobs": 10**9},
        "two prompts": {"prompt": "x"},
        "priority": {"priority": -(2**31)},
        "items that are none": {"input": [0] * 10_000},
        "id of its own": {"request_id": "x" * 100_000},
        "salt": {"cache_salt": ""},
    }
    for stream in (False, True):
        for name, more in bodies.items():
            yield (
                f"chat {name}",
                {"openai_route": "/v1/chat/completions", "openai_input": chat | {"stream": stream} | more},
            )
        for name, more in bodies.items():
            yield (
                f"responses {name}",
                {"openai_route": "/v1/responses", "openai_input": {"input": "hi", "stream": stream} | more},
            )
        for name, more in bodies.items():
            completion = {"prompt": "hi", "max_tokens": 2, "stream": stream} | more
            yield f"completion {name}", {"openai_route": "/v1/completions", "openai_input": completion}
    for name, query in {"page": "?a=b", "long": "?" + "x" * 100_000, "broken": "?%", "line": "?a\r\nX: 1"}.items():
        yield f"query {name}", {"openai_route": f"/v1/models{query}", "openai_input": {}}
    for state in ("", "resp_x", "x" * 10_000, "resp_%00"):
        yield f"response {state:.9}", {"openai_route": f"/v1/responses/{state}", "openai_input": {}}
        yield f"cancel {state:.9}", {"route": f"/v1/responses/{state}/cancel", "method": "POST"}


CORPUS_OF_JOBS = 2000
"""At least so many."""
FINE = {400, 403, 404, 405, 409, 422}


@dataclasses.dataclass(slots=True)
class Outcome:
    name: str
    seconds: float
    error: dict[str, Any] | None


def wrong(outcome: Outcome, job: Job) -> str | None:
    """Return what is wrong with how a hostile job ended, if anything."""
    error = outcome.error
    if error is None:
        broken = [chunk for chunk in job.chunks if isinstance(chunk, str) and '"code":500' in chunk.replace(" ", "")]
        return f"an internal error amid a stream: {broken[0]:.300}" if broken else None
    if not error.get("message") or len(error["message"]) > 3000:
        return f"a message of {len(error.get('message') or '')} characters"
    return None if error.get("code") in FINE else f"{error}"[:400]


async def run(worker: Worker, name: str, job_input: Any) -> tuple[Outcome, Job]:
    job = worker.plane.submit(job_input)
    error = None
    try:
        await job.result(PATIENCE)
    except JobFailed as failure:
        error = json.loads(failure.error)["error"]
    assert job.timestamps.taken is not None
    assert job.timestamps.done is not None
    return Outcome(name, job.timestamps.done - job.timestamps.taken, error), job


async def test_every_field_with_every_kind_of_value_ends_with_an_answer_or_a_named_error(shared_worker: Worker) -> None:
    jobs = [*systematic(), *thought_up()]
    assert len(jobs) >= CORPUS_OF_JOBS
    jobs = jobs[::EVERY]
    waiting = iter(jobs)
    outcomes: list[Outcome] = []
    failures: list[str] = []

    async def some() -> None:
        for name, job_input in waiting:
            try:
                outcome, job = await run(shared_worker, name, job_input)
            except TimeoutError:
                failures.append(f"{name}: did not end within {PATIENCE:g} s")
                continue
            outcomes.append(outcome)
            if problem := wrong(outcome, job):
                failures.append(f"{name}: {problem}")
            del shared_worker.plane.jobs[job.id]  # its answer may be large, and there are thousands

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    refused = [outcome.seconds for outcome in outcomes if outcome.error is not None]
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(  # noqa: T201 -- what `make hostile` is for
        f"\n{len(jobs)} hostile jobs: {len(refused)} refused, median {statistics.median(refused):.3f} s, longest "
        f"{max(refused):.3f} s; slowest of all {slowest.seconds:.2f} s ({slowest.name})"
    )
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    assert "not metered" not in shared_worker.stderr
    assert shared_worker.process.returncode is None
    assert text(await shared_worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]


LARGEST: dict[str, Any] = {
    "a prompt of 10 MB": {"prompt": "cold start 日本 " * 550_000},
    "a prompt of tokens": {"openai_route": "/v1/completions", "openai_input": {"prompt": [1000] * 1_600_000}},
    "100,000 messages": {"messages": HI * 300_000},
    "wide arguments": {"messages": HI, "chat_template_kwargs": {f"k{i}": [{}] for i in range(600_000)}},
    "a text to tokenize": {"route": "/tokenize", "body": {"prompt": "cold start " * 90_000}},
    "a text without spaces to tokenize": {"route": "/tokenize", "body": {"prompt": "x" * 990_000}},
    "tokens to detokenize": {"route": "/detokenize", "body": {"tokens": [40] * 300_000}},
}
PEAK = 1 << 30
"""Bytes that one job may take on top, as SECURITY.md says."""


async def test_the_largest_jobs_take_no_more_memory_than_is_stated(shared_worker: Worker) -> None:
    proc = Path(f"/proc/{shared_worker.process.pid}")

    def now(name: str) -> int:
        return int((proc / "status").read_text().partition(f"{name}:")[2].split()[0]) << 10

    def begin() -> None:
        (proc / "clear_refs").write_text("5")  # the peak begins here

    for name, job_input in LARGEST.items():
        begin()
        before = now("VmRSS")
        await run(shared_worker, name, job_input)
        peak = now("VmHWM") - before
        print(f"{name}: {peak >> 20} MiB on top")  # noqa: T201 -- what `make hostile` is for
        assert peak < PEAK, name


SECONDS = 2.0
"""Of the front end's processor that a refusal may take."""


async def ttft(worker: Worker) -> float:
    """Return the median of plain jobs, one after the other."""
    seconds = []
    for _ in range(15):
        job = worker.ask(EMOJI_ONLY)
        await job.result(PATIENCE)
        seconds.append(job.timestamps.chunks[0] - job.timestamps.submitted)
    return statistics.median(seconds)


@pytest.mark.skipif(not WHOLE, reason="measured by `make hostile`")
async def test_a_bomb_takes_little_of_the_front_end_and_nothing_of_the_next_jobs(worker: Worker) -> None:
    native = {
        name: {"prompt": "hi", "sampling_params": {"structured_outputs": bomb}} for name, (bomb, _) in GRAMMARS.items()
    }
    routes = {
        f"{name}, over OpenAI": {"openai_route": f"/v1/{route}", "openai_input": body}
        for name, (route, body) in WAYS.items()
    }
    rows = [
        "| bomb | ended after, s | front end's processor, s | TTFT before, ms | after, ms |",
        "|---|---|---|---|---|",
    ]
    too_long: list[str] = []
    await ttft(worker)
    for name, job_input in (native | routes | LARGEST).items():
        before, used = await ttft(worker), worker.front_cpu_seconds()
        outcome, _ = await run(worker, name, job_input)
        used = worker.front_cpu_seconds() - used
        after = await ttft(worker)
        rows.append(f"| {name} | {outcome.seconds:.2f} | {used:.2f} | {1000 * before:.0f} | {1000 * after:.0f} |")
        too_long += [name] if outcome.error and used > SECONDS else []
    print("", *rows, sep="\n")  # noqa: T201 -- what `make hostile` is for
    assert too_long == []


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("route", ROUTES)
@settings(
    max_examples=EXAMPLES, derandomize=not WHOLE, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
async def test_whatever_a_request_holds_its_error_has_a_name(
    shared_worker: Worker, route: str, data: st.DataObject
) -> None:
    model, body = ROUTES[route]
    more = data.draw(st.dictionaries(st.sampled_from(fields(model)), anything, min_size=1, max_size=4))
    outcome, job = await run(shared_worker, route, {"openai_route": route, "openai_input": body | more})
    assert wrong(outcome, job) is None, more


@settings(
    max_examples=EXAMPLES, derandomize=not WHOLE, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
async def test_whatever_a_native_job_holds_its_error_has_a_name(shared_worker: Worker, data: st.DataObject) -> None:
    sampling = data.draw(st.dictionaries(st.sampled_from(sampling_fields()), anything, max_size=4))
    more = data.draw(st.dictionaries(st.sampled_from(NATIVE), anything, max_size=2))
    job_input = {"prompt": "hi", "sampling_params": {"max_tokens": 2} | sampling} | more
    outcome, job = await run(shared_worker, "native", job_input)
    assert wrong(outcome, job) is None, job_input
