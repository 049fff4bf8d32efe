"""A boot as a picture: its phases one below the other, along the seconds."""

from __future__ import annotations

from html import escape
from typing import Any

_WIDTH, _LEFT, _ROW = 720, 130, 20


def waterfall(records: dict[str, dict[str, Any]]) -> str:
    """Return an SVG of cold-start records by name: phases on a line each, what ran beside them in grey."""
    longest = max(record["seconds"] for record in records.values())
    scale = (_WIDTH - _LEFT - 70) / longest
    parts: list[str] = []
    y = 0

    def text(x: float, words: str, anchor: str = "start") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y + 14}" text-anchor="{anchor}">{escape(words)}</text>')

    def bar(name: str, begin: float, seconds: float, colour: str) -> None:
        nonlocal y
        x, width = _LEFT + begin * scale, max(1.0, seconds * scale)
        text(_LEFT - 8, name, "end")
        parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="14" fill="{colour}"/>')
        text(x + width + 5, f"{seconds:.2f} s")
        y += _ROW

    for name, record in records.items():
        text(0, f"{name}: {record['seconds']:.2f} s from process start to ready")
        y += _ROW + 4
        begin = 0.0
        for phase, seconds in record["phases"].items():
            if seconds >= 0.005:
                bar(phase, begin, seconds, "#3465a4")
            begin += seconds
        for work, seconds in record["beside"].items():
            bar(work, 0.0, seconds, "#b8b8b8")
        y += _ROW
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
