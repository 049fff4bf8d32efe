"""A worker that stays for as long as a step of gpu_acceptance.py needs it, and what its GPU and processes say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coldstart import ROOT, base, start

from coldsnap.processes import children
from coldsnap.testing import ControlPlane, Job

BOOT_SECONDS = 300.0
_CONTEXT = Path("/dev/nvidia-uvm")
"""What a process with a CUDA context holds open, and one that only asks NVML does not."""


class LiveWorker:
    """`handler.py` with a control plane of its own; every process of it is gone when the context is left."""

    def __init__(self, home: Path, name: str, **environ: str) -> None:
        self.plane = ControlPlane(poll_seconds=30)
        self.pid = 0
        self._home = home
        self._log = home / f"{name}.log"
        self._folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=home))
        self._environ = environ
        self._process: subprocess.Popen[bytes]

    async def __aenter__(self) -> Self:
        await self.plane.__aenter__()
        env = base(self._home) | self.plane.environment() | {"COLDSNAP_LEDGER_DIR": str(self._folder)} | self._environ
        with self._log.open("wb") as log:
            self._process = start([sys.executable, str(ROOT / "handler.py")], env, log)
        self.pid = self._process.pid
        booting = asyncio.create_task(self.plane.wait_for_worker(BOOT_SECONDS))
        while not booting.done() and self._process.poll() is None:
            await asyncio.sleep(0.05)
        if not booting.done():
            booting.cancel()
            await self.__aexit__(None, None, None)
            raise RuntimeError(f"the worker ended with {self._process.returncode}: {self.said()[-2000:]}")
        await booting
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        below = [*children(self.pid)]
        for pid in (self.pid, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        await self.plane.__aexit__(kind, error, trace)

    def ask(self, content: str, **sampling: Any) -> Job:
        """Submit a native streaming job with one user message."""
        messages = [{"role": "user", "content": content}]
        return self.plane.submit({"messages": messages, "stream": True, "sampling_params": sampling})

    async def ended(self, within: float) -> int:
        """Return the exit code."""
        self.plane.release_polls()
        return await asyncio.to_thread(self._process.wait, within)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def kill_core(self) -> None:
        """Send SIGKILL to the engine's core."""
        (core,) = (pid for pid in children(self.pid) if "EngineCor" in Path(f"/proc/{pid}/comm").read_text())
        os.kill(core, signal.SIGKILL)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one kind that it has written so far."""
        lines = map(json.loads, (self._folder / "ledger.jsonl").read_text().splitlines())
        return [line for line in lines if line["record"] == kind]

    async def record(self, job: Job, within: float = 5.0) -> dict[str, Any]:
        """Return a job's record as soon as it is written."""
        async with asyncio.timeout(within):
            while not (records := [each for each in self.records("request") if each["job_id"] == job.id]):
                await asyncio.sleep(0.02)
        return records[0]

    def said(self) -> str:
        """Return what it wrote to stderr."""
        return self._log.read_text("utf-8", "replace")


def text(chunks: list[Any]) -> str:
    """Join the text of a native job's chunks."""
    return "".join(chunk["text"] for chunk in chunks)


def has_context(pid: int) -> bool:
    """Return whether a process has begun with CUDA."""
    links = []
    with contextlib.suppress(OSError):  # it has ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(link.readlink())
    return _CONTEXT in links


def used_bytes() -> int:
    """Return how much memory of the GPUs is in use, 0 without one."""
    return sum(memory.used for memory in _memories())


def total_bytes() -> int:
    """Return how much memory the first GPU has, 0 without one."""
    return next((int(memory.total) for memory in _memories()), 0)


def _memories() -> Iterator[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
    finally:
        pynvml.nvmlShutdown()


class PowerLog:
    """nvidia-smi's power, ten times a second; an independent witness of the energy counters."""

    def __init__(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--loop-ms=100"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._begun = time.monotonic()

    def joules(self) -> float:
        """End, and return the mean power times the time."""
        seconds = time.monotonic() - self._begun
        self._process.terminate()
        watts = [float(line) for line in self._process.communicate()[0].splitlines() if line.strip()]
        return sum(watts) / len(watts) * seconds
