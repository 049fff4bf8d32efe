"""Sends the ledger to a bucket: each flush seals a file of lines, which is deleted once the bucket has it.

record -> unsent/<worker>.<boot>.<n>.open -> sealed, ….jsonl -> an object -> deleted

A file belongs to one process and is written by no other; once sealed nobody writes to it, so that whoever sends
it, and however often, makes the same object: its key is made of its lines. Files of the dead are found by their
name or their age, because locks do not work on every network volume. A process that turns out to be alive, one
that the platform had suspended, opens its file by name for each record, and so begins a new one.
"""

from __future__ import annotations

import gzip
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
from blake3 import blake3

from coldsnap.errors import S3Error
from coldsnap.foundation.background import Background
from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.records.sink import Sink
from coldsnap.settings import Settings

UNSENT = "unsent"
"""The folder, in the ledger's, of what the bucket does not have yet."""
_OPEN, _SEALED = "open", "jsonl"

_IDLE_SECONDS = 3.0
"""Without a job for so long, a worker sends what it has: the platform may stop or suspend it any time."""
_STALE_SECONDS = 600.0
"""A file that was not written to for so long is a dead worker's: a living one writes every minute."""
_LET_GO_SECONDS = 1.0
"""Pause for a write that was under way when another worker's file was sealed."""
_ATTEMPTS = 3
_TIMEOUT_SECONDS = 10.0


class Upload(Background):
    """Sends what `sink` writes to `place`, and what earlier workers left unsent in the same folder.

    boto3 is imported in the thread, by its first upload. A bucket that does not answer is said once, through
    `warn`; the files stay and are tried again with every flush.
    """

    def __init__(
        self,
        sink: Sink,
        settings: Settings,
        place: Place,
        busy: Callable[[], bool],
        warn: Callable[[str], None],
        *,
        connect: Callable[[], Bucket] | None = None,
    ) -> None:
        super().__init__("upload", self.flush, self._is_due)
        self._sink = sink
        self._busy = busy
        self._warn = warn
        self._connect = connect or (lambda: Bucket(place, attempts=_ATTEMPTS, timeout_seconds=_TIMEOUT_SECONDS))
        self._bucket: Bucket | None = None
        self._every = settings.ledger_flush_seconds
        self._folder = settings.ledger_dir / UNSENT
        self._worker = quote(settings.worker_id, safe="")
        self._boot = uuid.uuid4().hex
        self._files = 0
        self._own: dict[str, int] = {}
        """This process's sealed files, and how many records each has."""
        self._flushed = self._last_busy = time.monotonic()
        self._warned = False
        self._tally = sink.tally
        self._tally.unsent = 0
        self._current = self._next()
        sink.turn(self._current)

    def _next(self) -> Path:
        self._files += 1
        return self._folder / f"{self._worker}.{self._boot}.{self._files}.{_OPEN}"

    def _is_due(self) -> bool:
        now = time.monotonic()
        if self._busy():
            self._last_busy = now
        if now - self._flushed >= self._every:
            return bool(self._sink.lines or self._own)
        return bool(self._sink.lines) and now - self._last_busy >= _IDLE_SECONDS

    def flush(self) -> None:
        """Seal what there is and send it, and what is left of workers that are gone. Call it from one thread only."""
        self._flushed = time.monotonic()
        try:
            self._seal()
            if not self.ending and self._take_over():
                time.sleep(_LET_GO_SECONDS)
            for path in self._ready():
                self._send(path)
        except (S3Error, OSError) as error:
            self._tally.failed_uploads += 1
            if not self._warned:
                self._warned = True
                self._warn(f"LEDGER_S3_URI: {error}; records wait in {self._folder} and are tried again")
        self._tally.unsent = sum(self._own.values())

    def _seal(self) -> None:
        """Give the sink a new file, and the old one the name that says that nobody writes to it any more."""
        following = self._next()
        old, records = self._current, self._sink.turn(following)
        self._current = following
        if records and (sealed := _sealed(old)):
            self._own[sealed.name] = records

    def _take_over(self) -> bool:
        """Seal the files of the dead; return whether there were any."""
        files = [path for path in self._folder.glob(f"*.{_OPEN}") if path != self._current and self._is_left(path)]
        return bool([path for path in files if _sealed(path)])

    def _ready(self) -> list[Path]:
        return sorted(
            path for path in self._folder.glob(f"*.{_SEALED}") if path.name in self._own or self._is_left(path)
        )

    def _is_left(self, path: Path) -> bool:
        """Return whether a file's process is gone: an earlier life of this worker's, or one long silent."""
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # another worker was faster
            return False
        return path.name.rsplit(".", 3)[0] == self._worker or age > _STALE_SECONDS

    def _send(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another worker was faster, and had it acknowledged
            self._own.pop(path.name, None)
            return
        lines = content.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and _record(line) is not None]
        if len(whole) != len(lines):
            self._warn(f"{path.name}: {len(lines) - len(whole)} of {len(lines)} lines are torn and were left out")
        if whole:
            self._bucket = self._bucket or self._connect()
            self._bucket.put(name_of(whole), gzip.compress(b"".join(whole), mtime=0))
        path.unlink(missing_ok=True)
        self._own.pop(path.name, None)


def _sealed(path: Path) -> Path | None:
    """Give an open file its sealed name and return it, or None if another worker was faster."""
    sealed = path.with_suffix(f".{_SEALED}")
    try:
        return path.rename(sealed)
    except FileNotFoundError:
        return None


def name_of(lines: list[bytes]) -> str:
    """Return the object's name for these lines, which are whole: the same for the same lines."""
    first = _record(lines[0])
    assert first is not None
    folder = "/".join(quote(str(first[name]), safe="") for name in ("endpoint_id", "worker_id"))
    return f"{folder}/{first['time']}-{blake3(b''.join(lines)).hexdigest()[:16]}.jsonl.gz"


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None if it is torn."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_record = isinstance(record, dict) and {"time", "worker_id", "endpoint_id"} <= record.keys()
    return record if is_record else None
