"""/metrics of `coldsnap serve`: pushes taken, kept and merged, beside what the platform counts."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Route

from coldsnap.desk.serve import pushes
from coldsnap.desk.serve.api import Api
from coldsnap.desk.serve.command import _private
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.fleet import Fleet
from coldsnap.desk.serve.pushes import Pushes
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.desk.serve.scrape import Scrape
from coldsnap.desk.serve.server import served
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.throttle import Throttle
from coldsnap.records.metrics import Push
from coldsnap.settings import Settings

Samples = dict[str, float]


class Desk:
    """Pushes and the page of an endpoint without workers: their pushes are made here."""

    def __init__(self, kept: Pushes, scrape: Scrape, said: list[str], url: str) -> None:
        self.kept = kept
        self.scrape = scrape
        self.said = said
        self.url = url

    async def metrics(self, key: str | None = None) -> tuple[int, Samples]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession() as http, http.get(self.url, headers=headers) as response:
            text = await response.text()
        if response.status != 200:
            assert "Authorization: Bearer" in text
            return response.status, {}
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = text.splitlines()
        assert len([line for line in lines if line.startswith("# TYPE")]) == len(
            {line.split()[2] for line in lines if line.startswith("# TYPE")}
        )  # Prometheus refuses a family that comes twice
        found: Samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = sample.labels
                found[" ".join([sample.name, *(labels[name] for name in sorted(labels))])] = sample.value
        return response.status, found

    async def push(self, worker: str, *, requests: int, running: int = 1) -> None:
        """Push as a worker does, by its own code."""
        registry = CollectorRegistry()
        Counter("requests", "r", ["outcome"], registry=registry).labels("stop").inc(requests)
        Histogram("seconds", "s", buckets=[1, 2], registry=registry).observe(requests)
        Gauge("running", "n", registry=registry).set(running)
        environ = self.kept.environment({"RUNPOD_POD_ID": worker, "RUNPOD_ENDPOINT_ID": "local"})
        settings = Settings.read(environ)
        assert settings.metrics_push_url
        push = Push(settings, settings.metrics_push_url, self.said.append, registry)
        await asyncio.to_thread(push.push)


@pytest_asyncio.fixture(params=[None])
async def desk(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    said: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    with Store(tmp_path / "serve.db", said.append) as store:
        plane = ControlPlane()
        endpoint = Endpoint(plane, store, Scaling(), said.append)
        async with Pushes(lambda worker: worker != "stranger", said.append) as kept:
            fleet = Fleet(endpoint, tmp_path / "handler.py", {}, tmp_path, said.append)
            authorize = request.param and Api(endpoint, fleet, request.param, Throttle()).authorize
            scrape = Scrape(endpoint, fleet, kept, authorize)
            async with served(Starlette(routes=[Route("/metrics", scrape.answer)]), listener):
                yield Desk(kept, scrape, said, f"http://127.0.0.1:{listener.getsockname()[1]}/metrics")


async def test_pushes_are_merged_under_their_workers_names(desk: Desk) -> None:
    await desk.push("worker-1", requests=5)
    await desk.push("worker-2", requests=7, running=3)
    await desk.push("worker-1", requests=6)
    _, found = await desk.metrics()
    assert found["requests_total local worker-1 coldsnap stop"] == 6
    assert found["requests_total local worker-2 coldsnap stop"] == 7
    assert found["running local worker-2 coldsnap"] == 3
    assert found["seconds_bucket local worker-1 coldsnap +Inf"] == 1
    assert found["push_time_seconds local worker-1 coldsnap"] > 1e9
    assert found["coldsnap_endpoint_queue_depth local"] == 0
    assert not [name for name in found if "_created" in name]
    assert desk.said == []


async def test_the_counters_of_a_worker_that_ended_stay_and_its_gauges_go(desk: Desk) -> None:
    await desk.push("worker-1", requests=5)
    desk.kept.end("worker-1")
    desk.kept.end("never-pushed")
    _, found = await desk.metrics()
    assert {name: value for name, value in found.items() if "worker-1" in name} == {
        "requests_total local worker-1 coldsnap stop": 5.0,
        "seconds_bucket local worker-1 coldsnap 1.0": 0.0,
        "seconds_bucket local worker-1 coldsnap 2.0": 0.0,
        "seconds_bucket local worker-1 coldsnap +Inf": 1.0,
        "seconds_count local worker-1 coldsnap": 1.0,
        "seconds_sum local worker-1 coldsnap": 5.0,
    }


async def test_of_many_that_ended_no_count_is_lost_and_the_page_stays_small(desk: Desk) -> None:
    sizes = []
    for number in range(1, 51):
        await desk.push(f"worker-{number}", requests=number)
        desk.kept.end(f"worker-{number}")
        _, found = await desk.metrics()
        sizes.append(len(found))
        for name in ("requests_total", "seconds_sum"):
            total = sum(value for sample, value in found.items() if sample.startswith(f"{name} "))
            assert total == number * (number + 1) / 2
    assert sizes[-1] == max(sizes)
    assert len({name.split()[2] for name in found if name.startswith("requests_total ")}) == pushes._ENDED_KEPT
    assert found["requests_total local ended-31 coldsnap stop"] == 31 * 32 / 2
    assert found["seconds_bucket local ended-31 coldsnap 2.0"] == 2


async def test_what_is_no_push_is_refused_or_left_out_and_said(desk: Desk) -> None:
    await desk.push("worker-1", requests=5)
    base = str(desk.kept.environment({})["METRICS_PUSH_URL"])
    odd = base64.urlsafe_b64encode("w/é".encode()).decode()
    good = generate_latest(CollectorRegistry())
    cases = {
        ("PUT", "metrics/job/coldsnap/instance/worker-2", b"what{is this"): 200,
        ("PUT", "metrics/job/coldsnap/instance/worker-3", b"\xff"): 200,
        ("PUT", f"metrics/job/coldsnap/instance@base64/{odd}", good): 200,
        ("PUT", "metrics/job/coldsnap/instance@base64/%%%", good): 400,
        ("PUT", "metrics/job/coldsnap/instance/stranger", good): 404,
        ("PUT", "metrics/job/coldsnap", good): 404,
        ("PUT", "metrics/job", good): 404,
        ("POST", "metrics/job/coldsnap/instance/worker-2", good): 404,
    }
    bare = f"http://127.0.0.1:{base.rpartition(':')[2]}"
    async with aiohttp.ClientSession() as http, http.put(f"{bare}/metrics/job/x/instance/worker-1") as response:
        assert response.status == 401
    async with aiohttp.ClientSession() as http:
        for (method, path, body), status in cases.items():
            async with http.request(method, f"{base}/{path}", data=body) as response:
                assert (path, response.status) == (path, status)
    status, found = await desk.metrics()
    assert status == 200
    assert found["requests_total local worker-1 coldsnap stop"] == 5
    assert [text.split(" pushed")[0] for text in desk.said] == ["worker-2", "worker-3"]


@pytest.mark.parametrize("desk", ["the key"], indirect=True)
async def test_where_others_reach_it_it_asks_for_the_key(desk: Desk) -> None:
    assert [(await desk.metrics(key))[0] for key in (None, "another", "the key")] == [401, 401, 200]


def test_only_a_loopback_address_is_private() -> None:
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("0.0.0.0", 0)) as open_:
        assert (_private(near), _private(open_)) == (True, False)


async def test_the_gateway_that_a_user_has_set_is_left_to_him(desk: Desk) -> None:
    mine = {"METRICS_PUSH_URL": "http://gateway:9091", "PATH": "p"}
    assert desk.kept.environment(mine) == mine
    here = desk.kept.environment({"PATH": "p"})
    assert here["METRICS_PUSH_URL"].startswith("http://worker:")
    assert (here["METRICS_PUSH_SECONDS"], here["PATH"]) == ("2", "p")
    assert desk.kept.environment({"METRICS_PUSH_SECONDS": "5"})["METRICS_PUSH_SECONDS"] == "5"
