"""Plots of a load, in the report's manner."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from coldsnap.desk.bench.driver import Outcome
from coldsnap.desk.report.plots import ACCENT, INK, MUTED, PART, SECOND, STYLE, figure, plain, svg

_Floats = npt.NDArray[np.float64]
_BINS = 60
_POINTS = 4000
_LINES = {"ttft": ("TTFT", ACCENT), "itl": ("ITL", PART["busy"]), "e2e": ("E2E", INK)}


def spreads(outcomes: Sequence[Outcome]) -> str:
    """Draw which share of the requests took how long at most."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(2.9)
        for name, (label, colour) in _LINES.items():
            values = [value * 1e3 for each in outcomes if each.error is None and (value := getattr(each, name))]
            if values:
                at = np.sort(values)
                axes.step(
                    at, np.arange(1, len(at) + 1) / len(at), where="post", color=colour, linewidth=1.6, label=label
                )
        for share in (0.5, 0.95, 0.99):
            axes.axhline(share, color=MUTED, linewidth=0.6, linestyle=":")
        axes.set_xscale("log")
        plain(axes, y=False)
        axes.set_yticks([0, 0.5, 0.95, 1], ["0", "50%", "95%", "100%"])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("requests that took no longer")
        axes.legend(loc="lower right")
        return svg(drawing, "spreads", "Requests by how long they took")


def over_time(outcomes: Sequence[Outcome]) -> str:
    """Draw each request's time to its first output by when it was due; those that failed at the bottom."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(2.7)
        step = len(outcomes) // _POINTS + 1
        dots = [(each.due, each.ttft * 1e3) for each in outcomes[::step] if each.error is None and each.ttft]
        if dots:
            due, ttft = zip(*dots, strict=True)
            axes.scatter(due, ttft, s=9, color=ACCENT, alpha=0.6, linewidths=0, label="TTFT")
        if failed := [each.due for each in outcomes if each.error is not None]:
            floor = min((value for _, value in dots), default=1.0) / 2
            axes.scatter(failed, [floor] * len(failed), s=14, color=SECOND, marker="x", linewidths=1, label="failed")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        axes.set_yscale("log")
        plain_y(axes)
        axes.set_xlabel("seconds from the start, when a request was due")
        axes.set_ylabel("ms to the first output")
        return svg(drawing, "over-time", "Time to the first output, over the load")


def throughput(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Draw the output tokens a second and the requests in flight; a request's tokens lie evenly over its output."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure(2.4)
        edges = np.linspace(0, max(seconds, 1e-3), _BINS + 1)
        tokens, flight = np.zeros(_BINS), np.zeros(_BINS)
        width = edges[1]
        for each in outcomes:
            flight += _overlap(edges, each.due, each.end) / width
            if each.error is None and each.first is not None and each.last is not None and each.output_tokens:
                last = max(each.last, each.first + 1e-6)
                tokens += each.output_tokens * _overlap(edges, each.first, last) / (last - each.first)
        middle = (edges[:-1] + edges[1:]) / 2
        axes.fill_between(middle, tokens / width, color=PART["busy"], alpha=0.35, linewidth=0)
        axes.plot(middle, tokens / width, color=PART["busy"], linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("seconds from the start")
        axes.set_ylabel("output tokens/s", color=PART["busy"])
        other = axes.twinx()
        other.plot(middle, flight, color=INK, linewidth=1)
        other.set_ylim(bottom=0)
        other.spines["right"].set_visible(False)
        other.set_ylabel("requests waiting or running")
        return svg(drawing, "throughput", "Output tokens a second and requests in flight")


def _overlap(edges: _Floats, begin: float, end: float) -> _Floats:
    """Return how much of each bin lies between two times."""
    shared: _Floats = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
    return shared.clip(0)


def plain_y(axes: mpl.axes.Axes) -> None:
    """Write the ticks of a logarithmic y axis as numbers, and leave the x axis as it is."""
    locator, formatter = axes.xaxis.get_major_locator(), axes.xaxis.get_major_formatter()
    plain(axes)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
