"""What the platform asks for a second of a GPU. A cost computed from it is an estimate, the invoice decides.

Serverless prices per second and GPU, in US dollars, of workers that scale to zero (flex), as documented on 2026-06-08
at https://docs.runpod.io/serverless/pricing; the 16 GB class has the RTX 2000 Ada by
https://docs.runpod.io/references/gpu-types. A worker's life is billed rounded up to the second. What an active worker
costs is not published: discounts are the sales team's. `GPU_PRICE_PER_SECOND` overrides the table. A GPU that is not
in it, or a slice of one (MIG), has no price, and so no dollars.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DATE = "2026-06-08"


TABLE: dict[str, float] = {
    r"B200": 0.00240,
    r"H200": 0.00155,
    r"H100": 0.00116,
    r"RTX PRO 6000": 0.00111,
    r"A100": 0.00076,
    r"L40S?|6000 Ada": 0.00053,
    r"A6000|A40": 0.00034,
    r"4090": 0.00031,
    r"L4|A5000|3090": 0.00019,
    r"A4000|A4500|RTX 4000|2000 Ada": 0.00016,
}
"""Whole words of the name that a driver reports, such as `NVIDIA A100-SXM4-80GB`; the first match counts."""
_SLICE = "MIG"
"""What the driver's name of a part of a GPU has in it: `NVIDIA H100 80GB HBM3 MIG 1g.24gb`."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a second of one GPU costs here, or that this is not known."""

    per_second: float | None
    origin: str
    """Where the number is from, or why there is none."""

    def usd(self, gpu_seconds: float) -> float | None:
        """Return the price of `gpu_seconds`, None without a price."""
        return None if self.per_second is None else gpu_seconds * self.per_second


def flex(gpu: str) -> float | None:
    """Return a GPU's price in the table by the name that its driver reports."""
    for pattern, price in TABLE.items():
        if re.search(rf"(?<![A-Za-z0-9])({pattern})(?![A-Za-z0-9])", gpu) and _SLICE not in gpu.split():
            return price
    return None


def of(gpu: str, given: float | None = None) -> Price:
    """Return the price of a GPU by the name that its driver reports; `given` overrides the table."""
    if given is not None:
        return Price(given, "GPU_PRICE_PER_SECOND")
    if (price := flex(gpu)) is not None:
        return Price(price, f"table of {DATE}")
    return Price(
        None,
        f"{gpu!r} is not in the price table of {DATE}; set GPU_PRICE_PER_SECOND to have costs in dollars",
    )
