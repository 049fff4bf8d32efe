"""Does `coldsnap plan` foretell what an endpoint does? Calibrate, predict, measure, compare.

    python bench/plan_check.py FOLDER calibrate      # leaves FOLDER/calibration/ledger.jsonl
    python bench/plan_check.py FOLDER predict        # traces and FOLDER/predicted.json, from the calibration alone
    python bench/plan_check.py FOLDER measure CASE   # FOLDER/measured-CASE.json, for each of the cases
    python bench/plan_check.py FOLDER report         # bench/results/plan.md and .json

`coldsnap serve` with the real engine is the endpoint; prompts are token ids, so their lengths are exact. The
calibration is traffic of its own: boots from nothing, and batches of growing size. Client, platform and worker
share this machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT / "src"))

from coldsnap import trace  # noqa: E402
from coldsnap.plan import calibration  # noqa: E402
from coldsnap.plan.simulation import Choice, Traffic, simulate  # noqa: E402
from coldsnap.platform.scaler import Scaling  # noqa: E402

KEY = "rpa_check"
WITHIN = 0.15
SEED = 7


@dataclass(frozen=True)
class Case:
    """One trace and the endpoint that it meets."""

    name: str
    about: str
    scaling: Scaling
    concurrency: int
    seconds: float
    rates: tuple[tuple[float, float], ...]
    """Over and over: (seconds, requests per second)."""
    prompt: tuple[int, int] = (50, 600)
    output: tuple[int, float] = (20, 400.0)
    """The least, and the mean of what comes on top, exponentially distributed."""


CASES = {
    case.name: case
    for case in (
        Case(
            "steady",
            "Poisson arrivals, 0.4 a second, from nothing to one worker, idle timeout 2 s",
            Scaling(0, 1, 2.0, "queue-delay", 4.0),
            concurrency=16,
            seconds=180,
            rates=((180, 0.4),),
        ),
        Case(
            "bursts",
            "10 s at 2 a second, silence, 5 s at 1 a second, silence; from nothing to one worker with four slots, "
            "idle timeout 4 s",
            Scaling(0, 1, 4.0, "queue-delay", 2.0),
            concurrency=4,
            seconds=180,
            rates=((10, 2.0), (14, 0.0), (5, 1.0), (10, 0.0)),
        ),
        Case(
            "saturated",
            "Poisson arrivals, 3 a second, one active worker with four slots that are nearly always taken",
            Scaling(1, 1, 5.0, "queue-delay", 4.0),
            concurrency=4,
            seconds=150,
            rates=((150, 3.0),),
        ),
        Case(
            "two-workers",
            "bursts of 4 a second, from nothing to two workers with four slots each, on the same two cores",
            Scaling(0, 2, 4.0, "queue-delay", 2.0),
            concurrency=4,
            seconds=180,
            rates=((12, 4.0), (18, 0.0), (6, 1.0), (9, 0.0)),
        ),
    )
}


def draw(case: Case) -> list[trace.Arrival]:
    """Return the case's arrivals."""
    rng = random.Random(SEED)
    found, now, begun = [], 0.0, 0.0
    while begun < case.seconds:
        for seconds, rate in case.rates:
            now, end = begun, min(begun + seconds, case.seconds)
            while rate and (now := now + rng.expovariate(rate)) < end:
                least, more = case.output
                output = min(3000, least + int(rng.expovariate(1 / more)))
                found.append(trace.Arrival(now, rng.randint(*case.prompt), output))
            begun += seconds
    return [trace.Arrival(each.time - found[0].time, each.prompt_tokens, each.output_tokens) for each in found]


def write(path: Path, arrivals: list[trace.Arrival]) -> None:
    names = ("time", "prompt_tokens", "output_tokens")
    lines = (json.dumps(dict(zip(names, (round(each.time, 6), each.prompt_tokens, each.output_tokens), strict=True)))
             for each in arrivals)  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


@dataclass
class Reply:
    """What a client saw of one request, in seconds after it was sent."""

    late: float = 0.0
    ttft: float | None = None
    total: float | None = None
    error: str | None = None


@dataclass
class Endpoint:
    """A running `coldsnap serve`."""

    url: str
    http: aiohttp.ClientSession
    ledger: Path
    random: random.Random = field(default_factory=lambda: random.Random(SEED))

    async def ask(self, prompt: int, output: int, late: float = 0.0) -> Reply:
        body = {
            "model": "coldsnap-demo", "prompt": [self.random.randrange(10, 250) for _ in range(prompt)],
            "max_tokens": output, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        reply, begun = Reply(late), time.monotonic()
        try:
            async with self.http.post(f"{self.url}/openai/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        if b'"error"' in line:
                            reply.error = line.decode()
                        reply.ttft = reply.ttft or time.monotonic() - begun
        except (aiohttp.ClientError, TimeoutError) as error:
            reply.error = f"{type(error).__name__}: {error}"
        reply.total = time.monotonic() - begun
        return reply

    async def replay(self, arrivals: list[trace.Arrival]) -> list[Reply]:
        """Send every request at its time, whatever became of those before."""
        begun = time.monotonic()
        tasks = []
        for each in arrivals:
            await asyncio.sleep(begun + each.time - time.monotonic())
            late = time.monotonic() - begun - each.time
            tasks.append(asyncio.create_task(self.ask(each.prompt_tokens, each.output_tokens, late)))
        return await asyncio.gather(*tasks)

    def records(self, kind: str) -> list[dict[str, Any]]:
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return [record for line in lines if (record := json.loads(line))["record"] == kind]

    async def ended(self, workers: int) -> None:
        """Wait until so many workers have written their last record."""
        async with asyncio.timeout(60):
            while sum(record["final"] for record in self.records("worker")) < workers:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def ready(self, workers: int) -> None:
        async with asyncio.timeout(60):
            while len(self.records("cold_start")) < workers:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def serve(folder: Path, scaling: Scaling, concurrency: int) -> AsyncIterator[Endpoint]:
    folder.mkdir(parents=True)  # noqa: ASYNC240 -- nothing else runs yet
    environ = os.environ | {
        "COLDSNAP_LEDGER_DIR": str(folder), "MAX_CONCURRENCY": str(concurrency), "PYTHONPATH": str(ROOT / "src"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    options = [
        "serve", "--port", "0", "--key", KEY, "--state", str(folder / "serve.db"),
        "--workers", str(scaling.least), "--max-workers", str(scaling.most), "--idle-timeout",
        str(scaling.idle_timeout), "--scaler", scaling.rule, "--scaler-value", str(scaling.value),
    ]  # fmt: skip
    code = "import sys; from coldsnap.cli import main; sys.exit(main())"
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, *options, stderr=file, env=environ, process_group=0
        )
    try:
        while (found := re.search(r"endpoint (\S+),", log.read_text())) is None:
            assert process.returncode is None, log.read_text()
            await asyncio.sleep(0.05)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {KEY}"}, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        ) as http:
            yield Endpoint(found[1], http, folder / "ledger.jsonl")
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()


async def calibrate(folder: Path) -> None:
    """Boot a worker from nothing five times; the last one gets batches of one to eight requests."""
    rng = random.Random(SEED + 1)
    async with serve(folder / "calibration", Scaling(0, 1, 1.0), 16) as endpoint:
        for boot in range(1, 6):
            await endpoint.ask(100, 20)
            if boot < 5:
                await endpoint.ended(boot)
        for batch in (1, 2, 4, 8):
            for _ in range(5):
                sizes = [(rng.randint(50, 600), 20 + int(rng.expovariate(1 / 300))) for _ in range(batch)]
                replies = await asyncio.gather(*(endpoint.ask(*size) for size in sizes))
                assert not any(reply.error for reply in replies), replies
        await endpoint.ended(5)


async def measure(folder: Path, case: Case, arrivals: list[trace.Arrival]) -> dict[str, Any]:
    """Replay the case's trace; return what clients saw and what the workers' records say."""
    scaling = case.scaling
    async with serve(folder / case.name, scaling, case.concurrency) as endpoint:
        await endpoint.ready(scaling.least)
        begun = time.time()
        replies = await endpoint.replay(arrivals)
        seconds = time.time() - begun
        await asyncio.sleep(scaling.idle_timeout + 1)
        await endpoint.ended(len(endpoint.records("cold_start")) - scaling.least)
    workers = [record for record in endpoint.records("worker") if record["final"]]
    requests = endpoint.records("request")
    lives = sum(record["gpu_seconds"] for record in workers)
    return {
        "seconds": seconds,
        "worker_seconds": seconds if scaling.least == scaling.most else lives,
        "busy_seconds": sum(record["gpu_seconds"] for record in requests),
        "workers": len(workers),
        "boots": [record["seconds"] for record in endpoint.records("cold_start")],
        "ttft": [reply.ttft for reply in replies],
        "total": [reply.total for reply in replies],
        "late": max(reply.late for reply in replies),
        "errors": [reply.error for reply in replies if reply.error],
    }


def keep(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found))
    print({name: value for name, value in found.items() if name not in {"ttft", "total"}})
    for name in ("ttft", "total"):
        print(name, np.round(np.percentile([each for each in found[name] if each], [50, 90, 95, 99]), 4))


def calibrated(folder: Path) -> calibration.Calibration:
    return calibration.read(folder / "ledger.jsonl", model=None, endpoint=None, flex=None, active=None)


def foretell(case: Case, arrivals: list[trace.Arrival], known: calibration.Calibration) -> dict[str, Any]:
    outcome = simulate(Traffic.of(arrivals), Choice(case.scaling, case.concurrency), known.worker, SEED)
    return {
        "seconds": outcome.seconds,
        "worker_seconds": float(outcome.lives.sum()),
        "busy_seconds": outcome.busy,
        "boots": outcome.boots,
        "ttft": outcome.ttft.tolist(),
        "total": outcome.total.tolist(),
    }


def predict(folder: Path) -> None:
    """Write the traces, and what the plan says of them from the calibration alone."""
    known = calibrated(folder / "calibration")
    print(known)
    predicted = {}
    for case in CASES.values():
        arrivals = draw(case)
        write(folder / f"{case.name}.jsonl", arrivals)
        found = foretell(case, list(trace.read(folder / f"{case.name}.jsonl")), known)
        predicted[case.name] = {"requests": len(arrivals), **found}
        print(case.name, {name: value for name, value in found.items() if name not in {"ttft", "total"}})
        for name in ("ttft", "total"):
            print(name, np.round(np.percentile(found[name], [50, 90, 95, 99]), 4))
    (folder / "predicted.json").write_text(json.dumps(predicted))


FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "worker-seconds": lambda found: float(found["worker_seconds"]),
    "p95 TTFT, s": lambda found: float(np.percentile(found["ttft"], 95)),
    "p50 TTFT, s": lambda found: float(np.percentile(found["ttft"], 50)),
    "p95 to the end, s": lambda found: float(np.percentile(found["total"], 95)),
    "engine-seconds of requests": lambda found: float(found["busy_seconds"]),
    "cold starts": lambda found: float(len(found["boots"]) if isinstance(found["boots"], list) else found["boots"]),
}
JUDGED = ("worker-seconds", "p95 TTFT, s")


def report(folder: Path) -> None:
    """Write the comparison, and say which figures are within the 15%."""
    predicted = json.loads((folder / "predicted.json").read_text())
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        path = folder / f"measured-{name}.json"
        if not path.exists():
            continue
        measured = json.loads(path.read_text())
        assert not measured["errors"], measured["errors"]
        if case.scaling.least:  # an active worker boots before the trace, which the plan leaves out
            measured["boots"] = []
        hindsight = foretell(case, list(trace.read(folder / f"{name}.jsonl")), calibrated(folder / name))
        columns = {"predicted": predicted[name], "measured": measured, "hindsight": hindsight}
        rows = {
            figure: {column: round(of(found), 3) for column, found in columns.items()} for figure, of in FIGURES.items()
        }
        results[name] = {"about": case.about, "requests": predicted[name]["requests"], "figures": rows}
    (RESULTS / "plan.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = [
        "`coldsnap plan` against `coldsnap serve` with the real engine (`bench/plan_check.py`), on two CPU cores that",
        "client, platform and workers share. Calibrated from a run of its own (five boots, batches of one to eight),",
        f"predicted, then measured. Aim: worker-seconds and p95 TTFT within {WITHIN:.0%}. The last column is the same",
        "simulation calibrated from the measured run's own ledger: what is left is the simulation's error, not the",
        "calibration's.",
        "",
    ]
    for name, found in results.items():
        lines += [f"**{name}**: {found['about']}; {found['requests']} requests.", ""]
        lines += ["| | predicted | measured | ratio | within | in hindsight |", "|---|---|---|---|---|---|"]
        for figure, row in found["figures"].items():
            ratio = row["predicted"] / row["measured"] if row["measured"] else None
            within = ("yes" if ratio and abs(ratio - 1) <= WITHIN else "**no**") if figure in JUDGED else ""
            said = "" if ratio is None else f"{ratio:.2f}"
            numbers = f"{row['predicted']:g} | {row['measured']:g} | {said} | {within} | {row['hindsight']:g}"
            lines.append(f"| {figure} | {numbers} |")
        lines.append("")
    text = "\n".join(lines)
    (RESULTS / "plan.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=["calibrate", "predict", "measure", "report"])
    parser.add_argument("case", nargs="?", choices=sorted(CASES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.stage == "calibrate":
        asyncio.run(calibrate(options.folder))
    elif options.stage == "predict":
        predict(options.folder)
    elif options.stage == "measure":
        arrivals = list(trace.read(options.folder / f"{options.case}.jsonl"))
        keep(
            options.folder / f"measured-{options.case}.json",
            asyncio.run(measure(options.folder, CASES[options.case], arrivals)),
        )
    else:
        report(options.folder)


if __name__ == "__main__":
    main()
