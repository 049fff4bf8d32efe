"""How much of its engine a worker delivers: tokens/s, TTFT, gaps between chunks, CPU and POSTs per job.

    python bench/tokenpath.py [--rounds 5] [--levels 1 8 32 128] [--peer CHECKOUT] [--out bench/results/tokenpath.json]

Contenders take turns in every round, on the same snapshot: the bare engine, this worker with native and with
OpenAI jobs, and worker-vllm where `--peer` names a checkout of it. Jobs stream 64 tokens. All processes share
this machine, the control plane and the client too; their CPU is reported, so that it can be judged.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.testing import ControlPlane, Job  # noqa: E402

TOKENS = 64
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Sample:
    """One run of one contender at one level. Seconds."""

    tokens_per_second: float
    ttft: list[float]
    gap: list[float] = field(default_factory=list)
    """Each job's longest wait between two chunks."""
    e2e: list[float] = field(default_factory=list)
    posts: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU-seconds per 1,000 tokens, by process."""


def processes(root: int) -> dict[str, float]:
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


class Contender(ABC):
    """Something that runs jobs. `run` returns one sample."""

    name: str
    pid: int

    @abstractmethod
    async def run(self, streams: int, jobs: int) -> Sample:
        """Run `jobs` jobs, `streams` at a time."""

    async def measured(self, streams: int, jobs: int) -> Sample:
        """Run, and add the CPU that this contender's processes and this one took meanwhile."""
        before, own = processes(self.pid), time.process_time()
        sample = await self.run(streams, jobs)
        after = processes(self.pid)
        thousands = jobs * TOKENS / 1000
        sample.cpu = {k: round((v - before.get(k, 0.0)) / thousands, 4) for k, v in after.items()}
        sample.cpu["control plane and client"] = round((time.process_time() - own) / thousands, 4)
        return sample


class Bare(Contender):
    """bench/bare_engine.py."""

    name = "bare engine"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def run(self, streams: int, jobs: int) -> Sample:
        assert self._process.stdin is not None
        request = {"streams": streams, "jobs": jobs, "tokens": TOKENS}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = json.loads(await line(self._process))
        return Sample(jobs * TOKENS / answer["seconds"], answer["ttft"])


class Worker(Contender):
    """A worker behind a control plane of its own."""

    def __init__(self, name: str, plane: ControlPlane, pid: int, job: dict[str, Any]) -> None:
        self.name, self.pid = name, pid
        self._plane, self._job = plane, job

    async def run(self, streams: int, jobs: int) -> Sample:
        room = asyncio.Semaphore(streams)

        async def one() -> Job:
            async with room:
                job = self._plane.submit(self._job)
                await job.result(300)
                return job

        begun = time.monotonic()
        done = await asyncio.gather(*(one() for _ in range(jobs)))
        seconds = time.monotonic() - begun
        gaps = [
            max((b - a for a, b in itertools.pairwise(t)), default=0.0) for t in (job.timestamps.chunks for job in done)
        ]
        return Sample(
            jobs * TOKENS / seconds,
            [(job.timestamps.first_chunk or 0.0) - job.timestamps.submitted for job in done],
            gaps,
            [(job.timestamps.done or 0.0) - job.timestamps.submitted for job in done],
            statistics.mean(job.posts for job in done),
        )


NATIVE = {
    "prompt": "hi there",
    "stream": True,
    "sampling_params": {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0},
}
OPENAI = {
    "openai_route": "/v1/chat/completions",
    "openai_input": {
        "messages": [{"role": "user", "content": "hi there"}],
        "stream": True,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0.0,
    },
}


async def line(process: asyncio.subprocess.Process) -> bytes:
    """Return the process's next line of JSON, or `ready`."""
    assert process.stdout is not None
    while text := await process.stdout.readline():
        if text.startswith((b"{", b"ready")):
            return text
    raise RuntimeError("a contender's process has ended")


async def start(command: list[str], env: dict[str, str], log: Path, **kwargs: Any) -> asyncio.subprocess.Process:
    """Start a process with its stderr in `log`, in a process group of its own.

    Not in a session of its own: Linux shares processors out by session (sched_autogroup), and the engine's would
    starve the client's.
    """
    with log.open("wb") as file:
        return await asyncio.create_subprocess_exec(*command, env=env, stderr=file, preexec_fn=os.setpgrp, **kwargs)


def peer_command(checkout: Path, scratch: Path) -> list[str]:
    """Return how to start worker-vllm; its `vllm` command does not exist with the CPU build, so one is made."""
    shim = scratch / "vllm"
    shim.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m vllm.entrypoints.openai.api_server "$@"\n')
    shim.chmod(0o755)
    shutil.copytree(checkout / "src", scratch / "peer", dirs_exist_ok=True)
    return [sys.executable, str(scratch / "peer" / "main.py")]


async def main() -> None:
    """Boot the contenders, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--peer", type=Path, help="a checkout of runpod-workers/worker-vllm")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tokenpath.json")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tokenpath-"))
    common = os.environ | {"MAX_CONCURRENCY": "256", "COLDSNAP_LEDGER_DIR": str(scratch / "ledger")}
    contenders: list[Contender] = []
    running: list[asyncio.subprocess.Process] = []
    async with ControlPlane(poll_seconds=30) as ours, ControlPlane(poll_seconds=30) as theirs:
        try:
            pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "limit": 1 << 24}
            bare = await start(
                [sys.executable, str(ROOT / "bench" / "bare_engine.py")], common, scratch / "bare.log", **pipe
            )
            running.append(bare)
            await line(bare)
            contenders.append(Bare(bare))
            env = common | ours.environment()
            worker = await start(
                [sys.executable, str(ROOT / "handler.py")], env, scratch / "worker.log", stdout=subprocess.DEVNULL
            )
            running.append(worker)
            await ours.wait_for_worker(120)
            contenders += [
                Worker("coldsnap, native", ours, worker.pid, NATIVE),
                Worker("coldsnap, OpenAI", ours, worker.pid, OPENAI),
            ]
            if args.peer:
                from coldsnap import snapshot, vllm_engine
                from coldsnap.settings import Settings

                folder = Settings.read(os.environ).snapshot()
                assert folder is not None
                baked = snapshot.load_manifest(folder).engine_args
                arguments = {k.upper(): str(v) for k, v in baked.items()}
                env = common | theirs.environment() | vllm_engine.environment(os.environ, baked) | arguments
                env |= {"MODEL_NAME": str(folder), "HF_HUB_OFFLINE": "1", "RUNPOD_LOG_LEVEL": "INFO"}
                env |= {"PATH": f"{scratch}:{env['PATH']}"}
                for name in ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):  # for a fork, and our choice; the peer spawns
                    env.pop(name, None)
                peer = await start(
                    peer_command(args.peer, scratch), env, scratch / "peer.log", stdout=subprocess.DEVNULL
                )
                running.append(peer)
                await theirs.wait_for_worker(240)
                contenders.append(Worker("worker-vllm, OpenAI", theirs, peer.pid, OPENAI))
            for contender in contenders:
                await contender.run(32, 64)
            samples = await rounds(contenders, args.rounds, args.levels)
        finally:
            for process in running:
                if process.returncode is None:
                    os.killpg(process.pid, 9)
    write(args.out, contenders, samples, args)


async def rounds(contenders: list[Contender], count: int, levels: list[int]) -> dict[tuple[str, int], list[Sample]]:
    """Let the contenders take turns."""
    samples: dict[tuple[str, int], list[Sample]] = {}
    for number in range(count):
        for level in levels:
            for contender in contenders:
                jobs = max(16, 4 * level)
                sample = await contender.measured(level, jobs)
                samples.setdefault((contender.name, level), []).append(sample)
                print(
                    f"{number + 1}/{count} {level:4} {contender.name:20} {sample.tokens_per_second:8.0f} tok/s",
                    file=sys.stderr,
                )
    return samples


def write(out: Path, contenders: list[Contender], samples: dict[tuple[str, int], list[Sample]], args: Any) -> None:
    """Write medians as JSON and as a Markdown table beside it."""
    rows = []
    table = [
        "| | streams | tok/s | of bare | TTFT p50 | longest gap p95 | POSTs a job | CPU-s per 1,000 tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        for level in args.levels:
            runs = samples[contender.name, level]
            bare = samples[contenders[0].name, level]
            ratio = statistics.median(
                r.tokens_per_second / b.tokens_per_second for r, b in zip(runs, bare, strict=True)
            )
            cpu = {k: statistics.median(r.cpu.get(k, 0.0) for r in runs) for k in runs[0].cpu}
            row = {
                "contender": contender.name,
                "streams": level,
                "tokens_per_second": statistics.median(r.tokens_per_second for r in runs),
                "of_bare": ratio,
                "ttft_p50_ms": 1000 * statistics.median(t for r in runs for t in r.ttft),
                "gap_p95_ms": 1000 * quantile([g for r in runs for g in r.gap], 0.95),
                "posts_per_job": statistics.median(r.posts for r in runs),
                "cpu_seconds_per_1000_tokens": cpu,
            }
            rows.append(row)
            parts = ", ".join(f"{k} {v:.3f}" for k, v in cpu.items() if v >= 0.001)
            table.append(
                f"| {contender.name} | {level} | {row['tokens_per_second']:.0f} | {ratio:.2f} "
                f"| {row['ttft_p50_ms']:.1f} ms | {row['gap_p95_ms']:.1f} ms | {row['posts_per_job']:.1f} | {parts} |"
            )
    about = {
        "rounds": args.rounds,
        "tokens_per_job": TOKENS,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, 0 for an empty list."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
