"""What two endpoints are asked: a line of JSON for each prompt, from the user's own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from coldsnap.errors import BenchError

_KNOWN = {"prompt", "messages", "text", "answer", "max_tokens"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line: `prompt` or `messages` to be answered, or a `text` to be read."""

    number: int
    prompt: str | None
    messages: tuple[dict[str, Any], ...] | None
    text: str | None
    answer: str | None
    """What the answer should be."""
    max_tokens: int

    def shown(self) -> str:
        """Return what is asked, for people."""
        return self.prompt or self.text or str((self.messages or ({},))[-1].get("content"))


def read(path: Path, max_tokens: int) -> list[Line]:
    """Read all lines. Raises `BenchError`, which names the line and what is wrong there."""
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--data: {path}: expected a UTF-8 file: {error}") from error
    lines = [_line(path, number, row, max_tokens) for number, row in enumerate(rows, start=1) if row.strip()]
    if not lines:
        raise BenchError(f"--data: {path}: expected lines of JSON, found none")
    return lines


def _line(path: Path, number: int, row: str, max_tokens: int) -> Line:
    where = f"--data: {path}:{number}"
    try:
        entry = orjson.loads(row)
    except orjson.JSONDecodeError as error:
        raise BenchError(f"{where}: expected a JSON object: {error}") from error
    if not isinstance(entry, dict) or len(entry.keys() & {"prompt", "messages", "text"}) != 1:
        raise BenchError(f"{where}: expected an object with one of `prompt`, `messages` and `text`")
    if unknown := sorted(entry.keys() - _KNOWN):
        raise BenchError(f"{where}: {unknown[0]!r:.40} is not known; expected {', '.join(sorted(_KNOWN))}")
    for name in ("prompt", "text", "answer"):
        if name in entry and not (isinstance(entry[name], str) and entry[name].strip()):
            raise BenchError(f"{where}: {name}: expected a text, found {entry[name]!r:.60}")
    messages = entry.get("messages")
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)
    ):
        raise BenchError(f"{where}: messages: expected a list of objects, found {messages!r:.60}")
    most = entry.get("max_tokens", max_tokens)
    if type(most) is not int or most < 1:
        raise BenchError(f"{where}: max_tokens: expected a whole number above 0, found {most!r:.40}")
    return Line(
        number, entry.get("prompt"), tuple(messages) if messages else None, entry.get("text"), entry.get("answer"), most
    )
