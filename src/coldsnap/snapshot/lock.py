"""A lock among machines that share a folder: a file with a heartbeat, taken over when the beat stops.

`flock` is not to be trusted on every network volume; creating a file that must not exist is. The lock's files are
`NAME.1`, `NAME.2`, …: who created the highest one holds it. A waiter that has seen no beat for a while, by its own
clock, creates the next, which only one of several can. A holder that wakes up again finds the higher file and
knows that it has lost. Until it looks there may be two who believe that they hold the lock: what it guards must
bear that, and do no worse than the work twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

BEAT_SECONDS = 2.0
STALE_SECONDS = 20.0
"""Without a beat for so long the holder counts as dead; a network volume may show a beat seconds late."""
_LOOK_SECONDS = 0.2


class Lock:
    """`acquire`, then use as a context; it beats in a thread until the end of the block.

    `path` names the lock, in a folder that exists.
    """

    def __init__(
        self,
        path: Path,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._mine = f"{os.uname().nodename} {os.getpid()} {os.urandom(8).hex()}"
        self._number = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def acquire(self, done: Callable[[], bool], waiting: Callable[[str], None]) -> bool:
        """Wait for the lock; return whether it is held: False if `done()` came first.

        `waiting` is told once who holds it. `OSError` if the folder takes no file.
        """
        last_state: tuple[int, str] | None = None
        since = self._clock()
        while not done():
            number = self._highest()
            state = (number, self._read(number))
            if state != last_state:
                if last_state is None and number:
                    waiting(state[1].rpartition(" ")[0])
                last_state, since = state, self._clock()
            if number == 0 or self._clock() - since > self._stale_seconds:
                if self._create(number + 1):
                    return True
                continue
            time.sleep(min(_LOOK_SECONDS, self._beat_seconds / 2))
        return False

    @property
    def lost(self) -> bool:
        """Whether another has taken the lock over. Looks into the folder."""
        return self._highest() != self._number

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for number in sorted(self._numbers()):  # the highest last: as long as it is there, nobody else is let in
            if number <= self._number:
                self._file(number).unlink(missing_ok=True)

    def _keep(self) -> None:
        beat = 0
        while not self._over.wait(self._beat_seconds):
            beat += 1
            try:
                if self.lost:
                    return
                # Not the time of change, which a volume may show late: a file that is opened is read anew.
                self._file(self._number).write_text(f"{self._mine} {beat}", encoding="utf-8")
            except OSError:  # a volume that is away for a moment; if it stays away, the others stop waiting
                continue

    def _create(self, number: int) -> bool:
        try:
            with self._file(number).open("x", encoding="utf-8") as file:
                file.write(f"{self._mine} 0")
        except FileExistsError:
            return False
        self._number = number
        return True

    def _read(self, number: int) -> str:
        try:
            return self._file(number).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        names = (path.name.rpartition(".") for path in self._path.parent.iterdir())
        return [int(end) for name, _, end in names if name == self._path.name and end.isdecimal()]

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
