"""Why the engine's processes did not start, in the words of the one that failed first.

vLLM says that its core did not start and that the reason is above, in the log. Its processes are forked from this one:
a filter of its loggers, which they inherit, sends the exception that they log through a pipe. Where they are spawned
instead, nothing comes, and vLLM's own words have to do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from coldsnap.vllm.translation import first_complaint

_MOST_BYTES = 4096
"""What a pipe takes in one piece, whoever else writes to it."""


class FirstCause(logging.Filter):
    """Carries the first exception that a child process logs with one of `loggers`; made before the fork.

    vLLM sets its loggers up anew in its processes: handlers are taken off them, filters stay.
    """

    def __init__(self, loggers: Sequence[str]) -> None:
        super().__init__()
        self._loggers = loggers
        self._process = os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        for name in self._loggers:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Send what a child says, and let it be logged."""
        error = record.exc_info[1] if record.exc_info else None
        if os.getpid() != self._process and isinstance(error, Exception):
            os.write(self._write, first_complaint(error).encode()[: _MOST_BYTES - 1] + b"\n")
        return True

    def end(self) -> str | None:
        """Stop listening; return the first cause, None if no child has said any."""
        for name in self._loggers:
            logging.getLogger(name).removeFilter(self)
        os.close(self._write)
        try:
            said = os.read(self._read, _MOST_BYTES)
        except BlockingIOError:
            said = b""
        os.close(self._read)
        return said.partition(b"\n")[0].decode(errors="replace") or None
