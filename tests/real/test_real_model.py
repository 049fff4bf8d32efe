"""SmolLM2 in 16 bit, booted and asked something that people know the answer to: `make real-check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldsnap.settings import ROOT
from coldsnap.snapshot.manifest import load_manifest, verify
from tests.engine.worker import run_handler

SNAPSHOTS = ROOT / ".coldsnap" / "real"
NAMES = ("none",)


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_is_whole_and_says_how_far_it_is_from_its_original(name: str) -> None:
    manifest = load_manifest(SNAPSHOTS / name)
    verify(SNAPSHOTS / name, manifest)
    assert manifest.bake is not None
    assert (manifest.bake.quality.mean_kl is None) == (name == "none")


@pytest.mark.parametrize("name", NAMES)
async def test_the_worker_knows_the_capital_of_france(name: str, tmp_path: Path) -> None:
    job = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "sampling_params": {"temperature": 0, "max_tokens": 16},
    }
    ended = await run_handler(
        "--test_input", json.dumps({"input": job}), home=tmp_path, cwd=tmp_path, SNAPSHOT_DIR=str(SNAPSHOTS / name)
    )
    assert ended.code == 0, ended
    assert "The capital of France is Paris." in ended.stdout
