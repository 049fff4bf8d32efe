"""Hashes the files of a snapshot: here, or in a process of its own beside the engine's start.

A process, because the engine is forked from this one and a fork must see no other thread. It reads the weights into
the page cache, from which the engine loads them. It waits for a line of JSON, the names, and answers
with one: the digest of each, and how reading them went.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from blake3 import blake3

from coldsnap.errors import SnapshotError

FILES_AT_ONCE = 4
_READ_BYTES = 4 << 20
_ENDED = "snapshot {}: its digests are not known, because the process that reads it was ended"
_PROGRAM = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r}); "
    "from coldsnap.snapshot.digest import main; main(sys.argv[1:])"
)


@dataclass(frozen=True)
class Reading:
    """What a full check read. `disk_bytes` of the `bytes` were not in the page cache; None if the kernel hides it."""

    bytes: int
    disk_bytes: int | None
    seconds: float

    def __add__(self, other: Reading) -> Reading:
        """Return both as one, the longer of their seconds: they ran side by side."""
        measured = None not in (self.disk_bytes, other.disk_bytes)
        disk = (self.disk_bytes or 0) + (other.disk_bytes or 0) if measured else None
        return Reading(self.bytes + other.bytes, disk, max(self.seconds, other.seconds))


@dataclass(frozen=True)
class Digests:
    """The BLAKE3 digest of each file, in hex, and how reading them went."""

    of: Mapping[str, str]
    reading: Reading


def digests(folder: Path, names: Iterable[str], files_at_once: int = FILES_AT_ONCE) -> Digests:
    """Hash the files, in this order. Raises `SnapshotError` that names the file that cannot be read.

    One at a time is for memory that cannot hold them all: then no file is read ahead as a whole, which would push out
    of the page cache what the engine has yet to load.
    """
    begun, names = time.monotonic(), list(names)
    advice = os.POSIX_FADV_WILLNEED if files_at_once > 1 else os.POSIX_FADV_SEQUENTIAL
    with ThreadPoolExecutor(files_at_once, thread_name_prefix="verify") as pool:
        results = dict(zip(names, pool.map(lambda name: _digest(folder, name, advice), names), strict=True))
    from_disk = [disk for _, disk, _ in results.values() if disk is not None]
    reading = Reading(
        sum(size for _, _, size in results.values()),
        sum(from_disk) if len(from_disk) == len(results) else None,
        time.monotonic() - begun,
    )
    return Digests({name: digest for name, (digest, _, _) in results.items()}, reading)


class Hashing:
    """Hashes files in a process of its own, which ends with this one. Nothing is read before `begin`."""

    def __init__(self, folder: Path, names: Iterable[str], files_at_once: int = FILES_AT_ONCE) -> None:
        self._folder = folder
        self._names = list(names)
        self._process = subprocess.Popen(  # noqa: S603 -- our own module
            [sys.executable, "-c", _PROGRAM, str(folder), str(files_at_once)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C at a terminal is the worker's; this ends with it, without a traceback
        )
        self._begun = False

    def begin(self) -> None:
        """Let the process read; a second call does nothing."""
        if not self._begun:
            self._begun = True
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: `result` says so
                self._process.stdin.write(orjson.dumps(self._names, option=orjson.OPT_APPEND_NEWLINE))
                self._process.stdin.flush()

    def result(self) -> Digests:
        """Wait for the digests. Raises `SnapshotError` if a file cannot be read or the process has ended."""
        self.begin()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.end()
        answer: dict[str, Any] = orjson.loads(line) if line else {"error": _ENDED.format(self._folder)}
        if "error" in answer:
            raise SnapshotError(answer["error"])
        return Digests(answer["of"], Reading(**answer["reading"]))

    def end(self) -> None:
        """End the process; what it has not said is lost."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was never told
                    stream.close()


def _digest(folder: Path, name: str, advice: int) -> tuple[str, int | None, int]:
    """Return the file's digest, how many bytes the disk delivered for it, and its size."""
    hasher, before, size = blake3(), _from_disk(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with (folder / name).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, advice)
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
    except OSError as error:
        raise SnapshotError(f"snapshot {folder}: {name}: expected a readable file, found: {error.strerror}") from error
    after = _from_disk()
    return hasher.hexdigest(), None if before is None or after is None else after - before, size


def _from_disk() -> int | None:
    """Return the bytes that this thread has had fetched from storage so far (proc(5), /proc/pid/io), if it may know."""
    try:
        lines = Path("/proc/thread-self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # nothing more is said there: this ends when the parent does
        pass
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Hash what the parent asks for and answer. Does nothing if the parent ends without a word."""
    folder, files_at_once = arguments
    line = sys.stdin.buffer.readline()
    if not line:
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer: dict[str, object]
    try:
        result = digests(Path(folder), orjson.loads(line), int(files_at_once))
        answer = {"of": result.of, "reading": result.reading}
    except SnapshotError as error:
        answer = {"error": error.message}
    sys.stdout.buffer.write(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()
