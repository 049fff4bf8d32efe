"""Notes which variables of the environment an import reads, so that a boot with others does not use its image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_INTERPRETER = ("LD_LIBRARY_PATH", "LD_PRELOAD", "LD_BIND_NOW", "GLIBC_TUNABLES", "LC_ALL", "LC_CTYPE", "LANG")
"""What the dynamic linker and the C library read without asking `getenv`."""
_SEARCHED = ("TQDM_", "NETWORKX_")
"""What is looked for by its beginning: a look at every variable is not counted as a reading of each."""
ASKED_ANEW: Mapping[str, str] = {
    "VLLM_LOGGING_LEVEL": "a boot sets the level of vLLM's logger anew",
    "TMPDIR": "Python's folder for temporary files is looked for again",
    "TEMP": "as TMPDIR",
    "TMP": "as TMPDIR",
    "COLUMNS": "the terminal is asked when something is drawn",
    "LINES": "as COLUMNS",
    "PWD": "the folder is the process's own",
    "OLDPWD": "as PWD",
    "SHLVL": "a shell's own",
}
"""Variables that are read at an import and may differ nonetheless, with the reason."""
_OTHERS = ("RUNPOD_",)
"""What only the SDK reads; it is imported again."""


class _Noting(os._Environ):  # type: ignore[type-arg] # noqa: SLF001 -- `os.environ` is one
    """`os.environ` that notes who is read.

    Who copies all of it, for another program, has read none: names that are read in the order of a walk over all of
    them, to its end, are not noted. Names of a walk that was broken off are.
    """

    def __getitem__(self, key: str) -> str:
        if _walk.due and key == _walk.due[0]:
            _walk.passed.append(_walk.due.pop(0))
            _walk.forget_if_whole()
        else:
            _walk.end()
            if isinstance(key, str):
                _read.add(key)
        value: str = super().__getitem__(key)
        return value

    def __iter__(self) -> Iterator[str]:
        _walk.end()
        for name in super().__iter__():
            _walk.due.append(name)
            yield name
        _walk.is_whole = True
        _walk.forget_if_whole()


class _Walk:
    """A walk over all names: those whose values are still to be read, and those that have been."""

    def __init__(self) -> None:
        self.due: list[str] = []
        self.passed: list[str] = []
        self.is_whole = False

    def forget_if_whole(self) -> None:
        if self.is_whole and not self.due:
            self.passed.clear()

    def end(self) -> None:
        _read.update(self.passed)
        self.due, self.passed, self.is_whole = [], [], False


_read: set[str] = set()
_walk = _Walk()


def begin() -> None:
    """Note what Python code reads of `os.environ` from here on."""
    _read.clear()
    os.environ.__class__ = _Noting


def end() -> None:
    """Stop noting."""
    _walk.end()
    os.environ.__class__ = os._Environ  # noqa: SLF001


class Environment:
    """What an import saw of the environment, and what it changed of it."""

    def __init__(self, before: Mapping[str, str], after: Mapping[str, str], read_by_c: set[str]) -> None:
        names = (_read | read_by_c | set(_INTERPRETER)) - ASKED_ANEW.keys()
        self._seen = {name: before.get(name) for name in sorted(names) if not name.startswith(_OTHERS)}
        self._changed = {
            name: after.get(name)
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) and name != "TORCHINDUCTOR_CACHE_DIR"
        }
        self._searched = _found(before)
        self._processors = _processors()

    def differs(self, environ: Mapping[str, str], *, ask: Callable[[], int] | None = None) -> str | None:
        """Return what would have made the import another one, None if nothing would."""
        for name, value in self._seen.items():
            if (now := environ.get(name)) != value:
                return f"{name} is {_shown(now)}, the image was made with {_shown(value)}"
        if (found := _found(environ)) != self._searched:
            return f"{', '.join(sorted(found ^ self._searched))}: differs from what the image was made with"
        if (processors := (ask or _processors)()) != self._processors:
            return f"{processors} processors, the image was made with {self._processors}"
        return None

    def apply(self, environ: Any) -> None:
        """Change the environment as the import did."""
        for name, value in self._changed.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value


def _found(environ: Mapping[str, str]) -> set[str]:
    return {f"{name}={value}" for name, value in environ.items() if name.startswith(_SEARCHED)}


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _shown(value: str | None) -> str:
    return "not set" if value is None else f"{value!r:.100}"
