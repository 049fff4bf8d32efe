"""Does `coldsnap bench` measure what other load generators measure? All load the same servers in turn.

    python bench/load_agreement.py [--servers paced vllm coldsnap] [--rounds 3] [--guidellm PATH]

Generators: `coldsnap bench`, `vllm bench serve`, and guidellm where `--guidellm` names its command (it is not among our
packages). Servers: one that does nothing but keep time, 30 ms to the first token and 5 ms between tokens; vLLM's own on
the demo's snapshot; `coldsnap serve` with one worker, by its OpenAI proxy. Loads: 8 and 32 requests side by side, and
Poisson arrivals, 128 prompt and 64 output tokens each. Every generator runs as its users run it, a process of its own,
on the same two cores as the server, and takes from it what it needs itself.

A real server is not the same twice: how a closed loop's requests fall into step decides how many are prefilled
together. So beside the client's mean TTFT stands the server's own mean over the same requests, from vLLM's metrics or
the worker's ledger, and what the client adds to it is compared. A figure is the median of the rounds; prompts are
random and of another seed in each.

Predicted: on the server that keeps time everything agrees within 2%. On the real ones output tokens/s and TTFT agree
within 10%, less well at 32 side by side, where the generators' own use of the cores differs. In the open loop TTFT is
larger here than there by how late requests are sent, under a millisecond: it counts from when they were due.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import base, healthy, start, stop  # noqa: E402

from coldsnap import snapshot  # noqa: E402
from coldsnap.settings import Settings  # noqa: E402

PROMPT, OUTPUT = 128, 64
LOADS: dict[str, dict[str, Any]] = {
    "8 side by side": {"concurrency": 8, "requests": 200},
    "32 side by side": {"concurrency": 32, "requests": 480},
    "15 a second": {"rate": 15.0, "requests": 120},
}
REST_SECONDS = 1.2
"""vLLM's processes spin for a second after a step."""
PACED_FIRST, PACED_NEXT = 0.03, 0.005
KEY = "rpa_bench"
CODE = "import sys; from coldsnap.cli import main; sys.exit(main())"
"""Runs the `coldsnap` command of this clone."""
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


@dataclass(frozen=True)
class Server:
    """Where requests go: the base of OpenAI routes, without /v1."""

    name: str
    url: str
    model: str
    tokenizer: Path
    own: Callable[[], tuple[float, float]] | None = None
    """Returns the seconds to the first tokens that it measured itself so far, in all, and of how many requests."""


def port() -> int:
    """Return a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def vllm_server(home: Path) -> AsyncIterator[Server]:
    """Start vLLM's own server as bench/coldstart.py does."""
    folder = Settings.read({}).snapshot()
    assert folder is not None
    at = port()
    arguments = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in snapshot.load_manifest(folder).engine_args.items()
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *arguments]
    command += ["--host=127.0.0.1", f"--port={at}", "--disable-uvicorn-access-log", "--served-model-name=demo"]
    with (home / "vllm.log").open("wb") as log:
        process = start(command, base(home), log)
    try:
        async with aiohttp.ClientSession() as session:
            await healthy(session, f"http://127.0.0.1:{at}", process)
        url = f"http://127.0.0.1:{at}"
        yield Server("vLLM's own server", url, "demo", folder, lambda: of_metrics(f"{url}/metrics"))
    finally:
        await asyncio.to_thread(stop, process)


@contextlib.asynccontextmanager
async def coldsnap_serve(home: Path) -> AsyncIterator[Server]:
    """Start `coldsnap serve` with one worker."""
    folder = Settings.read({}).snapshot()
    assert folder is not None
    at, said = port(), home / "serve.log"
    command = [sys.executable, "-c", CODE, "serve", f"--port={at}", "--key", KEY, f"--state={home / 'serve.db'}"]
    env = base(home) | {"PYTHONPATH": str(ROOT / "src"), "COLDSNAP_LEDGER_DIR": str(home / "ledger")}
    with said.open("wb") as log:
        process = start(command, env, log)
    try:
        while "takes jobs" not in said.read_text():
            if process.poll() is not None:
                raise RuntimeError(said.read_text())
            await asyncio.sleep(0.1)
        url = f"http://127.0.0.1:{at}/v2/local/openai"
        model = snapshot.load_manifest(folder).served_model_name
        yield Server("coldsnap serve", url, model, folder, lambda: of_ledger(home / "ledger" / "ledger.jsonl"))
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.wait, 60)


@contextlib.asynccontextmanager
async def paced_server(home: Path) -> AsyncIterator[Server]:
    """Start this file again, as the server that keeps time."""
    folder = Settings.read({}).snapshot()
    assert folder is not None
    at = port()
    with (home / "paced.log").open("wb") as log:
        process = start([sys.executable, __file__, "--pace-at", str(at)], base(home), log)
    try:
        async with aiohttp.ClientSession() as session:
            await healthy(session, f"http://127.0.0.1:{at}", process)
        yield Server("a server that keeps time", f"http://127.0.0.1:{at}", "demo", folder)
    finally:
        await asyncio.to_thread(stop, process)


def keep_time(at: int) -> None:
    """Serve completions whose tokens come at times that are known."""

    async def complete(request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        due = loop.time() + PACED_FIRST
        count = (await request.json())["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(count):
            await asyncio.sleep(due + number * PACED_NEXT - loop.time())
            choice = {"index": 0, "text": "a", "finish_reason": "length" if number == count - 1 else None}
            await response.write(b"data: %b\n\n" % json.dumps({"object": "x", "choices": [choice]}).encode())
        used = {"prompt_tokens": PROMPT, "completion_tokens": count, "total_tokens": PROMPT + count}
        await response.write(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps({"choices": [], "usage": used}).encode())
        return response

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "demo"}]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", models)
    web.run_app(app, host="127.0.0.1", port=at, print=None, access_log=None)


def of_metrics(url: str) -> tuple[float, float]:
    """Read vLLM's histogram."""
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    total, count = (
        float(re.findall(rf"^vllm:time_to_first_token_seconds_{part}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)[0])
        for part in ("sum", "count")
    )
    return total, count


def of_ledger(path: Path) -> tuple[float, float]:
    """Add up the records of requests."""
    lines = map(json.loads, path.read_text().splitlines())
    values = [line["ttft_seconds"] for line in lines if line["record"] == "request" and line["ttft_seconds"]]
    return sum(values), len(values)


def run(command: list[str], home: Path, log: Path) -> float:
    """Run a generator; return the CPU-seconds that it took."""
    before = os.times()
    env = base(home) | {"PYTHONPATH": str(ROOT / "src"), "OPENAI_API_KEY": KEY}
    with log.open("ab") as out:
        done = subprocess.run(command, env=env, stdout=out, stderr=out, check=False, cwd=home, timeout=300)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def page(server: Server, home: Path, file: Path) -> None:
    """Write the page of a load of mixed lengths, for a look."""
    command = [sys.executable, "-c", CODE, "bench", f"{server.url}/v1", "--model", server.model, "--key", KEY]
    command += ["--rate", "20", "--requests", "300", "--prompt-tokens", "lognormal:128:0.6", "--seed", "1"]
    command += ["--output-tokens", "lognormal:64:0.6", "--slo", "ttft=50ms,itl=10ms", "--html", str(file)]
    run(command, home, home / "page.log")


def ours(server: Server, load: dict[str, Any], seed: int, home: Path) -> dict[str, float]:
    """Run `coldsnap bench`."""
    found = home / "ours.json"
    how = ["--rate", str(load["rate"])] if "rate" in load else ["--concurrency", str(load["concurrency"])]
    command = [sys.executable, "-c", CODE, "bench", f"{server.url}/v1", "--model", server.model, "--key", KEY, *how]
    command += ["--requests", str(load["requests"]), "--prompt-tokens", str(PROMPT), "--output-tokens", str(OUTPUT)]
    cpu = run([*command, "--seed", str(seed), "--warmup", "8", "--json", str(found)], home, home / "ours.log")
    summary = json.loads(found.read_text())["summary"]
    return {
        "tokens_per_second": summary["output_tokens_per_second"],
        "ttft_mean": summary["ttft"]["mean"] * 1e3,
        "ttft_p50": summary["ttft"]["p50"] * 1e3,
        "ttft_p95": summary["ttft"]["p95"] * 1e3,
        "tpot_mean": summary["itl"]["mean"] * 1e3,
        "e2e_p50": summary["e2e"]["p50"] * 1e3,
        "prompt_tokens": summary["tokens"]["prompt"],
        "output_tokens": summary["tokens"]["output"],
        "failed": summary["failed"],
        "client_share": summary["client"]["cpu_share"],
        "cpu_seconds": cpu,
    }


def vllms(server: Server, load: dict[str, Any], seed: int, home: Path) -> dict[str, float]:
    """Run `vllm bench serve`, without the `vllm` command, which vLLM's CPU build cannot run."""
    code = (
        "import argparse, sys; from vllm.benchmarks import serve;"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P;"
        "p = P(); serve.add_cli_args(p); serve.main(p.parse_args(sys.argv[1:]))"
    )
    how = [f"--request-rate={load['rate']}"] if "rate" in load else [f"--max-concurrency={load['concurrency']}"]
    command = [sys.executable, "-c", code, "--backend=openai", f"--base-url={server.url}", "--endpoint=/v1/completions"]
    command += [f"--model={server.tokenizer}", f"--served-model-name={server.model}", f"--tokenizer={server.tokenizer}"]
    command += [
        "--dataset-name=random",
        f"--random-input-len={PROMPT}",
        f"--random-output-len={OUTPUT}",
        "--ignore-eos",
    ]
    command += [f"--num-prompts={load['requests']}", f"--seed={seed}", "--num-warmups=8", "--ready-check-timeout-sec=0"]
    command += ["--percentile-metrics=ttft,tpot,itl,e2el", "--metric-percentiles=50,95", "--save-result", *how]
    cpu = run([*command, f"--result-dir={home}", "--result-filename=vllm.json"], home, home / "vllm-bench.log")
    found = json.loads((home / "vllm.json").read_text())
    return {
        "tokens_per_second": found["output_throughput"],
        "ttft_mean": found["mean_ttft_ms"],
        "ttft_p50": found["median_ttft_ms"],
        "ttft_p95": found["p95_ttft_ms"],
        "tpot_mean": found["mean_tpot_ms"],
        "e2e_p50": found["median_e2el_ms"],
        "prompt_tokens": found["total_input_tokens"],
        "output_tokens": found["total_output_tokens"],
        "failed": load["requests"] - found["completed"],
        "cpu_seconds": cpu,
    }


def guidellms(server: Server, load: dict[str, Any], seed: int, home: Path, command: Path) -> dict[str, float]:
    """Run guidellm."""
    profile = f"poisson,rate={load['rate']}" if "rate" in load else f"concurrent,streams={load['concurrency']}"
    kinds = {
        "backend": f"openai_http,target={server.url},model={server.model},request_format=/v1/completions,api_key={KEY}"
        ",validate_backend=false",
        "profile": profile,
        "constraint": f"max_requests,count={load['requests']}",
        "data": f"synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "tokenizer": f"hf_auto,model={server.tokenizer}",
        "seed": f"static,value={seed}",
        "output": f"json,path={home / 'guidellm.json'}",
    }
    options = [f"--{name}=kind={value}" for name, value in kinds.items()]
    cpu = run([str(command), "run", *options, "--disable-console"], home, home / "guidellm.log")
    found = json.loads((home / "guidellm.json").read_text())["benchmarks"][0]
    metrics = found["metrics"]

    def of(name: str) -> dict[str, Any]:
        return dict(metrics[name]["successful"])

    ttft, each = of("time_to_first_token_ms"), of("time_per_output_token_ms")
    return {
        "tokens_per_second": of("output_tokens_per_second")["mean"],
        "ttft_mean": ttft["mean"],
        "ttft_p50": ttft["percentiles"]["p50"],
        "ttft_p95": ttft["percentiles"]["p95"],
        "tpot_mean": each["mean"],
        "e2e_p50": of("request_latency")["percentiles"]["p50"] * 1e3,
        "prompt_tokens": of("prompt_token_count")["total_sum"],
        "output_tokens": of("output_token_count")["total_sum"],
        "failed": metrics["request_totals"]["errored"],
        "cpu_seconds": cpu,
    }


SERVERS: dict[str, Any] = {"paced": paced_server, "vllm": vllm_server, "coldsnap": coldsnap_serve}


async def main() -> None:
    """Run the rounds and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidellm", type=Path, help="its command, in an environment of its own")
    parser.add_argument("--share", type=float, default=1.0, help="of the requests: less is a try-out")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--pace-at", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "load.json")
    args = parser.parse_args()
    generators: dict[str, Any] = {"coldsnap bench": ours, "vllm bench serve": vllms}
    if args.guidellm:
        generators["guidellm"] = lambda *given: guidellms(*given, args.guidellm)
    found: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    loads = {name: load | {"requests": int(load["requests"] * args.share)} for name, load in LOADS.items()}
    for kind in args.servers:
        home = Path(tempfile.mkdtemp(prefix="load-"))
        async with SERVERS[kind](home) as server:
            for number in range(args.rounds):
                for name, load in loads.items():
                    if server.own is None and load.get("concurrency", 0) > 8:
                        continue  # Python cannot keep time for so many
                    # in turn, and not always in the same order
                    for generator in list(generators)[:: 1 if number % 2 == 0 else -1]:
                        await asyncio.sleep(REST_SECONDS)
                        before = server.own() if server.own else (0.0, 0.0)
                        seed = 1000 * number + load["requests"]  # prompts that no cache knows from another load
                        sample = generators[generator](server, load, seed, home)
                        if server.own:
                            await asyncio.sleep(0.2)  # until it has noted the last one
                            after = server.own()
                            sample["server_ttft"] = (after[0] - before[0]) / (after[1] - before[1]) * 1e3
                            sample["ttft_over_server"] = sample["ttft_mean"] / sample["server_ttft"]
                        found.setdefault(server.name, {}).setdefault(name, {}).setdefault(generator, []).append(sample)
                        print(server.name, name, generator, json.dumps(sample), file=sys.stderr, flush=True)
            if server.own:
                page(server, home, args.out.with_name(f"{args.out.stem}-{kind}.html"))
        shutil.rmtree(home, ignore_errors=True)
    if args.out.exists():  # servers that were not loaded now stay in the tables
        found = json.loads(args.out.read_text())["found"] | found
    about = {"processors": os.cpu_count(), "python": platform.python_version(), "found": found}
    args.out.write_text(json.dumps(about, indent=1) + "\n")
    text = table(found)
    args.out.with_suffix(".md").write_text(text)
    print(text)


def table(found: dict[str, dict[str, dict[str, list[dict[str, float]]]]]) -> str:
    """Return the medians, and the ratios of ours to the others'."""
    lines = [
        f"{PROMPT} prompt and {OUTPUT} output tokens; medians of the rounds; times in ms. In brackets: ours / theirs."
    ]
    for server, loads in found.items():
        lines += ["", f"## {server}", ""]
        lines += [f"| load | generator | {' | '.join(FIGURES.values())} | failed | CPU-seconds |"]
        lines += ["|---" * (len(FIGURES) + 4) + "|"]
        for load, generators in loads.items():
            medians = {
                name: {figure: statistics.median(sample[figure] for sample in samples) for figure in samples[0]}
                for name, samples in generators.items()
            }
            own = medians["coldsnap bench"]
            for name, values in medians.items():
                cells = [
                    f"{values[figure]:.4g}"
                    + ("" if name == "coldsnap bench" else f" ({own[figure] / values[figure]:.3f})")
                    if figure in values
                    else ""
                    for figure in FIGURES
                ]
                failed = sum(sample["failed"] for sample in generators[name])
                lines.append(f"| {load} | {name} | {' | '.join(cells)} | {failed:.0f} | {values['cpu_seconds']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--pace-at" in sys.argv:
        keep_time(int(sys.argv[-1]))
    else:
        asyncio.run(main())
