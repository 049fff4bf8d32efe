"""The plan on the terminal: the page without its plot."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldsnap.desk.plan import words
from coldsnap.desk.plan.calibration import Calibration
from coldsnap.desk.plan.frontier import Plan
from coldsnap.foundation.plural import plural

_STYLES = {"recommended": "bold", "current": "dim", "other": ""}


def show(plan: Plan, calibration: Calibration, inputs: words.Inputs, console: Console) -> None:
    """Print everything."""
    console.print(Text(inputs.trace, style="bold"), end="")
    console.print(Text(f": {words.about(plan, inputs)}"))
    for line in words.assumed(calibration, inputs):
        console.print(Text(f"  {line}", style="dim"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(words.COLUMNS):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for kind, cells in words.rows(plan, inputs):
        table.add_row(*cells, style=_STYLES[kind])
    console.print(table)
    console.print(Text(words.KEY, style="dim"))
    for line in words.warnings(plan, calibration, inputs):
        console.print(Text(f"! {line}", style="yellow"))
    if plan.target is None or plan.recommended:
        console.print(Text(words.verdict(plan, inputs)))
    console.print(Text(f"{plural(len(plan.points), 'setting')} simulated in {plan.took:.1f} s.", style="dim"))
