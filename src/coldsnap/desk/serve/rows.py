"""Makes the page's rows of the newest jobs, and the latencies they show."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

from coldsnap.desk.serve.board import Board
from coldsnap.desk.serve.job import Job, JobState
from coldsnap.desk.serve.transcript import Transcript
from coldsnap.records.schema import Request

_ROWS = 32
_OF_THEM_QUEUED = 6
_OF_THEM_RUNNING = 18
_KNOWN = 256
"""Rows, and records of requests, that are kept for later."""
_LATENCIES = 200
_RATE_SECONDS = 10.0
_LIVE = {JobState.IN_QUEUE, JobState.IN_PROGRESS}

Row = dict[str, Any]


class Rows:
    """What is known of the newest jobs, from the board and from their workers' records."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._records: dict[str, Request] = {}
        self._transcripts: dict[str, Transcript] = {}
        self._rows: dict[str, Row] = {}
        """Rows by job id, oldest first, as they were when the job was last looked at."""
        self._ttft: deque[float] = deque(maxlen=_LATENCIES)
        self._itl: deque[float] = deque(maxlen=_LATENCIES)
        self._ended: list[tuple[float, int]] = []
        """When requests of the last seconds ended, and their tokens."""

    def add(self, record: Request) -> None:
        """Take in what a worker says of a job that has ended."""
        self._records[record.job_id] = record
        _forget_oldest(self._records)
        self._ended.append((record.monotonic, record.completion_tokens))
        if record.ttft_seconds is not None:
            self._ttft.append(record.ttft_seconds)
        if record.itl_seconds is not None:
            self._itl.append(record.itl_seconds)

    def latency(self) -> dict[str, Row]:
        """Return TTFT and ITL of the last requests, in seconds."""
        return {"ttft": _spread(self._ttft), "itl": _spread(self._itl)}

    def rate(self, now: float) -> dict[str, float]:
        """Return requests and tokens a second; workers share this machine's clock."""
        self._ended = [(end, tokens) for end, tokens in self._ended if end >= now - _RATE_SECONDS]
        tokens = sum(tokens for _, tokens in self._ended)
        return {"requests": len(self._ended) / _RATE_SECONDS, "tokens": tokens / _RATE_SECONDS}

    def newest(self, now: float) -> Row:
        """Return the rows, newest first, and how many jobs are not among them."""
        board = self._board
        running = [board.jobs[name] for worker in board.workers.values() for name in worker.running]
        running.sort(key=lambda job: job.number, reverse=True)
        recent = list(itertools.islice(reversed(board.jobs.values()), 2 * _ROWS))
        queued = [job for job in recent if job.state is JobState.IN_QUEUE][:_OF_THEM_QUEUED]
        ended = [job for job in recent if job.done]
        live = {name for name, row in self._rows.items() if row["state"] in _LIVE and name in board.jobs}
        newest_running = running[:_OF_THEM_RUNNING]
        for job in reversed([*queued, *newest_running, *ended, *(board.jobs[name] for name in live)]):
            self._rows[job.id] = self._row(job, now)
        _forget_oldest(self._rows)
        _forget_oldest(self._transcripts)
        rows = [self._rows[job.id] for job in [*queued, *newest_running]]
        rest = [row for row in self._rows.values() if row["state"] not in _LIVE]
        rest.sort(key=lambda row: row["number"], reverse=True)
        rows += rest[: _ROWS - len(rows)]
        rows.sort(key=lambda row: row["number"], reverse=True)
        return {
            "rows": rows,
            "queued_more": len(board.queue) - len(queued),
            "running_more": len(running) - len(newest_running),
        }

    def _row(self, job: Job, now: float) -> Row:
        if (transcript := self._transcripts.get(job.id)) is None:
            transcript = self._transcripts[job.id] = Transcript(job)
        transcript.follow(job)
        times, record = job.timestamps, self._records.get(job.id)
        started = times.taken
        ttft = times.first_chunk - started if started is not None and times.first_chunk is not None else None
        row: Row = {
            "id": job.id,
            "number": job.number,
            "state": job.state,
            "worker": job.worker_id,
            "route": transcript.route,
            "question": transcript.question,
            "text": transcript.text,
            "characters": transcript.characters,
            "waited": round((now if started is None else started) - times.submitted, 7),
            "took": None if started is None else round((times.done or now) - started, 6),
            "ttft": ttft,
            "error": None if job.error is None else job.error[:500],
            "attempts": job.attempts,
        }
        if record is not None and job.done:
            row |= {
                "ttft": record.ttft_seconds,
                "itl": record.itl_seconds,
                "prompt": record.prompt_tokens,
                "tokens": record.completion_tokens,
                "gpu_seconds": record.gpu_seconds,
                "usd": record.usd,
            }
        return row


def _forget_oldest(rows: dict[str, Any]) -> None:
    while len(rows) > _KNOWN:
        del rows[next(iter(rows))]


def _spread(values: Iterable[float]) -> Row:
    """Return the values as they came, and quantiles that are values (nearest rank)."""
    numbers = list(values)
    ordered = sorted(numbers)

    def quantile(share: float) -> float | None:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

    return {
        "count": len(numbers),
        "p50": quantile(0.5),
        "p95": quantile(0.95),
        "values": [round(x, 5) for x in numbers],
    }
