"""`coldsnap serve` as its users start it: a process of its own, an address and a key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

ROOT = Path(__file__).resolve().parents[3]
KEY = "rpa_test"


class Serve:
    """Starts on entry, is ended by SIGINT on exit; `log` is what it said."""

    def __init__(self, folder: Path, *options: str, environ: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.state = folder / "serve.db"
        self.process: asyncio.subprocess.Process
        self.base = ""
        """The SDK's endpoint_url_base."""
        self.url = ""
        self.http: aiohttp.ClientSession
        self._options = options
        self._environ = environ if environ is not None else dict(os.environ)

    async def __aenter__(self) -> Self:
        code = "import sys; from coldsnap.cli import main; sys.exit(main())"
        options = ["serve", "--port", "0", "--key", KEY, "--state", str(self.state), *self._options]
        with (self.folder / "serve.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, *options, cwd=self.folder, stderr=log, process_group=0,
                env=self._environ | {"PYTHONPATH": str(ROOT / "src")},
            )  # fmt: skip
        await self.says(r"endpoint (\S+),")
        self.url = re.search(r"endpoint (\S+),", self.log)[1]  # type: ignore[index]
        self.base = self.url.removesuffix("/local")
        self.http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.close()
        try:
            if self.process.returncode is None:
                assert await self.end() == 0, self.log
        finally:
            left = self.processes()
            for pid in [*left, self.process.pid] if self.process.returncode is None else left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert left == [], self.log

    async def end(self, within: float = 60.0) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(within):
            return await self.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text("utf-8")

    async def says(self, pattern: str, within: float = 180.0) -> None:
        """Return when it has said so."""
        await until(lambda: re.search(pattern, self.log) is not None or self.process.returncode is not None, within)
        assert re.search(pattern, self.log), self.log

    @property
    def workers(self) -> list[int]:
        """The process ids of all workers that it has started."""
        return [int(pid) for pid in re.findall(r"starts: process (\d+)", self.log)]

    def processes(self) -> list[int]:
        """Return the processes of its workers that still run."""
        leaders, found = set(self.workers), []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) in leaders and state != "Z":
                    found.append(int(path.parent.name))
        return found

    # The API.

    async def call(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        data = {"json": body} if body is not None else {}
        async with self.http.request(method, f"{self.url}/{path}", **data, **more) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> Any:
        code, answer = await self.call("GET", path)
        assert code == 200, answer
        return answer

    async def post(self, path: str, body: Any = None) -> Any:
        code, answer = await self.call("POST", path, body)
        assert code == 200, answer
        return answer

    async def run(self, job_input: Any, **fields: Any) -> str:
        """Submit a job; return its id."""
        return str((await self.post("run", {"input": job_input, **fields}))["id"])

    async def ended(self, job_id: str, within: float = 60.0) -> dict[str, Any]:
        """Return a job's status once it is final."""
        async with asyncio.timeout(within):
            while True:
                status = await self.get(f"status/{job_id}")
                if status["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                    return dict(status)
                await asyncio.sleep(0.05)


async def until(condition: Callable[[], bool], within: float = 60.0) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {within} s"
        await asyncio.sleep(0.02)
