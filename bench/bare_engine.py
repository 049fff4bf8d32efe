"""The yardstick of tokenpath.py: a bare `AsyncLLM` in a process of its own, nothing around it.

Reads one JSON line per run from stdin ({"streams", "jobs", "tokens"}) and answers with one. The engine is
started exactly as the worker starts it, then driven from one coroutine per stream.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


async def run(llm: Any, make: Any, streams: int, jobs: int, tokens: int) -> dict[str, Any]:
    """Run `jobs` generations of `tokens` tokens, `streams` at a time; return counts and latencies."""
    room = asyncio.Semaphore(streams)
    ttft: list[float] = []

    async def one(number: int) -> None:
        async with room:
            begun = time.monotonic()
            first = 0.0
            async for _ in llm.generate({"prompt": f"{number} hi there"}, make(tokens), f"bare-{time.monotonic_ns()}"):
                first = first or time.monotonic()
            ttft.append(first - begun)

    begun = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(jobs)))
    return {"seconds": time.monotonic() - begun, "ttft": ttft}


async def serve(llm: Any, make: Any) -> None:
    """Answer run requests until stdin ends."""
    loop = asyncio.get_running_loop()
    await run(llm, make, 4, 4, 8)
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await run(llm, make, **json.loads(line))), flush=True)


def main() -> None:
    """Boot the engine and serve."""
    from coldsnap import snapshot, vllm_engine
    from coldsnap.settings import Settings

    folder = Settings.read(os.environ).snapshot()
    assert folder is not None
    manifest = snapshot.load_manifest(folder)
    os.environ.update(vllm_engine.environment(os.environ, manifest.engine_args) | {"HF_HUB_OFFLINE": "1"})
    vllm_engine.load(os.environ)
    import uvloop
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(model=str(folder), **manifest.engine_args).create_engine_config()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    llm = AsyncLLM.from_vllm_config(config)

    def make(tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA)

    try:
        uvloop.run(serve(llm, make))
    finally:
        llm.shutdown()


if __name__ == "__main__":
    main()
