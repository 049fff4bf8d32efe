"""What grows in a worker's processes over many requests: memory by kind, descriptors, threads.

    python bench/soak.py [--timed] [--requests 20000] [--cancels 200] [--streams 64] [--out bench/results/soak]

Native and OpenAI streams, chats and prompts of token ids that no cache has seen, and cancels amid them, on the demo
with the real SDK. After each twentieth of them, with nothing running, every process of the worker is looked at.

With `--timed` an engine that keeps time stands for vLLM: what grows then is the worker's own.

The KV cache of the CPU build is the mapping beyond the 64 MiB of malloc's arenas, and told apart; `[heap]` is what
malloc has by brk. Predicted: nothing grows by more than 2% after the first fifth of the requests, but for the heap of
VLLM::Worker: torch allocates and frees tensors of other sizes at each step, the heap gets holes, and it grows ever
more slowly (docs/decisions/2026-12-01-memory.md).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from contenders import QUESTION, ROOT, Ring
from prometheus_client.parser import text_string_to_metric_families

from coldsnap.processes import children
from coldsnap.testing import ControlPlane, JobCancelled

_LOOKS = 20
_WARM = 4
"""Looks until the processes count as warm."""
_REST_SECONDS = 2.0
"""Until vLLM's processes sleep and the stop channel has been polled again."""
_ARENA_BYTES = 64 << 20
"""The largest mapping that is malloc's own."""
_CANCEL_TOKENS = 3000
_TIMED = {"boot": [0.1, 0.1], "a": 0.001, "b": 1e-6, "c": 1e-5, "d": 0.0, "max_num_seqs": 256}


@dataclass(frozen=True)
class Look:
    """What a process held at one time. Memory in MB, resident."""

    heap: float
    anonymous: float
    """Arenas, stacks and what else is no file's."""
    cache: float
    """Anonymous mappings beyond an arena's size: the KV cache of VLLM::Worker."""
    files: float
    descriptors: int
    threads: int

    @property
    def rest(self) -> float:
        """All but the KV cache."""
        return self.heap + self.anonymous + self.files


def look(pid: int) -> Look:
    """Return what a process holds."""
    kilobytes, kind = Counter[str](), ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if name == "Rss:":
            kilobytes[kind] += int(rest[0])
        elif not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            large = end - begin > _ARENA_BYTES
            path = rest[4] if len(rest) > 4 else ""
            kind = "heap" if path == "[heap]" else "files" if path else "cache" if large else "anonymous"
    descriptors, threads = (len(list(Path(f"/proc/{pid}/{each}").iterdir())) for each in ("fd", "task"))
    held = {kind: kilobytes[kind] / 1000 for kind in ("heap", "anonymous", "cache", "files")}
    return Look(**held, descriptors=descriptors, threads=threads)


def processes(pid: int) -> dict[str, int]:
    """Return the worker's processes by name."""
    return {"front end": pid} | {Path(f"/proc/{each}/comm").read_text().strip(): each for each in children(pid)}


class Traffic:
    """Jobs of many kinds, from a seed."""

    def __init__(self, plane: ControlPlane, streams: int, *, timed: bool) -> None:
        self._plane = plane
        self._timed = timed
        self._room = asyncio.Semaphore(streams)
        self._dice = random.Random(1)

    async def run(self, requests: int, cancels: int) -> None:
        """Run so many to their end."""
        kinds = [True] * cancels + [False] * (requests - cancels)
        self._dice.shuffle(kinds)
        await asyncio.gather(*(self._one(number, cancel) for number, cancel in enumerate(kinds)))

    async def _one(self, number: int, cancel: bool) -> None:
        async with self._room:
            tokens = _CANCEL_TOKENS if cancel else self._dice.randint(1, 64)
            job = self._plane.submit(self._content(number % 3, tokens))
            if cancel:
                await job.started(120)
                self._plane.cancel(job.id)
            with contextlib.suppress(JobCancelled):
                await job.result(120)

    def _content(self, kind: int, tokens: int) -> dict[str, Any]:
        sampling = {"max_tokens": tokens, "ignore_eos": True}
        if self._timed:  # it counts words, and serves no HTTP
            prompt = "word " * self._dice.randint(10, 400)
            return {"prompt": prompt, "stream": True, "sampling_params": {"max_tokens": tokens}}
        if kind == 0:
            return {"messages": [{"role": "user", "content": QUESTION}], "stream": True, "sampling_params": sampling}
        if kind == 1:
            prompt = "".join(chr(self._dice.randint(97, 122)) for _ in range(self._dice.randint(10, 400)))
            return {"prompt": prompt, "stream": True, "sampling_params": sampling}
        prompt_ids = [self._dice.randrange(10, 250) for _ in range(self._dice.randint(10, 400))]
        return {"openai_route": "/v1/completions", "openai_input": {"prompt": prompt_ids, "stream": True} | sampling}


class Gauges:
    """Takes a worker's pushes and keeps vLLM's gauges of the last."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.pushed = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.Response:
        """Answer a push."""
        families = text_string_to_metric_families(await request.text())
        self.last = {
            sample.name: sample.value
            for family in families
            if family.type == "gauge" and family.name.startswith("vllm:")
            for sample in family.samples
        }
        self.pushed.set()
        return web.Response()


async def soak(requests: int, cancels: int, streams: int, *, timed: bool) -> dict[str, Any]:
    """Return what every process held at each look, and what the engine said at the end."""
    gauges = Gauges()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_put("/metrics/job/coldsnap/{group:.*}", gauges)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    looks: dict[str, list[Look]] = defaultdict(list)
    async with Ring() as ring:
        ring.environ["METRICS_PUSH_URL"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ring.environ["TIMED_ENGINE"] = json.dumps(_TIMED)
        plane = await ring.plane()
        command = [str(ROOT / "src" / "coldsnap" / "testing" / "timed_worker.py")] if timed else []
        pid = await ring.worker(plane, ROOT, *command)
        named = processes(pid)
        traffic = Traffic(plane, streams, timed=timed)
        begun = time.monotonic()
        for number in range(_LOOKS):
            await traffic.run(requests // _LOOKS, cancels // _LOOKS)
            await asyncio.sleep(_REST_SECONDS)
            for name, each in named.items():
                looks[name].append(look(each))
            print(
                number,
                {
                    name: (round(seen[-1].heap), round(seen[-1].rest), round(seen[-1].cache))
                    for name, seen in looks.items()
                },
            )
        seconds = time.monotonic() - begun
        if not timed:
            gauges.pushed.clear()
            await gauges.pushed.wait()
    await runner.cleanup()
    return {
        "requests": requests, "cancels": cancels, "streams": streams, "timed": timed, "seconds": round(seconds),
        "looks": {name: [vars(each) for each in seen] for name, seen in looks.items()}, "gauges": gauges.last,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Return the run as Markdown."""
    engine = "an engine that keeps time" if found["timed"] else "vLLM"
    head = f"{engine}: {found['requests']:,} requests, {found['cancels']} cancels, {found['streams']} at once"
    lines = [
        f"## {head}: {found['seconds']} s", "",
        "| process | MB when warm | at the end | growth | of them heap | KV cache | descriptors | threads |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, looks in found["looks"].items():
        seen = [Look(**each) for each in looks]
        warm, end = seen[_WARM - 1], seen[-1]
        cache = f"{warm.cache:.0f} → {end.cache:.0f}"
        lines.append(
            f"| {name} | {warm.rest:.0f} | {end.rest:.0f} | {end.rest / warm.rest - 1:+.1%} "
            f"| {warm.heap:.0f} → {end.heap:.0f} | {cache} "
            f"| {warm.descriptors} → {end.descriptors} | {warm.threads} → {end.threads} |"
        )
    if not (gauges := found["gauges"]):
        return "\n".join(lines) + "\n"
    running, waiting = (gauges[f"vllm:num_requests_{state}"] for state in ("running", "waiting"))
    used = gauges["vllm:kv_cache_usage_perc"]
    lines += ["", f"At the end: {running:g} running, {waiting:g} waiting, KV cache in use {used:.1%}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "soak")
    given = parser.parse_args()
    found = asyncio.run(soak(given.requests, given.cancels, given.streams, timed=given.timed))
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    given.out.with_suffix(".md").write_text(f"# What grows\n\n`{' '.join(sys.argv)}`\n\n{table(found)}", "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
