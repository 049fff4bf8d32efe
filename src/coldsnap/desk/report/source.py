"""Where the lines of a ledger come from: a file, a folder, a bucket. What cannot be read is said, not fatal.

A line that was met before, in the local file and in its upload, counts once. Workers may be writing, sealing and
sending all the while: a folder is listed a second time for files that have a new name, and what is gone is passed over.
"""

from __future__ import annotations

import errno
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import orjson

from coldsnap.cost.books import HEADINGS
from coldsnap.errors import ReportError, S3Error
from coldsnap.foundation.plural import plural
from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.records.schema import Record

_KNOWN_SCHEMA = max(get_args(Record.model_fields["schema_version"].annotation))
_SUFFIXES = (".jsonl", ".jsonl.gz", ".open")
"""The last is what a worker with an upload writes to; see `coldsnap.records.upload`."""
_GZIP = b"\x1f\x8b"
_GONE = {errno.ENOENT, errno.ESTALE}
"""What a file that was renamed or deleted answers; the second is NFS's, in the middle of reading."""
_DOWNLOADS = 16

_Kinds = tuple[type, ...]
_TEXT: _Kinds = (str,)
_WHOLE: _Kinds = (int,)
_NUMBER: _Kinds = (int, float)
_OBJECT: _Kinds = (dict,)
_EVERY = {"time": _TEXT, "monotonic": _NUMBER, "worker_id": _TEXT, "endpoint_id": _TEXT, "gpu_count": _WHOLE}
_NEEDED: dict[str, dict[str, _Kinds]] = {
    "cold_start": _EVERY | {"seconds": _NUMBER, "phases": _OBJECT},
    "request": _EVERY
    | {"job_id": _TEXT, "model": _TEXT, "duration_seconds": _NUMBER}
    | dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), _WHOLE)
    | dict.fromkeys(("gpu_seconds", "prefill_gpu_seconds", "decode_gpu_seconds"), _NUMBER),
    "worker": _EVERY
    | {"billed_seconds": _NUMBER}
    | dict.fromkeys(("gpu_seconds", *(f"{name}_gpu_seconds" for name in HEADINGS)), _NUMBER),
}
"""Fields without which a record says nothing; others may be missing, and there may be more."""
_SAID = {_TEXT: "text", _WHOLE: "a whole number", _NUMBER: "a number", _OBJECT: "an object"}


@dataclass(frozen=True, slots=True)
class Torn:
    """A line, or the rest of a file, that could not be read."""

    file: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.why}"


@dataclass(frozen=True, slots=True)
class Intake:
    """What was read. `lines` is a file of JSON lines, each once, each with the fields that are needed."""

    place: str
    lines: Path
    files: int
    records: int
    repeated: int
    newer: int
    """Records of a schema that is newer than this report, left out."""
    torn: tuple[Torn, ...]


def read(place: str, folder: Path) -> Intake:
    """Read every record at `place`, a path or an `s3://` URI; `folder` is for temporary files.

    Raises `ReportError` if there is nothing to read, `SettingsError` and `S3Error` for what is wrong with a bucket.
    """
    files = _download(place, folder) if place.startswith("s3://") else _find(place)
    names_read: set[str] = set()
    digests: set[bytes] = set()
    count: Counter[str] = Counter()
    torn: list[Torn] = []
    clean = folder / "clean.jsonl"
    with clean.open("wb") as out:
        for name, path in files:
            unsealed = name.removesuffix(".open").removesuffix(".jsonl")
            again = unsealed in names_read  # it was sealed after it had been read
            names_read.add(unsealed)
            for number, line in _lines(name, path, torn):
                digest = blake2b(line, digest_size=16).digest()
                if digest in digests:
                    count["repeated"] += not again
                    continue
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    torn.append(Torn(name, number, "not a whole line of JSON"))
                    continue
                digests.add(digest)
                if isinstance(record, dict) and _newer(record.get("schema_version")):
                    count["newer"] += 1
                elif wrong := _wrong(record):
                    torn.append(Torn(name, number, wrong))
                else:
                    count["records"] += 1
                    out.write(line + b"\n")
    if not count["records"]:
        within = plural(len(names_read), "file")
        if count["newer"]:
            raise ReportError(
                f"{place}: written by a newer coldsnap: {plural(count['newer'], 'record')}, none that I know"
            )
        if torn:
            raise ReportError(f"{place}: not a ledger: no line is a record of coldsnap's; {torn[0]}")
        raise ReportError(f"{place}: the ledger is empty: no records in {within}")
    return Intake(place, clean, len(names_read), count["records"], count["repeated"], count["newer"], tuple(torn))


def _find(place: str) -> Iterator[tuple[str, Path]]:
    path = Path(place)
    if not path.exists():
        raise ReportError(f"{place}: expected a ledger.jsonl, a folder of them or s3://bucket/prefix, found nothing")
    if not path.is_dir():
        yield place, path
        return
    paths_read: set[Path] = set()
    for _ in range(2):  # once more when these have been read: one may have been renamed meanwhile, which happens once
        new = sorted(_below(path) - paths_read)
        paths_read.update(new)
        yield from ((str(file), file) for file in new)
    if not paths_read:
        raise ReportError(f"{place}: expected *.jsonl or *.jsonl.gz in this folder or below it, found none")


def _below(folder: Path) -> set[Path]:
    def refuse(error: OSError) -> None:
        if error.errno not in _GONE:
            raise ReportError(f"{error.filename}: cannot be read ({error.strerror})") from error

    paths = {
        Path(below, name)
        for below, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.endswith(_SUFFIXES)
    }
    return {file for file in paths if file.is_file()}


def _download(uri: str, folder: Path) -> list[tuple[str, Path]]:
    bucket = Bucket(Place.parse(uri, "PATH"))
    names = [each.name for each in bucket.objects() if each.name.endswith(_SUFFIXES)]
    if not names:
        raise ReportError(f"{bucket.place}: expected objects *.jsonl or *.jsonl.gz below it, found none")

    def fetch(numbered: tuple[int, str]) -> tuple[str, Path]:
        number, name = numbered
        path = folder / f"object-{number}"
        try:
            path.write_bytes(bucket.get(name))
        except S3Error as error:
            if not error.missing:
                raise
        return f"{bucket.place}{name}", path

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(pool.map(fetch, enumerate(names)))


def _lines(name: str, path: Path, torn: list[Torn]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, with their numbers; what the file breaks off with goes to `torn`."""
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if packed else raw, start=1):
                if stripped := line.strip():
                    yield number, stripped
    except (EOFError, gzip.BadGzipFile, zlib.error):
        torn.append(Torn(name, number + 1, "the compressed file breaks off here"))
    except OSError as error:
        if error.errno in _GONE:
            return
        raise ReportError(f"{name}: cannot be read ({error.strerror or error})") from error


def _newer(version: object) -> bool:
    return isinstance(version, int) and version > _KNOWN_SCHEMA


def _wrong(record: Any) -> str | None:
    """Return what keeps a line from being a record."""
    if not isinstance(record, dict) or record.get("record") not in _NEEDED:
        return f"expected a record of the kind {', '.join(_NEEDED)}"
    for field, kinds in _NEEDED[record["record"]].items():
        if not isinstance(record.get(field), kinds):
            return f"{record['record']}: {field}: expected {_SAID[kinds]}, found {record.get(field)!r:.50}"
    try:
        datetime.fromisoformat(record["time"])
    except ValueError:
        return f"{record['record']}: time: expected a time of ISO 8601, found {record['time']!r:.50}"
    return None
