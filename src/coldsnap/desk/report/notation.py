"""How figures are written: as many digits as one reads, and a dash for what is not known."""

from __future__ import annotations

NONE = "–"
_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def digits(value: float | None, significant: int = 3) -> str:
    """Return a number with thousands separated and at least that many digits: 1,234 and 0.00123."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10 ** (significant - 1):
        return f"{value:,.0f}"
    places = significant - 1
    while size < 1:
        size *= 10
        places += 1
    while size >= 10:  # noqa: PLR2004 -- a digit more before the point
        size /= 10
        places -= 1
    return f"{value:.{places}f}"


def seconds(value: float | None) -> str:
    """Return seconds, in milliseconds or microseconds where they are few."""
    if value is None:
        return NONE
    unit, size = next(((unit, size) for unit, size in _UNITS if abs(value) >= size), _UNITS[-1])
    return f"{digits(value / size)} {unit}"


def exact(value: float | None) -> str:
    """Return GPU-seconds to be added up: always three places."""
    return NONE if value is None else f"{value:,.3f}"


def usd(value: float | None) -> str:
    """Return dollars: cents from a dollar on, three digits below."""
    if value is None:
        return NONE
    return f"${value:,.2f}" if value >= 1 else f"${digits(value)}"


def part(value: float, whole: float) -> str:
    """Return a part of a whole in per cent."""
    return f"{value / whole:.1%}" if whole else NONE


def count(value: float | None) -> str:
    """Return a whole number."""
    return NONE if value is None else f"{value:,.0f}"


def ratio(value: float | None, by: float | None) -> float | None:
    """Divide, where there is something to divide by."""
    return value / by if value is not None and by else None
