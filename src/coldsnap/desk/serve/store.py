"""Durable jobs in SQLite, so that a restart of the platform loses none. Chunks of a running job are not kept.

A job is written down before its client learns its id. The write-ahead log outlives the process at any moment; a
machine that loses power may lose the last ones.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import orjson

from coldsnap.desk.serve.job import Job, JobState, Terms, Timestamps, encode
from coldsnap.errors import Refused, ServeError

_VERSION = 1
_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE job (
    id TEXT PRIMARY KEY, number INTEGER NOT NULL, payload BLOB NOT NULL, terms BLOB NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, worker TEXT,
    submitted REAL NOT NULL, taken REAL, done REAL,
    output BLOB, error TEXT, read INTEGER NOT NULL, unread BLOB
) WITHOUT ROWID;
"""
_COUNTS = "CREATE TABLE IF NOT EXISTS count (name TEXT PRIMARY KEY, number INTEGER NOT NULL)"
"""Not in the schema: files of the first days lack it."""
_ADD = """
INSERT INTO job VALUES (:id, :number, :payload, :terms, :state, :attempts, :worker, :submitted, :taken, :done,
    :output, :error, :read, :unread)
"""
_NOTE = """
UPDATE job SET state = :state, attempts = :attempts, worker = :worker, submitted = :submitted, taken = :taken,
    done = :done, output = :output, error = :error, read = :read, unread = :unread WHERE id = :id
"""


class Store:
    """One file, for one process at a time. It is the board's `Journal`."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                say(f"made the folder {path.parent} for --state")
            if path.exists() and not path.is_file():
                raise ServeError(f"--state {path}: that is not a file; name one, which need not be there")
            path.touch(mode=0o600)  # it holds the API key
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0)
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise ServeError(f"--state {path}: {_why(error)}") from error

    def _open(self) -> None:
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (whole,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        actual, expected = _layout(self._db), _layout(_empty())
        if whole != "ok":
            raise ServeError(f"--state {self._path}: the file is damaged ({whole}); name another")
        if version > _VERSION:
            raise ServeError(f"--state {self._path}: made by a newer coldsnap; name another file")
        if actual and expected.items() - actual.items():
            raise ServeError(f"--state {self._path}: the database of another program; name another file")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        if not actual:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        else:
            self._db.execute("BEGIN EXCLUSIVE").execute("COMMIT")
        self._db.execute(_COUNTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def kept(self, name: str, make: Callable[[], str]) -> str:
        """Return a word that is made once for this file."""
        if row := self._db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone():
            return str(row["value"])
        value = make()
        try:
            self._db.execute("INSERT INTO about VALUES (?, ?)", (name, value))
        except sqlite3.Error as error:
            raise ServeError(f"--state {self._path}: {_why(error)}") from error
        return value

    def jobs(self) -> list[Job]:
        """Return the jobs of the process before, oldest first."""
        jobs = []
        for row in self._db.execute("SELECT * FROM job ORDER BY number"):
            try:
                jobs.append(_job(row))
            except (TypeError, ValueError, KeyError) as error:
                message = f"job {row['id']} cannot be read ({error}): damaged, or another release's; name another file"
                raise ServeError(f"--state {self._path}: {message}") from error
        return jobs

    def add(self, job: Job) -> None:
        """See `board.Journal`."""
        try:
            self._db.execute(_ADD, _row(job))
        except sqlite3.Error as error:
            raise Refused(500, f"the job could not be written to {self._path}: {error}") from error

    def note(self, job: Job) -> None:
        """See `board.Journal`. What cannot be written is said; after a restart that job may run again."""
        try:
            self._db.execute(_NOTE, _row(job))
        except sqlite3.Error as error:
            self._say(f"{job.id} is {job.state}, which could not be written to {self._path}: {error}")

    def counts(self) -> dict[str, int]:
        """Return how many jobs came to which end in all lives of this file."""
        return {row["name"]: row["number"] for row in self._db.execute("SELECT * FROM count")}

    def count(self, name: str, number: int) -> None:
        """See `board.Journal`."""
        try:
            self._db.execute("INSERT OR REPLACE INTO count VALUES (?, ?)", (name, number))
        except sqlite3.Error as error:
            self._say(f"{name}: {number}, which could not be written to {self._path}: {error}")

    def forget(self, job: Job) -> None:
        """Remove a job whose result is no longer kept."""
        try:
            self._db.execute("DELETE FROM job WHERE id = ?", (job.id,))
        except sqlite3.Error as error:
            self._say(f"{job.id} could not be removed from {self._path}: {error}")


def _empty() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    database.executescript(_SCHEMA)
    return database


def _layout(database: sqlite3.Connection) -> dict[str, str]:
    """Return the tables with their columns."""
    columns = """
        SELECT tables.name, group_concat(columns.name) FROM sqlite_schema AS tables
        JOIN pragma_table_info(tables.name) AS columns WHERE tables.type = 'table' GROUP BY tables.name
    """
    return dict(database.execute(columns))


def _row(job: Job) -> dict[str, Any]:
    """Return a job as its columns: Unix times instead of the monotonic ones, which end with the process."""
    since = time.time() - time.monotonic()
    times = job.timestamps
    return {
        "id": job.id,
        "number": job.number,
        "payload": job.payload,
        "terms": orjson.dumps(asdict(job.terms)),
        "state": job.state,
        "attempts": job.attempts,
        "worker": job.worker_id,
        "submitted": since + times.submitted,
        "taken": None if times.taken is None else since + times.taken,
        "done": None if times.done is None else since + times.done,
        "output": None if job.output is None else encode({"output": job.output}),
        "error": job.error,
        "read": job.read,
        "unread": encode({"chunks": job.chunks[job.read :]}) if job.done and job.chunks else None,
    }


def _job(row: sqlite3.Row) -> Job:
    since = time.time() - time.monotonic()
    job = Job(row["id"], row["number"], row["payload"], Terms(**orjson.loads(row["terms"])))
    job.state, job.attempts, job.worker_id = JobState(row["state"]), row["attempts"], row["worker"]
    job.timestamps = Timestamps(
        row["submitted"] - since,
        taken=None if row["taken"] is None else row["taken"] - since,
        done=None if row["done"] is None else row["done"] - since,
    )
    job.output = None if row["output"] is None else orjson.loads(row["output"])["output"]
    job.error = row["error"]
    job.read = 0 if job.done else row["read"]
    job.chunks = [] if row["unread"] is None else orjson.loads(row["unread"])["chunks"]
    return job


def _why(error: OSError | sqlite3.Error) -> str:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return "in use by another `coldsnap serve`; name another file"
    if isinstance(error, OSError):
        return f"cannot be used: {error.filename}: {error.strerror}"
    return f"cannot be used: {error}; name another file"
