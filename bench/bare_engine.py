"""The yardstick of tokenpath.py: a bare `AsyncLLM` in a process of its own, nothing around it.

Reads one JSON line per run from stdin (the arguments of `run`) and answers with one. The engine is
started exactly as the worker starts it, then driven from one coroutine per stream.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


async def run(
    llm: Any, make: Any, *, streams: int, jobs: int, tokens: int, question: str, arrivals: list[float] | None
) -> dict[str, Any]:
    """Run `jobs` generations of `tokens` tokens, `streams` at a time; return latencies, one of each a job.

    With `arrivals` each begins so many seconds after the start. `gap` is the longest wait between two outputs.
    """
    room = asyncio.Semaphore(streams)
    prompt = {"prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"}
    ttft, gap, e2e = [], [], []
    begun = time.monotonic()

    async def one(number: int) -> None:
        if arrivals is not None:
            await asyncio.sleep(begun + arrivals[number] - time.monotonic())
        async with room:
            times = [time.monotonic()]
            count = 0
            async for output in llm.generate(prompt, make(tokens), f"bare-{time.monotonic_ns()}-{number}"):
                times.append(time.monotonic())
                count += len(output.outputs[0].token_ids)
            assert count == tokens
            ttft.append(times[1] - times[0])
            gap.append(max(later - earlier for earlier, later in itertools.pairwise(times[1:])))
            e2e.append(times[-1] - times[0])

    await asyncio.gather(*(one(i) for i in range(jobs)))
    return {"seconds": time.monotonic() - begun, "ttft": ttft, "gap": gap, "e2e": e2e}


async def serve(llm: Any, make: Any) -> None:
    """Answer run requests until stdin ends."""
    loop = asyncio.get_running_loop()
    await run(llm, make, streams=4, jobs=4, tokens=8, question="What is a cold start?", arrivals=None)
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await run(llm, make, **json.loads(line))), flush=True)


def start(folder: Path, **more: Any) -> Any:
    """Start the engine on a snapshot as the worker starts it; `more` are engine arguments."""
    from coldsnap.snapshot import manifest as snapshot
    from coldsnap.vllm import release as vllm_release
    from coldsnap.vllm import start as vllm_start

    baked = snapshot.load_manifest(folder).engine_args
    arguments = vllm_release.defaults(os.environ, baked) | baked | more
    os.environ.update(vllm_release.environment(os.environ, baked) | {"HF_HUB_OFFLINE": "1"})
    vllm_start.load(os.environ)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(model=str(folder), **arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    gc.freeze()
    llm = AsyncLLM.from_vllm_config(config)
    gc.enable()  # load() has switched it off
    return llm


def main() -> None:
    """Boot the engine on the snapshot that the environment names and serve."""
    from coldsnap.settings import Settings

    folder = Settings.read(os.environ).snapshot()
    assert folder is not None
    llm = start(folder)
    import uvloop
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    def make(tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=tokens, temperature=0.0, output_kind=RequestOutputKind.DELTA)

    try:
        uvloop.run(serve(llm, make))
    finally:
        llm.shutdown()


if __name__ == "__main__":
    main()
