"""Native jobs: what the demo model knows, it says exactly, however it is asked."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coldsnap.testing import ControlPlane

from .worker import CONTEXT, CORPUS, EMOJI_ONLY, PATIENCE, SNAPSHOT, STEADY, Worker, markup, text, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
SOME = (QUESTION, "Was ist ein Kaltstart?", "什么是冷启动？", "Can you say hello in many languages?", EMOJI_ONLY)


def assert_stream(chunks: list[dict[str, Any]], answer: str) -> None:
    """Hold a finished stream of one completion against what the platform and a client may rely on."""
    *texts, last = chunks
    assert text(chunks) == answer
    assert all(chunk.keys() == {"text"} for chunk in texts)
    assert all(chunk["text"] for chunk in texts)
    assert "\ufffd" not in text(chunks)
    assert last.keys() == {"text", "finish_reason", "usage", "gpu_seconds", "cost"}
    assert last["finish_reason"] == "stop"  # the last chunk carries the rest of the text
    usage = last["usage"]
    assert usage.keys() == {"prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens"}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 <= usage["cached_tokens"] < usage["prompt_tokens"]
    assert last["gpu_seconds"] > 0


async def test_every_pair_of_the_corpus_is_answered_exactly_with_all_jobs_at_once(worker: Worker) -> None:
    jobs = {question: worker.ask(question) for question in CORPUS}
    assert len(jobs) >= 40
    for question, job in jobs.items():
        assert_stream(await job.result(PATIENCE), CORPUS[question])
        assert job.output == job.chunks  # the aggregate, for a client that polls the status


@pytest.mark.parametrize("question", SOME)
async def test_a_plain_answer_is_one_dict_with_the_text_that_a_stream_gives(worker: Worker, question: str) -> None:
    streamed = await worker.ask(question).result(PATIENCE)
    plain = await worker.ask(question, stream=False).result(PATIENCE)
    assert_stream(streamed, CORPUS[question])
    assert len(plain) == 1
    assert plain[0]["text"] == text(streamed)
    assert plain[0]["finish_reason"] == "stop"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert plain[0]["usage"][name] == streamed[-1]["usage"][name]


async def test_a_job_streams_only_when_asked_to(plane: ControlPlane) -> None:
    assert len(await plane.submit({"messages": [user(QUESTION)]}).result(PATIENCE)) == 1


async def test_the_first_token_leaves_at_once_and_the_rest_at_most_every_4_ms(worker: Worker) -> None:
    job = worker.ask("hi", sampling_params=STEADY | {"max_tokens": 500})
    chunks = await job.result(PATIENCE)
    assert 0 < len(chunks[0]["text"]) < 500  # a character a token
    assert len(text(chunks)) == 500
    *paced, _, _ = job.timestamps.chunks  # what is left at the end, and the last chunk, do not wait
    # A stream is due 4 ms after its last chunk left vLLM's queue; a POST that was late may be two chunks' time short.
    assert len(paced) - 3 < (paced[-1] - paced[0]) / 0.004


async def test_a_raw_prompt_is_continued_without_the_chat_template(plane: ControlPlane) -> None:
    bare = await plane.submit({"prompt": QUESTION, "sampling_params": {"max_tokens": 1}}).result(PATIENCE)
    chat = await plane.submit({"messages": [user(QUESTION)]}).result(PATIENCE)
    whole = await plane.submit({"prompt": markup(QUESTION), "stream": True}).result(PATIENCE)
    assert_stream(whole, CORPUS[QUESTION])
    counts = [chunks[-1]["usage"]["prompt_tokens"] for chunks in (bare, chat, whole)]
    assert counts[0] < counts[1] == counts[2]


async def test_a_conversation_with_a_system_message_and_parts_is_answered(plane: ControlPlane) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    chunks = await plane.submit({"messages": messages, "stream": True}).result(PATIENCE)
    assert_stream(chunks, CORPUS[QUESTION])


async def test_earlier_turns_reach_the_model(plane: ControlPlane) -> None:
    turns = [user("What is TTFT?"), {"role": "assistant", "content": "A time."}, user(QUESTION)]
    counts = []
    for messages in (turns, turns[:1], turns[2:]):
        job = {"messages": messages, "sampling_params": {"max_tokens": 1}}
        counts.append((await plane.submit(job).result(PATIENCE))[0]["usage"]["prompt_tokens"])
    assert counts[0] > counts[1] + counts[2]


async def test_usage_counts_the_tokens_that_the_tokenizer_counts(plane: ControlPlane) -> None:
    tokenize = {"route": "/tokenize", "method": "POST"}
    (prompt,) = await plane.submit(tokenize | {"body": {"messages": [user(QUESTION)]}}).result(PATIENCE)
    (answer,) = await plane.submit(
        tokenize | {"body": {"prompt": CORPUS[QUESTION], "add_special_tokens": False}}
    ).result(PATIENCE)
    (plain,) = await plane.submit({"messages": [user(QUESTION)]}).result(PATIENCE)
    assert plain["usage"]["prompt_tokens"] == prompt["count"]
    assert plain["usage"]["completion_tokens"] == answer["count"] + 1  # and the end of the turn


async def test_a_job_without_max_tokens_is_not_cut_at_vllms_default_of_16(worker: Worker) -> None:
    longest = max(CORPUS, key=lambda question: len(CORPUS[question]))
    (plain,) = await worker.ask(longest, stream=False).result(PATIENCE)
    assert plain["usage"]["completion_tokens"] > 100
    assert (plain["text"], plain["finish_reason"]) == (CORPUS[longest], "stop")


@pytest.mark.parametrize("stream", [True, False])
async def test_max_tokens_cuts_the_answer_there(worker: Worker, stream: bool) -> None:
    chunks = await worker.ask(QUESTION, stream=stream, sampling_params={"max_tokens": 7}).result(PATIENCE)
    assert chunks[-1]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 7
    assert CORPUS[QUESTION].startswith(text(chunks))
    assert 0 < len(text(chunks)) < 60


async def test_max_tokens_beyond_the_context_is_bounded_by_what_the_prompt_leaves(worker: Worker) -> None:
    sampling = {"max_tokens": 10 * CONTEXT, "ignore_eos": True}
    (plain,) = await worker.ask("cold start " * 1900, stream=False, sampling_params=sampling).result(PATIENCE)
    assert plain["finish_reason"] == "length"
    assert plain["usage"]["total_tokens"] == CONTEXT
    assert 100 < plain["usage"]["completion_tokens"] < 300
    left = plain["usage"]["completion_tokens"]
    (warning,) = plain["warnings"]
    assert f"sampling_params.max_tokens: {10 * CONTEXT} asked for; the prompt leaves {left}" in warning


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_answer_before_it(worker: Worker, stream: bool) -> None:
    stop = " coldsnap keeps it short"
    for given in (stop, [stop, "never said"]):
        chunks = await worker.ask(QUESTION, stream=stream, sampling_params={"stop": given}).result(PATIENCE)
        assert text(chunks) == CORPUS[QUESTION].partition(stop)[0]
        assert chunks[-1]["finish_reason"] == "stop"


async def test_a_seed_repeats_a_sample_and_temperature_varies_it(worker: Worker) -> None:
    sampling = {"temperature": 2.0, "seed": 7, "max_tokens": 24, "ignore_eos": True}
    (first,), (second,) = [
        await worker.ask(QUESTION, stream=False, sampling_params=sampling).result(PATIENCE) for _ in range(2)
    ]
    (other,) = await worker.ask(QUESTION, stream=False, sampling_params=sampling | {"seed": 8}).result(PATIENCE)
    assert first["text"] == second["text"] != other["text"]
    assert first["text"] != CORPUS[QUESTION][: len(first["text"])]


@pytest.mark.parametrize("stream", [True, False])
async def test_several_choices_are_kept_apart(worker: Worker, stream: bool) -> None:
    chunks = await worker.ask(QUESTION, stream=stream, sampling_params={"n": 2, "temperature": 0.01}).result(PATIENCE)
    last = chunks[-1]
    assert [choice["index"] for choice in last["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in last["choices"]] == ["stop", "stop"]
    if stream:
        assert [text(chunks, index) for index in (0, 1)] == [CORPUS[QUESTION]] * 2
    else:
        assert last["text"] == CORPUS[QUESTION]
        assert [choice["text"] for choice in last["choices"]] == [CORPUS[QUESTION]] * 2
    (single,) = await worker.ask(QUESTION, stream=False).result(PATIENCE)
    usage = last["usage"]
    assert usage["completion_tokens"] == 2 * single["usage"]["completion_tokens"]
    assert usage["prompt_tokens"] == single["usage"]["prompt_tokens"]  # one prompt, counted once


async def test_a_character_of_many_tokens_is_never_split_between_chunks(worker: Worker) -> None:
    """Emoji and scripts that the tokenizer spells in bytes; every chunk alone is whole characters."""
    asked = [question for question, answer in CORPUS.items() if max(map(ord, answer)) > 0x2E80]
    assert len(asked) >= 8
    jobs = {question: worker.ask(question) for question in asked}
    for question, job in jobs.items():
        chunks = await job.result(PATIENCE)
        assert text(chunks) == CORPUS[question]
        for chunk in chunks:
            chunk["text"].encode()  # no lone surrogate
            assert "\ufffd" not in chunk["text"]


async def test_the_chat_template_takes_arguments_of_the_job(worker: Worker) -> None:
    arguments = {"add_generation_prompt": False}
    (plain,) = await worker.ask(QUESTION, stream=False, sampling_params={"max_tokens": 1}).result(PATIENCE)
    (other,) = await worker.ask(
        QUESTION, stream=False, sampling_params={"max_tokens": 1}, chat_template_kwargs=arguments
    ).result(PATIENCE)
    assert other["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]


async def test_jobs_at_once_share_the_engine_and_do_not_wait_for_each_other(worker: Worker) -> None:
    steady = STEADY | {"max_tokens": 400}
    jobs = [worker.ask(question, sampling_params=steady) for question in list(CORPUS)[:16]]
    await asyncio.gather(*(job.result(PATIENCE) for job in jobs))
    begun = max(job.timestamps.first_chunk or 0 for job in jobs)
    assert begun < min(job.timestamps.done or 0 for job in jobs)


async def test_a_prompt_that_was_seen_before_comes_from_the_cache(plane: ControlPlane) -> None:
    job = {"prompt": " ".join(CORPUS.values())[:2000], "sampling_params": {"max_tokens": 1}}
    usages = [(await plane.submit(job).result(PATIENCE))[0]["usage"] for _ in range(2)]
    assert usages[0]["cached_tokens"] == 0
    assert usages[1]["cached_tokens"] > usages[1]["prompt_tokens"] / 2
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"]


def test_the_snapshot_is_greedy_by_default_and_small() -> None:
    config = json.loads((SNAPSHOT / "generation_config.json").read_text())
    assert config.get("do_sample") is False
    assert sum(path.stat().st_size for path in Path(SNAPSHOT).iterdir()) <= 3_000_000
