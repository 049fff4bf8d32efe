"""A real Prometheus before a real load: what the dashboard and the alerts ask is answered, by an endpoint at the desk
and by workers that push to a real Pushgateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.engine.worker import CORPUS, MODEL, STEADY, environment, user
from tests.loopback.desk.serving import KEY, ROOT, Serve
from tests.programs.monitoring import DEPLOY, Program, Prometheus

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTIONS = list(CORPUS)[:6]
ROUNDS = 8
PRICE = 0.00116
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "coldsnap.json").read_text("utf-8"))
VARIABLES = {"$endpoint": ".+", "$__rate_interval": "10s", "$__range": "30m"}
"""What Grafana would put for them, at a scrape interval of a second."""
QUERIES = [
    (f"{panel['title']}: {target['legendFormat']}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
RULES = [
    (rule.get("alert") or rule["record"], rule["expr"])
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
OF_THE_PLATFORM = "coldsnap_endpoint_"


@dataclass
class Watched:
    """An endpoint after its load, and what its clients know of that."""

    serve: Serve
    prometheus: Prometheus
    at_desk: bool
    begun: float = field(default_factory=time.time)
    answered: int = 0
    cancelled: int = 0
    tokens: int = 0


async def load(watched: Watched) -> None:
    """Ask natively and as OpenAI, with and without a stream, for ten seconds, and cancel one."""
    serve = watched.serve
    async with openai.AsyncOpenAI(base_url=f"{serve.url}/openai/v1", api_key=KEY, max_retries=0) as client:

        async def native(question: str) -> int:
            job_id = await serve.run({"messages": [user(question)], "stream": True})
            ended = await serve.ended(job_id)
            return int(ended["output"][-1]["usage"]["completion_tokens"])

        async def chat(question: str) -> int:
            answer = await client.chat.completions.create(model=MODEL, messages=[user(question)])
            assert answer.usage
            return answer.usage.completion_tokens

        async def stream(question: str) -> int:
            options = {"include_usage": True}
            chunks = await client.chat.completions.create(
                model=MODEL, messages=[user(question)], stream=True, stream_options=options
            )
            return sum([chunk.usage.completion_tokens async for chunk in chunks if chunk.usage])

        for number in range(ROUNDS):
            question = QUESTIONS[number % len(QUESTIONS)]
            counts = await asyncio.gather(native(question), chat(question), stream(question))
            watched.answered += len(counts)
            watched.tokens += sum(counts)
            await asyncio.sleep(1)
        job_id = await serve.run({"messages": [user(QUESTIONS[0])], "sampling_params": STEADY, "stream": True})
        while not (await serve.get(f"stream/{job_id}"))["stream"]:
            pass
        assert (await serve.post(f"cancel/{job_id}"))["status"] == "CANCELLED"
        watched.cancelled += 1


async def arrived(watched: Watched) -> None:
    """Return when Prometheus has counted every request, and has evaluated its rules since."""
    value, ask = watched.prometheus.value, watched.prometheus.ask
    while await value("sum(coldsnap_requests_total)") != watched.answered + watched.cancelled:
        await asyncio.sleep(0.2)
    counted = datetime.now(UTC)

    async def evaluated() -> bool:
        rules = [rule for group in (await ask("rules"))["groups"] for rule in group["rules"]]
        return all(datetime.fromisoformat(rule["lastEvaluation"]) > counted for rule in rules)

    while not await evaluated():
        await asyncio.sleep(0.2)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["desk", "pushgateway"])
async def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    """An endpoint whose workers push to itself, or to a Pushgateway; Prometheus as `deploy/prometheus` has it."""
    at_desk = request.param == "desk"
    folder = tmp_path_factory.mktemp(request.param)
    more = {"GPU_PRICE_PER_SECOND": str(PRICE), "VLLM_CPU_KVCACHE_SPACE": "1", "METRICS_PUSH_SECONDS": "1"}
    async with contextlib.AsyncExitStack() as stack:
        if not at_desk:
            gateway = await stack.enter_async_context(Program(folder, "prometheus-pushgateway"))
            more["METRICS_PUSH_URL"] = gateway.url
        environ = environment(tmp_path_factory.getbasetemp() / "home", folder / "ledger", **more)
        serve = await stack.enter_async_context(Serve(folder, environ=environ))
        target = serve.base.removeprefix("http://").removesuffix("/v2") if at_desk else gateway.address
        config = "desk.yml" if at_desk else "pushgateway.yml"
        prometheus = await stack.enter_async_context(Prometheus(folder, config, target))
        watched = Watched(serve, prometheus, at_desk)
        await serve.says("worker-1 takes jobs")
        await load(watched)
        await arrived(watched)
        yield watched


@pytest.mark.parametrize("query", [expr for _, expr in QUERIES], ids=[name for name, _ in QUERIES])
async def test_a_query_of_the_dashboard_returns_data(watched: Watched, query: str) -> None:
    if not watched.at_desk and OF_THE_PLATFORM in query and " or vector(0)" not in query:
        assert await found(watched, query) == []  # the platform does not push
        return
    values = await found(watched, query)
    assert any(math.isfinite(value) for value in values)


async def found(watched: Watched, query: str) -> list[float]:
    """Return all values of a query over the time of the test."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    data = await watched.prometheus.ask("query_range", query=query, start=watched.begun, end=time.time(), step=1)
    return [float(value) for series in data["result"] for _, value in series["values"]]


@pytest.mark.parametrize("rule", [expr for _, expr in RULES], ids=[name for name, _ in RULES])
async def test_an_expression_of_a_rule_finds_what_it_compares(watched: Watched, rule: str) -> None:
    """With `bool` a comparison tells true from false instead of leaving false ones out."""
    asked = re.sub(r" (==|<|>) (?=[\dI])", r" \1 bool ", rule)
    assert ("bool" in asked) == bool(re.search(r" [=<>]+ ", rule))
    values = await found(watched, asked)
    if not watched.at_desk and OF_THE_PLATFORM in rule:
        assert values == []
    elif "unsent_records" in rule:
        assert values == []  # there is no bucket here
    else:
        assert any(math.isfinite(value) for value in values)


async def test_no_rule_fails_and_no_alert_fires(watched: Watched) -> None:
    groups = (await watched.prometheus.ask("rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"]: (rule["health"], rule.get("lastError")) for rule in rules} == {
        name: ("ok", None) for name, _ in RULES
    }
    assert await firing(watched) == slow(watched)


def slow(watched: Watched) -> set[str]:
    """Return the alert of a cold start of over a minute, if there was one: that may be this machine's doing."""
    return {"ColdsnapColdStartSlow"} if any(r["seconds"] > 60 for r in records(watched, "cold_start")) else set()


def records(watched: Watched, kind: str) -> list[dict[str, Any]]:
    lines = (watched.serve.folder / "ledger" / "ledger.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["record"] == kind]


async def firing(watched: Watched) -> set[str]:
    alerts = (await watched.prometheus.ask("alerts"))["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


async def test_the_sums_are_what_the_clients_got_and_what_the_ledger_says(watched: Watched) -> None:
    value = watched.prometheus.value
    requests = records(watched, "request")
    assert await value('sum(coldsnap_requests_total{outcome=~"stop|length"})') == watched.answered
    assert await value('sum(coldsnap_requests_total{outcome="cancelled"})') == 1
    cut = sum(record["completion_tokens"] for record in requests if record["error"] == "cancelled")
    assert await value('sum(coldsnap_tokens_total{kind="completion"})') == watched.tokens + cut
    shares = sum(record["gpu_seconds"] for record in requests)
    assert await value("sum(coldsnap_request_gpu_seconds_sum)") == pytest.approx(shares)
    (cold,) = records(watched, "cold_start")
    assert await value("sum(coldsnap_cold_start_seconds)") == pytest.approx(cold["seconds"])
    rounded = await value(f"sum(coldsnap_cost_usd_total) / {PRICE} - sum(coldsnap_gpu_seconds_total)")
    assert rounded is not None
    assert -0.1 < rounded < 1.1  # billed by the second that has begun


@pytest.mark.parametrize("watched", ["desk"], indirect=True)
async def test_the_platform_counts_what_it_saw(watched: Watched) -> None:
    value = watched.prometheus.value
    assert await value('coldsnap_endpoint_jobs_total{state="COMPLETED"}') == watched.answered
    assert await value('coldsnap_endpoint_jobs_total{state="CANCELLED"}') == 1
    assert await value("coldsnap_endpoint_queue_delay_seconds_count") == watched.answered + 1
    assert await value('coldsnap_endpoint_workers{state="idle"}') == 1
    assert await value("coldsnap_endpoint_cold_start_seconds_count") == 1
    pushed_before = await value("time() - push_time_seconds")
    assert pushed_before is not None
    assert -1 < pushed_before < 60


@pytest.mark.parametrize("watched", ["desk"], indirect=True)
async def test_metrics_stay_up_and_no_total_falls_when_a_worker_is_killed(watched: Watched) -> None:
    serve, value = watched.serve, watched.prometheus.value
    url = serve.url.replace("/v2/local", "/metrics")

    async def scraped() -> dict[str, dict[str, float]]:
        """Return the samples of each name that matters here, by worker."""
        async with serve.http.get(url) as response:
            assert response.status == 200
            families = text_string_to_metric_families(await response.text())
        found: dict[str, dict[str, float]] = {}
        for sample in (sample for family in families for sample in family.samples):
            workers = found.setdefault(sample.name, {})
            worker = sample.labels.get("instance", "")
            workers[worker] = workers.get(worker, 0.0) + sample.value
        return found

    before = await scraped()
    assert before["vllm:num_requests_running"] == {"worker-1": 0}
    os.kill(serve.workers[0], signal.SIGKILL)
    while "worker-2 takes jobs" not in serve.log:
        during = await scraped()
        for name in ("coldsnap_tokens_total", "coldsnap_cost_usd_total", "vllm:generation_tokens_total"):
            assert during[name]["worker-1"] >= before[name]["worker-1"]
        await asyncio.sleep(0.1)
    await load(watched)
    await arrived(watched)
    after = await scraped()
    assert after["vllm:num_requests_running"] == {"worker-2": 0}
    assert after["coldsnap_tokens_total"]["worker-2"] > 0
    assert after["coldsnap_tokens_total"]["worker-1"] == during["coldsnap_tokens_total"]["worker-1"]
    assert await value('sum(coldsnap_requests_total{outcome=~"stop|length"})') == watched.answered
    assert await value('coldsnap_endpoint_worker_ends_total{cause="crashed"}') == 1
    assert await firing(watched) == {"ColdsnapWorkersFail"} | slow(watched)
