"""What functions that search the whole environment have found, kept in a file until the environment changes."""

from __future__ import annotations

import contextlib
import marshal
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def environment_key() -> str:
    """Return what changes whenever a package is installed, upgraded or removed: the folders and their times.

    In whole seconds: an image's layers keep no more of a time, so that nanoseconds would change at the first pull.
    """
    folders = [Path(name) for name in sys.path if Path(name).name in {"site-packages", "dist-packages"}]
    return repr([sys.version, *((str(folder), int(folder.stat().st_mtime)) for folder in folders if folder.exists())])


class Remembered:
    """Answers of functions, by the function's name. Files in the environment that are edited in place go unseen."""

    def __init__(self, file: Path, key: str) -> None:
        self._file = file
        self._key = key
        self._answers: dict[str, bytes] = {}
        self._known = 0
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            kept, answers = marshal.loads(file.read_bytes())  # noqa: S302 -- as trusted as the bytecode beside it
            if kept == key:
                self._answers = answers
                self._known = len(answers)

    def answer(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return what `ask` returns, or returned when it was last asked. Plain data only, and its own each time."""
        if name not in self._answers:
            self._answers[name] = marshal.dumps(ask())
        return marshal.loads(self._answers[name])  # noqa: S302

    def keep(self) -> None:
        """Write down what is new. A folder that cannot be written is no error: the next boot asks again."""
        if len(self._answers) == self._known:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}")
            part.write_bytes(marshal.dumps((self._key, self._answers)))
            part.replace(self._file)
