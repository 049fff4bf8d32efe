"""Steps of gpu_acceptance.py that serve: answers, load, cost, ends, the same tokens, sleep.

A claim of speed is judged on a GPU with the 8b shape only; elsewhere the step proves this program.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import base  # noqa: E402
from contenders import NATIVE, OPENAI, Contender, Ring, Worker, quantile  # noqa: E402
from gpu_bench import Bench  # noqa: E402
from live_worker import LiveWorker, PowerLog, has_context, text, used_bytes  # noqa: E402

from coldsnap.processes import children  # noqa: E402
from coldsnap.testing import JobFailed, JobState  # noqa: E402

_ANSWERS = {
    pair["question"]: pair["answer"]
    for pair in map(json.loads, (ROOT / "builder" / "demo_corpus.jsonl").read_text("utf-8").splitlines())
}
_QUESTIONS = list(_ANSWERS)[:8]


async def demo(bench: Bench) -> None:
    """Answer the demo's questions, with CUDA begun in the engine's process only."""
    home = bench.home("demo")
    async with LiveWorker(home, "demo", **bench.environ(home)) as worker:
        answers = {each: text(await worker.ask(each, temperature=0.0).result(60)) for each in _QUESTIONS}
        right = sum(answers[each] == _ANSWERS[each] for each in _QUESTIONS)
        bench.must("the demo's answers are those it was taught", right, f"{len(answers)}", holds=right == len(answers))
        parent, below = has_context(worker.pid), [has_context(pid) for pid in children(worker.pid)]
        bench.must("the worker's own process has no CUDA context", parent, "False", holds=not parent)
        if bench.gpu:
            bench.must("the engine's process has one", below, "one True or more", holds=any(below))
        (record,) = worker.records("cold_start")
        bench.fact(record=record)
        if (method := record.get("start_method")) is not None:
            bench.must("the engine was forked", method, "fork", holds=method == "fork")


async def load(bench: Bench) -> None:
    """Load the bare engine, the worker, natively and by OpenAI, and vLLM's own server, in turn."""
    home = bench.home("cold")
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 8192 if bench.gpu else 2048}
    room = {"gpu_memory_utilization": 0.28} if bench.gpu else {}
    model = bench.model(kv_cache_memory_bytes=bench.kv_bytes, **limits, **room)
    os.environ |= base(home) | bench.environ(home, model, VLLM_LOGGING_LEVEL="WARNING")
    levels = [1, 32, 128, 256] if bench.gpu else [1, 8]
    samples: dict[int, dict[str, list[Any]]] = {level: {} for level in levels}
    async with Ring() as ring:
        bare = await ring.bare()
        plane = await ring.plane()
        pid = await ring.worker(plane)
        native, by_openai = Worker("native", plane, pid, NATIVE), Worker("OpenAI", plane, pid, OPENAI)
        contenders: list[Contender] = [bare, native, by_openai, await ring.server()]
        for contender in contenders:
            await contender.run(None, levels[-1], levels[-1])
        for _ in range(bench.few):
            for level in levels:
                for contender in contenders:
                    sample = await contender.measured(level, min(max(16, 8 * level), 768))
                    samples[level].setdefault(contender.name, []).append(sample)
                bench.fact(**{f"streams_{level}": {name: _figures(runs) for name, runs in samples[level].items()}})
    for level, runs in samples.items():
        pairs = zip(runs["native"], runs[bare.name], strict=True)
        ratio = statistics.median(ours.tokens_per_second / engine.tokens_per_second for ours, engine in pairs)
        says = f"{level} streams: native tokens a second, of the bare engine's"
        bench.must(says, round(ratio, 3), "0.97 or more", holds=ratio >= 0.97, speed=True)
        late = 1000 * (_ttft(runs["native"]) - _ttft(runs[bare.name]))
        says = f"{level} streams: native TTFT, after the bare engine's (ms)"
        bench.must(says, round(late, 2), "5 or less", holds=late <= 5, speed=True)


def _ttft(runs: list[Any]) -> float:
    return quantile([value for run in runs for value in run.ttft], 0.5)


def _figures(runs: list[Any]) -> dict[str, float]:
    gap = quantile([value for run in runs for value in run.gap], 0.5)
    end = statistics.median(value for run in runs for value in run.e2e)
    ttft = _ttft(runs)
    return {
        "tokens_per_second": round(statistics.median(run.tokens_per_second for run in runs), 1),
        "ttft_ms": round(1000 * ttft, 2),
        "itl_ms": round(1000 * (end - ttft) / 63, 3),
        "longest_gap_ms": round(1000 * gap, 2),
    }


async def books(bench: Bench) -> None:
    """Close a worker's books after some load: shares against busy time, joules against nvidia-smi."""
    home = bench.home("cold")
    model = bench.model(kv_cache_memory_bytes=bench.kv_bytes)
    async with LiveWorker(home, "books", **bench.environ(home, model)) as worker:
        power = PowerLog() if bench.gpu else None
        for _ in range(20 if bench.gpu else 1):
            jobs = [
                worker.ask(f"{n} {'word ' * (20 * n)}", max_tokens=16 + 8 * n, n=1 + n % 3, temperature=1.0)
                for n in range(32)
            ]
            await asyncio.gather(*(job.result(120) for job in jobs))
        worker.terminate()
        code = await worker.ended(60)
        measured = power.joules() if power else None
        final = worker.records("worker")[-1]
        bench.fact(worker=final, nvidia_smi_joules=measured, exit_code=code)
        shares = sum(record["gpu_seconds"] for record in worker.records("request"))
        _equal(bench, "requests' shares, of the worker's busy GPU-seconds", shares, final["busy_gpu_seconds"])
        parts = sum(final[f"{part}_gpu_seconds"] for part in ("cold", "busy", "overhead", "idle", "drain"))
        _equal(bench, "cold, busy, overhead, idle and drain, of all GPU-seconds", parts, final["gpu_seconds"])
        measured_steps = not final["estimated"] and final["lost_steps"] == 0
        bench.must("every step was measured", final["estimated_because"], "None", holds=measured_steps)
        if measured is not None:
            ratio = final["joules"] / measured if final["joules"] else 0.0
            bench.must("joules, of nvidia-smi's", round(ratio, 3), "within 10%", holds=abs(ratio - 1) <= 0.1)


def _equal(bench: Bench, says: str, part: float, whole: float) -> None:
    ratio = part / whole if whole else 0.0
    bench.must(says, round(ratio, 5), "1, within 0.1%", holds=abs(ratio - 1) <= 0.001)


async def stops(bench: Bench) -> None:
    """Cancel a job in its prefill, drain after SIGTERM, kill the engine's core: exit codes, and free memory."""
    home = bench.home("cold")
    model, before = bench.model(kv_cache_memory_bytes=bench.kv_bytes), used_bytes()
    environ = bench.environ(home, model)
    async with LiveWorker(home, "sigterm", **environ) as worker:
        asked = worker.plane.submit({"route": "/tokenize", "body": {"prompt": "word " * 1000}})
        (answer,) = await asked.result(60)
        words = int(1000 / answer["count"] * (30000 if bench.shape == "8b" else 3000))
        long = worker.ask("word " * words, max_tokens=64)
        await long.started(10)
        begun = time.monotonic()
        worker.plane.cancel(long.id)
        record = await worker.record(long)
        took = round(time.monotonic() - begun, 3)
        bench.fact(cancelled=record)
        bench.must("a cancelled job's record", record["error"], "cancelled", holds=record["error"] == "cancelled")
        bench.must("cancelled in prefill, the engine lets go (s)", took, "1 or less", holds=took <= 1, speed=True)
        none = record["completion_tokens"] == 0
        bench.must("it was cancelled in prefill", record["completion_tokens"], "no token", holds=none, speed=True)
        jobs = [worker.ask(f"question {n}", max_tokens=200, temperature=0.0) for n in range(8)]
        await asyncio.gather(*(job.started(10) for job in jobs))
        worker.terminate()
        code = await worker.ended(60)
        done = sum(job.state is JobState.COMPLETED for job in jobs)
        bench.must("jobs that ran at SIGTERM are completed", done, f"{len(jobs)}", holds=done == len(jobs))
        bench.must("exit code after SIGTERM", code, "0", holds=code == 0)
        await _memory_is_back(bench, "after SIGTERM", before)
    async with LiveWorker(home, "killed", **environ) as worker:
        job = worker.ask("question", max_tokens=2000, temperature=0.0)
        await anext(job.stream())  # a job of which nobody has read anything goes to another worker
        worker.kill_core()
        begun = time.monotonic()
        code = await worker.ended(60)
        bench.fact(killed_core_to_exit_seconds=round(time.monotonic() - begun, 2))
        bench.must("exit code after the core was killed", code, "1", holds=code == 1)
        try:
            await job.result(5)
            told = "completed"
        except JobFailed as error:
            told = error.error
        bench.must("its job is told why", told, "EngineDeadError", holds="EngineDeadError" in told)
        await _memory_is_back(bench, "after the core was killed", before)


async def _memory_is_back(bench: Bench, when: str, before: int) -> None:
    until = time.monotonic() + 10
    while (left := used_bytes() - before) > 64 << 20 and time.monotonic() < until:
        await asyncio.sleep(0.2)
    bench.must(f"GPU memory in use {when} (bytes)", left, "64 MiB or less", holds=left <= 64 << 20)


async def tokens(bench: Bench) -> None:
    """Ask the demo the same by either model runner, with CUDA graphs and without, and with either scheduler."""
    variants = {
        "default": {},
        "synchronous": {"ASYNC_SCHEDULING": "false"},
        "asynchronous": {"ASYNC_SCHEDULING": "true"},
    }
    if bench.gpu:
        graphs = {"ENFORCE_EAGER": "false"}
        variants |= {f"V{n} runner, graphs": graphs | {"VLLM_USE_V2_MODEL_RUNNER": str(n - 1)} for n in (1, 2)}
        variants["V2 runner, eager"] = {"ENFORCE_EAGER": "true", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    home = bench.home("tokens")
    for name, more in variants.items():
        says, goal = f"{name}: greedy answers as taught", f"{len(_QUESTIONS)}"
        try:
            async with LiveWorker(home, "tokens", **bench.environ(home), **more) as worker:
                answers = [text(await worker.ask(each, temperature=0.0).result(60)) for each in _QUESTIONS]
        except RuntimeError as error:  # it did not boot; the other variants are asked all the same
            bench.must(says, str(error), goal, holds=False)
            continue
        same = sum(answer == _ANSWERS[each] for answer, each in zip(answers, _QUESTIONS, strict=True))
        bench.must(says, same, goal, holds=same == len(answers))


async def sleep(bench: Bench) -> None:
    """Put the engine to sleep at level 1 and 2 and wake it: seconds, memory, the same tokens."""
    home, model = bench.home("cold"), bench.model(kv_cache_memory_bytes=bench.kv_bytes)
    os.environ |= base(home) | bench.environ(home, model)
    from bare_engine import start
    from vllm.sampling_params import SamplingParams

    try:
        llm = start(model, enable_sleep_mode=True)
    except (ValueError, RuntimeError) as error:  # vLLM's CPU platform has none
        bench.fact(refused=str(error).splitlines()[-1])
        bench.must("sleep mode is refused only without a GPU", "refused", "served on a GPU", holds=not bench.gpu)
        return
    number = 0

    async def answer() -> list[int]:
        nonlocal number
        number += 1
        said: list[int] = []
        async for output in llm.generate("word", SamplingParams(max_tokens=16, temperature=0.0), f"sleep-{number}"):
            said = list(output.outputs[0].token_ids)
        return said

    async def timed(name: str, work: Awaitable[object]) -> None:
        begun = time.monotonic()
        await work
        bench.fact(**{f"{name}_seconds": round(time.monotonic() - begun, 3), f"{name}_bytes": used_bytes()})

    try:
        before = await answer()
        await timed("level_1_sleep", llm.sleep(1))
        await timed("level_1_wake", llm.wake_up())
        after = await answer()
        bench.must("level 1: the same tokens after it", after == before, "True", holds=after == before)
        await timed("level_2_sleep", llm.sleep(2))
        await timed("level_2_wake_weights", llm.wake_up(["weights"]))
        await timed("level_2_reload", llm.collective_rpc("reload_weights"))
        await timed("level_2_wake_kv", llm.wake_up(["kv_cache"]))
        await llm.reset_prefix_cache()
        after = await answer()
        bench.must("level 2: the same tokens after it", after == before, "True", holds=after == before)
    finally:
        llm.shutdown()
