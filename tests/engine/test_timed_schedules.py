"""The engine that keeps time against vLLM's own scheduler: the same requests, the same steps."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from coldsnap.testing.timed_engine import Timing, _Core, _Sequence

from .worker import SNAPSHOT

Steps = list[dict[str, int]]
"""By step: tokens scheduled for each request."""
Asks = list[tuple[int, int, int]]
"""(step before which a request comes, prompt, output)."""


class Notes:
    """Stands where the meter does."""

    def __init__(self) -> None:
        self.steps: Steps = []

    def scheduled(self, output: Any, requests: Any, begun: float) -> None:
        self.steps.append(dict(output.num_scheduled_tokens))

    def ended(self, output: Any, scheduler: Any) -> None:
        pass


async def timed(asks: Asks, sequences: int, tokens: int) -> Steps:
    notes, now = Notes(), 0.0
    timing = Timing(a=1.0, b=0.0, c=0.0, d=0.0, max_num_seqs=sequences, max_num_batched_tokens=tokens)
    core: Any = _Core(timing, -1, lambda: now)
    core._meter = notes
    left = dict(enumerate(asks))
    while left or core.get_num_unfinished_requests():
        for number, (step, prompt, output) in list(left.items()):
            if step <= now:
                core._waiting.append(sequence := _Sequence(f"r{number}", prompt, output))
                core._requests[sequence.name] = sequence
                del left[number]
        scheduled = core._schedule(now)
        core._end(core._note(scheduled), scheduled)
        now += 1
    return notes.steps


def vllms(asks: Asks, sequences: int, tokens: int) -> Steps:
    import torch
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=str(SNAPSHOT), max_num_seqs=sequences, max_num_batched_tokens=tokens, async_scheduling=False,
        enable_prefix_caching=False, enforce_eager=True,
    ).create_engine_config()  # fmt: skip
    blocks, block = 10_000, 16
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    scheduler = Scheduler(config, cache, StructuredOutputManager(config), block)
    steps: Steps = []
    left = dict(enumerate(asks))
    while left or scheduler.get_num_unfinished_requests():
        for number, (step, prompt, output) in list(left.items()):
            if step <= len(steps):
                sampling = SamplingParams(max_tokens=output, ignore_eos=True)
                scheduler.add_request(Request(f"r{number}", list(range(1, prompt + 1)), sampling, None))
                del left[number]
        scheduled = scheduler.schedule()
        steps.append(dict(scheduled.num_scheduled_tokens))
        names = list(scheduled.num_scheduled_tokens)
        done = [
            scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_prompt_tokens for name in names
        ]
        scheduler.update_from_output(
            scheduled,
            ModelRunnerOutput(
                names, {name: at for at, name in enumerate(names)}, [[5] if each else [] for each in done]
            ),
        )  # fmt: skip
    return steps


@pytest.mark.parametrize("seed", range(3))
def test_its_steps_are_those_of_vllms_scheduler(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    rng = random.Random(seed)
    sequences, tokens = [(2, 64), (4, 100), (8, 300)][seed]
    asks = [(rng.randint(0, 150), rng.randint(1, 400), rng.randint(1, 60)) for _ in range(40)]
    ours = asyncio.run(timed(asks, sequences, tokens))
    assert ours == vllms(asks, sequences, tokens)
    assert any(len(step) == sequences for step in ours)
    assert any(sum(step.values()) == tokens for step in ours)
