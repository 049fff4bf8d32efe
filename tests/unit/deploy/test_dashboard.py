"""Grafana's dashboard and provisioning, as far as they can be held to their formats without a Grafana.

Grafana's own models read the dashboard: what they do not know, a misspelt option among it, they drop.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from coldsnap.settings import ROOT

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "coldsnap.json").read_text("utf-8"))
PANELS = {panel["title"] or panel["id"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}


def lost(before: Any, after: Any, path: str = "") -> list[str]:
    """Return where `after` lacks or changes something of `before`; what it adds are defaults."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            each
            for name, value in before.items()
            for each in (lost(value, after[name], f"{path}.{name}") if name in after else [f"{path}.{name}"])
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [each for i, pair in enumerate(zip(before, after, strict=True)) for each in lost(*pair, f"{path}[{i}]")]
    return [] if before == after else [path]


def read_by_grafana(dashboard: dict[str, Any]) -> Any:
    plugins.register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard)))


def test_grafana_s_own_models_know_all_of_the_dashboard() -> None:
    assert lost(DASHBOARD, read_by_grafana(DASHBOARD)) == []


@pytest.mark.parametrize(("right", "wrong"), [("showPoints", "showPionts"), ("gridPos", "grid"), ("expr", "query")])
def test_what_they_do_not_know_is_noticed(right: str, wrong: str) -> None:
    dashboard = json.loads(json.dumps(DASHBOARD).replace(f'"{right}"', f'"{wrong}"'))
    assert any(path.endswith(f".{wrong}") for path in lost(dashboard, read_by_grafana(dashboard)))


def test_panels_have_ids_of_their_own_and_lie_beside_each_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


@pytest.mark.parametrize("panel", PANELS.values(), ids=PANELS)
def test_a_panel_says_what_it_shows_and_in_what_unit_and_asks_the_chosen_prometheus(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert 'endpoint=~"$endpoint"' in target["expr"]


def test_grafana_is_told_where_prometheus_and_the_dashboards_are() -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://127.0.0.1:9090", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "coldsnap.yml").read_text("utf-8"))["providers"]
    guide = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert f"deploy/grafana/dashboards:{provider['options']['path']}" in guide
