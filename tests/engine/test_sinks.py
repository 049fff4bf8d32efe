"""Where a real worker's records and metrics go: a bucket and a gateway, on loopback."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from coldsnap.foundation.s3 import Bucket, Place

from .conftest import Boot
from .worker import CORPUS, PATIENCE, text

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_workers_records_and_metrics_leave_it_before_it_ends(new_worker: Boot, s3_place: Place) -> None:
    pushed: list[str] = []

    async def take(request: web.Request) -> web.Response:
        pushed.append(await request.text())
        return web.Response()

    app = web.Application(client_max_size=1 << 24)
    app.router.add_put("/metrics/job/coldsnap/{group:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    _, port = runner.addresses[0]

    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings = {
        "LEDGER_S3_URI": str(s3_place),
        "METRICS_PUSH_URL": f"http://127.0.0.1:{port}",
        "GPU_PRICE_PER_SECOND": "0.00116",
    }
    async with new_worker(**settings, **aws) as worker:
        questions = list(CORPUS)[:8]
        for question, chunks in zip(
            questions, await asyncio.gather(*(worker.ask(each).result(PATIENCE) for each in questions)), strict=True
        ):
            assert text(chunks) == CORPUS[question]
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.ended() == 0
        lines = [line for line in worker.stdout.splitlines() if line.startswith('{"schema_version"')]
        folder = worker.folder / "unsent"
        assert (list(folder.iterdir()), (worker.folder / "ledger.jsonl").exists()) == ([], False)
        assert "coldsnap: LEDGER_S3_URI" not in worker.stderr
    await runner.cleanup()

    bucket = await asyncio.to_thread(Bucket, s3_place)
    objects = await asyncio.to_thread(lambda: list(bucket.objects()))
    contents = [await asyncio.to_thread(bucket.get, found.name) for found in objects]
    sent = [line for content in contents for line in gzip.decompress(content).decode().splitlines()]
    assert sorted(sent) == sorted(lines)
    records = [json.loads(line) for line in lines]
    assert [record["record"] for record in records].count("request") == len(questions)
    final = records[-1]
    assert (final["record"], final["final"], final["unwritten_records"], final["failed_uploads"]) == (
        "worker", True, 0, 0,
    )  # fmt: skip

    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(pushed[-1])
        for sample in family.samples
    }
    assert samples["coldsnap_cost_usd_total",] == final["usd"]
    for state in ("cold", "busy", "overhead", "idle", "drain"):
        # A counter never goes back: a step that was under way at the last look counted as idle until it ended.
        assert samples["coldsnap_gpu_seconds_total", state] >= final[f"{state}_gpu_seconds"]
    assert samples["coldsnap_requests_total", "stop"] == len(questions)
    assert samples["coldsnap_request_gpu_seconds_count",] == len(questions)
    assert samples["coldsnap_tokens_total", "completion"] == final["completion_tokens"]
    assert samples["coldsnap_stream_posts_total",] >= 2 * len(questions)
    assert any(name.startswith("vllm:") for name, *_ in samples)
