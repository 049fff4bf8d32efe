"""Turns records into Prometheus metrics beside vLLM's own, and pushes them: a worker has no port to be scraped at.

record -> counters in prometheus_client's registry -> a Pushgateway, with METRICS_PUSH_URL

vLLM has imported prometheus_client before the worker is ready, so that nothing of it is on the boot's path.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from coldsnap.foundation.background import Background
from coldsnap.records.schema import ColdStart, Record, Request, Worker
from coldsnap.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

_TIMEOUT_SECONDS = 5.0
_GPU_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the histogram's buckets."""
_KINDS = ("prompt", "cached", "completion")
_OUTCOMES = ("stop", "length", "cancelled", "internal_server_error", "EngineDeadError", "ServiceUnavailableError")
"""There from the start, at 0: a counter that appears with its first event shows no increase."""


class Metrics:
    """Sums of this worker's records as metrics. `see` takes each record; a registry collects the sums."""

    def __init__(self, registry: CollectorRegistry | None = None, posts: Callable[[], int] = lambda: 0) -> None:
        """Register with `registry`, vLLM's by default. `posts` is how many chunks were posted so far."""
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self._posts = posts
        self._totals: dict[str, float] = {}
        self._worker: Worker | None = None
        self._cold = Gauge(
            "coldsnap_cold_start_seconds", "Seconds of the cold start by phase", ["phase"], registry=registry
        )
        self._cost = Histogram(
            "coldsnap_request_gpu_seconds",
            "GPU-seconds that a request has cost, its share of the engine's steps",
            buckets=_GPU_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("coldsnap_tokens", "Tokens of requests by kind", ["kind"], registry=registry)
        self._requests = Counter(
            "coldsnap_requests", "Requests by finish reason or error", ["outcome"], registry=registry
        )
        for kind in _KINDS:
            self._tokens.labels(kind)
        for outcome in _OUTCOMES:
            self._requests.labels(outcome)
        registry.register(self)

    def see(self, record: Record) -> None:
        """Count a record."""
        if isinstance(record, Request):
            self._cost.observe(record.gpu_seconds)
            self._requests.labels(record.error or record.finish_reason or "answered").inc()
            for kind in _KINDS:
                self._tokens.labels(kind).inc(getattr(record, f"{kind}_tokens"))
        elif isinstance(record, ColdStart):
            for phase, seconds in record.phases.items():
                self._cold.labels(phase).set(seconds)
        elif isinstance(record, Worker):
            for state, seconds in record.headings().by_name().items():
                # Shares that lose their owner move from busy to overhead, but a counter never goes back.
                self._totals[state] = max(self._totals.get(state, 0.0), seconds)
            self._worker = record

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that are running totals, for the registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        seconds = CounterMetricFamily("coldsnap_gpu_seconds", "GPU-seconds of this worker by state", labels=["state"])
        for state, total in tuple(self._totals.items()):
            seconds.add_metric([state], total)
        yield seconds
        yield CounterMetricFamily("coldsnap_stream_posts", "Chunks posted to the platform", value=self._posts())
        if (worker := self._worker) is None:
            return
        for name, help_, value in (
            ("cost_usd", "Estimated price of this worker's life", worker.usd),
            ("joules", "Energy of this worker's GPUs since ready", worker.joules),
            ("unwritten_records", "Records that the ledger's disk did not take", worker.unwritten_records),
            ("failed_uploads", "Uploads of records that failed", worker.failed_uploads),
            ("lost_steps", "Steps of the engine whose cost went unreported", worker.lost_steps),
        ):
            if value is not None:
                yield CounterMetricFamily(f"coldsnap_{name}", help_, value=value)
        if worker.unsent_records is not None:
            help_ = "Records that wait for the bucket after a failed upload"
            yield GaugeMetricFamily("coldsnap_unsent_records", help_, value=worker.unsent_records)


class Push(Background):
    """Pushes a whole registry, every METRICS_PUSH_SECONDS and at the end. What fails is said once, through `warn`.

    The group is the job `coldsnap`, the instance the worker's id, and the endpoint's id. It stays at the gateway
    when the worker ends: its last totals are still wanted.
    """

    def __init__(
        self, settings: Settings, url: str, warn: Callable[[str], None], registry: CollectorRegistry | None = None
    ) -> None:
        super().__init__("push", self.push, self._is_due)
        self._url = url
        self._seconds = settings.metrics_push_seconds
        self._warn = warn
        self._registry = registry
        self._group = {"instance": settings.worker_id, "endpoint": settings.endpoint_id}
        self._pushed = 0.0
        self._warned = False

    def _is_due(self) -> bool:
        return time.monotonic() - self._pushed >= self._seconds

    def push(self) -> None:
        """Push now."""
        from prometheus_client import REGISTRY, push_to_gateway
        from prometheus_client.exposition import basic_auth_handler, default_handler

        self._pushed = time.monotonic()
        url = urlsplit(self._url)

        handler = default_handler
        if url.username is not None:
            word = unquote(url.password or "")
            handler = partial(basic_auth_handler, username=unquote(url.username), password=word)
        place = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        try:
            push_to_gateway(
                place,
                job="coldsnap",
                registry=self._registry or REGISTRY,
                grouping_key=self._group,
                timeout=_TIMEOUT_SECONDS,
                handler=handler,
            )
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib wraps not all of them
            if not self._warned:
                self._warned = True
                self._warn(f"METRICS_PUSH_URL: {place}: {error}; pushes are tried again every {self._seconds:g} s")
