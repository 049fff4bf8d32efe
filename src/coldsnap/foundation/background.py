"""Work beside the event loop: a thread that looks every second whether there is something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_SECONDS = 1.0


class Background:
    """Calls `work` in a thread of its own: at `start`, when `due()` says so, when asked, and once more at `end`.

    An error that `work` raises ends the thread, with a traceback on stderr; the worker goes on.
    """

    def __init__(self, name: str, work: Callable[[], None], due: Callable[[], bool]) -> None:
        self._work = work
        self._due = due
        self._asked = threading.Event()
        self.ending = False
        """Whether this call of `work` is the last."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin. Not before the engine is forked: a fork must see no other thread."""
        self._thread.start()

    def soon(self) -> None:
        """Ask for `work` now, without waiting for it."""
        self._asked.set()

    def stop(self) -> None:
        """Ask for the last `work`, without waiting for it."""
        self.ending = True
        self._asked.set()

    def end(self, within: float) -> bool:
        """Have the last `work` done; return whether it was within so many seconds."""
        self.stop()
        if self._thread.ident:
            self._thread.join(max(0.0, within))
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._work()
        last = False
        while not last:
            is_urgent = self._asked.wait(_LOOK_SECONDS)
            self._asked.clear()
            last = self.ending
            if is_urgent or self._due():
                self._work()
