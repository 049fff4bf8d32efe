"""The configurations and rules of `deploy/prometheus`, by Prometheus's own tool."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from tests.programs.monitoring import DEPLOY


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "desk.yml"), ("check", "config", "pushgateway.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_finds_no_fault(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done.stdout + done.stderr


def test_every_alert_is_seen_to_fire() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text("utf-8"))["tests"]
    fired = {
        sample["labels"]
        for test in tests
        for asked in test["promql_expr_test"]
        if "firing" in asked["expr"]
        for sample in asked["exp_samples"]
    }
    assert fired == {f'{{alertname="{name}"}}' for name in alerts}
