"""Ends the worker's processes: none stays, nor what they shared, and Python's slow teardown is skipped.

A worker is billed until it has stopped, so nothing is tidied up that the kernel tidies up anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_SHARED = re.compile(r"/dev/shm/psm_\w+")  # noqa: S108 -- Python chooses the place
"""Python's own names for shared memory."""
_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG, prctl(2)."""
_ENGINE = "VLLM::"
"""How vLLM's names for its processes begin."""
_UUID = "-".join("[0-9a-f]" * digits for digits in (8, 4, 4, 4, 12))
"""vLLM's names for its sockets."""
_MOMENT_SECONDS = 60.0
PIPE = "coldsnap-"
"""Prefix of the step meter's pipes: any other pipe may be where somebody redirected our output to."""


def children(pid: int) -> Iterator[int]:
    """Yield the ids of the processes below `pid`."""
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from children(child)


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends, however that comes."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def tie_children() -> None:
    """Let no process that is forked from here on outlive the one that forked it, even if that one is killed.

    vLLM's engine does not notice that its front end is gone: it would keep the GPU and wait for ever.
    """
    os.register_at_fork(after_in_child=end_with_parent)


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
def without_leaks() -> Iterator[None]:
    """Remove the shared memory and the sockets' files of the child processes that are killed meanwhile.

    Those of the engine that remain are killed here: a stopped one learns of no parent's end.
    """
    below = list(children(os.getpid()))
    engine = [pid for pid in below if _name(pid).startswith(_ENGINE)]
    files = {file for pid in below for file in _files(pid)}
    yield
    for pid in engine:
        if _name(pid).startswith(_ENGINE):
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


def remove_left_behind(folder: Path) -> list[Path]:
    """Remove what killed workers have left on this machine, in the folder for temporary files too; return what it was.

    Only what is ours, has been there for a minute, and no process uses.
    """
    candidates = [
        *Path("/dev/shm").glob("psm_*"),  # noqa: S108 -- as above
        *folder.glob("vllm_dist_*"),
        *folder.glob(f"{PIPE}*"),
        *folder.glob(_UUID),
    ]
    old = [path for path in candidates if _settled(path)]
    if not old:
        return []
    running = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    used = {file for pid in running for file in _files(pid)}
    begun = min((_since(pid) for pid in running if _name(pid).startswith(_ENGINE)), default=time.time())
    # vLLM opens its rendezvous only while it boots: one as old as a living engine may be that engine's.
    removed = [
        path
        for path in old
        if (path.lstat().st_mtime < begun if path.name.startswith("vllm_dist_") else str(path) not in used)
    ]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def _settled(path: Path) -> bool:
    """Whether a file, pipe or socket is ours and older than a moment, in which a process may be about to open it."""
    with contextlib.suppress(OSError):  # another worker was faster
        status = path.lstat()
        return not path.is_dir() and status.st_uid == os.getuid() and time.time() - status.st_mtime > _MOMENT_SECONDS
    return False


def _since(pid: int) -> float:
    """Return the time at which a process was started."""
    now = time.time()
    with contextlib.suppress(OSError):  # it has ended
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return now - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return now


def leave(code: int) -> NoReturn:
    """End this process now: what was written is flushed, child processes are killed, modules are not torn down."""
    for child in multiprocessing.active_children():
        child.kill()  # the SDK's pings
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # nobody reads it, it is closed, or being written
            stream.flush()
    os._exit(code)
