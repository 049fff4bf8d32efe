"""Writes this process into an image file, and tells a restored one what it was started with; see `snap.c`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from coldsnap.errors import ImageError

_PAGE = 4096
_DIGEST_AT = 8
_DIGESTED_AT = _DIGEST_AT + 32
_TABLES_AT = struct.Struct("<QQ"), _DIGESTED_AT + 8
"""`tables_at` and `tables_size`, behind `file_size`; see `format.h`."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a restored process was started with."""

    command: list[str]
    environ: dict[str, str]


class _Arrival(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("command", "command_size", "environ", "environ_size", "begun_ns", "restored_ns")
    ]


class Snap:
    """The library that writes images. It must have been preloaded, or it knows not what C code has read."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.snap_name.restype = ctypes.c_char_p
        self._library.snap_complaint.restype = ctypes.c_char_p
        self._library.snap_arrival.restype = ctypes.POINTER(_Arrival)

    def variables_read(self) -> set[str]:
        """Return the names of the environment that C code has asked for since the process began."""
        return {os.fsdecode(name) for name in self._names()}

    def _names(self) -> Iterator[bytes]:
        number = 0
        while (name := self._library.snap_name(number)) is not None:
            yield name
            number += 1

    def write(self, image: Path, depends: Iterable[str]) -> Arrival | None:
        """Write this process to `image`: return None once that is done, and what is new in one restored from it.

        `depends` are files whose change makes the image useless, beside the libraries that are mapped.
        Raises `ImageError` if this process cannot be written; `image` is then as it was.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        paths = b"".join(os.fsencode(path) + b"\0" for path in depends) + b"\0"
        part = image.with_name(f"{image.name}.{os.getpid()}")
        try:
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            result = self._library.snap_write(file, paths)
            if result == 0:
                _sign(part)
                part.replace(image)
        except OSError as error:
            raise ImageError(f"{part}: {error.strerror}") from error
        if result < 0:
            part.unlink()
            raise ImageError(self._library.snap_complaint().decode(errors="replace"))
        return self._arrive() if result else None

    def _arrive(self) -> Arrival:
        told = self._library.snap_arrival().contents
        command = _strings(told.command, told.command_size)
        pairs = (text.partition("=") for text in _strings(told.environ, told.environ_size))
        arrival = Arrival(command, {name: value for name, _, value in pairs})
        self._library.snap_arrived()
        return arrival


def _strings(address: int, size: int) -> list[str]:
    return [os.fsdecode(text) for text in ctypes.string_at(address, size).split(b"\0")[:-1]]


def _sign(image: Path) -> None:
    """Write the digest of the header and the tables into the header."""
    with image.open("r+b") as file:
        page = file.read(_PAGE)
        layout, at = _TABLES_AT
        tables_at, tables_size = layout.unpack_from(page, at)
        file.seek(tables_at)
        digest = blake3(page[_DIGESTED_AT:] + file.read(tables_size)).digest()
        file.seek(_DIGEST_AT)
        file.write(digest)
        with contextlib.suppress(OSError):  # a file system that cannot; an image cut short is refused
            os.fsync(file.fileno())
