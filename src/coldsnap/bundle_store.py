"""Where bundles lie: a folder that workers share, or a bucket. Nobody overwrites what is good."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from coldsnap.errors import S3Error
from coldsnap.s3 import Bucket, Place

_PIECE_BYTES = 1 << 20
_LEFT_SECONDS = 3600.0
_ATTEMPTS = 2
_TIMEOUT_SECONDS = 5.0


class Store(Protocol):
    """Bundles by their file's name. Methods raise `OSError` or `S3Error` where the place cannot be read or written."""

    def open(self, name: str) -> tuple[int, Iterator[bytes]] | None:
        """Return a bundle's size and its bytes, piece by piece; None if there is none of that name."""

    def has(self, name: str) -> bool:
        """Return whether there is one."""

    def write(self, name: str, content: bytes, *, replace: bool) -> bool:
        """Store a bundle whole or not at all; return whether it was stored: not if there is one, unless `replace`."""


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
