"""A comparison as people see it: on the terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldsnap.desk.bench.answer import Failed
from coldsnap.desk.compare.asking import Reading, Reply, Round
from coldsnap.desk.compare.figures import LEAST, Difference, differences, divergence, same_answers
from coldsnap.desk.compare.prompts import Line
from coldsnap.desk.report.notation import digits, seconds
from coldsnap.desk.report.page import templates
from coldsnap.foundation.plural import plural

COLUMNS = ("", "pairs", "A", "B", "B against A", "95% interval", "")
_SAMPLES = 12
_WIDE = 150


@dataclass(frozen=True)
class Comparison:
    """What was asked, and what came of it."""

    a: str
    b: str
    lines: Sequence[Line]
    rounds_a: Sequence[Round]
    rounds_b: Sequence[Round]
    readings: Sequence[tuple[Reading, Reading]]

    @property
    def failures(self) -> list[str]:
        """A sentence for each side that failed."""
        said = []
        for name, rounds in (("A", self.rounds_a), ("B", self.rounds_b)):
            failed = [reply for each in rounds for reply in each.replies if isinstance(reply, Failed)]
            if failed:
                said.append(f"{name}: {plural(len(failed), 'request')} failed, the first with {failed[0]}")
        return said

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a row for each figure."""
        for each in differences(self.lines, self.rounds_a, self.rounds_b, self.readings):
            interval = f"{_change(each, each.low)} to {_change(each, each.high)}" if each.pairs >= LEAST else ""
            values = (_value(each, each.a), _value(each, each.b), _change(each, each.change))
            yield each.name, str(each.pairs), *values, interval, each.verdict

    def notes(self) -> list[str]:
        """Return what is no pair of figures."""
        notes = self.failures
        if self.lines:
            same, both = same_answers(self.rounds_a, self.rounds_b)
            notes.append(f"{same} of {plural(both, 'greedy answer')} are the same text.")
        if (least := divergence(self.readings)) is not None:
            notes.append(
                f"KL divergence of B from A: at least {digits(least)} nats a token, by the 20 likeliest tokens."
            )
        return notes

    def show(self) -> None:
        """Print everything."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDE)
        console.print(Text(f"A {self.a}\nB {self.b}", style="bold"))
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if place in {0, len(COLUMNS) - 1} else "right")
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        for note in self.notes():
            console.print(Text(note))

    def page(self) -> str:
        """Return the page."""
        first = zip(self.lines, self.rounds_a[0].replies, self.rounds_b[0].replies, strict=True) if self.lines else ()
        samples = [
            (line.shown(), *(each.said if isinstance(each, Reply) else f"failed: {each}" for each in pair))
            for line, *pair in first
        ]
        samples.sort(key=lambda sample: sample[1] == sample[2])  # what differs comes first
        return (
            templates("coldsnap.desk.compare")
            .get_template("compare.html.jinja")
            .render(
                comparison=self,
                columns=COLUMNS,
                rows=list(self.rows()),
                notes=self.notes(),
                samples=samples[:_SAMPLES],
                written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            )
        )


def _value(each: Difference, value: float) -> str:
    if each.unit == "seconds":
        return seconds(value)
    return f"{value:.0%}" if each.unit == "share" else digits(value)


def _change(each: Difference, value: float) -> str:
    return f"{100 * value:+.0f} points" if each.unit == "share" else f"{value:+.1%}"
