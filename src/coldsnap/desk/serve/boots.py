"""Whether workers boot: how many in a row did not, why, and when the next may be tried.

The platform calls a worker that crashed unhealthy and tries again for up to 7 days, after pauses that double. Here they
double up to half a minute: whoever mends the cause sits before it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_UNHEALTHY = 3
"""Failed boots in a row after which it is not chance."""
_LONGEST_PAUSE = 30.0
_SAYS = "coldsnap: "
"""Before what a worker itself says of its end; see `errors.BootError`."""
_LOG_END = 10_000
_LOGS_KEPT = 10


@dataclass(slots=True)
class Boots:
    """The boots since the last that came to an end well."""

    failed: int = 0
    why: str = ""
    """Of the last one."""
    _not_before: float = 0.0

    @property
    def pause(self) -> float:
        """Seconds until the next boot may begin."""
        return max(0.0, self._not_before - time.monotonic())

    @property
    def trouble(self) -> str | None:
        """What is wrong, once so many failed that the next will too."""
        if self.failed < _UNHEALTHY:
            return None
        return f"workers do not start: {self.failed} boots in a row failed, the last with: {self.why}"

    def succeed(self) -> None:
        """Count a worker that takes jobs."""
        self.failed, self.why, self._not_before = 0, "", 0.0

    def fail(self, why: str) -> None:
        """Count one that ended before it took any."""
        self.failed += 1
        self.why = why
        self._not_before = time.monotonic() + min(2.0 ** (self.failed - 1), _LONGEST_PAUSE)


def prune(logs: Collection[Path]) -> None:
    """Delete all but the newest of these logs: boots that fail all night would fill the disk."""
    with contextlib.suppress(OSError):  # who took them away, or the right to, has seen to it
        for log in sorted(filter(Path.is_file, logs), key=lambda log: log.stat().st_mtime_ns)[:-_LOGS_KEPT]:
            log.unlink()


def tail(log: Path, lines: int = 5) -> list[str]:
    """Return the last lines of a worker's log that are not empty; none of one that somebody removed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_END))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def reason(log: Path) -> str | None:
    """Return why a worker ended by its log: its own sentence, else its last line."""
    lines = tail(log, _LOG_END)
    own = [line.removeprefix(_SAYS) for line in lines if line.startswith(_SAYS)]
    return next(reversed(own or lines), None)
