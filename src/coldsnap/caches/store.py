"""Stores bundles in a folder that workers share, or in a bucket. A good bundle is never overwritten.

When one was last used is known by the store's own clock: in a folder a hit sets the file's time, in a bucket it writes
an empty object beside it, `<name>.used`. A bundle that was deleted while it was in use costs one boot without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from coldsnap.errors import S3Error
from coldsnap.foundation.s3 import Bucket, Place

_PIECE_BYTES = 1 << 20
_LEFT_SECONDS = 3600.0
_ATTEMPTS = 2
_TIMEOUT_SECONDS = 5.0
_USED = ".used"
_BUNDLE = re.compile(rf"(?P<name>[0-9a-f]{{32}}\.bundle)({re.escape(_USED)})?")
"""How our files are named: nothing else is ever deleted."""


class Store(Protocol):
    """Bundles by their file's name. Methods raise `OSError` or `S3Error` where the place cannot be read or written."""

    def open(self, name: str) -> tuple[int, Iterator[bytes]] | None:
        """Return a bundle's size and its bytes, piece by piece; None if there is none of that name."""

    def has(self, name: str) -> bool:
        """Return whether there is one."""

    def write(self, name: str, content: bytes, *, replace: bool) -> bool:
        """Store a bundle whole or not at all; return whether it was stored: not if there is one, unless `replace`."""

    def mark(self, name: str) -> None:
        """Note that a bundle is in use."""

    def prune(self, newest: str, seconds: float) -> int:
        """Delete the bundles that were made, and last used, `seconds` before `newest` was stored; return how many."""


def store_at(place: Path | Place) -> Store:
    """Return the store in a folder or a bucket; for a bucket boto3 is imported."""
    return Shared(place) if isinstance(place, Path) else InBucket(place)


class Shared:
    """A folder, such as on a network volume."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> tuple[int, Iterator[bytes]] | None:
        """See `Store.open`."""
        try:
            file = (self._folder / name).open("rb")
        except FileNotFoundError:
            return None

        def pieces() -> Iterator[bytes]:
            with file:
                yield from iter(lambda: file.read(_PIECE_BYTES), b"")

        return os.fstat(file.fileno()).st_size, pieces()

    def has(self, name: str) -> bool:
        """See `Store.has`."""
        return (self._folder / name).exists()

    def write(self, name: str, content: bytes, *, replace: bool) -> bool:
        """See `Store.write`: a file beside it, then one link or rename."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        final = self._folder / name
        partial = self._folder / f".{name}.{uuid4().hex}.partial"
        try:
            partial.write_bytes(content)
            if replace:
                partial.rename(final)
                return True
            return _linked(partial, final)
        finally:
            partial.unlink(missing_ok=True)

    def mark(self, name: str) -> None:
        """See `Store.mark`."""
        with contextlib.suppress(FileNotFoundError):  # deleted since it was read
            os.utime(self._folder / name)

    def prune(self, newest: str, seconds: float) -> int:
        """See `Store.prune`."""
        used = {}
        for path in self._folder.glob("*.bundle"):
            if _BUNDLE.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # somebody else prunes
                    used[path.name] = path.stat().st_mtime
        unused = _unused(used, newest, seconds)
        for name in unused:
            (self._folder / name).unlink(missing_ok=True)
        return len(unused)

    def _tidy(self) -> None:
        """Remove what workers that were killed have left."""
        for left in self._folder.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                    left.unlink()


def _linked(partial: Path, final: Path) -> bool:
    try:
        os.link(partial, final)
    except FileExistsError:
        return False
    except OSError:  # a volume without links: of two who find nothing the second's bundle stays, as good as the first's
        if final.exists():
            return False
        partial.rename(final)
    return True


class InBucket:
    """A place in a bucket."""

    def __init__(self, place: Place) -> None:
        self._bucket = Bucket(place, attempts=_ATTEMPTS, timeout_seconds=_TIMEOUT_SECONDS)

    def open(self, name: str) -> tuple[int, Iterator[bytes]] | None:
        """See `Store.open`."""
        try:
            return self._bucket.stream(name)
        except S3Error as error:
            if error.missing:
                return None
            raise

    def has(self, name: str) -> bool:
        """See `Store.has`."""
        return self._bucket.find(name) is not None

    def write(self, name: str, content: bytes, *, replace: bool) -> bool:
        """See `Store.write`."""
        if not replace:
            return self._bucket.create(name, content)
        self._bucket.put(name, content)
        return True

    def mark(self, name: str) -> None:
        """See `Store.mark`: the bundle's own time could only be set by writing it again."""
        self._bucket.put(f"{name}{_USED}", b"")

    def prune(self, newest: str, seconds: float) -> int:
        """See `Store.prune`."""
        used: dict[str, float] = {}
        there = set()
        for item in self._bucket.objects():
            if match := _BUNDLE.fullmatch(item.name):
                there.add(item.name)
                used[match["name"]] = max(item.modified, used.get(match["name"], 0.0))
        unused = _unused(used, newest, seconds)
        for name in (each for bundle in unused for each in (bundle, f"{bundle}{_USED}")):
            if name in there:
                self._bucket.delete(name)
        return sum(name in there for name in unused)


def _unused(used: Mapping[str, float], newest: str, seconds: float) -> list[str]:
    """Return the bundles last used so long before `newest`; none where that one has already been deleted again."""
    return sorted(name for name, at in used.items() if at < used.get(newest, 0.0) - seconds)
