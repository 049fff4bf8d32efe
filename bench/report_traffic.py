"""Traffic for a report: one request alone and in fuller and fuller batches, then 64 mixed ones at once.

    python bench/report_traffic.py FOLDER [--workers 2]

Real workers, one after the other, against a local control plane leave their `ledger.jsonl` in a folder each. Prompts
are token ids, so their lengths are exact and the prefix cache meets only what is meant to be shared. The price is
that of an H100, so that the report has dollars; the seconds are those of this machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.testing import ControlPlane, Job, JobFailed  # noqa: E402

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT, TOKENS = 400, 64
REQUESTS = 64


class Traffic:
    """Submits jobs to a control plane; `seed` makes the same traffic again."""

    def __init__(self, plane: ControlPlane, seed: int) -> None:
        self.plane = plane
        self.random = random.Random(seed)
        self.shared = self.ids(160)

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(10, 250) for _ in range(count)]

    def submit(self, prompt: list[int], tokens: int, **more: Any) -> Job:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True} | more
        return self.plane.submit({"openai_route": "/v1/completions", "openai_input": body})

    async def batches(self) -> None:
        """The same request alone, then with more and more of its kind."""
        for size in BATCHES:
            for _ in range(4 if size == 1 else 2):
                jobs = [self.submit(self.ids(PROMPT), TOKENS) for _ in range(size)]
                await asyncio.gather(*(job.result(120) for job in jobs))

    async def mix(self) -> None:
        """Prompts of 16 to 400 tokens and outputs of 8 to 128; a third share a prefix, every eighth is cancelled."""
        jobs, cancelled = [], []
        for i in range(REQUESTS):
            prompt, tokens = self.ids(self.random.randint(16, 400)), self.random.randint(8, 128)
            if i % 3 == 0:
                prompt = self.shared + prompt[: max(16, len(prompt) - len(self.shared))]
            if i % 8 == 5:
                cancelled.append(self.submit(prompt, 1000))
            else:
                jobs.append(self.submit(prompt, tokens))
        await cancelled[0].started(60)
        for job in cancelled:
            await asyncio.sleep(0.02)
            self.plane.cancel(job.id)
        await asyncio.gather(*(job.result(120) for job in jobs))
        for job in cancelled:
            with contextlib.suppress(JobFailed):
                await job.result(10)


async def serve(folder: Path, home: str, seed: int) -> None:
    """Boot a worker, send it the traffic, leave it idle for a moment, end it."""
    async with ControlPlane(poll_seconds=5) as plane:
        environ = {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", "COLDSNAP_LEDGER_DIR": str(folder)}
        environ |= {"GPU_PRICE_PER_SECOND": "0.00116", **plane.environment()}
        environ |= {"RUNPOD_POD_ID": folder.name, "RUNPOD_ENDPOINT_ID": "demo"}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            worker = await asyncio.create_subprocess_exec(
                sys.executable, ROOT / "handler.py", cwd=folder, env=environ, stdout=out, stderr=err, process_group=0
            )
        try:
            await plane.wait_for_worker(120)
            traffic = Traffic(plane, seed)
            await traffic.submit(traffic.ids(16), 8).result(60)
            await traffic.batches()
            await traffic.mix()
            await asyncio.sleep(2)
            worker.send_signal(signal.SIGTERM)
            await asyncio.wait_for(worker.wait(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        for number in range(options.workers):
            folder = options.folder.resolve() / f"worker-{number + 1}"
            folder.mkdir(parents=True, exist_ok=True)
            await serve(folder, home, number)


if __name__ == "__main__":
    asyncio.run(main())
