"""How much of its engine a worker delivers: tokens/s, TTFT, gaps between chunks, CPU and POSTs per job.

    python bench/tokenpath.py [--rounds 5] [--levels 1 8 32 128] [--before CHECKOUT] [--server] [--peer CHECKOUT]

Contenders take turns in every round, on the same snapshot: the bare engine, this worker with native and with
OpenAI jobs, the same of an older checkout (`--before`), with `--server` vLLM's own API server, which knows no
platform, and worker-vllm where `--peer` names a checkout of it.
Closed loop: so many streams at a time. With `--open SHARE ...`, jobs then arrive at random (Poisson), 256 for each
share of what this worker has just delivered, natively, at 32 streams.

All processes share this machine, the control plane and the client too; their CPU is reported, so that it can be
judged. `--append` adds rounds to those in `--out`, so that a long measurement can be taken in parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from contenders import ROOT, TOKENS, Contender, Sample, quantile, ring

Samples = dict[str, dict[str, list[Sample]]]
"""By level (or share of the capacity), then by contender."""


async def closed(contenders: list[Contender], rounds: int, levels: list[int], samples: Samples) -> None:
    """Let the contenders take turns, `level` streams at a time."""
    first = 1 + max((run.round for c in samples.values() for runs in c.values() for run in runs), default=0)
    for number in range(first, first + rounds):
        for level in levels:
            for contender in contenders:
                sample = await contender.measured(level, min(max(24, 16 * level), 640))
                sample.round = number
                samples.setdefault(str(level), {}).setdefault(contender.name, []).append(sample)
                print(f"{number} {level:4} {contender.name:24} {sample.tokens_per_second:8.0f}", file=sys.stderr)


async def arriving(contenders: list[Contender], shares: list[float], samples: Samples) -> None:
    """Let the contenders take turns, once, at jobs that arrive at random, the same times for each.

    Without worker-vllm: at half of what this worker can do its queue only grows.
    """
    ours = next(each for each in contenders if each.name.endswith("native"))
    for share in shares:
        capacity = (await ours.measured(32, 192)).tokens_per_second / TOKENS
        times, now = [], 0.0
        dice = random.Random(share)
        for _ in range(256):
            now += dice.expovariate(share * capacity)
            times.append(now)
        for contender in contenders:
            if contender.name.startswith("worker-vllm"):
                continue
            sample = await contender.measured(1024, len(times), times)
            sample.round = 1 + len(samples.get(f"{share:.0%}", {}).get(contender.name, []))
            samples.setdefault(f"{share:.0%}", {}).setdefault(contender.name, []).append(sample)
            print(f"{share:6} {contender.name:24} {len(times) / now:8.1f} jobs/s", file=sys.stderr)


def row(runs: list[Sample], bare: list[Sample]) -> dict[str, Any]:
    """Return the medians of a contender's runs; `of_bare` is the median of the ratios in the same round."""

    def of(name: str, q: float) -> float:
        return 1000 * quantile([value for run in runs for value in getattr(run, name)], q)

    yardstick = {run.round: run.tokens_per_second for run in bare}
    ratios = [run.tokens_per_second / yardstick[run.round] for run in runs]
    return {
        "rounds": len(runs),
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "of_bare": statistics.median(ratios),
        "of_bare_range": [min(ratios), max(ratios)],
        "ttft_ms": {"p50": of("ttft", 0.5), "p95": of("ttft", 0.95)},
        "gap_ms": {"p50": of("gap", 0.5), "p95": of("gap", 0.95)},
        "e2e_ms": {"p50": of("e2e", 0.5), "p95": of("e2e", 0.95)},
        "posts_per_job": statistics.median(run.posts for run in runs),
        "cpu_seconds_per_1000_tokens": {
            name: statistics.median(run.cpu.get(name, 0.0) for run in runs) for name in runs[0].cpu
        },
    }


def table(samples: Samples, first: str) -> list[str]:
    """Return the samples in Markdown."""
    heading = (
        f"| {first} | | rounds | tok/s | of bare (least–most) | TTFT p50 / p95, ms | longest gap p50 / p95, ms "
        "| end to end p50 / p95, ms | POSTs a job | CPU-s per 1,000 tokens |"
    )
    lines = [heading, "|---|---|---|---|---|---|---|---|---|---|"]
    for level, contenders in samples.items():
        bare = contenders.get("bare engine", [])
        for name, runs in contenders.items():
            each = row(runs, bare)
            pairs = " | ".join(f"{each[k]['p50']:.1f} / {each[k]['p95']:.1f}" for k in ("ttft_ms", "gap_ms", "e2e_ms"))
            cpu = ", ".join(f"{k} {v:.3f}" for k, v in each["cpu_seconds_per_1000_tokens"].items() if v >= 0.001)
            low, high = each["of_bare_range"]
            lines.append(
                f"| {level} | {name} | {len(runs)} | {each['tokens_per_second']:.0f} "
                f"| {each['of_bare']:.2f} ({low:.2f}–{high:.2f}) "
                f"| {pairs} | {each['posts_per_job']:.1f} | {cpu} |"
            )
    return lines


def load(out: Path) -> dict[str, Samples]:
    """Return the samples of an earlier part."""
    content = json.loads(out.with_suffix(".samples.json").read_text())
    return {
        loop: {level: {n: [Sample(**s) for s in runs] for n, runs in c.items()} for level, c in samples.items()}
        for loop, samples in content.items()
    }


def write(out: Path, loops: dict[str, Samples]) -> None:
    """Write medians as JSON and as a Markdown table beside it; the samples go where git does not look."""
    about = {"tokens_per_job": TOKENS, "cores": os.cpu_count(), "python": platform.python_version()}
    results = {
        loop: {level: {n: row(runs, c.get("bare engine", [])) for n, runs in c.items()} for level, c in samples.items()}
        for loop, samples in loops.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about} | results, indent=1) + "\n")
    raw = {
        loop: {level: {n: [dataclasses.asdict(s) for s in runs] for n, runs in c.items()} for level, c in s.items()}
        for loop, s in loops.items()
    }
    out.with_suffix(".samples.json").write_text(json.dumps(raw))
    lines = [f"{TOKENS}-token streams, {about['cores']} cores, Python {about['python']}.", ""]
    if loops["closed"]:
        lines += ["## Closed loop", "", *table(loops["closed"], "streams"), ""]
    if loops["open"]:
        lines += ["## Open loop: jobs arrive at random", "", *table(loops["open"], "of capacity"), ""]
    out.with_suffix(".md").write_text("\n".join(lines))


async def main() -> None:
    """Boot the contenders, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--open", type=float, nargs="*", default=[], metavar="SHARE")
    parser.add_argument("--before", type=Path, help="an older checkout of this project")
    parser.add_argument("--server", action="store_true", help="vLLM's own API server too")
    parser.add_argument("--peer", type=Path, help="a checkout of runpod-workers/worker-vllm")
    parser.add_argument("--append", action="store_true", help="add rounds to those in --out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tokenpath.json")
    args = parser.parse_args()
    loops: dict[str, Samples] = load(args.out) if args.append else {"closed": {}, "open": {}}
    async with ring([ROOT, *([args.before] if args.before else [])], args.peer, server=args.server) as contenders:
        await closed(contenders, args.rounds, args.levels, loops["closed"])
        write(args.out, loops)
        await arriving(contenders, args.open, loops["open"])
    write(args.out, loops)
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
