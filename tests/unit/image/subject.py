"""A small process that writes itself into an image; restored, it does what its arguments say.

subject.py IMAGE [FILE...]     write IMAGE, which depends on FILEs
restored: … ACTION             print what came of it as JSON
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import multiprocessing
import multiprocessing.synchronize
import os
import secrets
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coldsnap.image import arrival, noting
from coldsnap.image.arrival import Restored
from coldsnap.image.noting import Environment
from coldsnap.image.snap import Snap

BALLAST = bytes(range(256)) * 20_000
FREED = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def unique() -> Any:
    """What no two processes may have in common."""
    return {
        "openssl": ssl.RAND_bytes(16).hex(),
        "numpy": int(np.random.randint(1 << 60)),  # noqa: NPY002 -- the global generator is what is asked about
        "random": __import__("random").getrandbits(64),
        "uuid": uuid.uuid4().hex,
        "secret": secrets.token_hex(),
        "temporary": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
        "semaphore": next(multiprocessing.synchronize.SemLock._rand),  # type: ignore[attr-defined]
        "authkey": multiprocessing.current_process().authkey.hex(),
    }


def works() -> Any:
    """Threads, forks, new programs, libraries, C++ exceptions, signals, timers, an event loop, deep stacks."""
    did: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: did.update(thread=threading.get_native_id() != os.getpid()))
    thread.start()
    thread.join()
    did["thread_id"] = threading.main_thread().native_id == os.getpid()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        did["fork"] = pool.map(abs, [-1, -2])
    did["program"] = subprocess.run(["echo", "hi"], capture_output=True, text=True, check=True).stdout
    did["library"] = ctypes.CDLL("libutil.so.1")._name
    try:
        np.array(["x"]).astype(float)
    except ValueError:
        did["exception"] = True
    heard: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()
    did["alarm"] = heard == [signal.SIGALRM]

    async def soon() -> float:
        await asyncio.sleep(0.001)
        process = await asyncio.create_subprocess_exec("true")
        return await process.wait()

    did["asyncio"] = asyncio.run(soon())
    before = time.time(), time.monotonic()
    did["clocks"] = before <= (time.time(), time.monotonic())
    sys.setrecursionlimit(20_000)

    def deep(n: int) -> int:
        return n and 1 + max(deep(n - 1), 0)

    did["stack"] = deep(10_000)
    did["ballast"] = bytes(range(256)) * 20_000 == BALLAST
    FREED.madvise(mmap.MADV_DONTNEED)
    did["freed"] = FREED[:] == bytes(1 << 20)
    return did


def is_ignored(number: int) -> bool:
    """Whether the kernel ignores a signal; what Python remembers is what it found at its start."""
    status = Path("/proc/self/status").read_text()
    mask = int(status.partition("SigIgn:")[2].split()[0], 16)
    return bool(mask >> (number - 1) & 1)


def facts() -> Any:
    """What the process was started with."""
    return {
        "argv": sys.argv,
        "environ": dict(os.environ),
        "cwd": str(Path.cwd()),
        "stdin": sys.stdin is not None,
        "files": sorted(int(link.name) for link in Path("/proc/self/fd").iterdir() if link.exists()),
        "ignored": [number.name for number in signal.Signals if is_ignored(number)],
        "shown": Path("/proc/self/cmdline").read_text().split("\0"),
    }


def env() -> Any:
    """Whether the import would have been the same."""
    arrival.settle(os.environ, required=False)
    return {"restored": arrival.is_restored(), "changed": os.environ.get("CHANGED_BY_IMPORT")}


ACTIONS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (unique, works, facts, env)}


def main() -> None:
    image, *depends = sys.argv[1:]
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    library = os.environ.pop("LD_PRELOAD")
    FREED[:] = b"x" * (1 << 20)
    unique()
    before = dict(os.environ)
    noting.begin()
    os.environ.get("READ_BY_IMPORT")
    copies = dict(os.environ), os.environ.copy(), os.environ | {}, {**os.environ}, list(os.environ.items())
    assert all(dict(copy) == before for copy in copies)
    os.environ.get(next(iter(list(os.environ))))  # a walk that reads the first alone: `NAMED_FIRST`
    os.environ["CHANGED_BY_IMPORT"] = "yes"
    noting.end()
    if os.environ.get("SECOND_THREAD"):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if os.environ.get("OPEN_FILE"):
        os.open("/dev/null", os.O_RDONLY)
    snap = Snap(Path(library))
    environment = Environment(before, dict(os.environ), snap.variables_read())
    try:
        arrived = snap.write(Path(image), depends)
    except Exception as error:  # noqa: BLE001 -- shown to the test
        sys.stdout.write(str(error))
        sys.stdout.flush()
        os._exit(1)
    if arrived is None:
        os._exit(0)
    arrival.begin(Restored(arrived, environment))
    sys.stdout.write(json.dumps(ACTIONS[sys.argv[-1]]()))
    sys.stdout.flush()
    os._exit(0)


main()
