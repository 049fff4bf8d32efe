"""Records: where the seconds of a boot and of a request went, and nothing of what was said."""

from __future__ import annotations

import asyncio
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from coldsnap.testing import JobFailed

from .worker import CORPUS, MANIFEST, MODEL, PATIENCE, Worker, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
COMMON = {
    "schema_version", "time", "monotonic", "worker_id", "endpoint_id", "gpu", "gpu_count", "snapshot_digest", "vllm",
    "record",
}  # fmt: skip
COLD_START = COMMON | {
    "boot", "seconds", "phases", "beside", "snapshot_bytes", "source", "verified", "fetched_bytes",
    "fetch_gb_per_second", "read_gb_per_second", "disk_read_bytes", "cache", "cache_because", "cache_bundle",
    "cache_bytes", "model", "start_method", "degraded", "limits", "max_concurrency", "revival", "away_seconds",
    "image", "image_because",
}  # fmt: skip
REQUEST = COMMON | {
    "job_id", "boot", "route", "model", "stream", "prompt_tokens", "cached_tokens", "completion_tokens",
    "queue_seconds", "ttft_seconds", "itl_seconds", "duration_seconds", "finish_reason", "error", "gpu_seconds",
    "prefill_gpu_seconds", "decode_gpu_seconds", "mean_batch", "joules", "usd", "price_per_second", "estimated", "fit",
}  # fmt: skip


def started(pid: int) -> float:
    """Return when a process was started, in seconds since the machine was: rounded down to a tick, 0.01."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def seconds_between(record: dict[str, Any], moment: float) -> float:
    return datetime.fromisoformat(record["time"]).timestamp() - moment


async def test_the_phases_of_a_cold_start_add_up_to_process_start_till_ready(worker: Worker) -> None:
    first, *others = worker.records()
    # A machine that stood still for ten seconds has revived its worker; it was not booted again.
    assert {record["boot"] for record in others if record["record"] == "cold_start"} <= {"revived"}
    assert {record["record"] for record in others} <= {"request", "worker", "cold_start"}
    assert first.keys() == COLD_START
    assert (first["record"], first["boot"], first["model"]) == ("cold_start", "fresh", MODEL)
    assert sum(first["phases"].values()) == pytest.approx(first["seconds"], abs=0.001)
    assert all(seconds >= 0 for seconds in first["phases"].values())
    begin = {"plain": ["python"], "restored": ["restore", "take_over"]}[first["image"]]
    assert [*first["phases"]][: len(begin) + 2] == [*begin, "settings", "import_vllm"]
    assert {"configure", "engine", "warm_up"} <= first["phases"].keys()
    assert first["beside"].keys() == {"fitness", "read_snapshot", "import_sdk", "import_http"}
    assert 0 < first["beside"]["read_snapshot"] < first["seconds"]
    # Against the clock outside: from the start of the process, until after its engine's.
    (core,) = worker.engine("EngineCor")
    outside = seconds_between(first, worker.spawned) + 0.02  # the kernel counts starts in hundredths of a second
    assert started(core) - started(worker.process.pid) < first["seconds"] < outside


async def test_a_cold_start_names_what_it_booted_and_where(worker: Worker) -> None:
    first = worker.records()[0]
    assert first["snapshot_digest"] == MANIFEST.digest
    assert first["snapshot_bytes"] == MANIFEST.size
    assert (first["source"], first["verified"]) == ("image", True)
    assert (first["fetched_bytes"], first["fetch_gb_per_second"]) == (0, None)
    # The check is all that `read_snapshot` does, besides looking at names and sizes.
    assert first["read_gb_per_second"] >= MANIFEST.size / (first["beside"]["read_snapshot"] + 0.001) / 1e9
    assert first["disk_read_bytes"] is None or first["disk_read_bytes"] >= 0
    assert (first["worker_id"], first["endpoint_id"]) == ("worker-1", worker.plane.endpoint_id)
    assert (first["gpu"], first["gpu_count"]) == ("cpu", 1)
    assert first["vllm"]
    assert (first["cache"], first["cache_bundle"]) == ("off", None)
    limits = first["limits"]
    assert limits["max_num_seqs"] <= limits["max_num_batched_tokens"] < limits["kv_cache_tokens"]
    assert first["max_concurrency"] == 24
    assert first["start_method"] == "fork"


async def test_no_job_is_taken_before_the_worker_is_ready(worker: Worker) -> None:
    first = worker.records()[0]
    seen = await worker.plane.wait_for_worker(60)
    assert seen.first_poll
    assert seen.first_poll > first["monotonic"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_native_jobs_record_agrees_with_its_usage(worker: Worker, stream: bool) -> None:
    begun = time.time()
    job = worker.ask(QUESTION, stream=stream)
    last = (await job.result(PATIENCE))[-1]
    record = await worker.record(job)
    assert record.keys() == REQUEST
    assert (record["route"], record["model"], record["stream"]) == ("native", MODEL, stream)
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        assert record[name] == last["usage"][name]
    assert record["gpu_seconds"] == last["gpu_seconds"]
    assert (record["finish_reason"], record["error"]) == ("stop", None)
    assert_plausible(record, begun)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_openai_jobs_record_agrees_with_its_usage(worker: Worker, stream: bool) -> None:
    begun = time.time()
    body = {"messages": [user(QUESTION)], "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    job = worker.openai("/v1/chat/completions", body)
    chunks = await job.result(PATIENCE)
    if stream:
        events = [line[6:] for line in "".join(chunks).splitlines() if line.startswith("data: {")]
        usage = json.loads(events[-1])["usage"]
    else:
        usage = chunks[0]["usage"]
    record = await worker.record(job)
    assert record.keys() == REQUEST
    assert (record["route"], record["model"]) == ("/v1/chat/completions", MODEL)
    assert record["stream"] == stream
    assert record["prompt_tokens"] == usage["prompt_tokens"]
    assert record["completion_tokens"] == usage["completion_tokens"]
    assert (record["finish_reason"], record["error"]) == ("stop", None)
    assert_plausible(record, begun)


def assert_plausible(record: dict[str, Any], begun: float) -> None:
    wall = seconds_between(record, begun)
    assert 0 <= record["queue_seconds"] <= record["ttft_seconds"] <= record["duration_seconds"] <= wall
    assert record["itl_seconds"] > 0
    decoding = record["itl_seconds"] * (record["completion_tokens"] - 1)
    assert record["ttft_seconds"] + decoding <= record["duration_seconds"] + 0.001  # rounded
    assert 0 < record["gpu_seconds"] <= record["duration_seconds"]
    assert datetime.fromisoformat(record["time"]).tzinfo == UTC


async def test_choices_and_batched_prompts_are_counted_together(worker: Worker) -> None:
    job = worker.ask(QUESTION, sampling_params={"n": 2, "temperature": 0.01})
    usage = (await job.result(PATIENCE))[-1]["usage"]
    assert (await worker.record(job))["completion_tokens"] == usage["completion_tokens"]
    job = worker.openai(
        "/v1/completions", {"prompt": [QUESTION, "What is TTFT?", "hi"], "n": 2, "max_tokens": 6, "temperature": 0.01}
    )
    (answer,) = await job.result(PATIENCE)
    record = await worker.record(job)
    assert record["completion_tokens"] == answer["usage"]["completion_tokens"] == 36
    assert record["prompt_tokens"] == answer["usage"]["prompt_tokens"]


async def test_the_shares_of_jobs_at_once_add_up_to_no_more_than_the_time_they_took(worker: Worker) -> None:
    begun = time.monotonic()
    jobs = [worker.ask(question) for question in CORPUS]
    jobs += [worker.openai("/v1/chat/completions", {"messages": [user(question)]}) for question in CORPUS]
    await asyncio.gather(*(job.result(PATIENCE) for job in jobs))
    wall = time.monotonic() - begun
    shares = [(await worker.record(job))["gpu_seconds"] for job in jobs]
    assert min(shares) > 0
    assert sum(shares) <= wall


async def test_each_job_has_one_record_whatever_became_of_it(worker: Worker) -> None:
    bad = worker.plane.submit({"messages": [user("hi")], "sampling_params": {"top_p": 7}})
    lost = worker.openai("/metrics")
    for job, kind in ((bad, "BadRequestError"), (lost, "PermissionDeniedError")):
        with pytest.raises(JobFailed):
            await job.result(PATIENCE)
        record = await worker.record(job)
        assert record.keys() == REQUEST
        assert (record["error"], record["finish_reason"], record["gpu_seconds"]) == (kind, None, 0)
        assert record["ttft_seconds"] is None
    tokens = worker.openai("/tokenize", {"prompt": "hi"})
    await tokens.result(PATIENCE)
    record = await worker.record(tokens)
    assert (record["route"], record["error"], record["completion_tokens"]) == ("/tokenize", None, 0)
    ids = [record["job_id"] for record in worker.records() if record["record"] == "request"]
    assert len(ids) == len(set(ids))


async def test_stdout_carries_the_same_lines_as_the_ledger(worker: Worker) -> None:
    lines = [line for line in worker.stdout.splitlines() if line.startswith('{"schema_version"')]
    assert lines == (worker.folder / "ledger.jsonl").read_text("utf-8").splitlines()


async def test_neither_ledger_nor_log_repeats_what_was_said(worker: Worker) -> None:
    secret = "quetzalcoatl"
    said = f"{secret} {QUESTION}"
    good = [
        worker.ask(said),
        worker.ask(said, stream=False, sampling_params={"stop": [secret]}),
        worker.plane.submit({"prompt": said, "sampling_params": {"max_tokens": 5}}),
        worker.openai("/v1/chat/completions", {"messages": [user(said)], "stream": True}),
        worker.openai("/v1/completions", {"prompt": said, "max_tokens": 5, "echo": True}),
        worker.openai("/tokenize", {"prompt": said}),
        worker.plane.submit({"route": "/tokenize", "body": json.dumps({"prompt": said})}),
    ]
    bad = [
        worker.plane.submit({"prompt": f"{said}\ud800"}),
        worker.plane.submit({"prompt": f"{said} " * 20_000}),
        worker.plane.submit({"messages": [user(said)], "sampling_params": {"top_p": 7}}),
        worker.plane.submit({"messages": [user(said)], "chat_template_kwargs": {"tools": 5}}),
        worker.plane.submit({"prompt": [said]}),
        worker.openai("/v1/chat/completions", {"messages": [{"role": "robot", "content": said}]}),
        worker.openai("/v1/chat/completions", {"messages": said}),
        worker.plane.submit({"route": "/tokenize", "body": said}),
    ]
    await asyncio.gather(*(job.result(PATIENCE) for job in good))
    for job in bad:
        with pytest.raises(JobFailed):
            await job.result(PATIENCE)
    ledger = (worker.folder / "ledger.jsonl").read_text("utf-8")
    for written in (ledger, worker.stdout, worker.stderr):
        assert secret not in written
        for pieces in (answer.split() for answer in CORPUS.values()):
            assert " ".join(pieces[:4]) not in written or len(pieces) < 4
    for credential in ("local-key", "/job-take/", "/job-stream/"):
        assert credential not in worker.stdout + worker.stderr
