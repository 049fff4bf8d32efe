"""What a request must keep to in order to count as good: `ttft=200ms,itl=30ms,e2e=2s`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from coldsnap.desk.bench.driver import Outcome
from coldsnap.errors import BenchError

_NAMES = ("ttft", "itl", "e2e")
_UNITS = {"ms": 1e-3, "s": 1.0}
_TERM = re.compile(r"(\w+)=(\d+(?:\.\d+)?)(ms|s)")


@dataclass(frozen=True, slots=True)
class Slo:
    """The objectives: at most so many seconds for each name."""

    most: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read the option. Raises `BenchError`."""
        most: dict[str, float] = {}
        for term in text.split(","):
            match = _TERM.fullmatch(term.strip())
            if match is None or match[1] not in _NAMES or match[1] in most:
                expected = "some of ttft, itl and e2e, each once, as in ttft=200ms,itl=30ms,e2e=2s"
                raise BenchError(f"--slo: expected {expected}, found {term!r:.60}")
            most[match[1]] = float(match[2]) * _UNITS[match[3]]
        return cls(most)

    def kept(self, outcome: Outcome) -> bool:
        """Whether a request did: one that failed did not; one of a single token has no time between tokens."""
        if outcome.error is not None:
            return False
        values = {"ttft": outcome.ttft, "itl": outcome.itl or 0.0, "e2e": outcome.e2e}
        return all((value := values[name]) is not None and value <= most for name, most in self.most.items())
