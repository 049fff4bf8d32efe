"""A number of things in a sentence."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """Return `1 job`, `2 jobs`, `1,000 jobs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
