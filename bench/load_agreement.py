"""Does `coldsnap bench` measure what other load generators measure? All load the same servers in turn.

    python bench/load_agreement.py [--servers paced vllm coldsnap vllm-sized coldsnap-sized] [--rounds 3] [--more]

Generators: `coldsnap bench`, `vllm bench serve`, and guidellm where `--guidellm` names its command (it is not among our
packages). Every one runs as its users run it, a process of its own, on the same two cores as the server, and takes
from it what it needs itself.

Servers: one that does nothing but keep time, 30 ms to the first token and 5 ms between tokens; vLLM's own on the demo's
snapshot; `coldsnap serve` with one worker, by its OpenAI proxy. There, 8 and 32 requests side by side, and Poisson
arrivals. With so small a model a TTFT is 10 ms, and what the generators take from the cores is a part of it. So both
again on random weights of 85 million parameters, of which a step takes 10 ms and a prefill 250 ms, about what real
models take a GPU, under low loads: the model computes on one core, the other is everybody else's. There both send
token ids, and in the open loop the same arrivals, from one file.

A real server is not the same twice: how a closed loop's requests fall into step decides how many are prefilled
together. So beside the client's mean TTFT stands the server's own mean over the same requests, from vLLM's metrics or
the worker's ledger. A figure is the median of the rounds; prompts are random and of another seed in each.

Predicted: on the server that keeps time everything agrees within 2%. On the demo's model output tokens/s and TTFT
agree within 10%, less well at 32 side by side, where the generators' own use of the cores differs (wrong for TTFT). On
85 million parameters mean TTFT, output tokens/s and time per output token agree within 5%, within 2% one after the
other. In the open loop TTFT is larger here than there by how late requests are sent, under a millisecond: it counts
from when they were due.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from load_generators import guidellms, ours, page, vllms
from load_servers import OUTPUT, PROMPT, ROOT, SERVERS, SIZED_NAME

TINY = {"prompt": PROMPT, "output": OUTPUT}
LARGE = {"prompt": 512, "output": 32, "ids": True}
LOADS: dict[str, dict[str, Any]] = {
    "8 side by side": TINY | {"concurrency": 8, "requests": 200},
    "32 side by side": TINY | {"concurrency": 32, "requests": 480},
    "15 a second": TINY | {"rate": 15.0, "requests": 120},
}
LOADS_SIZED: dict[str, dict[str, Any]] = {
    "one after the other": LARGE | {"concurrency": 1, "requests": 24},
    "2 side by side": LARGE | {"concurrency": 2, "requests": 24},
    "1 a second, the same arrivals": LARGE | {"rate": 1.0, "requests": 30, "replayed": True},
}
REST_SECONDS = 1.2
"""vLLM's processes spin for a second after a step."""
FIGURES = {
    "tokens_per_second": "output tokens/s",
    "ttft_mean": "TTFT mean",
    "ttft_p50": "TTFT p50",
    "ttft_p95": "TTFT p95",
    "tpot_mean": "time per output token, mean",
    "e2e_p50": "E2E p50",
    "server_ttft": "server's own TTFT mean",
    "ttft_over_server": "TTFT mean / server's own",
}
Found = dict[str, dict[str, dict[str, list[dict[str, float]]]]]
"""Samples, one a round, by server, load and generator."""


async def main() -> None:
    """Run the rounds and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--more", action="store_true", help="add the rounds to those in the file")
    parser.add_argument("--guidellm", type=Path, help="its command, in an environment of its own")
    parser.add_argument("--share", type=float, default=1.0, help="of the requests: less is a try-out")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "load.json")
    args = parser.parse_args()
    generators: dict[str, Any] = {"coldsnap bench": ours, "vllm bench serve": vllms}
    if args.guidellm:
        generators["guidellm"] = partial(guidellms, command=args.guidellm)
    found: Found = json.loads(args.out.read_text())["found"] if args.out.exists() else {}
    for kind in args.servers:
        await load(kind, generators, found, args)
    about = {"processors": os.cpu_count(), "python": platform.python_version(), "found": found}
    args.out.write_text(json.dumps(about, indent=1) + "\n")
    text = table(found)
    args.out.with_suffix(".md").write_text(text)
    print(text)


async def load(kind: str, generators: dict[str, Any], found: Found, args: argparse.Namespace) -> None:
    """Start a server and load it with every generator in turn; put what they say into `found`."""
    loads = LOADS_SIZED if kind.endswith("-sized") else LOADS
    loads = {name: each | {"requests": int(each["requests"] * args.share)} for name, each in loads.items()}
    home = Path(tempfile.mkdtemp(prefix="load-"))
    async with SERVERS[kind](home) as server:
        if not args.more:
            found.pop(server.name, None)
        done = max((len(each) for name in found.get(server.name, {}).values() for each in name.values()), default=0)
        if server.own:
            ours(server, TINY | {"concurrency": 1, "requests": 4}, 0, home)  # its first requests take longer
        for number in range(done, done + args.rounds):
            for place, (name, each) in enumerate(loads.items()):
                if server.own is None and each.get("concurrency", 0) > 8:
                    continue  # Python cannot keep time for so many
                # in turn, and not always in the same order
                for generator in list(generators)[:: 1 if number % 2 == 0 else -1]:
                    await asyncio.sleep(REST_SECONDS)
                    seed = 100 * number + place + 1  # prompts that no cache knows from another load
                    own = None if each.get("ids") else server.own  # of a few requests ours sends one more
                    before = own() if own else (0.0, 0.0)
                    sample = generators[generator](server, each, seed, home)
                    if own:
                        await asyncio.sleep(0.2)  # until it has noted the last one
                        after = own()
                        sample["server_ttft"] = (after[0] - before[0]) / (after[1] - before[1]) * 1e3
                        sample["ttft_over_server"] = sample["ttft_mean"] / sample["server_ttft"]
                    found.setdefault(server.name, {}).setdefault(name, {}).setdefault(generator, []).append(sample)
                    print(server.name, name, generator, json.dumps(sample), file=sys.stderr, flush=True)
        if kind in {"coldsnap", "vllm"}:
            page(server, home, args.out.with_stem(f"{args.out.stem}-{kind}").with_suffix(".html"))
    shutil.rmtree(home, ignore_errors=True)


def table(found: Found) -> str:
    """Return the medians, and the ratios of ours to the others'."""
    lines = ["Medians of the rounds; times in ms. In brackets: ours / theirs."]
    for server in sorted(found, key=lambda name: (SIZED_NAME not in name, name)):
        size = LARGE if SIZED_NAME in server else TINY
        lines += ["", f"## {server}", "", f"{size['prompt']} prompt and {size['output']} output tokens.", ""]
        lines += [f"| load | generator | {' | '.join(FIGURES.values())} | failed | CPU-seconds |"]
        lines += ["|---" * (len(FIGURES) + 4) + "|"]
        for name, generators in found[server].items():
            medians = {
                generator: {figure: statistics.median(sample[figure] for sample in samples) for figure in samples[0]}
                for generator, samples in generators.items()
            }
            own = medians["coldsnap bench"]
            for generator, values in medians.items():
                cells = [
                    f"{values[figure]:.4g}"
                    + ("" if generator == "coldsnap bench" else f" ({own[figure] / values[figure]:.3f})")
                    if figure in values
                    else ""
                    for figure in FIGURES
                ]
                failed = sum(sample["failed"] for sample in generators[generator])
                lines.append(
                    f"| {name} | {generator} | {' | '.join(cells)} | {failed:.0f} | {values['cpu_seconds']:.1f} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    asyncio.run(main())
