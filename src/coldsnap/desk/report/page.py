"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import jinja2

from coldsnap.desk.report import notation, plots
from coldsnap.desk.report.api import Rates
from coldsnap.desk.report.figures import Figures
from coldsnap.desk.report.source import Intake
from coldsnap.desk.report.terminal import reading, snapshot_rates

CAUSES = {
    "recompute": "computed again after a preemption",
    "empty": "steps in which nothing could run",
    "tail": "ran on after a request’s account was closed",
    "lost": "steps whose report was lost",
}
POLICIES = {
    "by-gpu-seconds": "in proportion to their marginal GPU-seconds",
    "by-request": "in equal parts",
}


@dataclass(frozen=True, slots=True)
class Choices:
    """What the report was asked for."""

    by: str
    loaded: str
    since: datetime | None
    rates: Rates | None


def templates(package: str) -> jinja2.Environment:
    """Return the templates of a package, with the parts and the notation that all pages share."""
    folders = [jinja2.PackageLoader(name, ".") for name in (package, "coldsnap.desk.report")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {name: getattr(notation, name) for name in ("count", "digits", "exact", "seconds", "usd")}
    return environment


def render(figures: Figures, intake: Intake, choices: Choices) -> str:
    """Return the page."""
    phases = [phase for phase in figures.phases if not phase["beside"]]
    economy = figures.economy
    drawn = {
        "spent": plots.spent(figures.spent),
        "waterfall": plots.waterfall(phases) if phases else None,
        "batches": plots.batches(figures.points, figures.batches) if figures.batches else None,
        "costs": plots.costs(figures.costs) if figures.costs else None,
        "break_even": plots.break_even(economy, figures.api)
        if economy and economy.usd_per_second and economy.requests_per_second and figures.api
        else None,
    }
    return (
        templates("coldsnap.desk.report")
        .get_template("page.html.jinja")
        .render(
            figures=figures,
            choices=choices,
            plots=drawn,
            phases=phases,
            causes=CAUSES,
            policy=POLICIES[choices.loaded],
            part=notation.part,
            ratio=notation.ratio,
            million=lambda value, tokens: None if not value or not tokens else value / tokens * 1e6,
            intake=intake,
            reading=list(reading(intake)),
            snapshot_rates=snapshot_rates(figures.boots),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
