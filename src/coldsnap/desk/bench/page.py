"""A load as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from coldsnap.desk.bench import plots
from coldsnap.desk.bench.driver import Outcome
from coldsnap.desk.bench.figures import Summary
from coldsnap.desk.bench.terminal import TIMES, lines
from coldsnap.desk.report.page import templates


def render(about: Mapping[str, Any], summary: Summary, outcomes: Sequence[Outcome]) -> str:
    """Return the page."""
    drawn = {}
    if summary.succeeded:
        drawn = {
            "spreads": plots.spreads(outcomes),
            "over_time": plots.over_time(outcomes),
            "throughput": plots.throughput(outcomes, summary.seconds),
        }
    return (
        templates("coldsnap.desk.bench")
        .get_template("bench.html.jinja")
        .render(
            about=about,
            summary=summary,
            times=TIMES,
            lines=list(lines(summary, about["slo"])),
            plots=drawn,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
