"""Has an image made for the next boot, by a process of the lowest priority, once nothing else wants the machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coldsnap.foundation.background import Background


def start(command: Sequence[str], environ: Mapping[str, str], folder: Path) -> None:
    """Run `command` for itself; it outlives this process, and what it says is in `make.log`."""
    with (folder / "make.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 -- our own program
            command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
    try:
        os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # a sandbox without it
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)


class Later(Background):
    """Starts the maker after the first second without a job."""

    def __init__(self, begin: Callable[[], None], *, busy: Callable[[], bool], served: Callable[[], int]) -> None:
        super().__init__("image", self._look, lambda: not self._done)
        self._begin = begin
        self._busy = busy
        self._served = served
        self._seen = -1
        self._done = False

    def soon(self) -> None:
        """Leave it: the worker is about to end."""
        self._done = True

    def _look(self) -> None:
        served = self._served()
        idle = not self._busy() and served == self._seen
        self._seen = served
        if idle and not self.ending and not self._done:
            self._done = True
            self._begin()
