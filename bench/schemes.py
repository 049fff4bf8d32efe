"""What each scheme costs and gives on the real model: size, quality, speed; writes docs/schemes.md's table and plot.

    make real; python bench/schemes.py [SNAPSHOT ...]       all that are baked under .coldsnap/real, or these
    python bench/schemes.py --answers [SNAPSHOT ...]        no speed: on a machine that does other things, too
    python bench/schemes.py --draw                          only write the table and the plot again

Quality is what the bake's gate found, from each snapshot's manifest. Speed is a worker's behind a control plane in this
process: 64 tokens a request, no two prompts alike, first one stream, then 32. The figures of a snapshot are kept in
bench/results/schemes.json until it is measured again, so that a long measurement can be taken in parts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contenders import ROOT, TOKENS, Contender, Worker, check, said
from live_worker import LiveWorker, text

from coldsnap.processes import children
from coldsnap.snapshot.manifest import load_manifest
from coldsnap.testing import Job

REAL = ROOT / ".coldsnap" / "real"
RESULTS = ROOT / "bench" / "results" / "schemes.json"
PAGE, PLOT = ROOT / "docs" / "schemes.md", ROOT / "docs" / "schemes.svg"
ORDER = (
    "none", "fp8-dynamic", "w8a8", "w8a8-gptq", "w4a16-g32", "w4a16-g32-gptq", "w4a16-g64", "w4a16-g64-gptq",
)  # fmt: skip
JOBS = {1: 4, 32: 32}
_WITHIN = 180.0
_QUESTION = "What is the capital of France?"
_SYSTEM = "You explain how servers for language models work, to people who run them. Be exact and do not be short."
_SUBJECTS = ("a cold start", "a batch of requests", "the key-value cache", "a token", "quantisation", "a prefix cache")
_MARKS = "<!-- written by bench/schemes.py -->", "<!-- to here -->"
_COLUMNS = (
    "snapshot", "MB", "perplexity", "mean KL", "greedy kept", "TTFT, ms", "ITL, ms",
    "tok/s at 1", "at 32", "GPU-s a 1k tokens at 1", "at 32", "peak GB", f"“{_QUESTION}”",
)  # fmt: skip


class Various(Worker):
    """A worker that is asked something else each time, so that no prompt's cache serves another."""

    def __init__(self, live: LiveWorker) -> None:
        super().__init__("coldsnap", live.plane, live.pid, {})
        self._numbers = itertools.count(1)
        self.jobs: list[Job] = []

    async def _one(self) -> tuple[list[float], float, int]:
        number = next(self._numbers)
        question = f"Question {number}: what is {_SUBJECTS[number % len(_SUBJECTS)]}, and what does it cost?"
        messages = [{"role": "system", "content": f"{number}. {_SYSTEM}"}, {"role": "user", "content": question}]
        sampling = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
        job = self._plane.submit({"messages": messages, "stream": True, "sampling_params": sampling})
        self.jobs.append(job)
        await job.result(_WITHIN)
        check(said(job))
        assert job.timestamps.done is not None
        return [job.timestamps.submitted, *job.timestamps.chunks], job.timestamps.done, job.posts


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process below `pid` has had at once: the one with the weights and the KV cache."""
    status = [Path(f"/proc/{child}/status").read_text() for child in children(pid)]
    peaks = [int(kilobytes) * 1024 for each in status for kilobytes in re.findall(r"VmHWM:\s+(\d+) kB", each)]
    return max(peaks, default=0)


async def speed(folder: Path, home: Path, jobs_by_streams: Mapping[int, int]) -> dict[str, Any]:
    """Boot a worker on a snapshot, ask it and measure it; if it does not boot, say why."""
    try:
        async with LiveWorker(home, folder.name, SNAPSHOT_DIR=str(folder), VLLM_CPU_KVCACHE_SPACE="1") as live:
            worker = Various(live)
            job = live.ask(_QUESTION, max_tokens=16, temperature=0.0)
            await job.result(_WITHIN)
            result: dict[str, Any] = {"answer": text(job.chunks), "streams": {}}
            await worker.run(None, 8, 8)  # the first requests of a worker are slower
            for streams, jobs in jobs_by_streams.items():
                result["streams"][str(streams)] = await level(live, worker, streams, jobs)
            return result | {"peak_bytes": peak_bytes(live.pid)}
    except RuntimeError as error:
        reasons = [line for line in str(error).splitlines() if "Error" in line or "coldsnap:" in line]
        return {"not_run": (reasons or [str(error)])[-1].strip()[-300:]}


async def level(live: LiveWorker, worker: Various, streams: int, jobs: int) -> dict[str, Any]:
    """Run `jobs` requests, `streams` at a time."""
    worker.jobs.clear()
    sample = await Contender.measured(worker, streams, jobs)
    records = [await live.record(job) for job in worker.jobs]
    itl = [(e2e - ttft) / (TOKENS - 1) for e2e, ttft in zip(sample.e2e, sample.ttft, strict=True)]
    tokens = sum(record["completion_tokens"] for record in records)
    return {
        "jobs": jobs,
        "tokens_per_second": round(sample.tokens_per_second, 1),
        "ttft_p50_s": round(statistics.median(sample.ttft), 4),
        "itl_p50_s": round(statistics.median(itl), 4),
        "gpu_seconds_per_1k": round(1000 * sum(record["gpu_seconds"] for record in records) / tokens, 3),
    }


def quality(folder: Path) -> dict[str, Any]:
    """Return a snapshot's size and what its bake's gate found."""
    manifest = load_manifest(folder)
    found = manifest.bake.quality.model_dump(exclude_none=True) if manifest.bake else {}
    return {"bytes": manifest.size, "quality": found}


def rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the table's rows; what was not measured is a dash."""
    originals = [each["quality"].get("original_perplexity") for each in results.values()]
    original = next((value for value in originals if value), None)
    for name, each in results.items():
        gate, run = each["quality"], each["run"]
        if name == "none":
            gate = {"perplexity": original, "mean_kl": 0.0}
        kept = f"{gate['greedy_identical']} of {gate['greedy_prompts']}" if "greedy_prompts" in gate else "all"
        row = [f"`{name}`", f"{each['bytes'] / 1e6:.0f}"]
        row += [f"{gate['perplexity']:.2f}" if gate.get("perplexity") else "—"]
        row += [f"{gate['mean_kl']:.3f}", kept] if "mean_kl" in gate else ["—", "—"]
        measured = run.get("streams", {})
        one, many = measured.get("1", {}), measured.get("32", {})
        row += [_figure(one, "ttft_p50_s", 1e3), _figure(one, "itl_p50_s", 1e3)]
        row += [_figure(level, "tokens_per_second") for level in (one, many)]
        row += [_figure(level, "gpu_seconds_per_1k", digits=1) for level in (one, many)]
        row += [_figure(run, "peak_bytes", 1e-9, digits=2)]
        if "answer" in run:
            answer = " ".join(run["answer"].split())
            row += [answer if "Paris" in answer else f"**wrong:** {answer}"]
        else:
            row += [f"does not run here: {run['not_run'].replace('|', '/')}" if "not_run" in run else "—"]
        yield row


def _figure(values: Mapping[str, float], name: str, factor: float = 1.0, digits: int = 0) -> str:
    return f"{values[name] * factor:.{digits}f}" if name in values else "—"


def draw(results: Mapping[str, Any]) -> None:
    """Write the plot: what is lost against what is saved, on disk and in time."""
    from matplotlib.figure import Figure

    timed = any(each["run"].get("streams") for each in results.values())
    drawing = Figure(figsize=(9.5 if timed else 6.2, 3.8), layout="constrained")
    panels = drawing.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    disk, time = panels[0], panels[-1]
    for number, (name, each) in enumerate(results.items()):
        loss = 0.0 if name == "none" else each["quality"].get("mean_kl")
        if loss is None:
            continue
        run = each["run"]
        places = [(disk, each["bytes"] / 1e6)]
        if run.get("streams"):
            places.append((time, run["streams"]["32"]["tokens_per_second"]))
        wrong = "answer" in run and "Paris" not in run["answer"]
        for axes, at in places:
            colour = f"C{number}"
            axes.scatter(at, loss, color=colour, marker="x" if wrong else "o", s=45, label=name, zorder=3)
    disk.set_xlabel("MB on disk")
    disk.set_ylabel("mean KL divergence, nats a token")
    disk.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    disk.set_yticks([0, 0.01, 0.03, 0.1, 0.3, 1], ["0", "0.01", "0.03", "0.1", "0.3", "1"])
    disk.set_ylim(-0.002, 1)
    if timed:
        time.set_xlabel("tokens a second, 32 streams")
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_xlim(left=0)
        axes.minorticks_off()
    drawing.legend(*disk.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    drawing.suptitle("SmolLM2-135M-Instruct: what a scheme loses and saves (x: answers wrongly here)", fontsize=10)
    drawing.savefig(PLOT, metadata={"Date": None})
    drawing.savefig(Path(tempfile.gettempdir(), "schemes.png"), dpi=90)


def write(results: Mapping[str, Any]) -> None:
    """Write the table between its marks in docs/schemes.md, and the plot."""
    lines = [f"| {' | '.join(row)} |" for row in (list(_COLUMNS), ["---"] * len(_COLUMNS), *rows(results))]
    page, (begin, end) = PAGE.read_text("utf-8"), _MARKS
    before, after = page[: page.index(begin)], page[page.index(end) :]
    PAGE.write_text("\n".join([before + begin, "", *lines, "", after]), "utf-8")
    draw(results)


def main() -> int:
    """Measure what is asked for, keep it, and write what is known so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshots", nargs="*", metavar="SNAPSHOT")
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    baked = {name: quality(REAL / name) for name in ORDER if (REAL / name).is_dir()}
    results = {
        name: {"run": {}} | before.get(name, {}) | baked.get(name, {}) for name in ORDER if name in before | baked
    }
    names = [] if args.draw else args.snapshots or list(baked)
    with tempfile.TemporaryDirectory(prefix="schemes-") as home:
        for name in names:
            run = asyncio.run(speed(REAL / name, Path(home), {} if args.answers else JOBS))
            results[name]["run"] = run
            print(name, json.dumps(run), file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
