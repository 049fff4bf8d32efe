"""One job on the terminal: where its input comes from and what a person sees of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from coldsnap.boot import Booted
from coldsnap.errors import SettingsError
from coldsnap.jobs.job import Chunk
from coldsnap.records.schema import ColdStart
from coldsnap.records.sink import LEDGER
from coldsnap.settings import ROOT

_FLAG = "--test_input"
_FILE = "test_input.json"


def test_input(argv: list[str], *, on_platform: bool) -> str | None:
    """Return the job to run locally as JSON text, or None if jobs come from the platform.

    Raises `SettingsError` before anything is booted if it is not a JSON object with `input`.
    """
    text, name = _flag(argv), _FLAG
    if text is None:
        if on_platform or "--rp_serve_api" in argv:
            return None
        if stray := argv[1:2]:  # a job that was meant, and would not be the one that is run
            raise SettingsError(
                f"{stray[0]:.100}: unknown argument; expected {_FLAG} '{{\"input\": …}}', or none for {_FILE}"
            )
        path = next((p for p in (Path.cwd() / _FILE, ROOT / _FILE) if p.is_file()), None)
        if path is None:
            raise SettingsError(
                f"{_FILE}: expected a file here or beside handler.py, found none; or give {_FLAG} '{{\"input\": …}}'"
            )
        try:
            # What is not UTF-8 becomes lone surrogates, which are not JSON.
            text, name = path.read_text(encoding="utf-8", errors="surrogateescape"), str(path)
        except OSError as error:
            raise SettingsError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        job = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise SettingsError(f'{name}: expected JSON such as {{"input": {{"prompt": "Hello"}}}}: {error}') from error
    if not isinstance(job, dict) or "input" not in job:
        raise SettingsError(f"{name}: expected an object with the field input, found {text:.80}")
    return text


def _flag(argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word == _FLAG:
            if i + 1 == len(argv):
                raise SettingsError(f"{_FLAG}: expected the job's JSON behind it, found nothing")
            return argv[i + 1]
        if word.startswith(f"{_FLAG}="):
            return word.removeprefix(f"{_FLAG}=")
    return None


class View:
    """Prints a job as it runs, then its result, the cold start's waterfall, its cost and its records."""

    def __init__(self, booted: Booted) -> None:
        self._booted = booted

    def begin(self, job: Mapping[str, Any]) -> None:
        """Say what is asked of whom."""
        info = self._booted.engine.info
        self._title(f"{info.models[0]} on {info.gpu}, vLLM {info.version}")
        content = job.get("input")
        if isinstance(content, dict) and isinstance(messages := content.get("messages"), list):
            for message in messages:
                if isinstance(message, dict):
                    self._line(f"{message.get('role')}: {message.get('content')}")
        elif isinstance(content, dict) and "prompt" in content:
            self._line(f"prompt: {str(content['prompt'])[:500]}")
        self._line("")

    def chunk(self, chunk: Chunk) -> Chunk:
        """Print a chunk's text as it comes, and return the chunk."""
        text = chunk if isinstance(chunk, str) else chunk.get("text", "")
        self._write(text if isinstance(text, str) else "")
        return chunk

    def end(self, chunks: list[Chunk], cold_start: ColdStart, records: list[str], *, written: bool = True) -> None:
        """Print what is known once the job has ended; `written` if the ledger took the records."""
        self._line("")
        last = chunks[-1]
        if isinstance(last, dict):
            self._title("result")
            texts = [chunk["text"] for chunk in chunks if isinstance(chunk, dict) and "text" in chunk]
            result = last | ({"text": "".join(texts)} if texts else {})
            self._line(orjson.dumps(result, option=orjson.OPT_INDENT_2).decode())
        self._title(f"cold start: {cold_start.seconds:.2f} s from process start to ready")
        begin = 0.0
        for phase, seconds in cold_start.phases.items():
            self._line(f"{phase:16} {seconds:6.2f} s  {_bar(begin, seconds, cold_start.seconds)}")
            begin += seconds
        for work, seconds in cold_start.beside.items():
            self._line(f"{work:16} {seconds:6.2f} s  beside the phases above")
        request = orjson.loads(records[-1])
        self._title("request")
        ttft, itl = request["ttft_seconds"], request["itl_seconds"]
        self._line(
            f"{request['prompt_tokens']} prompt tokens ({request['cached_tokens']} cached), "
            f"{request['completion_tokens']} completion tokens"
        )
        if ttft is not None:
            pace = "" if itl is None else f", ITL {itl * 1000:.1f} ms"
            self._line(f"TTFT {ttft * 1000:.1f} ms{pace}, {request['duration_seconds']:.3f} s in all")
        self._line(f"{request['gpu_seconds']:.6f} GPU-seconds on {request['gpu_count']} x {request['gpu']}")
        self._title(f"records, also appended to {self._booted.settings.ledger_dir / LEDGER}" if written else "records")
        for record in records:
            self._line(record)

    def last(self, records: list[str]) -> None:
        """Print the record that comes when the engine has been stopped, if the worker had been ready."""
        for record in records[-1:]:
            self._line(record)

    def _title(self, text: str) -> None:
        self._line(f"\n── {text} " + "─" * max(3, 76 - len(text)))

    def _line(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough; the job runs on, and its records are kept
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123 -- what is left to write must go somewhere
                os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _bar(begin: float, seconds: float, total: float, width: int = 48) -> str:
    indent = round(begin / total * width)
    length = round((begin + seconds) / total * width) - indent
    return " " * indent + ("█" * length or "▏")
