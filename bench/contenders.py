"""What the token path's benchmarks measure: the bare engine, workers, worker-vllm, and what each process takes.

All of them run the same job on the same snapshot: the demo's longest answer, cut at 64 tokens, so that every token
has text. All share one machine, with the control plane and the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.settings import Settings  # noqa: E402
from coldsnap.snapshot import manifest as snapshot  # noqa: E402
from coldsnap.testing import ControlPlane, Job  # noqa: E402

TOKENS = 64
QUESTION = "What happens on a cold worker before the first token?"
"""Its answer has 167 tokens."""
_MESSAGES = [{"role": "user", "content": QUESTION}]
NATIVE: dict[str, Any] = {
    "messages": _MESSAGES,
    "stream": True,
    "sampling_params": {"max_tokens": TOKENS, "temperature": 0.0},
}
OPENAI: dict[str, Any] = {
    "openai_route": "/v1/chat/completions",
    "openai_input": {"messages": _MESSAGES, "stream": True, "max_tokens": TOKENS, "temperature": 0.0},
}
_REST_SECONDS = 1.2
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Sample:
    """One run of one contender at one level. Seconds; a list has a value for each job."""

    tokens_per_second: float
    ttft: list[float]
    gap: list[float]
    """The longest wait between two chunks of a job, as its client sees it."""
    e2e: list[float]
    posts: float = 0.0
    """Per job."""
    round: int = 0
    """Contenders that ran in the same one are compared."""
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU-seconds per 1,000 tokens, by process."""


class Contender(ABC):
    """Something that runs jobs. `run` returns one sample."""

    name: str
    pid: int

    @abstractmethod
    async def run(self, arrivals: Sequence[float] | None, streams: int, jobs: int) -> Sample:
        """Run `jobs` jobs, `streams` at a time; with `arrivals` each begins so many seconds after the start."""

    async def measured(self, streams: int, jobs: int, arrivals: Sequence[float] | None = None) -> Sample:
        """Run, and add the CPU that this contender's processes and this one took meanwhile.

        vLLM's processes spin for a second after a step: another contender's must have come to rest before. The
        control plane keeps its jobs, and Python's collector would go through all of them for 100 ms at a time, which
        every stream of a worker would show.
        """
        gc.collect()
        gc.freeze()
        await asyncio.sleep(_REST_SECONDS)
        before, own = cpu_seconds(self.pid), time.process_time()
        sample = await self.run(arrivals, streams, jobs)
        after = cpu_seconds(self.pid)
        thousands = jobs * TOKENS / 1000
        sample.cpu = {name: round((used - before.get(name, 0.0)) / thousands, 4) for name, used in after.items()}
        sample.cpu["control plane and client"] = round((time.process_time() - own) / thousands, 4)
        return sample


class Bare(Contender):
    """bench/bare_engine.py, which does the loop itself: nothing but the engine is between request and token."""

    name = "bare engine"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def run(self, arrivals: Sequence[float] | None, streams: int, jobs: int) -> Sample:
        assert self._process.stdin is not None
        request = {"arrivals": arrivals, "streams": streams, "jobs": jobs, "tokens": TOKENS, "question": QUESTION}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = json.loads(await line(self._process))
        return Sample(jobs * TOKENS / answer["seconds"], answer["ttft"], answer["gap"], answer["e2e"])


class Remote(Contender):
    """Something that this process sends jobs to."""

    @abstractmethod
    async def _one(self) -> tuple[list[float], float, int]:
        """Run a job; return the times of submission and of each chunk, the time of its end, and its POSTs."""

    async def run(self, arrivals: Sequence[float] | None, streams: int, jobs: int) -> Sample:
        room = asyncio.Semaphore(streams)
        begun = time.monotonic()

        async def timed(number: int) -> tuple[list[float], float, int]:
            if arrivals is not None:
                await asyncio.sleep(begun + arrivals[number] - time.monotonic())
            async with room:
                return await self._one()

        done = await asyncio.gather(*(timed(number) for number in range(jobs)))
        seconds = time.monotonic() - begun
        return Sample(
            jobs * TOKENS / seconds,
            [times[1] - times[0] for times, _, _ in done],
            [max((b - a for a, b in itertools.pairwise(times[1:])), default=0.0) for times, _, _ in done],
            [end - times[0] for times, end, _ in done],
            statistics.mean(posts for _, _, posts in done),
        )


class Worker(Remote):
    """A worker behind a control plane."""

    def __init__(self, name: str, plane: ControlPlane, pid: int, job: dict[str, Any]) -> None:
        self.name, self.pid = name, pid
        self._plane, self._job = plane, job

    async def _one(self) -> tuple[list[float], float, int]:
        job = self._plane.submit(self._job)
        await job.result(20)
        check(said(job))
        times = job.timestamps
        assert times.done is not None
        return [times.submitted, *times.chunks], times.done, job.posts


class Server(Remote):
    """vLLM's own API server, which chat completions are streamed from: no platform, no SDK, no POSTs."""

    name = "vLLM's server, OpenAI"

    def __init__(self, session: aiohttp.ClientSession, url: str, pid: int) -> None:
        self._session, self._url, self.pid = session, url, pid

    async def _one(self) -> tuple[list[float], float, int]:
        times, text = [time.monotonic()], b""
        body = OPENAI["openai_input"]
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for data in answer.content.iter_any():
                times.append(time.monotonic())
                text += data
        check(text.decode())
        return times, time.monotonic(), 0


def said(job: Job) -> str:
    """Return all that a job has streamed."""
    return "".join(chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in job.chunks)


def check(text: str) -> None:
    """Raise if a stream did not give all its tokens."""
    if '"finish_reason":"length"' not in text.replace(": ", ":"):
        raise RuntimeError(f"a job ended before {TOKENS} tokens: {text[-300:]}")


def cpu_seconds(root: int) -> dict[str, float]:
    """Return the CPU-seconds used so far by `root` and its descendants, by a short name."""
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        pid, rest = int(stat.parent.name), text.rpartition(")")[2].split()
        name = text[text.index("(") + 1 : text.rindex(")")]
        table[pid] = (int(rest[1]), (int(rest[11]) + int(rest[12])) / _TICKS, name)
    used: dict[str, float] = {}
    for pid, (_, seconds, name) in table.items():
        above, depth = pid, 0
        while above not in {root, 0, 1} and above in table:
            above, depth = table[above][0], depth + 1
        if above == root:
            label = "front end" if depth == 0 else name
            used[label] = used.get(label, 0.0) + seconds
    return used


async def line(process: asyncio.subprocess.Process) -> bytes:
    """Return the process's next line of JSON, or `ready`."""
    assert process.stdout is not None
    while text := await process.stdout.readline():
        if text.startswith((b"{", b"ready")):
            return text
    raise RuntimeError("a contender's process has ended")


class Ring(contextlib.AsyncExitStack):
    """Starts contenders, and ends their processes when it is left. Logs are in `scratch`."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="tokenpath-"))
        self.environ = os.environ | {
            "MAX_CONCURRENCY": "256",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "COLDSNAP_LEDGER_DIR": str(self.scratch / "ledger"),
        }
        """The variables of what is started from now on."""

    async def bare(self) -> Bare:
        """Start the bare engine."""
        command = [sys.executable, str(ROOT / "bench" / "bare_engine.py")]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "limit": 1 << 24}
        process = await self._start(command, self.environ, "bare", **pipe)
        await line(process)
        return Bare(process)

    async def plane(self, plane: ControlPlane | None = None) -> ControlPlane:
        """Open a control plane."""
        return await self.enter_async_context(plane or ControlPlane(poll_seconds=30))

    async def worker(self, plane: ControlPlane, checkout: Path = ROOT, *command: str) -> int:
        """Start the worker of a checkout of this project; return its process id."""
        command = command or (str(checkout / "handler.py"),)
        environ = self.environ | plane.environment()
        process = await self._start(
            [sys.executable, *command], environ, f"worker-{plane.url[-5:]}", stdout=subprocess.DEVNULL
        )
        await plane.wait_for_worker(120)
        return process.pid

    async def server(self) -> Server:
        """Start vLLM's API server on the snapshot, as it comes, with the arguments that were baked into it."""
        command, url = server_command()
        environ = {name: value for name, value in self.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
        process = await self._start(command, environ, "server", stdout=subprocess.DEVNULL)
        session = await self.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        await healthy(session, url)
        return Server(session, url, process.pid)

    async def peer(self, plane: ControlPlane, checkout: Path) -> int:
        """Start worker-vllm; its `vllm` command does not exist with the CPU build, so one is made."""
        from coldsnap.vllm import release as vllm_release

        folder, arguments = baked()
        environ = self.environ | plane.environment() | vllm_release.environment(os.environ, arguments)
        environ |= {name.upper(): str(value) for name, value in arguments.items()}
        environ |= {"MODEL_NAME": str(folder), "HF_HUB_OFFLINE": "1", "RUNPOD_LOG_LEVEL": "INFO"}
        environ |= {"PATH": f"{self.scratch}:{environ['PATH']}"}
        for name in ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):  # for a fork, and our choice; the peer spawns
            environ.pop(name, None)
        shim = self.scratch / "vllm"
        shim.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m vllm.entrypoints.openai.api_server "$@"\n')
        shim.chmod(0o755)
        shutil.copytree(checkout / "src", self.scratch / "peer", dirs_exist_ok=True)
        process = await self._start(
            [sys.executable, str(self.scratch / "peer" / "main.py")], environ, "peer", stdout=subprocess.DEVNULL
        )
        await plane.wait_for_worker(240)
        return process.pid

    async def _start(
        self, command: list[str], environ: dict[str, str], name: str, **kwargs: Any
    ) -> asyncio.subprocess.Process:
        """Start a process in a process group of its own.

        Not in a session of its own: Linux shares processors out by session (sched_autogroup), and the engine's
        would starve the client's.
        """
        with (self.scratch / f"{name}.log").open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command, env=environ, stderr=file, preexec_fn=os.setpgrp, **kwargs
            )
        self.callback(_kill, process.pid)
        return process


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 9)


@contextlib.asynccontextmanager
async def ring(checkouts: Sequence[Path], peer: Path | None, *, server: bool = False) -> AsyncIterator[list[Contender]]:
    """Start the bare engine, the worker of each checkout (the first is this one) and the others, and warm them up."""
    async with Ring() as started:
        contenders: list[Contender] = [await started.bare()]
        for number, checkout in enumerate(checkouts):
            plane = await started.plane()
            pid = await started.worker(plane, checkout)
            name = "coldsnap" if number == 0 else checkout.name
            contenders += [
                Worker(f"{name}, native", plane, pid, NATIVE),
                Worker(f"{name}, OpenAI", plane, pid, OPENAI),
            ]
        if server:
            contenders.append(await started.server())
        if peer:
            plane = await started.plane()
            contenders.append(Worker("worker-vllm, OpenAI", plane, await started.peer(plane, peer), OPENAI))
        for contender in contenders:
            await contender.run(None, 32, 64)
        yield contenders


def baked() -> tuple[Path, dict[str, Any]]:
    """Return the snapshot that the environment names, or the demo's, and the engine arguments baked into it."""
    folder = Settings.read(os.environ).snapshot()
    assert folder is not None
    return folder, dict(snapshot.load_manifest(folder).engine_args)


def server_command() -> tuple[list[str], str]:
    """Return how to start vLLM's API server on the snapshot, as it comes, and where it will be."""
    folder, arguments = baked()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    for name, value in arguments.items():
        command.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    command += ["--host=127.0.0.1", f"--port={port}", "--disable-uvicorn-access-log"]
    return command, f"http://127.0.0.1:{port}"


async def healthy(session: aiohttp.ClientSession, url: str) -> None:
    """Return when /health answers 200. Raises TimeoutError after four minutes."""
    async with asyncio.timeout(240):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.02)


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, 0 for an empty list."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0
