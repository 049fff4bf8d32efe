"""How many tokens requests have: a constant, or a distribution, as the options name it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from coldsnap.errors import BenchError

_PARAMETERS = {
    "uniform": ("LEAST", "MOST"),
    "normal": ("MEAN", "SD"),
    "lognormal": ("MEDIAN", "SIGMA"),
}
FORMS = "N, " + ", ".join(":".join((name, *each)) for name, each in _PARAMETERS.items())
_MOST = 10_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers of at least 1. `sigma` of a lognormal is that of the logarithm."""

    shape: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Read `128`, `uniform:64:256`, `normal:128:32` or `lognormal:128:0.5`."""
        shape, *rest = text.split(":") if ":" in text else ("constant", text)
        parameters = ("N",) if shape == "constant" else _PARAMETERS.get(shape)
        try:
            values = [float(each) for each in rest]
        except ValueError:
            values = []
        if parameters is None or len(values) != len(parameters) or not all(0 <= value <= _MOST for value in values):
            raise BenchError(f"{option}: expected {FORMS}, in tokens, found {text!r:.80}")
        first, second = values[0], (*values, 0.0)[1]
        if first < 1 or (shape in {"constant", "uniform"} and not all(value.is_integer() for value in values)):
            raise BenchError(f"{option}: expected whole tokens, 1 at least, found {text!r:.80}")
        if shape == "uniform" and second < first:
            raise BenchError(f"{option}: expected the least before the most, found {text!r:.80}")
        if shape == "lognormal" and second > math.log(_MOST):
            raise BenchError(f"{option}: a sigma of {second:g} is more than any tokens have; 0.5 is usual")
        return cls(shape, first, second)

    def draw(self, random: random.Random) -> int:
        """Return one length."""
        match self.shape:
            case "uniform":
                return random.randint(int(self.first), int(self.second))
            case "normal":
                value = random.gauss(self.first, self.second)
            case "lognormal":
                value = random.lognormvariate(math.log(self.first), self.second)
            case _:
                value = self.first
        return max(1, min(round(value), _MOST))

    def __str__(self) -> str:
        return f"{self.first:g}" if self.shape == "constant" else f"{self.shape}:{self.first:g}:{self.second:g}"
