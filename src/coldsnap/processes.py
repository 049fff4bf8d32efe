"""Ends the worker's processes: none stays, nor what they shared, and Python's slow teardown is skipped.

A worker is billed until it has stopped, so nothing is tidied up that the kernel tidies up anyway.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_SHARED = re.compile(r"/dev/shm/psm_\w+")  # noqa: S108 -- Python chooses the place
"""Python's own names for shared memory."""
PIPE = "coldsnap-"
"""Prefix of the step meter's pipes: any other pipe may be where somebody redirected our output to."""


def children(pid: int) -> Iterator[int]:
    """Yield the ids of the processes below `pid`."""
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from children(child)


def end_at_signals() -> None:
    """End at once at SIGINT and SIGTERM, with every process below this one, until somebody else takes these signals.

    For a boot: nothing is served yet, so there is nothing to drain. As exceptions they would not do: while vLLM waits
    for its engine it swallows a KeyboardInterrupt and then waits for ten minutes, and at a SIGTERM the engine lives on.
    """
    owner = os.getpid()

    def end(signum: int, _frame: object) -> None:
        if os.getpid() == owner:  # not in a child that has been forked a moment ago
            below = list(children(owner))
            files = {file for pid in (owner, *below) for file in _files(pid)}
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for file in files:
                Path(file).unlink(missing_ok=True)
        leave(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, end)


@contextlib.contextmanager
def without_leaks(names: str) -> Iterator[None]:
    """Remove the shared memory and the sockets' files of the child processes that are killed meanwhile.

    Those whose name begins with `names` and that remain are killed here: a stopped one learns of no parent's end.
    """
    below = list(children(os.getpid()))
    named = [pid for pid in below if _name(pid).startswith(names)]
    files = {file for pid in below for file in _files(pid)}
    yield
    for pid in named:
        if _name(pid).startswith(names):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for file in files:
        Path(file).unlink(missing_ok=True)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):  # it has ended
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def _files(pid: int) -> Iterator[str]:
    """Yield the files that a process would leave behind if it were killed."""
    with contextlib.suppress(OSError):
        yield from _SHARED.findall(Path(f"/proc/{pid}/maps").read_text())
        opened = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile, as what this list was read through
                opened.add(link.readlink())
        yield from (str(path) for path in opened if path.name.startswith(PIPE) and path.is_fifo())
        sockets = {path.name for path in opened}
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            inode, *path = line.split(maxsplit=7)[6:]
            if path and path[0].startswith("/") and f"socket:[{inode}]" in sockets:
                yield path[0]


def leave(code: int) -> NoReturn:
    """End this process now: what was written is flushed, child processes are killed, modules are not torn down."""
    for child in multiprocessing.active_children():
        child.kill()  # the SDK's pings
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # nobody reads it, it is closed, or being written
            stream.flush()
    os._exit(code)
