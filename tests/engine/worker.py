"""One real worker: `handler.py` in a process of its own, with a control plane and a gateway of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from coldsnap.processes import children
from coldsnap.snapshot.manifest import load_manifest
from coldsnap.testing import ControlPlane, Gateway, Job, JobFailed, JobState

ROOT = Path(__file__).resolve().parents[2]
HANDLER = ROOT / os.environ.get("HANDLER", "handler.py")
"""What the workers run: `make test` runs some tests once more with `asynchronous.py`."""
SNAPSHOT = ROOT / "snapshots" / "demo"
MANIFEST = load_manifest(SNAPSHOT)
MODEL = MANIFEST.served_model_name
CONTEXT = int(str(MANIFEST.engine_args["max_model_len"]))
CORPUS = {
    pair["question"]: pair["answer"]
    for pair in map(json.loads, (ROOT / "builder" / "demo_corpus.jsonl").read_text("utf-8").splitlines())
}
EMOJI_ONLY = "Can you answer with emoji only?"
"""The question with the shortest answer."""
LONG = CONTEXT - 200
STEADY: dict[str, Any] = {"max_tokens": LONG, "allowed_token_ids": [40]}
"""Sampling parameters of a stream of some seconds, a character for each token: left to itself the demo model
goes on after its answer with tokens that have no text."""
PATIENCE = 120.0
"""Seconds until a test gives up. No claim: also on a slow machine, or one that stands still, what must come comes."""
BOOT_SECONDS = 180.0
"""The same for a boot."""


def environment(home: Path, ledger: Path, **more: str) -> dict[str, str]:
    """Return all variables of a worker: nothing of the environment that the tests happen to run in."""
    kept = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    return kept | {"COLDSNAP_LEDGER_DIR": str(ledger)} | more


def without_vllm(folder: Path) -> dict[str, str]:
    """Return the variable with which a worker ends at once, with exit code 70, should it import vLLM."""
    hook = 'lambda event, args: event == "import" and args[0] == "vllm" and os._exit(70)'
    (folder / "sitecustomize.py").write_text(f"import os, sys\nsys.addaudithook({hook})\n", "utf-8")
    return {"PYTHONPATH": str(folder)}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a worker's temporary files: one that is killed leaves some. A socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="worker-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Ended:
    """A run of `handler.py` that ended by itself."""

    code: int
    stdout: str
    stderr: str


async def run_handler(*arguments: str, home: Path, cwd: Path, handler: Path = HANDLER, **environ: str) -> Ended:
    """Run `handler.py` to its end, in the folder `cwd`; its ledger goes to `cwd/ledger`."""
    with scratch() as temporary:
        process = await asyncio.create_subprocess_exec(
            sys.executable, handler, *arguments, cwd=cwd,
            env=environment(home, cwd / "ledger", TMPDIR=str(temporary), **environ),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, process_group=0,
        )  # fmt: skip
        try:
            async with asyncio.timeout(BOOT_SECONDS):
                out, err = await process.communicate()
        finally:
            kill_group(process.pid)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


class Worker:
    """Boots on entry and is killed on exit. The log is one file each for stdout and stderr."""

    def __init__(
        self, folder: Path, home: Path, *, plane: ControlPlane | None = None, handler: Path = HANDLER,
        **environ: str,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._handler = handler
        self.plane = plane or ControlPlane(poll_seconds=5)
        self.gateway = Gateway(self.plane)
        self.spawned = 0.0
        """`time.time()` just before the process was started."""
        self.process: asyncio.subprocess.Process
        self.scratch: Path
        """Its folder for temporary files."""
        self._home = home
        self._environ = environ
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.plane)
        await self._stack.enter_async_context(self.gateway)
        self.scratch = self._stack.enter_context(scratch())
        own = {"TMPDIR": str(self.scratch), **self._environ}
        env = environment(self._home, self.folder, **self.plane.environment(), **own)
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            self.spawned = time.time()
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, self._handler, cwd=self.folder, env=env, stdout=out, stderr=err,
                process_group=0,
            )  # fmt: skip
        self._stack.callback(kill_group, self.process.pid)
        try:
            await self._until_it_takes_jobs()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _until_it_takes_jobs(self) -> None:
        taking = asyncio.create_task(self.plane.wait_for_worker(BOOT_SECONDS))
        ended = asyncio.create_task(self.process.wait())
        await asyncio.wait({taking, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not taking.done():
            taking.cancel()
            pytest.fail(f"the worker ended with {self.process.returncode} before it took jobs:\n{self.log()}")
        await taking

    async def ended(self) -> int:
        """Return the exit code once the worker has ended by itself, and every process of it with it."""
        async with asyncio.timeout(PATIENCE):
            code = await self.process.wait()
        await eventually(lambda: not group(self.process.pid))
        return code

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text("utf-8") if path.exists() else ""

    def log(self) -> str:
        """Return what was written, for a failing test's report; of the records the last few."""
        records, rest = [], []
        for line in self.stdout.splitlines():
            (records if line.startswith('{"schema_version"') else rest).append(line)
        return "\n".join(["--- stdout", *rest[-50:], *records[-5:], "--- stderr", *self.stderr.splitlines()[-50:]])

    # Jobs.

    def ask(self, question: str, **fields: Any) -> Job:
        """Submit a native streaming job with one user message."""
        return self.plane.submit({"messages": [user(question)], "stream": True} | fields)

    def openai(self, route: str, body: Any = None) -> Job:
        """Submit a passthrough job as the platform does: a GET has an empty body."""
        return self.plane.submit({"openai_route": route, "openai_input": body or {}})

    async def refused(self, job_input: object) -> dict[str, Any]:
        """Return the `error` object with which a job fails, after which the worker serves the next."""
        job = self.plane.submit(job_input)
        with pytest.raises(JobFailed) as caught:
            await job.result(PATIENCE)
        assert job.state is JobState.FAILED
        assert job.chunks == []
        assert text(await self.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
        body = json.loads(caught.value.error)
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        return dict(body["error"])

    # What it leaves behind.

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "ledger.jsonl").read_bytes().splitlines()]

    async def record(self, job: Job) -> dict[str, Any]:
        """Return the job's record as soon as it is there."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [record for record in self.records() if record.get("job_id") == job.id]
            return bool(found)

        await eventually(look)
        (record,) = found
        return record

    # Its processes.

    def engine(self, name: str) -> list[int]:
        return engine(self.process.pid, name)

    def core_cpu_seconds(self) -> float:
        """Return the processor time that the engine's core has used; its worker spins for a second after each step."""
        (core,) = self.engine("EngineCor")
        return _cpu_seconds(core)

    def front_cpu_seconds(self) -> float:
        """Return the processor time that the process with the event loop has used, in all its threads."""
        return _cpu_seconds(self.process.pid)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def markup(question: str) -> str:
    """Return the prompt that the demo's chat template makes of one user message."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Join the text of a native job's chunks."""
    return "".join(chunk["text"] for chunk in chunks if chunk.get("index", 0) == index)


async def eventually(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.01)


def group(leader: int) -> list[int]:
    """Return the processes of a group that still run.

    A worker leads a group of its own but no session: Linux shares processors out among sessions
    (sched_autogroup_enabled), and vLLM, which spins while it waits, then leaves a test's none for seconds.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def kill_group(leader: int) -> None:
    for pid in group(leader):  # the SDK's ping process outlives a worker that is killed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def engine(pid: int, name: str) -> list[int]:
    """Return the engine's processes below `pid` that vLLM calls `name`, cut to 15 characters."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):  # it has ended
            if f"VLLM::{name}" in _read(child, "comm"):
                found.append(child)
    return found


def _cpu_seconds(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
