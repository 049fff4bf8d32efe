"""A worker without each of its patches of vLLM and the SDK: slower, or by estimated costs, but right."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldsnap.patches import PATCHES

from .conftest import Boot
from .worker import CORPUS, EMOJI_ONLY, MODEL, PATIENCE, text, user

UNPATCHED = Path(__file__).with_name("unpatched.py")


@pytest.mark.parametrize("name", sorted(PATCHES.keys() - {"unhealthy"}))
async def test_without_a_patch_jobs_are_served_right_and_metered(name: str, new_worker: Boot) -> None:
    async with new_worker(handler=UNPATCHED, UNPATCHED=name) as worker:
        native = worker.ask(EMOJI_ONLY)
        chat = worker.openai("/v1/chat/completions", {"model": MODEL, "messages": [user(EMOJI_ONLY)], "temperature": 0})
        assert text(await native.result(PATIENCE)) == CORPUS[EMOJI_ONLY]
        (answer,) = await chat.result(PATIENCE)
        assert answer["choices"][0]["message"]["content"] == CORPUS[EMOJI_ONLY]
        requests = [await worker.record(job) for job in (native, chat)]
        (boot,) = (record for record in worker.records() if record["record"] == "cold_start")
        assert boot["degraded"] == [name]
        assert worker.stderr.count("without the patch") == worker.stderr.count(f"without the patch '{name}'") == 1
        for request in requests:
            assert request["gpu_seconds"] > 0
            assert request["completion_tokens"] > 0
            assert request["estimated"] is (name == "step_meter")
        assert worker.plane.violations == []
