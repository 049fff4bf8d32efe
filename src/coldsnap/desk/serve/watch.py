"""A worker's log, followed while it is written: the records among its lines.

Any other line is kept only as the last one that was said. What reads a log decides when: nothing runs beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coldsnap.records.schema import ColdStart, Line, Request, Worker

_READ_AT_ONCE = 1_000_000
_LONGEST_LINE = 1_000_000
_SAID_CHARACTERS = 200
_LINE: TypeAdapter[ColdStart | Request | Worker] = TypeAdapter(Line)


class Log:
    """A file that a worker writes its stdout and stderr to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self._begun = b""
        """The beginning of a line whose end is not there yet."""
        self._skipping = False
        self.said = ""
        """The last line that was no record."""

    def read(self) -> list[ColdStart | Request | Worker]:
        """Return the records of what was written since the last call, a megabyte at most: no caller waits long."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._at:  # somebody emptied it
                    self._at, self._begun = 0, b""
                file.seek(self._at)
                new = file.read(_READ_AT_ONCE)
        except OSError:  # somebody removed it
            return []
        self._at += len(new)
        *lines, self._begun = (self._begun + new).split(b"\n")
        if lines and self._skipping:
            del lines[0]
            self._skipping = False
        if len(self._begun) > _LONGEST_LINE:
            self._begun, self._skipping = b"", True
        return [record for line in lines if (record := self._record(line)) is not None]

    def _record(self, line: bytes) -> ColdStart | Request | Worker | None:
        if line.startswith(b'{"') and b'"record"' in line:
            try:
                return _LINE.validate_json(line)
            except ValidationError:
                pass  # another program's JSON, or another version's record
        if text := line[: 4 * _SAID_CHARACTERS].decode(errors="replace").strip():
            self.said = text[:_SAID_CHARACTERS]
        return None
