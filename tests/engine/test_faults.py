"""Faults that a machine and a network bring: disks that run out, a platform that is gone or slow.

Those that take minutes run with FAULTS=1 (`make faults`); without it the same happens in seconds. What needs a
mount is skipped, with the reason, where none can be made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldsnap.desk.serve.worker_http import _Connection
from coldsnap.testing import ControlPlane, Faults, JobState
from tests.loopback.desk.serving import Serve

from .conftest import Boot
from .worker import (
    CORPUS,
    EMOJI_ONLY,
    HANDLER,
    LONG,
    PATIENCE,
    STEADY,
    Worker,
    environment,
    eventually,
    run_handler,
    text,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
LONG_ROWS = os.environ.get("FAULTS") == "1"
DOWN_SECONDS = 120.0 if LONG_ROWS else 6.0
SLOW_SECONDS = 30.0 if LONG_ROWS else 3.0
MEGABYTE = 1_000_000


# The platform.


async def gone(plane: ControlPlane, seconds: float) -> None:
    """Close every connection of the plane and refuse new ones; then be there again, under the same address."""
    server = plane._server
    await server.__aexit__()
    await asyncio.sleep(seconds)
    server._server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(server._answer, server._open, 75.0), "127.0.0.1", server.port
    )


async def test_a_platform_that_is_gone_for_a_while_loses_and_doubles_nothing(
    worker: Worker,
) -> None:
    native = [worker.ask(question) for question in list(CORPUS)[:8]]
    long = worker.ask(QUESTION, sampling_params=STEADY)
    await long.started(PATIENCE)
    await gone(worker.plane, DOWN_SECONDS)
    for question, job in zip(list(CORPUS), native, strict=False):
        assert text(await job.result(PATIENCE)) == CORPUS[question]
        assert text(job.output) == CORPUS[question]
    chunks = await long.result(PATIENCE)
    assert chunks[-1]["usage"]["completion_tokens"] == LONG
    assert len(text(chunks)) == LONG
    assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]  # it takes jobs again


async def test_a_platform_that_answers_slowly_gets_all_of_every_stream_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.plane, "faults", Faults(SLOW_SECONDS))
    questions = list(CORPUS)[:6]
    jobs = [worker.ask(question) for question in questions]
    for question, job in zip(questions, jobs, strict=True):
        assert text(await job.result(10 * SLOW_SECONDS + PATIENCE)) == CORPUS[question]
    assert all(len(job.output) == len(job.chunks) for job in jobs)


# Disks.


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, which can be filled."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all the room that is left."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return ballast


async def test_a_full_disk_of_the_ledger_costs_records_there_and_nothing_else(new_worker: Boot, tmp_path: Path) -> None:
    with disk(tmp_path / "small", "128m") as small:  # temporary files want 100 MiB as the worker boots
        async with new_worker(COLDSNAP_LEDGER_DIR=str(small), TMPDIR=str(small)) as worker:
            assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
            ballast = fill(small)
            regex = {"structured_outputs": {"regex": "(yes|no)"}}
            bound = await worker.ask(QUESTION, sampling_params=regex).result(PATIENCE)  # tried in a process of its own
            assert text(bound) in {"yes", "no"}
            full = [worker.ask(EMOJI_ONLY) for _ in range(30)]
            for job in full:
                assert text(await job.result(PATIENCE)) == CORPUS[EMOJI_ONLY]
            await eventually(lambda: all(job.id in worker.stdout for job in full))
            assert worker.stderr.count("ledger.jsonl cannot be written") == 1
            ballast.unlink()
            last = worker.ask(EMOJI_ONLY)
            await last.result(PATIENCE)
            await eventually(lambda: last.id in (small / "ledger.jsonl").read_text("utf-8"))
        records = (small / "ledger.jsonl").read_bytes()
        assert b"ledger.jsonl" not in records
        assert sum(b'"job_id"' in line for line in records.splitlines()) < 32


INPUT = '{"input": {"prompt": "hi"}}'
READ_ONLY = """
for folder in /tmp /var/tmp /usr/tmp "$PWD"; do
    if [ -d "$folder" ]; then mount --bind "$folder" "$folder"; mount -o remount,ro,bind "$folder"; fi
done
cd "$PWD"; exec "$@"
"""


async def test_a_boot_that_can_write_no_temporary_file_says_so(home: Path, tmp_path: Path) -> None:
    command = ["unshare", "--mount", "sh", "-ec", READ_ONLY, "sh", sys.executable, str(HANDLER), "--test_input", INPUT]
    ended = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, env=environment(home, tmp_path / "ledger"), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if "unshare" in ended.stderr:
        pytest.skip(f"nothing can be mounted here: {ended.stderr.strip()}")
    assert (ended.returncode, ended.stdout) == (1, "")
    (said,) = ended.stderr.splitlines()
    assert said.startswith("coldsnap: disk: no temporary file can be written")


# Memory.


@contextlib.contextmanager
def limited(megabytes: int | None, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Make a memory cgroup, and a handler that boots in it."""
    group = Path("/sys/fs/cgroup/memory") / f"coldsnap-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup of version 1 can be made here: {error}")
    try:
        if megabytes is not None:
            (group / "memory.limit_in_bytes").write_text(f"{megabytes}M")
        handler = folder / "limited.py"
        enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        handler.write_text(f"import os, runpy\n{enter}\nrunpy.run_path({str(HANDLER)!r}, run_name='__main__')\n")
        yield group, handler
    finally:
        while (group / "cgroup.procs").read_text():
            time.sleep(0.01)
        group.rmdir()


async def test_a_boot_that_runs_out_of_memory_says_so(home: Path, tmp_path: Path) -> None:
    with limited(1300, tmp_path) as (_, handler):
        ended = await run_handler(
            "--test_input", INPUT, home=home, cwd=tmp_path, handler=handler, VLLM_CPU_KVCACHE_SPACE="4"
        )
    assert ended.code == 1, ended
    assert "coldsnap: memory: the kernel ended a process of the engine" in ended.stderr


async def test_an_engine_that_runs_out_of_memory_is_a_dead_one(new_worker: Boot, tmp_path: Path) -> None:
    with limited(None, tmp_path) as (group, handler):
        async with new_worker(handler=handler) as worker:
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            for more in range(0, 200 << 20, 1 << 20):  # the kernel refuses what it cannot get back
                with contextlib.suppress(OSError):
                    (group / "memory.limit_in_bytes").write_text(str(int(stat["rss"]) + more))
                    break
            jobs = [worker.ask(question) for question in CORPUS]
            assert await worker.ended() == 1
            assert "the engine process is gone; the worker ends" in worker.stderr
            worker.plane.lose("worker-1", "it died")
            assert JobState.IN_QUEUE in {job.state for job in jobs}  # nobody has read of them


async def test_a_full_disk_of_the_state_refuses_jobs_and_takes_them_again(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text("import time\ntime.sleep(600)\n", "utf-8")
    with disk(tmp_path / "small", "400k") as small:
        async with Serve(small, "--handler", str(tmp_path / "handler.py")) as serve:
            kept = await serve.run({"before": True})
            ballast = fill(small)
            codes = set()
            for _ in range(40):
                code, answer = await serve.call("POST", "run", {"input": {"text": "x" * 5000}})
                codes.add(code)
            assert codes & {500, 503, 507}, codes
            assert "error" in answer
            ballast.unlink()
            again = await serve.run({"after": True})
            assert (await serve.get(f"status/{kept}"))["status"] == "IN_QUEUE"
            assert (await serve.get(f"status/{again}"))["status"] == "IN_QUEUE"
            await serve.end()
        async with Serve(small, "--handler", str(tmp_path / "handler.py")) as serve:
            for job in (kept, again):
                assert (await serve.get(f"status/{job}"))["status"] == "IN_QUEUE"
