"""`coldsnap serve` with workers whose engine keeps time: jobs, records and books end to end, without vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coldsnap.desk.plan import calibration
from coldsnap.testing import ControlPlane
from tests.loopback.desk.serving import ROOT, Serve

HANDLER = str(ROOT / "src" / "coldsnap" / "testing" / "timed_worker.py")
TIMING = {"boot": [0.1, 0.2], "a": 0.004, "b": 0.00001, "c": 0.0001, "d": 0.0, "max_num_seqs": 4}


async def test_jobs_are_answered_and_every_second_is_somebodys(tmp_path: Path) -> None:
    more = {"TIMED_ENGINE": json.dumps(TIMING), "COLDSNAP_LEDGER_DIR": str(tmp_path), "CHUNK_INTERVAL_MS": "20"}
    async with Serve(tmp_path, "--handler", HANDLER, "--workers", "1", environ=dict(os.environ) | more) as serve:
        jobs = [
            await serve.run({"prompt": "word " * words, "sampling_params": {"max_tokens": 40}, "stream": True})
            for words in range(10, 310, 10)
        ]
        wrong = await serve.run({"prompt": "word " * 40_000})
        for words, job in zip(range(10, 310, 10), jobs, strict=True):
            status = await serve.ended(job)
            assert status["status"] == "COMPLETED", status
            text = "".join(chunk["text"] for chunk in status["output"])
            last = status["output"][-1]
            assert (text.split(), last["finish_reason"]) == (["word"] * 40, "length")
            assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (words, 40)
            assert last["cost"]["gpu"] == "a clock"
        failed = await serve.ended(wrong)
        assert failed["status"] == "FAILED"
        assert "do not fit into 32768" in failed["error"]
        assert await serve.end() == 0
    records: dict[str, list[dict[str, Any]]] = {"cold_start": [], "request": [], "worker": []}
    for line in (tmp_path / "ledger.jsonl").read_text().splitlines():
        record = json.loads(line)
        records[record["record"]].append(record)
    [cold], requests, books = records["cold_start"], records["request"], records["worker"][-1]
    assert cold["limits"] == {"max_num_seqs": 4, "max_num_batched_tokens": 2048, "kv_cache_tokens": None}
    assert sum(cold["phases"].values()) == pytest.approx(cold["seconds"], abs=0.01)
    served = [record for record in requests if record["error"] is None]
    assert len(served) == 30
    assert not any(record["estimated"] for record in requests)
    assert max(record["mean_batch"] for record in served) <= 4
    assert books["final"]
    assert books["busy_gpu_seconds"] == pytest.approx(sum(record["gpu_seconds"] for record in requests), abs=1e-6)
    parts = (books[f"{part}_gpu_seconds"] for part in ("cold", "busy", "overhead", "idle", "drain"))
    assert books["gpu_seconds"] == pytest.approx(sum(parts))
    known = calibration.read(tmp_path / "ledger.jsonl", model=None, endpoint=None, flex=None, active=None)
    assert (known.model, known.worker.speed.sequences, known.limits_known) == ("timed", 4, True)


def held(pid: int) -> dict[str, int]:
    """Return what a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    threads, kilobytes = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("Threads", "VmRSS"))
    return {
        "threads": threads,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "kilobytes": kilobytes,
    }


async def test_two_thousand_requests_leave_nothing_in_the_worker(tmp_path: Path) -> None:
    timing = TIMING | {"a": 0.001, "c": 0.00001, "max_num_seqs": 64}
    more = {"TIMED_ENGINE": json.dumps(timing), "COLDSNAP_LEDGER_DIR": str(tmp_path)}
    async with ControlPlane() as plane:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, HANDLER, env=os.environ | plane.environment() | more, stdout=subprocess.DEVNULL,
            process_group=0,
        )  # fmt: skip

        async def serve(jobs: int) -> dict[str, int]:
            job_input = {"prompt": "word " * 50, "sampling_params": {"max_tokens": 5}, "stream": True}
            await asyncio.gather(*(plane.submit(job_input).result() for _ in range(jobs)))
            return held(worker.pid)

        try:
            await plane.wait_for_worker(60)
            before, after = await serve(1000), await serve(2000)
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
            await worker.wait()
    # How many connections are open and threads started depends on the machine, by some dozens; what a request leaves
    # would be there two thousand times.
    assert after["threads"] < before["threads"] + 100
    assert after["descriptors"] < before["descriptors"] + 100
    assert after["kilobytes"] < 1.05 * before["kilobytes"]


def test_it_needs_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None; import coldsnap.testing.timed_engine, coldsnap.worker; print('here')"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
