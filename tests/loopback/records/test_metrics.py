"""Metrics: that they are the records' sums, and what arrives at a gateway.

No Pushgateway is at hand on a fresh machine: what stands for it here takes the protocol's PUT and reads the body
with prometheus_client's own parser.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from coldsnap.records.metrics import Metrics, Push
from coldsnap.records.schema import ColdStart, Request, Worker
from coldsnap.settings import Settings

ORIGIN: dict[str, Any] = {
    "worker_id": "pod", "endpoint_id": "end point", "gpu": "g", "gpu_count": 1, "snapshot_digest": None, "vllm": "0",
}  # fmt: skip
REQUEST: dict[str, Any] = ORIGIN | {
    "job_id": "j", "route": "native", "model": "m", "stream": True, "prompt_tokens": 5, "cached_tokens": 2,
    "completion_tokens": 7, "queue_seconds": 0.0, "ttft_seconds": None, "itl_seconds": None, "duration_seconds": 1.0,
    "finish_reason": "stop", "gpu_seconds": 0.02, "prefill_gpu_seconds": 0.01, "decode_gpu_seconds": 0.01,
    "mean_batch": None, "joules": None, "usd": None, "price_per_second": None, "estimated": False, "fit": None,
}  # fmt: skip
WORKER: dict[str, Any] = ORIGIN | {
    "final": False, "gpu_seconds": 15.0, "cold_gpu_seconds": 1.0, "busy_gpu_seconds": 2.0,
    "overhead_gpu_seconds": 3.0, "idle_gpu_seconds": 4.0, "drain_gpu_seconds": 5.0, "overhead_causes": {},
    "joules": 900.0, "request_joules": 500.0, "billed_seconds": 15, "usd": 0.25, "price_per_second": 0.01,
    "requests": 2, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "steps": 1, "lost_steps": 0,
    "metering_seconds": 0.0, "unwritten_records": 0, "unsent_records": None, "failed_uploads": 0,
    "estimated": False, "estimated_because": None, "fit": None,
}  # fmt: skip


class Gateway(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.puts: list[tuple[str, dict[str, float]]] = []
        self.authorization: str | None = None
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = {
            sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        self.server.authorization = self.headers["Authorization"]
        self.server.puts.append((self.path, found))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)


def push(url: str, registry: CollectorRegistry, said: list[str]) -> Push:
    settings = Settings.read({"RUNPOD_POD_ID": "pod/1", "RUNPOD_ENDPOINT_ID": "endpoint", "METRICS_PUSH_URL": url})
    return Push(settings, url, said.append, registry)


def test_the_records_arrive_as_sums_beside_the_registrys_other_metrics(
    gateway: Gateway, registry: CollectorRegistry
) -> None:
    Gauge("vllm_running", "another's", registry=registry).set(3)
    metrics = Metrics(registry, posts=lambda: 11)
    metrics.see(
        ColdStart(
            **ORIGIN,
            seconds=3.0,
            phases={"python": 1.0, "engine": 2.0},
            beside={},
            snapshot_bytes=None,
            model="m",
            source="image",
            verified=True,
            fetched_bytes=0,
            fetch_gb_per_second=None,
        )
    )
    for change in ({}, {"gpu_seconds": 20.0}, {"finish_reason": None, "error": "cancelled"}, {"finish_reason": None}):
        metrics.see(Request(**REQUEST | change))
    metrics.see(Worker(**WORKER))
    metrics.see(Worker(**WORKER | {"busy_gpu_seconds": 1.5, "idle_gpu_seconds": 6.0, "usd": 0.5, "joules": 950.0}))
    said: list[str] = []
    push(gateway.url, registry, said).push()
    ((path, found),) = gateway.puts
    instance = base64.urlsafe_b64encode(b"pod/1").decode()
    assert path == f"/metrics/job/coldsnap/endpoint/endpoint/instance@base64/{instance}"
    expected = {
        "coldsnap_cold_start_seconds python": 1.0,
        "coldsnap_cold_start_seconds engine": 2.0,
        "coldsnap_gpu_seconds_total cold": 1.0,
        "coldsnap_gpu_seconds_total busy": 2.0,  # a counter never goes back
        "coldsnap_gpu_seconds_total overhead": 3.0,
        "coldsnap_gpu_seconds_total idle": 6.0,
        "coldsnap_gpu_seconds_total drain": 5.0,
        "coldsnap_request_gpu_seconds_bucket 0.01": 0.0,
        "coldsnap_request_gpu_seconds_bucket 0.03": 3.0,
        "coldsnap_request_gpu_seconds_bucket 30.0": 4.0,
        "coldsnap_request_gpu_seconds_count": 4.0,
        "coldsnap_request_gpu_seconds_sum": 20.06,
        "coldsnap_requests_total stop": 2.0,
        "coldsnap_requests_total cancelled": 1.0,
        "coldsnap_requests_total answered": 1.0,
        "coldsnap_tokens_total prompt": 20.0,
        "coldsnap_tokens_total cached": 8.0,
        "coldsnap_tokens_total completion": 28.0,
        "coldsnap_cost_usd_total": 0.5,
        "coldsnap_joules_total": 950.0,
        "coldsnap_stream_posts_total": 11.0,
        "vllm_running": 3.0,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    assert said == []


def test_what_is_not_known_is_absent(gateway: Gateway, registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    metrics.see(Worker(**WORKER | {"usd": None, "joules": None}))
    push(gateway.url, registry, []).push()
    assert not {"coldsnap_cost_usd_total", "coldsnap_joules_total"} & gateway.puts[0][1].keys()


def test_user_and_password_are_sent_but_never_said(gateway: Gateway, registry: CollectorRegistry) -> None:
    url = gateway.url.replace("://", "://me:a%20word@")
    said: list[str] = []
    sender = push(url, registry, said)
    sender.push()
    assert gateway.authorization == "Basic " + base64.b64encode(b"me:a word").decode()
    gateway.status = 500
    sender.push()
    assert "word" not in said[0]


@pytest.mark.parametrize("status", [500, 404, None])
def test_a_gateway_that_fails_is_said_once(gateway: Gateway, registry: CollectorRegistry, status: int | None) -> None:
    said: list[str] = []
    gateway.status = status or 200
    sender = push(gateway.url if status else "http://127.0.0.1:9", registry, said)
    for _ in range(3):
        sender.push()
    (text,) = said
    assert text.startswith("METRICS_PUSH_URL: http://127.0.0.1:")
    assert text.endswith("pushes are tried again every 15 s")


def test_it_pushes_at_the_start_and_at_the_end(gateway: Gateway, registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    sender = push(gateway.url, registry, [])
    sender.start()
    metrics.see(Request(**REQUEST))
    assert sender.end(10)
    assert len(gateway.puts) >= 2
    assert gateway.puts[-1][1]["coldsnap_requests_total stop"] == 1.0
