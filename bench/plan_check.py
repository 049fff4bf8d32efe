"""Does `coldsnap plan` foretell what an endpoint does? Calibrate, predict, measure, compare.

    python bench/plan_check.py FOLDER calibrate ENGINE   # timed or real: leaves FOLDER/calibration-ENGINE/ledger.jsonl
    python bench/plan_check.py FOLDER predict ENGINE     # traces and predicted-*.json, from the calibration alone
    python bench/plan_check.py FOLDER measure CASE       # FOLDER/measured-CASE.json
    python bench/plan_check.py FOLDER report             # bench/results/plan.md and .json

`coldsnap serve` is the endpoint, `coldsnap bench` the load, in calibration and measurement alike. A calibration is
traffic of its own: boots from nothing, and batches of growing size. The timed engine keeps time and needs no
processor (`coldsnap.testing.timed_engine`), so that several workers do not slow each other, as GPUs do not; the real
one is vLLM on this machine's processors, which client, platform and worker share. FOLDER had better be in memory
(/dev/shm): `coldsnap serve` keeps its jobs there, and waits for a disk that others keep busy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.desk import trace  # noqa: E402
from coldsnap.desk.plan import calibration  # noqa: E402
from coldsnap.desk.plan.simulation import Choice, Traffic, simulate  # noqa: E402
from coldsnap.desk.serve.scaler import Scaling  # noqa: E402

KEY = "rpa_check"
CODE = "import sys; from coldsnap.cli import main; sys.exit(main())"
PATHS = {"PYTHONPATH": str(ROOT / "src")}
WITHIN = 0.15
SEED = 7
ALONE_SECONDS = 20.0
"""More than a boot and an idle timeout."""


@dataclass(frozen=True)
class Kind:
    """An engine and how it is loaded."""

    handler: Path
    path: str
    """What is asked of the endpoint: exact prompts natively, or by token ids."""
    environ: Mapping[str, str]
    prompt: tuple[int, int]
    output: tuple[int, float, int]
    """The least, the mean of what comes on top, exponentially distributed, and the most."""
    calibration: tuple[tuple[int, int], ...]
    """Of the calibration: (batch, requests)."""


KINDS = {
    "timed": Kind(
        ROOT / "src" / "coldsnap" / "testing" / "timed_worker.py",
        "",
        {"TIMED_ENGINE": '{"boot": [6, 9], "noise": 0.05}', "CHUNK_INTERVAL_MS": "1000"},
        (50, 1200),
        (20, 100.0, 600),
        ((1, 6), (8, 40), (32, 96)),
    ),
    "real": Kind(
        ROOT / "handler.py",
        "/openai/v1",
        {"VLLM_CPU_KVCACHE_SPACE": "1"},
        (50, 600),
        (20, 400.0, 3000),
        ((1, 5), (2, 10), (4, 20), (8, 40)),
    ),
}


@dataclass(frozen=True)
class Case:
    """One trace and the endpoint that it meets."""

    name: str
    kind: str
    about: str
    scaling: Scaling
    concurrency: int
    seconds: float
    rates: tuple[tuple[float, float], ...]
    """Over and over: (seconds, requests per second)."""
    prompt: tuple[int, int] | None = None
    """Where it is not its kind's."""


def day(seconds: float, night: float, noon: float) -> tuple[tuple[float, float], ...]:
    """Return a day's rates in 24 hours of `seconds` in all."""
    hours = (night + (noon - night) * (1 - math.cos(2 * math.pi * (hour + 0.5) / 24)) / 2 for hour in range(24))
    return tuple((seconds / 24, rate) for rate in hours)


CASES = {
    case.name: case
    for case in (
        Case(
            "bursts",
            "timed",
            "20 s at 6 a second, 20 s of silence, 10 s at 3, silence; from nothing to four workers with eight slots, "
            "by queue delay of 2 s, idle timeout 5 s",
            Scaling(0, 4, 5.0, "queue-delay", 2.0),
            concurrency=8,
            seconds=150,
            rates=((20, 6.0), (20, 0.0), (10, 3.0), (15, 0.0)),
        ),
        Case(
            "day",
            "timed",
            "a day in 160 s, 0.3 a second at night, 8 at noon; one active worker of four with eight slots, a worker "
            "for each 6 requests, idle timeout 5 s",
            Scaling(1, 4, 5.0, "request-count", 6.0),
            concurrency=8,
            seconds=160,
            rates=day(160, 0.3, 8.0),
        ),
        Case(
            "near-saturation",
            "timed",
            "Poisson arrivals, 4.3 a second, two active workers with eight slots, and no more",
            Scaling(2, 2, 5.0, "queue-delay", 4.0),
            concurrency=8,
            seconds=160,
            rates=((160, 4.3),),
        ),
        Case(
            "long-prompts",
            "timed",
            "prompts of 500 to 6,000 tokens in parts of 2,048, Poisson arrivals, 1.5 a second; one active worker with "
            "64 slots",
            Scaling(1, 1, 5.0, "queue-delay", 4.0),
            concurrency=64,
            seconds=150,
            rates=((150, 1.5),),
            prompt=(500, 6000),
        ),
        Case(
            "real-steady",
            "real",
            "Poisson arrivals, 0.4 a second, from nothing to one worker, idle timeout 2 s",
            Scaling(0, 1, 2.0, "queue-delay", 4.0),
            concurrency=16,
            seconds=180,
            rates=((180, 0.4),),
        ),
        Case(
            "real-bursts",
            "real",
            "10 s at 2 a second, silence, 5 s at 1 a second, silence; from nothing to one worker with four slots, "
            "idle timeout 4 s",
            Scaling(0, 1, 4.0, "queue-delay", 2.0),
            concurrency=4,
            seconds=180,
            rates=((10, 2.0), (14, 0.0), (5, 1.0), (10, 0.0)),
        ),
        Case(
            "real-saturated",
            "real",
            "Poisson arrivals, 3 a second, one active worker with four slots that are nearly always taken",
            Scaling(1, 1, 5.0, "queue-delay", 4.0),
            concurrency=4,
            seconds=150,
            rates=((150, 3.0),),
        ),
        Case(
            "real-two-workers",
            "real",
            "bursts of 4 a second, from nothing to two workers with four slots each, on the same two cores",
            Scaling(0, 2, 4.0, "queue-delay", 2.0),
            concurrency=4,
            seconds=180,
            rates=((12, 4.0), (18, 0.0), (6, 1.0), (9, 0.0)),
        ),
    )
}


def draw(case: Case) -> list[trace.Arrival]:
    """Return the case's arrivals.

    An endpoint without active workers boots one for the load generator's first words. So such a trace begins with one
    token and silence, until that worker has ended: the plan boots it for this token, and its life is the same.
    """
    rng = random.Random(SEED)
    kind = KINDS[case.kind]
    least, more, most = kind.output
    found, now, begun = [], 0.0, 0.0
    if not case.scaling.least:
        found, begun = [trace.Arrival(0.0, 1, 1)], ALONE_SECONDS
    end_of_all = begun + case.seconds
    while begun < end_of_all:
        for seconds, rate in case.rates:
            now, end = begun, min(begun + seconds, end_of_all)
            while rate and (now := now + rng.expovariate(rate)) < end:
                output = min(most, least + int(rng.expovariate(1 / more)))
                found.append(trace.Arrival(now, rng.randint(*(case.prompt or kind.prompt)), output))
            begun += seconds
    return [trace.Arrival(each.time - found[0].time, each.prompt_tokens, each.output_tokens) for each in found]


def write(path: Path, arrivals: list[trace.Arrival]) -> None:
    names = ("time", "prompt_tokens", "output_tokens")
    lines = (json.dumps(dict(zip(names, (round(each.time, 6), each.prompt_tokens, each.output_tokens), strict=True)))
             for each in arrivals)  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


@dataclass
class Endpoint:
    """A running `coldsnap serve`."""

    url: str
    folder: Path

    async def load(self, *options: str) -> dict[str, Any]:
        """Run `coldsnap bench`; return what it writes."""
        found = self.folder / "bench.json"
        command = [sys.executable, "-c", CODE, "bench", self.url, "--key", KEY, "--warmup", "0", "--seed", str(SEED)]
        with (self.folder / "bench.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, "--json", str(found), *options, stdout=log, stderr=log, env=os.environ | PATHS
            )
            assert await process.wait() == 0, (self.folder / "bench.log").read_text()[-3000:]
        return dict(json.loads(found.read_text()))

    def records(self, kind: str) -> list[dict[str, Any]]:
        ledger = self.folder / "ledger.jsonl"
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        return [record for line in lines if (record := json.loads(line))["record"] == kind]

    async def ended(self, workers: int) -> None:
        """Wait until so many workers have written their last record."""
        async with asyncio.timeout(60):
            while sum(record["final"] for record in self.records("worker")) < workers:
                await asyncio.sleep(0.1)

    async def ready(self, workers: int) -> None:
        async with asyncio.timeout(60):
            while len(self.records("cold_start")) < workers:
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def serve(folder: Path, kind: Kind, scaling: Scaling, concurrency: int) -> AsyncIterator[Endpoint]:
    folder.mkdir(parents=True)
    more = {"COLDSNAP_LEDGER_DIR": str(folder), "MAX_CONCURRENCY": str(concurrency)}
    options = [
        "serve", "--port", "0", "--key", KEY, "--state", str(folder / "serve.db"), "--handler", str(kind.handler),
        "--workers", str(scaling.least), "--max-workers", str(scaling.most), "--idle-timeout",
        str(scaling.idle_timeout), "--scaler", scaling.rule, "--scaler-value", f"{scaling.value:g}",
    ]  # fmt: skip
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CODE, *options, stderr=file, env=os.environ | PATHS | dict(kind.environ) | more,
            process_group=0,
        )  # fmt: skip
    try:
        while (found := re.search(r"endpoint (\S+),", log.read_text())) is None:
            assert process.returncode is None, log.read_text()
            await asyncio.sleep(0.05)
        yield Endpoint(found[1] + kind.path, folder)
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()


async def calibrate(folder: Path, kind: Kind) -> None:
    """Boot a worker from nothing five times; the last one gets batches of growing size."""
    least, more, most = kind.output
    prompt, output = f"uniform:{kind.prompt[0]}:{kind.prompt[1]}", f"uniform:{least}:{min(most, 2 * int(more))}"
    async with serve(folder, kind, Scaling(0, 1, 3.0), 64) as endpoint:
        for boot in range(1, 6):
            await endpoint.load("--concurrency", "1", "--requests", "1", "--prompt-tokens", "100")
            if boot < 5:
                await endpoint.ended(boot)
        for batch, requests in kind.calibration:
            load = ("--concurrency", str(batch), "--requests", str(requests))
            await endpoint.load(*load, "--prompt-tokens", prompt, "--output-tokens", output)
        await endpoint.ended(5)


async def measure(folder: Path, case: Case, file: Path) -> dict[str, Any]:
    """Replay the case's trace; return what the client saw and what the workers' records say."""
    scaling = case.scaling
    async with serve(folder / case.name, KINDS[case.kind], scaling, case.concurrency) as endpoint:
        await endpoint.ready(scaling.least)
        found = await endpoint.load("--trace", str(file))
        await asyncio.sleep(scaling.idle_timeout + 1)
        await endpoint.ended(len(endpoint.records("cold_start")) - scaling.least)
        over = time.time()
    begun = moment(found["begun"])
    last = begun + max(each["end"] for each in found["requests"])
    lives = []
    for record in endpoint.records("worker"):
        if record["final"]:
            end = moment(record["time"])
            since = end - record["gpu_seconds"]
            # One that stays counts while the trace lasts, as in the plan.
            lives.append(end - since if end < over else last - max(since, begun))
    return {
        "seconds": last - begun,
        "worker_seconds": sum(lives),
        "busy_seconds": sum(record["gpu_seconds"] for record in endpoint.records("request")),
        "boots": len(lives) - scaling.least,
        "ttft": [each["first"] - each["due"] for each in found["requests"] if not each["error"]],
        "total": [each["end"] - each["due"] for each in found["requests"] if not each["error"]],
        "late": found["summary"]["client"]["late"]["most"],
        "errors": [each["error"] for each in found["requests"] if each["error"]],
    }


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def keep(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found))
    print({name: value for name, value in found.items() if name not in {"ttft", "total"}})
    for name in ("ttft", "total"):
        print(name, np.round(np.percentile([each for each in found[name] if each], [50, 90, 95, 99]), 4))


def calibrated(folder: Path) -> calibration.Calibration:
    return calibration.read(folder / "ledger.jsonl", model=None, endpoint=None, flex=None, active=None)


def foretell(case: Case, arrivals: list[trace.Arrival], known: calibration.Calibration) -> dict[str, Any]:
    traffic, choice = Traffic.of(arrivals), Choice(case.scaling, case.concurrency)
    outcome = simulate(traffic, choice, known.worker, SEED)
    off = (simulate(traffic, choice, known.worker.slower(by), SEED) for by in (0.9, 1.1))
    return {
        "seconds": outcome.seconds,
        "worker_seconds": float(outcome.lives.sum()),
        "busy_seconds": outcome.busy,
        "boots": outcome.boots,
        "ttft": outcome.ttft.tolist(),
        "total": outcome.total.tolist(),
        "ttft95_if_steps_are_10%_off": [float(np.percentile(each.ttft, 95)) for each in off],
        "slots": outcome.occupancy(known.worker.speed.sequences),
    }


def predict(folder: Path, kind: str) -> None:
    """Write the traces, and what the plan says of them from the calibration alone."""
    known = calibrated(folder / f"calibration-{kind}")
    print(known)
    for case in CASES.values():
        if case.kind != kind:
            continue
        file = folder / f"{case.name}.jsonl"
        arrivals = draw(case)
        write(file, arrivals)
        found = foretell(case, list(trace.read(file)), known)
        print(case.name)
        keep(folder / f"predicted-{case.name}.json", {"requests": len(arrivals), **found})


FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "worker-seconds": lambda found: float(found["worker_seconds"]),
    "p95 TTFT, s": lambda found: float(np.percentile(found["ttft"], 95)),
    "p50 TTFT, s": lambda found: float(np.percentile(found["ttft"], 50)),
    "p95 to the end, s": lambda found: float(np.percentile(found["total"], 95)),
    "engine-seconds of requests": lambda found: float(found["busy_seconds"]),
    "cold starts": lambda found: float(found["boots"]),
}
JUDGED = ("worker-seconds", "p95 TTFT, s")


def report(folder: Path) -> None:
    """Write the comparison, and say which figures are within the 15%. A case that has no files here stays as it was."""
    results: dict[str, Any] = json.loads((RESULTS / "plan.json").read_text())
    for name, case in CASES.items():
        path = folder / f"measured-{name}.json"
        if not path.exists():
            continue
        measured, predicted = json.loads(path.read_text()), json.loads((folder / f"predicted-{name}.json").read_text())
        assert not measured["errors"], measured["errors"]
        hindsight = foretell(case, list(trace.read(folder / f"{name}.jsonl")), calibrated(folder / name))
        columns = {"predicted": predicted, "measured": measured, "hindsight": hindsight}
        results[name] = {
            "about": case.about,
            "requests": predicted["requests"],
            "figures": {
                figure: {column: round(of(found), 3) for column, found in columns.items()}
                for figure, of in FIGURES.items()
            },
            "p95 TTFT if steps are 10% off, s": [round(each, 3) for each in predicted["ttft95_if_steps_are_10%_off"]],
            "slots": round(predicted["slots"], 3),
            "late, s": round(measured["late"], 3),
        }
    results = {name: results[name] for name in CASES if name in results}
    (RESULTS / "plan.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = [
        "`coldsnap plan` against `coldsnap serve` (`bench/plan_check.py`): calibrated from a run of its own (five",
        "boots, batches of growing size), predicted, then measured. Aim: worker-seconds and p95 TTFT within",
        f"{WITHIN:.0%}. The last column is the same simulation calibrated from the measured run's own ledger: what is",
        "left is the simulation's error, not the calibration's.",
        "",
        *table({name: found for name, found in results.items() if CASES[name].kind == "timed"}, "timed"),
        *table({name: found for name, found in results.items() if CASES[name].kind == "real"}, "real"),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    (RESULTS / "plan.md").write_text(text)
    print(text)


ABOUT = {
    "timed": [
        "## With an engine that keeps time",
        "",
        "Workers, SDK loop, `coldsnap serve`, scaler, ledger and `coldsnap bench --trace` are the real ones; a step of",
        "the engine lasts a + b*prefill + c*decode + d*attention seconds, give or take 5%, and needs no processor, as",
        "on a GPU (`coldsnap.testing.timed_engine`; a boot takes 6 to 9 s). That holds queue, scaler, cold starts,",
        "idle timeouts, billing, batching and calibration to account. It says nothing of real steps, whose cost the",
        "four terms may miss, of a cache that gets full, or of the network. `late` is the longest that the client sent",
        "a request behind its time, on two cores that others used too: what a measurement may be off by.",
        "",
    ],
    "real": [
        "## With the real engine on two cores",
        "",
        "vLLM on two processors that client, platform and workers share, which GPUs do not. Measured with a replay of",
        "this program's own, before `coldsnap bench` was there.",
        "",
    ],
}


def table(results: dict[str, Any], kind: str) -> Iterator[str]:
    yield from ABOUT[kind]
    for name, found in results.items():
        yield from (f"**{name}**: {found['about']}; {found['requests']} requests.", "")
        yield from ("| | predicted | measured | ratio | within | in hindsight |", "|---|---|---|---|---|---|")
        for figure, row in found["figures"].items():
            ratio = row["predicted"] / row["measured"] if row["measured"] else None
            within = ("yes" if ratio and abs(ratio - 1) <= WITHIN else "**no**") if figure in JUDGED else ""
            said = "" if ratio is None else f"{ratio:.2f}"
            numbers = f"{row['predicted']:g} | {row['measured']:g} | {said} | {within} | {row['hindsight']:g}"
            yield f"| {figure} | {numbers} |"
        yield ""
        if "slots" in found:
            fast, slow = found["p95 TTFT if steps are 10% off, s"]
            yield (
                f"Foreseen: {found['slots']:.0%} of the slots taken; p95 TTFT {fast:g} s if steps are 10% faster, "
                f"{slow:g} s if slower. Late: {found['late, s']:g} s."
            )
            yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=["calibrate", "predict", "measure", "report"])
    parser.add_argument("what", nargs="?", choices=[*KINDS, *CASES])
    options = parser.parse_args()
    folder, what = options.folder, options.what
    folder.mkdir(parents=True, exist_ok=True)
    if options.stage == "calibrate":
        asyncio.run(calibrate(folder / f"calibration-{what}", KINDS[what]))
    elif options.stage == "predict":
        predict(folder, what)
    elif options.stage == "measure":
        found = asyncio.run(measure(folder, CASES[what], folder / f"{what}.jsonl"))
        keep(folder / f"measured-{what}.json", found)
    else:
        report(folder)


if __name__ == "__main__":
    main()
