"""Load generators that bench/load_agreement.py compares, each run as its users run it, and what each reports."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from coldstart import base
from load_servers import CODE, KEY, ROOT, Server


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


def trace(load: dict[str, Any], seed: int, home: Path) -> Path:
    """Write arrivals (Poisson) and lengths in Mooncake's format, which `coldsnap bench` and vLLM's both read."""
    file = home / f"trace-{seed}.jsonl"
    draw, at = random.Random(seed), 0.0
    with file.open("w") as out:
        for number in range(load["requests"]):
            line = {"timestamp": at * 1e3, "input_length": load["prompt"], "output_length": load["output"]}
            # a chunk of its own: no prompt begins as another does
            out.write(json.dumps(line | {"hash_ids": [seed * 10_000 + number]}) + "\n")
            at += draw.expovariate(load.get("rate", 1.0))
    return file


def ours(server: Server, load: dict[str, Any], seed: int, home: Path) -> dict[str, float]:
    """Run `coldsnap bench`."""
    found = home / "ours.json"
    if load.get("replayed"):
        how = ["--trace", str(trace(load, seed, home))]
    elif "rate" in load:
        how = ["--rate", str(load["rate"])]
    else:
        how = ["--concurrency", str(load["concurrency"])]
    command = [sys.executable, "-c", CODE, "bench", f"{server.url}/v1", "--model", server.model, "--key", KEY, *how]
    command += ["--requests", str(load["requests"])]
    if not load.get("replayed"):
        command += ["--prompt-tokens", str(load["prompt"]), "--output-tokens", str(load["output"])]
    cpu = run(
        [*command, "--seed", str(seed), "--warmup", "0" if load.get("ids") else "8", "--json", str(found)],
        home,
        home / "ours.log",
    )
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
    if load.get("ids"):  # prompts of token ids come from a trace only; a warm-up would send the first one beforehand
        command += ["--dataset-name=timed_trace", f"--dataset-path={trace(load, seed, home)}", "--num-warmups=0"]
        command += ["--timed-trace-sec-multiplier=0.001", f"--timed-trace-chunk-hash-size={load['prompt']}"]
        how = [] if load.get("replayed") else ["--no-self-timed", *how]
    else:
        command += ["--dataset-name=random", f"--random-input-len={load['prompt']}", "--num-warmups=8"]
        command += [f"--random-output-len={load['output']}", "--ignore-eos"]
    command += [f"--num-prompts={load['requests']}", f"--seed={seed}", "--ready-check-timeout-sec=0"]
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
        "data": f"synthetic_text,prompt_tokens={load['prompt']},output_tokens={load['output']}",
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
