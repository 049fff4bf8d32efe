"""Fetches a snapshot from a bucket: for `coldsnap pull s3://bucket/prefix FOLDER`, and for a boot without a snapshot.

manifest -> lock -> space -> ranged reads side by side -> each file hashed as it is written -> renamed, whole

Until the last step everything is in a folder beside the final one, `.NAME.partial`. A file grows in it from its
beginning only, so what an interrupted download has left is its length, and it goes on from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from coldsnap.errors import S3Error, SnapshotError, SourceError
from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.snapshot import lock
from coldsnap.snapshot import manifest as snapshot
from coldsnap.snapshot.lock import Lock
from coldsnap.snapshot.manifest import MANIFEST, FileEntry, Manifest
from coldsnap.snapshot.push import blob

PART_BYTES = 8 << 20
AHEAD = 8
"""Parts of a file that are asked for before the first of them is written: what a kill can lose, per file."""
FILES_AT_ONCE = 4
_STREAMS = 16


@dataclass(frozen=True)
class Offer:
    """A snapshot in a bucket: its manifest, as it is read and as it is stored."""

    bucket: Bucket
    setting: str
    """What named the place: the setting or option that an error is about."""
    manifest: Manifest
    content: bytes


@dataclass(frozen=True)
class Pulled:
    """What a pull did: the bytes that came over the network, the seconds that took, those in the queue for it.

    `whole` if this process completed the folder, and so has seen the digest of each file; else another did.
    """

    whole: bool
    fetched_bytes: int
    seconds: float
    waited_seconds: float


def offer(place: Place, setting: str) -> Offer:
    """Return what is at `place`. Raises `SourceError`, or `SnapshotError` for a manifest not of the contract."""
    try:
        bucket = Bucket(place)
        content = bucket.get(MANIFEST)
    except S3Error as error:
        missing = f"{place} holds no {MANIFEST}: send a snapshot there with `coldsnap push FOLDER {place}`"
        raise SourceError(f"{setting}: {missing if error.missing else error.message}") from error
    return Offer(bucket, setting, snapshot.parse_manifest(content, str(place)), content)


def pull(
    offered: Offer,
    folder: Path,
    setting: str,
    *,
    say: Callable[[str], None],
    on_bytes: Callable[[int], None] = lambda _: None,
    stale_seconds: float = lock.STALE_SECONDS,
) -> Pulled:
    """Put the snapshot into `folder`, which appears whole or not at all; `setting` is what names its place.

    Of several processes and machines that pull into one folder at once, one does; the others wait for it
    (`Pulled.whole` is False), and one of them goes on where it was if it has shown no sign of life for
    `stale_seconds`. `on_bytes` is told of bytes that are there, from several threads. Raises `SourceError`, and
    `SnapshotError` if the bucket holds something else than its manifest says.
    """

    def there() -> bool:
        return (folder / MANIFEST).is_file()

    whole, fetched, seconds, waited = False, 0, 0.0, 0.0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not there():
            begun = time.monotonic()
            lock_of_folder = Lock(folder.parent / f".{folder.name}.lock", stale_seconds=stale_seconds)
            if lock_of_folder.acquire(
                there, lambda who: say(f"{folder}: waiting for the worker that fetches it, {who}")
            ):
                with lock_of_folder:
                    started = time.monotonic()
                    waited += started - begun
                    if not there():
                        download = _Download(offered, folder, setting, lock_of_folder, on_bytes)
                        whole = download.run()
                        fetched += download.fetched
                        seconds += time.monotonic() - started
            else:
                waited += time.monotonic() - begun
    except OSError as error:
        if isinstance(error, FileNotFoundError) and there():  # the lock was lost, and the other one was first
            return Pulled(False, fetched, seconds, waited)
        raise SourceError(f"{setting}: {error.filename or folder}: {error.strerror}") from error
    except S3Error as error:
        raise SourceError(f"{offered.setting}: {error.message}") from error
    return Pulled(whole, fetched, seconds, waited)


class _Stopped(Exception):
    """Another file has failed, or the lock is lost."""


class _Download:
    """One download into `.NAME.partial`, under a lock, and the rename at its end."""

    def __init__(self, offered: Offer, folder: Path, setting: str, held: Lock, on_bytes: Callable[[int], None]) -> None:
        self._offered = offered
        self._folder = folder
        self._partial = folder.parent / f".{folder.name}.partial"
        self._setting = setting
        self._held = held
        self._on_bytes = on_bytes
        self._failed = threading.Event()
        self._counting = threading.Lock()
        self.fetched = 0
        """Bytes that came over the network."""

    def run(self) -> bool:
        """Return whether the folder is there by this download's doing: False if the lock was lost meanwhile."""
        self._tidy()
        self._check_space()
        files = sorted(self._offered.manifest.files.items(), key=lambda item: -item[1].size)
        readers = ThreadPoolExecutor(_STREAMS, thread_name_prefix="read")
        writers = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="write")
        try:
            running = [writers.submit(self._file, name, entry, readers) for name, entry in files]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            self._failed.set()  # nothing, where all have ended
            writers.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)
        errors = [error for future in running if not future.cancelled() and (error := future.exception())]
        for error in errors:
            if not isinstance(error, _Stopped):
                raise error
        return not errors and self._finish()

    def _tidy(self) -> None:
        """Leave nothing in the folder but files of this manifest: no links that lead out of it, no other version."""
        if self._partial.is_symlink():
            self._partial.unlink()
        self._partial.mkdir(exist_ok=True)
        for path in self._partial.rglob("*"):
            is_listed = path.relative_to(self._partial).as_posix() in self._offered.manifest.files
            if path.is_symlink() or not (is_listed or path.is_dir()):
                path.unlink()

    def _check_space(self) -> None:
        there = sum(path.stat().st_size for path in self._partial.rglob("*") if path.is_file())
        missing = self._offered.manifest.size - there
        free = shutil.disk_usage(self._partial).free
        if missing > free:
            raise SourceError(
                f"{self._setting}: {self._folder.parent}: the snapshot needs {missing} bytes more, "
                f"{free} are free there"
            )

    def _file(self, name: str, entry: FileEntry, readers: ThreadPoolExecutor) -> None:
        path = self._partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, kept = self._fill(path, entry, readers)
        if digest != entry.blake3 and kept:  # a machine that crashed may have left a length without the content
            path.unlink()
            digest, kept = self._fill(path, entry, readers)
        if digest != entry.blake3:
            path.unlink()
            raise SnapshotError(
                f"snapshot {self._offered.bucket.place}: {name}: expected BLAKE3 {entry.blake3}, found {digest} "
                f"in {blob(entry)}; delete that object and push the snapshot again"
            )

    def _fill(self, path: Path, entry: FileEntry, readers: ThreadPoolExecutor) -> tuple[str, int]:
        """Return the digest of the whole file, and how many of its bytes had been there."""
        hasher = blake3()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o644), "r+b") as file:
            if os.fstat(file.fileno()).st_size > entry.size:
                file.truncate(0)
            size = 0
            while data := file.read(PART_BYTES):
                hasher.update(data)
                size += len(data)
            self._on_bytes(size)
            for part in self._parts(blob(entry), size, entry.size, readers):
                _write(file, part)
                hasher.update(part)
                self._on_bytes(len(part))
        return hasher.hexdigest(), size

    def _parts(self, name: str, position: int, size: int, readers: ThreadPoolExecutor) -> Iterator[bytearray]:
        ahead: deque[Future[bytearray]] = deque()
        while position < size or ahead:
            while position < size and len(ahead) < AHEAD:
                count = min(PART_BYTES, size - position)
                ahead.append(readers.submit(self._offered.bucket.read, name, position, count))
                position += count
            part = ahead.popleft().result()
            if self._failed.is_set() or self._held.lost:
                raise _Stopped
            with self._counting:
                self.fetched += len(part)
            yield part

    def _finish(self) -> bool:
        (self._partial / MANIFEST).write_bytes(self._offered.content)
        if self._held.lost:
            return False
        self._partial.rename(self._folder)
        return True


def _write(file: BinaryIO, part: bytearray) -> None:
    file.write(part)
    file.flush()  # what is not written is lost with the process


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coldsnap pull`."""
    parser.add_argument("place", help="s3://bucket/prefix that a snapshot was pushed to; boto3 finds credentials")
    parser.add_argument("folder", type=Path, help="where to put it: a folder that is not there yet")


def run(options: argparse.Namespace) -> int:
    """Pull, and say how much and how fast."""
    from rich.progress import Progress

    offered = offer(Place.parse(options.place, "PLACE"), "PLACE")
    folder: Path = options.folder.absolute()
    digest, size = offered.manifest.digest, offered.manifest.size
    if folder.exists() and any(folder.iterdir()):
        if snapshot.load_manifest(folder).digest != digest:
            raise SourceError(f"FOLDER: {folder} holds another snapshot: expected none, or {digest}")
        snapshot.verify(folder, offered.manifest)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"pull {offered.bucket.place}", total=size)
        pulled = pull(
            offered, folder, "FOLDER", say=progress.console.print, on_bytes=lambda count: progress.advance(task, count)
        )
    print(  # noqa: T201
        f"{folder}: {digest}, {size} bytes, {pulled.fetched_bytes} of them fetched in {pulled.seconds:.1f} s"
    )
    return 0
