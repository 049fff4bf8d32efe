"""Servers that bench/load_agreement.py loads: one that keeps time, vLLM's own, `coldsnap serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import base, start, stop  # noqa: E402
from contenders import healthy  # noqa: E402

from coldsnap.settings import Settings  # noqa: E402
from coldsnap.snapshot import manifest as snapshot  # noqa: E402

PROMPT, OUTPUT = 128, 64
PACED_FIRST, PACED_NEXT = 0.03, 0.005
KEY = "rpa_bench"
CODE = "import sys; from coldsnap.cli import main; sys.exit(main())"
"""Runs the `coldsnap` command of this clone."""
ONE_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""What coldsnap sets too: the model computes on one core, as on a GPU it computes on none."""
SIZED: dict[str, Any] = {
    "vocab_size": 1280,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""A Qwen3 whose prefill takes one core about as long as a real model's takes a GPU."""
SIZED_NAME = "85M parameters"


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


def demo() -> Path:
    """Return the demo's snapshot."""
    folder = Settings.read({}).snapshot()
    assert folder is not None
    return folder


def sized(folder: Path) -> Path:
    """Write a snapshot of random weights, the same ones each time, with the demo's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZED)).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[no-untyped-call]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo() / name, folder / name)
    snapshot.write_manifest(
        folder,
        source=snapshot.Source(),
        quantization=snapshot.Quantization(),
        served_model_name="sized",
        engine_args=snapshot.load_manifest(demo()).engine_args,
        versions={},
    )
    return folder


@contextlib.asynccontextmanager
async def vllm_server(home: Path) -> AsyncIterator[Server]:
    """Start vLLM's own server on the demo's snapshot, as bench/coldstart.py does."""
    async with _vllm_server(home, "vLLM's own server", demo(), {}) as server:
        yield server


@contextlib.asynccontextmanager
async def vllm_server_sized(home: Path) -> AsyncIterator[Server]:
    """Start vLLM's own server on a model of a size that matters."""
    async with _vllm_server(home, f"vLLM's own server, {SIZED_NAME}", sized(home / "sized"), ONE_CORE) as server:
        yield server


@contextlib.asynccontextmanager
async def _vllm_server(home: Path, name: str, folder: Path, more: dict[str, str]) -> AsyncIterator[Server]:
    at = port()
    arguments = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in snapshot.load_manifest(folder).engine_args.items()
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *arguments]
    command += ["--host=127.0.0.1", f"--port={at}", "--disable-uvicorn-access-log", "--served-model-name=demo"]
    with (home / "vllm.log").open("wb") as log:
        process = start(command, base(home) | more, log)
    try:
        async with aiohttp.ClientSession() as session:
            await healthy(session, f"http://127.0.0.1:{at}")
        url = f"http://127.0.0.1:{at}"
        yield Server(name, url, "demo", folder, lambda: of_metrics(f"{url}/metrics"))
    finally:
        await asyncio.to_thread(stop, process)


@contextlib.asynccontextmanager
async def coldsnap_serve(home: Path) -> AsyncIterator[Server]:
    """Start `coldsnap serve` with one worker on the demo's snapshot."""
    async with _coldsnap_serve(home, "coldsnap serve", demo()) as server:
        yield server


@contextlib.asynccontextmanager
async def coldsnap_serve_sized(home: Path) -> AsyncIterator[Server]:
    """Start `coldsnap serve` with one worker on a model of a size that matters."""
    async with _coldsnap_serve(home, f"coldsnap serve, {SIZED_NAME}", sized(home / "sized")) as server:
        yield server


@contextlib.asynccontextmanager
async def _coldsnap_serve(home: Path, name: str, folder: Path) -> AsyncIterator[Server]:
    at, said = port(), home / "serve.log"
    command = [sys.executable, "-c", CODE, "serve", f"--port={at}", "--key", KEY, f"--state={home / 'serve.db'}"]
    env = base(home) | {"PYTHONPATH": str(ROOT / "src"), "COLDSNAP_LEDGER_DIR": str(home / "ledger")}
    env |= {"SNAPSHOT_DIR": str(folder)}
    with said.open("wb") as log:
        process = start(command, env, log)
    try:
        while "takes jobs" not in said.read_text():
            if process.poll() is not None:
                raise RuntimeError(said.read_text())
            await asyncio.sleep(0.1)
        url = f"http://127.0.0.1:{at}/v2/local/openai"
        model = snapshot.load_manifest(folder).served_model_name
        yield Server(name, url, model, folder, lambda: of_ledger(home / "ledger" / "ledger.jsonl"))
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.wait, 60)


@contextlib.asynccontextmanager
async def paced_server(home: Path) -> AsyncIterator[Server]:
    """Start this file as the server that keeps time."""
    at = port()
    with (home / "paced.log").open("wb") as log:
        process = start([sys.executable, __file__, str(at)], base(home), log)
    try:
        async with aiohttp.ClientSession() as session:
            await healthy(session, f"http://127.0.0.1:{at}")
        yield Server("a server that keeps time", f"http://127.0.0.1:{at}", "demo", demo())
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


SERVERS = {
    "paced": paced_server,
    "vllm": vllm_server,
    "coldsnap": coldsnap_serve,
    "vllm-sized": vllm_server_sized,
    "coldsnap-sized": coldsnap_serve_sized,
}

if __name__ == "__main__":
    keep_time(int(sys.argv[1]))
