"""Whether a token is lost, doubled or out of order while processes, disks and POSTs fail: a seeded soak.

    python bench/chaos.py [--requests 20000] [--seed 1] [--out bench/results/chaos]     # as root: it mounts a disk

The platform of `coldsnap serve` with two workers on the real engine and the demo. Clients ask natively and by OpenAI's
API over HTTP, streamed and plain; one in a hundred cancels. A twentieth of all POSTs is refused or its answer lost, and
every 200 requests something breaks (`FAULTS`). The demo is greedy, so every answer is known: what a client got, and
what the job's result holds, is compared with it character by character. A client whose job failed with an error that
says to try again sends it again, as the docs tell it to.

Predicted: 0 lost, 0 doubled, 0 out of order; each job ends once; every record of a completed job is in the ledger or,
while its disk was full, on stdout; of the ledger's lines at most as many are torn as workers were killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from contenders import ROOT

from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.fleet import Fleet, WorkerProcess
from coldsnap.desk.serve.job import RUNSYNC
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.submission import Submission
from coldsnap.processes import children
from coldsnap.testing import ControlPlane, Faults, Gateway, Job, JobCancelled, JobFailed

FAULTS = (
    "worker killed", "engine core killed", "engine core stopped", "worker told to end", "worker frozen",
    "ledger's disk full", "ledger's disk frozen", "POSTs unanswered",
)  # fmt: skip
POSTS = Faults(jitter=0.02, stream_5xx=0.02, stream_429=0.01, stream_lost=0.02, done_5xx=0.02, done_lost=0.02)
_EVERY = 200
"""Requests from one of FAULTS to the next."""
_SECONDS = 3.0
"""How long a fault that passes lasts."""
_CLIENTS = 48
_CANCELS = 0.01
_TRIES = 20
_PATIENCE = 300.0
"""Seconds until a job counts as one that never ends."""
_AGAIN = ("EngineDeadError", "EngineStalledError", "while it ran the job", "DRAIN_SECONDS")
"""What an error says after which a client sends the same again."""
_ENVIRON = {
    "MAX_CONCURRENCY": "24", "ENGINE_STALL_SECONDS": "10", "DRAIN_SECONDS": "20", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip
_CORPUS: dict[str, str] = {
    pair["question"]: pair["answer"]
    for pair in map(json.loads, (ROOT / "builder" / "demo_corpus.jsonl").read_text("utf-8").splitlines())
}
_QUESTIONS = sorted(_CORPUS, key=lambda question: len(_CORPUS[question]))[:24]


class _Counted:
    """POSTS, and how many of each were drawn."""

    def __init__(self) -> None:
        self.drawn = Counter[str]()

    def draw(self, kind: Any, job_number: int, post_number: int) -> tuple[float, int | None]:
        """See `Faults`."""
        delay, status = POSTS.draw(kind, job_number, post_number)
        self.drawn["taken" if status is None else f"answered with {status}"] += 1
        return delay, status


class Clients:
    """Ask, and compare."""

    def __init__(self, endpoint: Endpoint, gateway: Gateway, http: aiohttp.ClientSession, seed: int) -> None:
        self.count = Counter[str]()
        self.wrong: list[str] = []
        """Errors that say nothing of trying again, and jobs that never ended."""
        self.completed: set[str] = set()
        """Native jobs, by id."""
        self._endpoint, self._gateway, self._http, self._seed = endpoint, gateway, http, seed
        self._room = asyncio.Semaphore(_CLIENTS)

    async def ask(self, number: int) -> None:
        """Send a request until it is answered, or cancel it."""
        dice = random.Random(f"{self._seed}/{number}")
        question, cancel = dice.choice(_QUESTIONS), dice.random() < _CANCELS
        way, stream = self._native if number % 2 else self._openai, number % 4 < 2
        async with self._room:
            for _ in range(_TRIES):
                try:
                    async with asyncio.timeout(_PATIENCE):
                        said, end = await way(question, stream=stream, cancel=cancel)
                except TimeoutError:
                    self.wrong.append(f"{number}: no end within {_PATIENCE:g} s")
                    return
                for text in said:
                    self._compare(text, _CORPUS[question], whole=end == "completed")
                if end in {"completed", "cancelled"}:
                    self.count[end] += 1
                    return
                if not any(words in end for words in _AGAIN):
                    self.wrong.append(f"{number}: {end}")
                    return
                self.count["failed and sent again"] += 1
            self.wrong.append(f"{number}: failed {_TRIES} times")

    def _compare(self, got: str, want: str, *, whole: bool) -> None:
        """Count characters that are missing, too many, or at another place. What broke off is a beginning."""
        want = want if whole else want[: len(got)]
        missing, surplus = Counter(want) - Counter(got), Counter(got) - Counter(want)
        self.count["lost"] += missing.total()
        self.count["doubled"] += surplus.total()
        if got != want:
            self.wrong.append(f"{got!r} instead of {want!r}")
            if not missing and not surplus:
                self.count["out of order"] += sum(a != b for a, b in zip(got, want, strict=True))

    async def _native(self, question: str, *, stream: bool, cancel: bool) -> tuple[list[str], str]:
        """Return what was said, as chunks and as the result, and how it ended."""
        asked = {"messages": [{"role": "user", "content": question}], "stream": stream}
        job = self._endpoint.submit(Submission(asked, {}, RUNSYNC), sync=True)
        said: list[str] = []
        try:
            if cancel and not stream:
                await asyncio.sleep(0.02)
                self._endpoint.plane.cancel(job.id)
            if stream:
                async for chunk in job.stream():
                    said.append(chunk["text"])
                    if cancel:
                        self._endpoint.plane.cancel(job.id)
            result = "".join(chunk["text"] for chunk in await job.result())
        except JobCancelled:
            return ["".join(said)], "cancelled"
        except JobFailed as failure:
            return ["".join(said)], failure.error
        self.completed.add(job.id)
        return [result, *(["".join(said)] if stream else [])], "completed"

    async def _openai(self, question: str, *, stream: bool, cancel: bool) -> tuple[list[str], str]:
        body = {"messages": [{"role": "user", "content": question}], "stream": stream}
        said, done = "", 0
        async with self._http.post(f"{self._gateway.base_url}/chat/completions", json=body) as answer:
            if answer.status != 200:
                return [], await answer.text()
            if not stream:
                return [(await answer.json())["choices"][0]["message"]["content"]], "completed"
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if done:
                    return [said], f"after [DONE]: {line!r}"
                if line.startswith(b"data: [DONE]"):
                    done = 1
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return [said], json.dumps(event)
                said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if cancel:  # the connection is closed
                    return [said], "cancelled"
        return [said], "completed" if done else "a stream without [DONE]"


class Breaker:
    """Breaks what is named, of a worker drawn from the seed."""

    def __init__(self, fleet: Fleet, plane: ControlPlane, disk: Path, seed: int) -> None:
        self.count = Counter[str]()
        self._fleet, self._plane, self._disk = fleet, plane, disk
        self._dice = random.Random(seed)

    async def run(self, requests: int, finished: Counter[str]) -> None:
        """Break something each time that so many more requests have ended."""
        number = max(len(FAULTS), requests // _EVERY)
        faults = [FAULTS[i % len(FAULTS)] for i in range(number)]
        self._dice.shuffle(faults)
        for i, fault in enumerate(faults):
            while finished["completed"] + finished["cancelled"] < i * requests // number:
                await asyncio.sleep(0.05)
            await self._break(fault)
            self.count[fault] += 1

    async def _break(self, fault: str) -> None:
        worker = await self._worker()
        (core,) = (pid for pid in children(worker.process.pid) if _name(pid) == "VLLM::EngineCor")
        match fault:
            case "worker killed":
                os.kill(worker.process.pid, signal.SIGKILL)
            case "engine core killed":
                os.kill(core, signal.SIGKILL)
            case "engine core stopped":
                os.kill(core, signal.SIGSTOP)
            case "worker told to end":
                os.kill(worker.process.pid, signal.SIGTERM)
            case "worker frozen":
                os.kill(worker.process.pid, signal.SIGSTOP)
                await asyncio.sleep(_SECONDS)
                os.kill(worker.process.pid, signal.SIGCONT)
            case "ledger's disk full":
                await asyncio.to_thread(_fill, self._disk / "ballast")
                await asyncio.sleep(_SECONDS)
                (self._disk / "ballast").unlink()
            case "ledger's disk frozen":
                subprocess.run(["fsfreeze", "-f", self._disk], check=True)
                await asyncio.sleep(_SECONDS)
                subprocess.run(["fsfreeze", "-u", self._disk], check=True)
            case "POSTs unanswered":
                self._plane.gate = asyncio.Event()
                await asyncio.sleep(_SECONDS)
                self._plane.gate.set()
                self._plane.gate = None

    async def _worker(self) -> WorkerProcess:
        while True:
            ready = [each for each in self._fleet.workers.values() if each.ready and not each.stopping]
            whole = [
                each for each in ready if any(_name(pid) == "VLLM::EngineCor" for pid in children(each.process.pid))
            ]
            if whole:
                return self._dice.choice(whole)
            await asyncio.sleep(0.1)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """Mount a file system that can be filled and frozen."""
    image, mounted = folder / "disk", folder / "ledger"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


@contextlib.asynccontextmanager
async def _platform(folder: Path, ledger: Path, plane: ControlPlane) -> AsyncIterator[tuple[Endpoint, Fleet]]:
    """Run an endpoint and its workers."""
    with Store(folder / "serve.db", print) as store:
        async with plane, Endpoint(plane, store, Scaling(least=2, most=2), print) as endpoint:
            environ = os.environ | _ENVIRON | {"COLDSNAP_LEDGER_DIR": str(ledger), "TMPDIR": str(folder)}
            fleet = Fleet(endpoint, ROOT / "handler.py", environ, folder / "logs", lambda _: None)
            running = asyncio.create_task(fleet.run())
            try:
                await plane.wait_for_worker(300)
                yield endpoint, fleet
            finally:
                endpoint.stop()
                await running
                await fleet.stop(60, asyncio.Event())


async def soak(requests: int, seed: int, folder: Path) -> dict[str, Any]:
    """Return the counts."""
    posts, ends = _Counted(), Counter[str]()
    plane = ControlPlane(poll_seconds=5, faults=posts)
    plane.on_end = lambda job: ends.update([job.id])
    jobs: list[Job] = []
    with _disk(folder) as ledger:
        async with (
            _platform(folder, ledger, plane) as (endpoint, fleet),
            Gateway(plane) as gateway,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        ):
            clients = Clients(endpoint, gateway, http, seed)
            breaker = Breaker(fleet, plane, ledger, seed)
            begun = time.monotonic()
            breaking = asyncio.create_task(breaker.run(requests, clients.count))
            saying = asyncio.create_task(_say(clients, breaker))
            await asyncio.gather(*(clients.ask(number) for number in range(requests)))
            seconds = time.monotonic() - begun
            saying.cancel()
            await breaking
            jobs = [job for job in plane.jobs.values() if not job.done]
        books = _books(ledger / "ledger.jsonl", folder / "logs", clients.completed)
    return {
        "requests": requests, "seed": seed, "seconds": round(seconds),
        **{name: clients.count[name] for name in ("lost", "doubled", "out of order")},
        **{name: clients.count[name] for name in ("completed", "cancelled", "failed and sent again")},
        "retried by the platform": plane.counts["retried"],
        "jobs that ended twice": sum(number > 1 for number in ends.values()),
        "jobs that did not end": len(jobs),
        "wrong": len(clients.wrong), "examples": clients.wrong[:20],
        "violations": Counter(each.kind for each in plane.violations),
        "faults": breaker.count, "posts": posts.drawn, "workers": len(fleet.past),
        "ends of workers": Counter(each.how for each in fleet.past), **books,
    }  # fmt: skip


async def _say(clients: Clients, breaker: Breaker) -> None:
    while True:
        await asyncio.sleep(20)
        print(dict(clients.count), f"{breaker.count.total()} faults", f"{len(clients.wrong)} wrong", flush=True)


def _books(ledger: Path, logs: Path, completed: set[str]) -> dict[str, int]:
    """Return what the ledger lacks of completed native jobs, and how many of its lines cannot be read."""
    lines, torn, recorded = 0, 0, set()
    for line in ledger.read_bytes().splitlines():
        lines += 1
        try:
            recorded.add(json.loads(line).get("job_id"))
        except ValueError:
            torn += 1
    printed = set()
    for log in logs.glob("*.log"):
        for line in log.read_bytes().splitlines():
            if line.startswith(b'{"schema_version"'):
                with contextlib.suppress(ValueError):
                    printed.add(json.loads(line).get("job_id"))
    return {
        "ledger lines": lines,
        "torn ledger lines": torn,
        "records on stdout only": len((completed & printed) - recorded),
        "completed jobs without a record": len(completed - recorded - printed),
    }


def table(found: dict[str, Any]) -> str:
    """Return the counts as Markdown."""
    lines = ["| | |", "|---|---|"]
    for name, value in found.items():
        if name != "examples":
            shown = (
                ", ".join(f"{key} {number:,}" for key, number in value.items()) if isinstance(value, dict) else value
            )
            lines.append(f"| {name} | {shown or 0} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run and report; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "chaos")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    found = asyncio.run(soak(given.requests, given.seed, folder))
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = f"# A soak with faults\n\n`python bench/chaos.py --requests {given.requests} --seed {given.seed}`\n\n"
    given.out.with_suffix(".md").write_text(text + table(found), "utf-8")
    print(table(found), *found["examples"], f"logs: {folder}", sep="\n")
    return int(bool(found["wrong"] or found["jobs that ended twice"] or found["jobs that did not end"]))


if __name__ == "__main__":
    sys.exit(main())
