"""What the platform asks for a second of a GPU. A cost computed from it is an estimate, the invoice decides.

Serverless prices per second and GPU, in US dollars, as documented on 2026-06-08 at
https://docs.runpod.io/serverless/pricing; a worker's life is billed rounded up to the second. `flex` is what
a worker that scales to zero costs, `active` one that always runs, where the page named it.
`GPU_PRICE_PER_SECOND` overrides the table. A GPU that is not in it has no price, and so no dollars.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DATE = "2026-06-08"


@dataclass(frozen=True, slots=True)
class Tariff:
    """US dollars per second of one GPU."""

    flex: float
    active: float | None


TABLE: dict[str, Tariff] = {
    r"B200": Tariff(0.00240, 0.00190),
    r"H200": Tariff(0.00155, 0.00124),
    r"H100": Tariff(0.00116, 0.00093),
    r"RTX PRO 6000": Tariff(0.00111, None),
    r"A100": Tariff(0.00076, 0.00060),
    r"L40S?|6000 Ada": Tariff(0.00053, 0.00037),
    r"A6000|A40": Tariff(0.00034, 0.00024),
    r"4090": Tariff(0.00031, 0.00021),
    r"L4|A5000|3090": Tariff(0.00019, 0.00013),
    r"A4000|A4500|RTX 4000": Tariff(0.00016, 0.00011),
}
"""Whole words of the name that a driver reports, such as `NVIDIA A100-SXM4-80GB`; the first match counts."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a second of one GPU costs here, or that this is not known."""

    per_second: float | None
    origin: str
    """Where the number is from, or why there is none."""

    def usd(self, gpu_seconds: float) -> float | None:
        """Return the price of `gpu_seconds`, None without a price."""
        return None if self.per_second is None else gpu_seconds * self.per_second


def tariff(gpu: str) -> Tariff | None:
    """Return a GPU's line of the table by the name that its driver reports."""
    for pattern, found in TABLE.items():
        if re.search(rf"(?<![A-Za-z0-9])({pattern})(?![A-Za-z0-9])", gpu):
            return found
    return None


def of(gpu: str, given: float | None = None) -> Price:
    """Return the flex price of a GPU by the name that its driver reports; `given` overrides the table."""
    if given is not None:
        return Price(given, "GPU_PRICE_PER_SECOND")
    if (found := tariff(gpu)) is not None:
        return Price(found.flex, f"table of {DATE}")
    return Price(
        None,
        f"{gpu!r} is not in the price table of {DATE}; set GPU_PRICE_PER_SECOND to have costs in dollars",
    )
