"""Makes a restored process one of its own: its arguments, environment and streams, its random numbers and names.

What stays shared by all processes of an image: the seed of Python's hashes, the stack's canary, and where in memory
everything lies. So an image is readable by its owner alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import tempfile
import threading
import time
from typing import Any, NoReturn

from coldsnap.errors import ImageError
from coldsnap.image.noting import Environment
from coldsnap.image.snap import Arrival

REFUSED = "COLDSNAP_IMAGE_REFUSED"
"""The variable in which a plain boot finds why the image was not used; the restorer sets it too."""


class Restored:
    """A process that came out of an image."""

    def __init__(self, arrival: Arrival, environment: Environment) -> None:
        self._arrival = arrival
        self._environment = environment

    def take_over(self) -> None:
        """Give the process what it was started with, and make it differ from every other one of its image."""
        _own_environment(self._arrival.environ)
        sys.argv[:] = self._arrival.command[1:]
        main = sys.modules["__main__"]
        main.__file__, main.__spec__ = sys.argv[0], None  # what a process that multiprocessing spawns imports
        _own_streams()
        _own_randomness()
        _own_caches()

    def settle(self, environ: Any, *, required: bool) -> None:
        """Go on if the import would have been the same in `environ`; else run the command plainly, in this process.

        To be called where a plain boot imports, before anything is started. `required`: raises `ImageError` instead.
        """
        because = self._environment.differs(environ)
        if self._arrival.command[0] != sys.executable:
            because = f"the command runs {self._arrival.command[0]}, the image {sys.executable}"
        if because is None:
            self._environment.apply(environ)
        elif required:
            raise ImageError(f"PROCESS_IMAGE=require: {because}")
        else:
            self._plainly(because)

    def _plainly(self, because: str) -> NoReturn:
        print(f"coldsnap: process image: {because}; booting plainly", file=sys.stderr, flush=True)  # noqa: T201
        environ = self._arrival.environ | {REFUSED: because}
        os.execve(self._arrival.command[0], self._arrival.command, environ)  # noqa: S606 -- what the restorer was given


_restored: Restored | None = None


def begin(restored: Restored) -> None:
    """Say that this process came out of an image."""
    global _restored  # noqa: PLW0603 -- a process is restored or it is not
    _restored = restored
    restored.take_over()


def settle(environ: Any, *, required: bool) -> None:
    """See `Restored.settle`; nothing in a process that was not restored."""
    if _restored is not None:
        _restored.settle(environ, required=required)


def is_restored() -> bool:
    """Return whether this process came out of an image."""
    return _restored is not None


def _own_environment(given: dict[str, str]) -> None:
    coerced = os.environ.get("LC_CTYPE")
    plain_locale = all(given.get(name, "C") in {"", "C", "POSIX"} for name in ("LC_CTYPE", "LANG"))
    if coerced is not None and "LC_ALL" not in given and plain_locale:
        given = {**given, "LC_CTYPE": coerced}  # as Python's own start does, PEP 538
    for name in os.environ.keys() - given.keys():
        del os.environ[name]
    for name, value in given.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    time.tzset()


def _own_streams() -> None:
    """Python sets a stream up by what it is connected to; a closed one is None."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
        else:
            getattr(sys, name).reconfigure(line_buffering=name == "stderr" or os.isatty(number))


def _own_randomness() -> None:
    """Whatever would give two processes the same numbers, keys or names."""
    random.seed()
    with contextlib.suppress(KeyError):  # before any TLS: OpenSSL seeds itself anew only where the process id differs
        sys.modules["_ssl"].RAND_add(os.urandom(64), 64.0)
    with contextlib.suppress(KeyError):
        sys.modules["numpy.random"].seed()
    names = tempfile._RandomNameSequence()  # type: ignore[attr-defined] # noqa: SLF001 -- no public way
    tempfile._name_sequence = None  # type: ignore[attr-defined] # noqa: SLF001
    tempfile.tempdir = None
    with contextlib.suppress(KeyError):
        sys.modules["multiprocessing.synchronize"].SemLock._rand = names  # noqa: SLF001
    with contextlib.suppress(KeyError):
        multiprocessing = sys.modules["multiprocessing.process"]
        config = multiprocessing.current_process()._config  # noqa: SLF001
        config["authkey"] = multiprocessing.AuthenticationString(os.urandom(32))
        config.pop("tempdir", None)


def _own_caches() -> None:
    """What Python remembers of a process or machine."""
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined] # noqa: SLF001
    logging._startTime = time.time()  # type: ignore[attr-defined] # noqa: SLF001
    with contextlib.suppress(KeyError):
        vars(sys.modules["platform"])["_uname_cache"] = None
