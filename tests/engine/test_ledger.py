"""The ledger on the real engine: the books close, and what a request pays follows what it made the engine do.

One worker serves all of it and then ends; the tests look at what it left behind. Its KV cache is small enough
that requests are preempted.
"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import openai
import pytest
import pytest_asyncio

from coldsnap import cli
from coldsnap.cost.books import HEADINGS
from coldsnap.desk.report import figures, source, store
from coldsnap.testing import Job, JobFailed

from .worker import MODEL, PATIENCE, Worker, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

Record = dict[str, Any]

BLOCKS = "96"
"""Of 128 tokens each; the mix wants about twice as many."""
LONG, SHORT = 400, 16
ALONE = (LONG, 64)


@dataclass
class Run:
    """What the worker left behind, and the clock outside."""

    records: list[Record]
    lived: float
    """Seconds from just before the process was started until it had ended."""
    jobs: dict[str, list[str]]
    ledger: Path

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["record"] == kind]

    def named(self, name: str) -> list[Record]:
        """Return the records of the jobs that were submitted under a name."""
        return [record for record in self.of("request") if record["job_id"] in self.jobs[name]]

    @property
    def last(self) -> Record:
        return self.of("worker")[-1]


class Traffic:
    """Prompts of exact lengths, as token ids; the prefix cache meets only what is meant to be shared."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.jobs: dict[str, list[str]] = {}
        self.random = random.Random(4)
        self.shared = self.ids(160)

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(10, 250) for _ in range(count)]

    def submit(self, name: str, prompt: list[int], tokens: int, **fields: Any) -> Job:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True} | fields
        job = self.worker.openai("/v1/completions", body)
        self.jobs.setdefault(name, []).append(job.id)
        return job

    async def alone(self) -> None:
        """Lone requests, in turns: other work on this machine then slows all of them alike."""
        await self.submit("first", self.ids(SHORT), 64).result(PATIENCE)  # builds the HTTP application
        for _ in range(4):
            for name, prompt, tokens in (("once", SHORT, 64), ("twice", SHORT, 128), ("alone", *ALONE)):
                await self.submit(name, self.ids(prompt), tokens).result(PATIENCE)

    async def pairs(self) -> None:
        """Long and short prompts that arrive together, so that the same steps compute them."""
        for _ in range(5):
            both = [self.submit("long", self.ids(LONG), 4), self.submit("short", self.ids(SHORT), 4)]
            await asyncio.gather(*(job.result(PATIENCE) for job in both))

    async def mix(self) -> None:
        """64 requests at once: some share a prefix, some sample several completions, some are cancelled."""
        jobs, cancelled = [], []
        for i in range(64):
            prompt, tokens = self.ids(self.random.randint(16, 400)), self.random.randint(8, 128)
            if i % 3 == 0:
                prompt = self.shared + prompt[: max(16, len(prompt) - len(self.shared))]
            if i % 16 == 7:
                jobs.append(self.submit("several", prompt, tokens, n=3, temperature=1.0))
            elif i % 8 == 5:
                cancelled.append(self.submit("cancelled", prompt, 1000))
            else:
                jobs.append(self.submit("mixed", prompt, tokens))
        jobs += [self.submit("crowded", self.ids(ALONE[0]), ALONE[1]) for _ in range(3)]
        await cancelled[0].started(PATIENCE)
        for job in cancelled:
            await asyncio.sleep(0.02)
            self.worker.plane.cancel(job.id)
        await asyncio.gather(*(job.result(PATIENCE) for job in jobs))
        for job in cancelled:
            with pytest.raises(JobFailed):
                await job.result(PATIENCE)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def run(tmp_path_factory: pytest.TempPathFactory, home: Any) -> AsyncIterator[Run]:
    environ = {"MAX_CONCURRENCY": "80", "NUM_GPU_BLOCKS_OVERRIDE": BLOCKS, "GPU_PRICE_PER_SECOND": "0.00116"}
    async with Worker(tmp_path_factory.mktemp("ledger"), home, **environ) as worker:
        traffic = Traffic(worker)
        await traffic.alone()
        await traffic.pairs()
        await traffic.mix()
        await asyncio.sleep(0.3)
        worker.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(worker.process.wait(), 60)
        yield Run(worker.records(), time.time() - worker.spawned, traffic.jobs, worker.folder / "ledger.jsonl")


async def test_every_second_of_the_worker_has_an_owner(run: Run) -> None:
    last = run.last
    parts = ("cold", "busy", "overhead", "idle", "drain")
    assert last["gpu_seconds"] == pytest.approx(sum(last[f"{part}_gpu_seconds"] for part in parts), rel=1e-6)
    assert all(last[f"{part}_gpu_seconds"] >= 0 for part in parts)
    assert last["final"]
    # The worker cannot see the fork before it and the end of the interpreter after it.
    asked = run.of("request")[-1]["monotonic"] - run.of("request")[0]["monotonic"]
    assert run.of("cold_start")[0]["seconds"] + asked < last["gpu_seconds"] <= run.lived
    assert last["gpu_seconds"] <= last["billed_seconds"] < last["gpu_seconds"] + 1
    assert last["usd"] == pytest.approx(last["billed_seconds"] * 0.00116)


async def test_the_requests_shares_are_the_busy_seconds(run: Run) -> None:
    shares = sum(record["gpu_seconds"] for record in run.of("request"))
    assert shares == pytest.approx(run.last["busy_gpu_seconds"], rel=1e-3)
    assert len(run.of("request")) == run.last["requests"] == sum(map(len, run.jobs.values()))
    for tokens in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        assert sum(record[tokens] for record in run.of("request")) == run.last[tokens]


async def test_nothing_was_estimated_or_lost(run: Run) -> None:
    assert not any(record["estimated"] for record in run.of("request"))
    assert (run.last["estimated"], run.last["estimated_because"], run.last["lost_steps"]) == (False, None, 0)
    for record in run.of("request"):
        parts = record["prefill_gpu_seconds"] + record["decode_gpu_seconds"]
        assert record["gpu_seconds"] == pytest.approx(parts, abs=1e-8)
        assert record["usd"] == pytest.approx(record["gpu_seconds"] * 0.00116, abs=1e-9)


def part(record: Record) -> float:
    """Return what a request paid of the time it took: a machine that stands still meanwhile changes it little."""
    return float(record["gpu_seconds"] / record["duration_seconds"])


async def test_a_lone_request_costs_the_time_it_kept_the_engine_busy_and_one_in_a_full_batch_little_of_it(
    run: Run,
) -> None:
    lone = [part(record) for name in ("once", "twice", "alone") for record in run.named(name)]
    crowded = [part(record) for record in run.named("crowded")]
    assert max(lone) <= 1
    assert statistics.median(lone) > 3 * statistics.median(crowded)
    assert {record["mean_batch"] for record in run.named("alone")} == {1.0}
    assert min(record["mean_batch"] for record in run.named("crowded")) > 4


async def test_twice_the_output_costs_more_decoding(run: Run) -> None:
    once, twice = (min(record["decode_gpu_seconds"] for record in run.named(name)) for name in ("once", "twice"))
    assert once < twice


async def test_a_long_prompt_pays_more_than_a_short_one_beside_it(run: Run) -> None:
    long, short = (sum(record["prefill_gpu_seconds"] for record in run.named(name)) for name in ("long", "short"))
    assert long > short > 0


async def test_a_cached_prefix_is_not_paid_again(run: Run) -> None:
    cached = [record for record in run.named("mixed") if record["cached_tokens"]]
    assert cached
    assert run.last["cached_tokens"] >= sum(record["cached_tokens"] for record in cached)


async def test_a_cancelled_request_pays_for_what_it_ran(run: Run) -> None:
    records = run.named("cancelled")
    assert {record["error"] for record in records} == {"cancelled"}
    assert any(record["gpu_seconds"] > 0 for record in records)
    assert all(record["completion_tokens"] == 0 or record["gpu_seconds"] > 0 for record in records)


async def test_what_preemptions_computed_again_is_overhead(run: Run) -> None:
    causes = run.last["overhead_causes"]
    assert causes["recompute"] > 0
    assert run.last["overhead_gpu_seconds"] == pytest.approx(sum(causes.values()), abs=1e-5)


async def test_the_fit_predicts_the_steps(run: Run) -> None:
    fit = run.last["fit"]
    assert fit["residual"] < 1
    assert fit["steps"] <= run.last["steps"]
    assert min(fit[name] for name in "abcd") >= 0
    assert run.last["metering_seconds"] < 0.2 * (run.last["busy_gpu_seconds"] + run.last["overhead_gpu_seconds"])


_SUMS = """
SELECT count(*), sum(gpu_seconds), sum(prefill_gpu_seconds), sum(decode_gpu_seconds), sum(completion_tokens),
    sum(prompt_tokens - cached_tokens), sum(usd), count(error)
FROM read_json_auto($path, union_by_name = true) WHERE record = 'request'
"""


async def test_the_reports_figures_are_duckdbs_own_sums(run: Run, tmp_path: Path) -> None:
    intake = source.read(str(run.ledger), tmp_path)
    with store.load(intake.lines, since=None, loaded="by-gpu-seconds") as database:
        found = figures.gather(database, "model", None, None)
    assert (intake.records, intake.torn, found.notes) == (len(run.records), (), [])
    total = found.total
    names = ["requests", "gpu_seconds", "prefill", "decode", "output_tokens", "input_tokens", "usd", "failed"]
    (sums,) = duckdb.execute(_SUMS, {"path": str(run.ledger)}).fetchall()
    assert [total[name] for name in names] == pytest.approx(sums)
    (whole,) = duckdb.execute(
        "SELECT max(gpu_seconds) FROM read_json_auto($path, union_by_name = true) WHERE record = 'worker'",
        {"path": str(run.ledger)},
    ).fetchall()
    assert sum(found.spent.values()) == pytest.approx(whole[0])
    assert total["loaded_gpu_seconds"] == pytest.approx(whole[0], rel=1e-3)
    assert found.phases[0]["phase"] == "python"


async def test_the_reports_curve_shows_that_company_makes_a_token_cheaper(run: Run, tmp_path: Path) -> None:
    intake = source.read(str(run.ledger), tmp_path)
    with store.load(intake.lines, since=None, loaded="by-gpu-seconds") as database:
        rows = figures.gather(database, "model", None, None).batches
    assert rows[0]["batch"] == 1
    assert rows[-1]["batch"] >= 16
    assert rows[-1]["seconds"][1] < rows[0]["seconds"][1]


async def test_the_page_says_the_sums(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run.ledger), "--html", str(page)]) == 0
    said = page.read_text("utf-8"), capsys.readouterr().out
    for part in HEADINGS:
        assert all(f"{run.last[f'{part}_gpu_seconds']:,.3f}" in text for text in said)
    shares = sum(record["gpu_seconds"] for record in run.of("request"))
    assert all(f"{shares:,.3f}" in text for text in said)


async def test_the_official_client_parses_an_answer_with_its_cost(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=[user("What is a cold start?")])
    assert answer.model_extra is not None
    assert 0 < answer.model_extra["cost"]["gpu_seconds"] < 5
    costs = [
        (chunk.model_extra or {}).get("cost")
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=[user("What is a cold start?")], stream=True, stream_options={"include_usage": True}
        )
    ]
    assert [cost is None for cost in costs] == [True] * (len(costs) - 1) + [False]
