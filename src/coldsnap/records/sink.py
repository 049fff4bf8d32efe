"""Where a worker's records go: one JSON line each on stdout and in the ledger's file, `ledger.jsonl`."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

from coldsnap.records.schema import Boot, ColdStart, Record, Request

LEDGER = "ledger.jsonl"


@dataclass(slots=True)
class Tally:
    """Totals of the request records written, and what became of all records."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unwritten: int = 0
    """Records that the ledger's disk did not take."""
    unsent: int | None = None
    """Records that wait for a bucket after an upload that failed, None if there is no bucket."""
    failed_uploads: int = 0

    def add(self, record: Request) -> None:
        """Count one."""
        self.requests += 1
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.completion_tokens += record.completion_tokens


class Sink:
    """Writes records. A ledger that cannot be written is said once and counted; the worker serves on."""

    def __init__(self, folder: Path, echo: Callable[[str], None]) -> None:
        self._path = folder / LEDGER
        self._echo = echo
        self._turning = threading.Lock()
        self.lines = 0
        """Records in the file that is being written to."""
        self.tally = Tally()
        self.watchers: list[Callable[[Record], None]] = []
        """Called with every record, in the thread that writes it."""
        self._boot: Boot = "fresh"
        self.on_job: Callable[[], None] = lambda: None
        """Called as a job arrives: it may be what the worker was revived for."""

    def turn(self, path: Path) -> int:
        """Write into `path` from now on; return how many records the file until now has got.

        Once this has returned nothing is written to that file any more. May be called from any thread.
        """
        with self._turning:
            lines, self._path, self.lines = self.lines, path, 0
        return lines

    def next_job(self) -> Boot:
        """Return how the worker came to a job that has just arrived."""
        self.on_job()
        boot, self._boot = self._boot, "warm"
        return boot

    def write(self, record: Record) -> None:
        """Append `record` to the ledger and echo its line."""
        if isinstance(record, Request):
            self.tally.add(record)
        elif isinstance(record, ColdStart):
            self._boot = record.boot
        for watcher in self.watchers:
            watcher(record)
        line = orjson.dumps(record.model_dump(mode="json"))
        self._echo(line.decode())
        with self._turning:
            try:
                self._append(line + b"\n")
            except OSError as error:
                if not self.tally.unwritten:
                    print(  # noqa: T201
                        f"coldsnap: COLDSNAP_LEDGER_DIR: {self._path} cannot be written ({error.strerror}); "
                        "records go to stdout only",
                        file=sys.stderr,
                        flush=True,
                    )
                self.tally.unwritten += 1
            else:
                self.lines += 1

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            written = file.write(line)
            if written < len(line):  # a disk that is full took the beginning: another worker's line must not follow it
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
