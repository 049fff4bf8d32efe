"""`coldsnap bench` against `coldsnap serve` with the real worker and engine, in each of the ways to ask it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from coldsnap.desk import trace
from tests.loopback.desk.serving import KEY, Serve

from .worker import MODEL, ROOT, environment

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serve(tmp_path_factory: pytest.TempPathFactory, home: Path) -> AsyncIterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    environ = environment(home, folder / "ledger", GPU_PRICE_PER_SECOND="0.00116")
    async with Serve(folder, "--workers", "1", environ=environ) as serve:
        await serve.says("worker-1 takes jobs")
        yield serve


async def bench(url: str, folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Return its exit code, its JSON and what it said on stderr."""
    found = folder / "found.json"
    code = "import sys; from coldsnap.cli import main; sys.exit(main())"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "bench", url, "--json", str(found), "--html", str(folder / "page.html"), *options,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "RUNPOD_API_KEY": KEY},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    told = json.loads(found.read_text("utf-8")) if found.exists() else {}
    return int(process.returncode or 0), told, out.decode() + err.decode()


@pytest.mark.parametrize(
    ("path", "options", "prompts"),
    [
        ("openai/v1", ("--concurrency", "4"), "token ids"),
        ("openai/v1", ("--rate", "20", "--api", "chat"), "words"),
        ("", ("--concurrency", "4"), "words"),
        ("", ("--rate", "20", "--api", "completions"), "token ids"),
    ],
)
async def test_an_endpoint_is_loaded_and_answers_in_full(
    serve: Serve, tmp_path: Path, path: str, options: tuple[str, ...], prompts: str
) -> None:
    url = f"{serve.url}/{path}".rstrip("/")
    code, found, said = await bench(url, tmp_path, "--requests", "24", "--output-tokens", "uniform:8:40", *options)
    assert code == 0, said
    summary = found["summary"]
    assert (summary["succeeded"], summary["failed"], found["prompts"]) == (24, 0, prompts)
    tokens = summary["tokens"]
    assert tokens["output"] == tokens["wished_output"]  # past the model's own end
    assert tokens["prompt"] == pytest.approx(tokens["wished_prompt"], rel=0 if prompts == "token ids" else 0.1)
    assert summary["cost"]["requests"] == 24
    assert summary["cost"]["usd"] == pytest.approx(summary["cost"]["gpu_seconds"] * 0.00116, rel=1e-3)
    assert all(row["due"] <= row["sent"] <= row["first"] <= row["last"] <= row["end"] for row in found["requests"])
    assert "<svg" in (tmp_path / "page.html").read_text("utf-8")


async def test_the_ledger_of_a_load_is_a_trace_that_can_be_replayed(serve: Serve, tmp_path: Path) -> None:
    code, _, said = await bench(serve.url, tmp_path, "--concurrency", "2", "--requests", "8", "--output-tokens", "16")
    assert code == 0, said
    ledger = serve.folder / "ledger" / "ledger.jsonl"
    arrivals = list(trace.read(ledger))[-6:]
    replay = tmp_path / "trace.jsonl"
    lines = [{"time": a.time, "prompt_tokens": a.prompt_tokens, "output_tokens": a.output_tokens} for a in arrivals]
    replay.write_text("\n".join(map(json.dumps, lines)))
    code, found, said = await bench(f"{serve.url}/openai/v1", tmp_path, "--trace", str(replay), "--warmup", "0")
    assert code == 0, said
    rows = sorted(found["requests"], key=lambda row: row["number"])
    assert [(row["prompt_tokens"], row["output_tokens"]) for row in rows] == [
        (each.prompt_tokens, each.output_tokens) for each in arrivals
    ]
    assert [row["due"] for row in rows] == pytest.approx([each.time - arrivals[0].time for each in arrivals])


async def test_what_does_not_fit_the_context_fails_and_says_so(serve: Serve, tmp_path: Path) -> None:
    url = f"{serve.url}/openai/v1"
    code, found, _ = await bench(url, tmp_path, "--rate", "50", "--requests", "3", "--prompt-tokens", "5000")
    assert code == 1
    (failure,) = found["summary"]["failures"]
    assert (failure["kind"], failure["count"]) == ("HTTP 400 Bad Request", 3)
    assert "4096" in failure["example"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("", ("--key", "wrong"), "--key: 127.0.0.1"),
        ("openai/v1", ("--key", "wrong"), "--key: 127.0.0.1"),
        ("", ("--model", "other"), f"--model: model: 'other' is not served here; served: {MODEL}"),
        ("openai/v1", ("--model", "other"), "--model: 'other' is not served by 127.0.0.1"),
    ],
)
async def test_a_wrong_key_or_model_is_one_sentence(
    serve: Serve, tmp_path: Path, path: str, options: tuple[str, ...], message: str
) -> None:
    code, _, said = await bench(f"{serve.url}/{path}".rstrip("/"), tmp_path, "--rate", "1", *options)
    assert code == 1
    assert said.startswith(f"coldsnap: {message}")
    assert said.count("\n") == 1
