"""GET /metrics, for Prometheus: the endpoint as the platform sees it, and what its workers push.

The platform's own are named `coldsnap_endpoint_…`; `docs/metrics.md` lists them all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.fleet import STATES, Fleet, Turn, WorkerProcess
from coldsnap.desk.serve.job import Job, JobState
from coldsnap.desk.serve.pushes import Group, Pushes, labelled, merged
from coldsnap.errors import Refused

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COLD_SECONDS = (1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 420.0)
"""Upper bounds of the histograms' buckets."""
_ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT)
_STREAM_CHUNKS = 2
_CAUSES = ("stopped", "crashed", "boot failed")


class Platform(Collector):
    """What the platform knows of jobs and workers. `see_job` and `see_worker` take each turn of their lives."""

    def __init__(self, endpoint: Endpoint, fleet: Fleet) -> None:
        self._endpoint = endpoint
        self._fleet = fleet
        self.registry = CollectorRegistry()

        def seconds(name: str, help_: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"coldsnap_endpoint_{name}_seconds", help_, buckets=buckets, registry=self.registry)

        self._delay = seconds("queue_delay", "From a job's submission until a worker took it")
        self._ttft = seconds("ttft", "From submission to the first chunk, of jobs that came in two chunks or more")
        self._whole = seconds("job", "From a job's submission to its end")
        self._cold = seconds("cold_start", "From a worker's start until it asked for jobs", _COLD_SECONDS)
        self._starts = Counter("coldsnap_endpoint_worker_starts", "Workers started", registry=self.registry)
        self._ends = Counter("coldsnap_endpoint_worker_ends", "Workers ended", ["cause"], registry=self.registry)
        for cause in _CAUSES:
            self._ends.labels(cause)
        self.registry.register(self)

    def see_job(self, job: Job) -> None:
        """Count a job that has ended."""
        times = job.timestamps
        assert times.done is not None
        self._whole.observe(times.done - times.submitted)
        if times.taken is not None:
            self._delay.observe(times.taken - times.submitted)
        if len(times.chunks) >= _STREAM_CHUNKS:
            self._ttft.observe(times.chunks[0] - times.submitted)

    def see_worker(self, worker: WorkerProcess, turn: Turn) -> None:
        """Count a worker's start, cold start or end."""
        if turn == "started":
            self._starts.inc()
        elif turn == "ready" and worker.ready is not None:
            self._cold.observe(worker.ready - worker.begun)
        elif turn == "ended":
            cause = "stopped" if worker.stopping else "crashed" if worker.ready is not None else "boot failed"
            self._ends.labels(cause).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield what is, for the registry."""
        plane = self._endpoint.plane
        oldest = min((job.timestamps.submitted for job in plane.queue), default=None)
        waited = 0.0 if oldest is None else time.monotonic() - oldest
        running = sum(len(worker.running) for worker in plane.workers.values())
        yield _gauge("queue_depth", "Jobs that wait for a worker", len(plane.queue))
        yield _gauge("queue_oldest_seconds", "How long the first of them has waited", waited)
        yield _gauge("jobs_running", "Jobs that a worker has taken", running)
        ended = CounterMetricFamily("coldsnap_endpoint_jobs", "Jobs that have ended, by state", labels=["state"])
        for state in _ENDED:
            ended.add_metric([state], plane.counts[state])
        yield ended
        yield CounterMetricFamily("coldsnap_endpoint_retries", "Jobs tried again", value=plane.counts["retried"])
        workers = GaugeMetricFamily("coldsnap_endpoint_workers", "Workers by state", labels=["state"])
        counts = self._fleet.count()
        for name in STATES:
            workers.add_metric([name], counts[name])
        yield workers


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"coldsnap_endpoint_{name}", help_, value=value)


class Scrape:
    """The route. `authorize` refuses a request; with None anybody may ask."""

    def __init__(
        self, endpoint: Endpoint, fleet: Fleet, pushes: Pushes, authorize: Callable[[Request], None] | None
    ) -> None:
        self._platform = Platform(endpoint, fleet)
        self._pushes = pushes
        self._labels = {"endpoint": endpoint.plane.endpoint_id}
        self._authorize = authorize
        endpoint.plane.on_end = self._platform.see_job
        fleet.on_turn = self._see_worker

    async def answer(self, request: Request) -> Response:
        """Answer GET /metrics."""
        if self._authorize is not None:
            try:
                self._authorize(request)
            except Refused as refused:
                return PlainTextResponse(f"{refused.message}\n", refused.status, {"WWW-Authenticate": "Bearer"})
        own, groups = list(self._platform.registry.collect()), self._pushes.groups()
        # Workers push thousands of lines: parsed and written beside the loop that moves the streams.
        body = await asyncio.to_thread(self._text, own, groups)
        return Response(body, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _see_worker(self, worker: WorkerProcess, turn: Turn) -> None:
        self._platform.see_worker(worker, turn)
        if turn == "ended":
            self._pushes.end(worker.id)

    def _text(self, own: Iterable[Metric], groups: Iterable[Group]) -> bytes:
        """Return the text format of everything."""
        families = [*labelled(own, self._labels), *self._pushes.read(groups)]
        return generate_latest(_Families(merged(families)))


@dataclass(frozen=True, slots=True)
class _Families(Collector):
    """Metrics that have been collected."""

    families: list[Metric]

    def collect(self) -> list[Metric]:
        return self.families
