"""The plan as one HTML page, in the report's look."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from coldsnap.desk.plan import words
from coldsnap.desk.plan.calibration import Calibration
from coldsnap.desk.plan.frontier import Plan
from coldsnap.desk.report import notation
from coldsnap.desk.report.page import templates
from coldsnap.desk.report.plots import ACCENT, INK, MUTED, RULE, SECOND, STYLE, figure, plain, svg
from coldsnap.foundation.plural import plural

_HOUR = 3600.0
_WIDTHS = {"wide": 8.4, "narrow": 4.2}
"""Of the plot, for a desk and for a phone, where half the size would leave its words too small to read."""
_CLOSE, _FAR = 8.0, 1000.0
"""Logarithmic axes whose ends are less than this factor apart have ticks as linear ones; more, at powers of ten."""


def render(plan: Plan, calibration: Calibration, inputs: words.Inputs) -> str:
    """Return the page."""
    return (
        templates("coldsnap.desk.plan")
        .get_template("plan.html.jinja")
        .render(
            plan=plan,
            inputs=inputs,
            calibration=calibration,
            words=words,
            notes=[_code(note) for note in words.warnings(plan, calibration, inputs)],
            plural=plural,
            rows=list(words.rows(plan, inputs)),
            plots=[draw(plan, inputs, name, width) for name, width in _WIDTHS.items()],
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _code(text: str) -> Markup:
    return Markup(re.sub(r"`(.*?)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 -- escaped before


def draw(plan: Plan, inputs: words.Inputs, name: str, width: float) -> str:
    """Draw what was tried: cost against the p95 of the time to the first token, the frontier as a line."""
    hours = plan.seconds / _HOUR or 1.0
    with mpl.rc_context(STYLE):
        drawing, axes = figure(3.9)
        drawing.set_figwidth(width)
        axes.scatter(
            [point.cost / hours for point in plan.points], [point.ttft95 for point in plan.points],
            s=11, color=MUTED, alpha=0.45, linewidths=0,
        )  # fmt: skip
        line = [(point.cost / hours, point.ttft95) for point in plan.frontier]
        axes.step(*zip(*line, strict=True), where="post", color=ACCENT, linewidth=1.6, marker="o", markersize=4)
        if plan.target is not None:
            axes.axhline(plan.target, color=SECOND, linewidth=0.9, linestyle="--")
            axes.annotate(
                f"target {notation.seconds(plan.target)}", (1, plan.target), (0, 3), ha="right", fontsize=7.5,
                xycoords=("axes fraction", "data"), textcoords="offset points", color=SECOND,
            )  # fmt: skip
        marked = {inputs.current_name: plan.current, "recommended": plan.recommended}
        for label, point in marked.items():
            if point is not None:
                at = (point.cost / hours, point.ttft95)
                axes.plot(*at, "o", markersize=8, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.3)
                axes.annotate(label, at, (8, 5), textcoords="offset points", fontweight="bold")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.08, 0.12)
        plain(axes)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            if high < low * _CLOSE:
                axis.set_major_locator(MaxNLocator(5))
                axis.set_major_formatter(FuncFormatter(lambda value, _: notation.digits(value, 2)))
            elif high > low * _FAR:
                axis.set_major_locator(LogLocator())
        axes.grid(color=RULE)
        axes.set_xlabel("GPU-seconds an hour" if plan.current.usd is None else "dollars an hour")
        axes.set_ylabel("p95 TTFT, seconds")
        return svg(drawing, f"frontier-{name}", "Cost against the time to the first token")
