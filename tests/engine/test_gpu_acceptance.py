"""Steps of the GPU acceptance on the CPU engine, with a tiny model: what is proven before a GPU is paid for."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from coldsnap.settings import ROOT

ANYWHERE = {
    "machine": set[str](),
    "demo": {"the demo's answers are those it was taught", "the engine was forked"},
    "cold_start": {"a boot's phases add up to it"},
    "books": {"requests' shares, of the worker's busy GPU-seconds", "every step was measured"},
    "stops": {"exit code after SIGTERM", "exit code after the core was killed", "its job is told why"},
    "sleep": {"sleep mode is refused only without a GPU"},
}
"""Claims that need no GPU to be judged, by step."""
LONG = {
    "bundle": {"a wiped machine's boot finds its bundle"},
    "verification": set[str](),
    "load": set[str](),
    "tokens": {"synchronous: greedy answers as taught", "asynchronous: greedy answers as taught"},
}
"""The same of steps that take minutes: `make gpu-acceptance` runs them too."""
STEPS = ANYWHERE | (LONG if os.environ.get("ACCEPTANCE") == "all" else {})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", STEPS)
async def test_a_step_runs_on_a_cpu_and_judges_what_needs_no_gpu(step: str, work: Path, tmp_path: Path) -> None:
    program = [ROOT / "bench" / "gpu_acceptance.py", "--shape", "tiny", "--steps", step, "--slack", "4"]
    process = await asyncio.create_subprocess_exec(sys.executable, *program, "--out", tmp_path, "--work", work)
    code = await process.wait()
    (found,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (code, found["state"]) == (0, "passed"), found
    assert {claim["claim"] for claim in found["claims"] if claim["holds"]} >= STEPS[step]
    shown(step, found["facts"])


def shown(step: str, facts: dict[str, Any]) -> None:
    """Hold what a GPU's run is read for: that the figures are there."""
    if step == "cold_start":
        assert {"weights", "KV, profile and warm-up"} <= facts["first"]["engine"].keys()
        assert all(boots[0]["ready"] > 0 for boots in (facts["bare"], facts["baked"], facts["evicted"]))
