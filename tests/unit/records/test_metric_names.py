"""docs/metrics.md has every metric of ours, as the code exports it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, Metric

from coldsnap.desk.serve.job import JobState
from coldsnap.desk.serve.scrape import Platform
from coldsnap.records.metrics import Metrics
from coldsnap.records.schema import ColdStart, Worker
from coldsnap.settings import ROOT

GUIDE = (ROOT / "docs" / "metrics.md").read_text("utf-8")


def of_a_worker() -> Iterable[Metric]:
    """Return what a worker that has everything exports: a price, GPUs that report energy, a bucket."""
    registry = CollectorRegistry(auto_describe=True)
    metrics = Metrics(registry)
    metrics.see(ColdStart.model_construct(phases={"engine": 1.0}))
    metrics.see(Worker.model_construct(**dict.fromkeys(Worker.model_fields, 1)))
    return registry.collect()


def of_the_platform() -> Iterable[Metric]:
    """Return what an endpoint without jobs and workers exports."""
    plane = SimpleNamespace(queue=[], workers={}, counts=dict.fromkeys([*JobState, "retried"], 0))
    states = dict.fromkeys(("initializing", "idle", "running", "throttled", "unhealthy"), 0)
    endpoint, fleet = SimpleNamespace(plane=plane), SimpleNamespace(count=lambda: states)
    return Platform(cast(Any, endpoint), cast(Any, fleet)).registry.collect()


def table(metrics: Iterable[Metric]) -> str:
    """Return the Markdown table of a guide."""
    rows = ["| metric | type | labels | what it is |", "|---|---|---|---|"]
    for metric in sorted(metrics, key=lambda metric: metric.name):
        labels = {name for sample in metric.samples for name in sample.labels} - {"le"}
        name = metric.name + "_total" * (metric.type == "counter")
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        rows.append(f"| `{name}` | {metric.type} | {shown} | {metric.documentation} |")
    return "\n".join(rows)


@pytest.mark.parametrize(("name", "metrics"), [("worker", of_a_worker), ("platform", of_the_platform)])
def test_the_guide_s_table_is_what_the_code_exports(name: str, metrics: Any) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", GUIDE, re.DOTALL)
    assert found
    assert found[1].strip() == table(metrics())
