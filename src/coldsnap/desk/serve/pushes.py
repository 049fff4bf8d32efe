"""What the workers push: the part of a Pushgateway that an endpoint on one machine needs.

A worker replaces its group with each push. When it ends its gauges go, which say what is; its counters and histograms
stay, which say what was, so that no sum over workers falls. Those of the workers that ended longest ago become one.
"""

from __future__ import annotations

import base64
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily, Sample
from prometheus_client.parser import text_string_to_metric_families

from coldsnap.desk.serve.worker_http import Request, Response, Server

_SECONDS = 2.0
"""Between two pushes of a worker, which looks every second whether it is time."""
_ENDED_KEPT = 20
"""Workers that have ended whose counters are told apart."""
_KEPT_TYPES = {"counter", "histogram", "summary"}

Labels = Mapping[str, str]


class Group:
    """The last push of one worker, parsed when it is asked for."""

    def __init__(self, labels: Labels, body: bytes = b"", families: list[Metric] | None = None) -> None:
        self.labels = labels
        self.ended = False
        self._body = body
        self._at = time.time()
        self._families = families

    def families(self) -> list[Metric]:
        """Return the metrics with the group's labels. Raises `ValueError` where the push was none."""
        if self._families is None:
            self._families = list(labelled(text_string_to_metric_families(self._body.decode()), self.labels))
        if self.ended:
            return [family for family in self._families if family.type in _KEPT_TYPES]
        pushed = GaugeMetricFamily("push_time_seconds", "Unix time of the worker's last push", labels=list(self.labels))
        pushed.add_metric(list(self.labels.values()), self._at)
        return [*self._families, pushed]


class Pushes:
    """Takes pushes on a free port of 127.0.0.1 while the context is open."""

    def __init__(self, is_worker: Callable[[str], bool], say: Callable[[str], None]) -> None:
        self._is_worker = is_worker
        self._say = say
        self._word = secrets.token_urlsafe(24)
        self._authorization = b"Basic " + base64.b64encode(f"worker:{self._word}".encode())
        self._groups: dict[str, Group] = {}
        self._ended: list[Group] = []
        """The workers that have ended, the first one first."""
        self._summed = 1
        """How many workers the first of them stands for."""

    async def __aenter__(self) -> Self:
        self._server = await Server(self._take).__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.__aexit__(kind, error, trace)

    def environment(self, environ: Mapping[str, str]) -> Mapping[str, str]:
        """Return a worker's environment in which it pushes here, unless its user has a gateway of his own."""
        if "METRICS_PUSH_URL" in environ:
            return environ
        url = f"http://worker:{self._word}@127.0.0.1:{self._server.port}"
        return {"METRICS_PUSH_SECONDS": f"{_SECONDS:g}", **environ, "METRICS_PUSH_URL": url}

    def end(self, worker_id: str) -> None:
        """Learn that a worker has ended."""
        if (group := self._groups.pop(worker_id, None)) is not None:
            group.ended = True
            self._ended.append(group)
        if len(self._ended) > _ENDED_KEPT:
            self._summed += 1
            # A name of its own each time: to Prometheus it is a new series, and none that had an increase just now.
            labels = {**self._ended[1].labels, "instance": f"ended-{self._summed}"}
            self._ended[:2] = [Group(labels, families=list(_sums(self.read(self._ended[:2]), labels)))]
            self._ended[0].ended = True

    def groups(self) -> list[Group]:
        """Return what there is, to be read by `read` in any thread."""
        return [*self._ended, *self._groups.values()]

    def read(self, groups: Iterable[Group]) -> Iterator[Metric]:
        """Yield the metrics of all groups; one that is none is left out, and said."""
        for group in groups:
            try:
                yield from group.families()
            except ValueError as error:  # a UnicodeDecodeError is one
                self._say(f"{group.labels['instance']} pushed what is no Prometheus text: {error}")

    def _take(self, request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), self._authorization):
            return Response(401)
        match request.path.strip("/").split("/"):
            case "metrics", *pairs if request.method == "PUT" and len(pairs) % 2 == 0:
                try:
                    labels = dict(map(_label, pairs[::2], pairs[1::2]))
                except ValueError:
                    return Response(400)
            case _:
                return Response(404)
        if (worker_id := labels.get("instance")) is None or not self._is_worker(worker_id):
            return Response(404)
        self._groups[worker_id] = Group(labels, request.body)
        return Response()


def _label(name: str, value: str) -> tuple[str, str]:
    """Read a pair of a push's path."""
    name, _, code = name.partition("@")
    if code == "base64":
        padded = value.rstrip("=") + "=" * (-len(value.rstrip("=")) % 4)
        return name, base64.urlsafe_b64decode(padded).decode()
    return name, unquote(value)


def _sums(families: Iterable[Metric], labels: Labels) -> Iterator[Metric]:
    """Add up what differs in `labels` only."""
    for family in merged(families):
        totals: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for sample in family.samples:
            key = sample.name, frozenset({**sample.labels, **labels}.items())
            totals[key] = totals.get(key, 0.0) + sample.value
        family.samples = [Sample(name, dict(pairs), value) for (name, pairs), value in totals.items()]
        yield family


def labelled(families: Iterable[Metric], labels: Labels) -> Iterator[Metric]:
    """Give every sample these labels too; leave out when each counter was made, a third of all series."""
    for family in families:
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        family.samples = [sample._replace(labels={**sample.labels, **labels}) for sample in samples]
        if samples:
            yield family


def merged(families: Iterable[Metric]) -> list[Metric]:
    """Make one family of those with one name: the text format has each once."""
    metrics: dict[str, Metric] = {}
    for family in families:
        if family.name not in metrics:
            metrics[family.name] = Metric(family.name, family.documentation, family.type)
        metrics[family.name].samples += family.samples
    return list(metrics.values())
