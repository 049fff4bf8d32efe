"""Plots as SVG for the page: text stays text in the page's font, colours are the page's variables.

matplotlib knows neither `currentColor` nor CSS variables, so it draws in colours that stand for them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from coldsnap.cost.books import HEADINGS
from coldsnap.desk.report import notation
from coldsnap.desk.report.figures import ApiCost, Economy, Row

INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
PART = {part: f"#05050{place}" for place, part in enumerate(HEADINGS)}
ACCENT, SECOND = "#060601", "#060602"
_VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
} | {colour: f"var(--{part})" for part, colour in PART.items()}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.loc": "upper right",  # "best" looks for a place, for seconds where there is much to avoid
}
_WIDTH = 8.4
_LABELS_APART = 1.5
"""The least ratio of two prices between which there is room for a name."""


def spent(parts: dict[str, float]) -> str:
    """Draw one bar: where the GPU-seconds went."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(0.5)
        whole, at = sum(parts.values()) or 1.0, 0.0
        for part, value in parts.items():
            axes.barh(0, value, left=at, height=1, color=PART[part], edgecolor=PAPER, linewidth=1.2)
            if value / whole > 0.08:  # noqa: PLR2004 -- wide enough for its name
                label = f"{part} {value / whole:.0%}"
                axes.text(at + value / 2, 0, label, ha="center", va="center", color=PAPER, fontweight="bold")
            at += value
        axes.set_xlim(0, whole)
        axes.axis("off")
        return svg(drawing, "spent", "Where the GPU-seconds went")


def waterfall(phases: Sequence[Row]) -> str:
    """Draw the phases of a cold start, each where the medians before it end; a thin line reaches to its p95."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(0.55 + 0.26 * len(phases))
        at, furthest = 0.0, 0.0
        for row, phase in enumerate(phases):
            axes.barh(row, phase["p50"], left=at, height=0.62, color=PART["cold"])
            axes.plot([at + phase["p50"], at + max(phase["p95"], phase["p50"])], [row, row], color=INK, linewidth=1)
            end = at + max(phase["p50"], phase["p95"])
            furthest = max(furthest, end)
            axes.annotate(
                f"{notation.seconds(phase['p50'])}", (end, row), (5, 0), textcoords="offset points", va="center"
            )
            at += phase["p50"]
        axes.set_yticks(range(len(phases)), [phase["phase"] for phase in phases])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, furthest * 1.1 or 1)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("seconds since the process started")
        return svg(drawing, "waterfall", "Phases of a cold start")


def batches(points: Sequence[tuple[float, float]], rows: Sequence[Row]) -> str:
    """Draw what an output token cost against how many requests shared its steps."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(3.1)
        axes.scatter(
            [batch for batch, _ in points], [seconds * 1e3 for _, seconds in points],
            s=9, color=ACCENT, alpha=0.35, linewidths=0,
        )  # fmt: skip
        middle = [row["seconds"][1] * 1e3 for row in rows]
        axes.plot([row["mean"] for row in rows], middle, color=INK, linewidth=1.4, marker="o", markersize=3.5)
        for row, value in zip(rows, middle, strict=True):
            axes.annotate(
                notation.digits(value), (row["mean"], value), (0, 8), textcoords="offset points", ha="center",
                fontsize=8, bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.6},
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.margins(y=0.14)
        plain(axes)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
        axes.set_xlabel("requests in a step, mean over the request's steps")
        axes.set_ylabel("GPU-milliseconds per output token")
        return svg(drawing, "batches", "Batch size against the cost of an output token")


def costs(pairs: Sequence[tuple[float, float]]) -> str:
    """Draw how the requests' marginal and loaded cost are spread."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(2.2)
        values = np.array(pairs)
        low, high = math.log10(values.min()), math.log10(values.max())
        bins = np.logspace(low - 0.02, high + 0.02, 48).tolist()
        axes.hist(values[:, 0], bins, color=PART["busy"], alpha=0.85, label="marginal")
        axes.hist(values[:, 1], bins, histtype="step", color=INK, linewidth=1.1, label="loaded")
        axes.set_xscale("log")
        plain(axes, y=False)
        axes.grid(axis="y")
        axes.set_xlabel("GPU-seconds of a request")
        axes.set_ylabel("requests")
        axes.legend()
        return svg(drawing, "costs", "What requests cost")


def break_even(economy: Economy, api: Sequence[ApiCost]) -> str:
    """Draw what 1,000 requests cost on a worker that keeps running, by its load, and at the rates of APIs."""
    assert economy.usd_per_second is not None
    with mpl.rc_context(STYLE):
        drawing, axes = figure(3.1)
        most = economy.most_requests_per_second or economy.requests_per_second
        rates_with_price = [each for each in api if each.usd > 0]
        ends = [most, economy.requests_per_second, *(each.requests_per_second or most for each in rates_with_price)]
        load = np.logspace(math.log10(min(ends) / 4), math.log10(max(ends) * 2), 80)
        able = load[load <= most]
        axes.plot(able, economy.usd_per_second / able * 1000, color=PART["busy"], linewidth=2)
        axes.plot(load[load >= most], economy.usd_per_second / load[load >= most] * 1000,
                  color=PART["busy"], linewidth=1.2, linestyle=":")  # fmt: skip
        here = economy.requests_per_second
        axes.plot([here], [economy.usd_per_second / here * 1000], "o", color=INK, markersize=5)
        axes.annotate("this ledger", (here, economy.usd_per_second / here * 1000), (7, 4), textcoords="offset points")
        priced = sorted((each.usd / each.requests * 1000, each.rate.name) for each in rates_with_price)
        above = [price for price, _ in priced[1:]] + [math.inf]
        for (price, name), following in zip(priced, above, strict=True):
            axes.axhline(price, color=ACCENT, linewidth=0.9)
            below = following < price * _LABELS_APART
            axes.annotate(
                name, (load[-1], price), (-2, -3 if below else 3), textcoords="offset points", ha="right",
                va="top" if below else "bottom", fontsize=7.5, color=ACCENT,
            )  # fmt: skip
        axes.axvline(most, color=MUTED, linewidth=0.8, linestyle="--")
        axes.annotate(
            "always busy", (most, 1), (4, -9), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=7.5, color=MUTED,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(load[0], load[-1])
        plain(axes)
        axes.set_xlabel("requests per second on one worker")
        axes.set_ylabel("dollars for 1,000 requests")
        return svg(drawing, "break-even", "Own GPU against APIs, by load")


def figure(height: float) -> tuple[Figure, Axes]:
    """Return an empty drawing of the page's width; `height` is in the same unit as its width, 8.4."""
    drawing = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.0, h_pad=0.02))
    drawing.patch.set_visible(False)
    axes = drawing.add_subplot()
    axes.set_facecolor("none")  # beside a second y axis matplotlib shows a hidden patch again
    return drawing, axes


def plain(axes: Axes, *, y: bool = True) -> None:
    """Write the ticks of logarithmic axes as numbers."""
    for axis in (axes.xaxis, axes.yaxis) if y else (axes.xaxis,):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: notation.digits(value, 1)))
        axis.set_minor_formatter(NullFormatter())
        axis.grid(visible=True)


def svg(drawing: Figure, name: str, title: str) -> str:
    """Return the drawing as an element of an HTML page, with ids that no other plot of the page has."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        drawing.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"font(-family|): [^;\"]*;? ?", _font, text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" aria-label="{title}">', text, count=1)
    return re.sub(r"\n\s*", "\n", text)


def _font(match: re.Match[str]) -> str:
    """Keep the size and weight of a font, not its family."""
    size = re.search(r"([\d.]+)px", match[0])
    weight = "font-weight: 600; " if "bold" in match[0] or "700" in match[0] else ""
    return f"{weight}font-size: {size[1]}px; " if size else weight
