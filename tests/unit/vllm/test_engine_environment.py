"""What vLLM finds in its environment, by what the snapshot's manifest and the user say."""

from __future__ import annotations

from typing import Any

import pytest

from coldsnap.vllm import release as vllm_release


@pytest.fixture(autouse=True)
def _on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_release, "is_cpu_build", lambda: True)


@pytest.mark.parametrize(
    ("environ", "manifest", "set_to"),
    [
        ({}, {}, "1"),
        ({}, {"kv_cache_memory_bytes": 1 << 28}, None),  # it would overrule the manifest
        ({"KV_CACHE_MEMORY_BYTES": "268435456"}, {}, None),
        ({"VLLM_CPU_KVCACHE_SPACE": "4"}, {}, None),
    ],
)
def test_the_cache_has_a_size_that_somebody_chose(
    environ: dict[str, str], manifest: dict[str, Any], set_to: str | None
) -> None:
    assert vllm_release.environment(environ, manifest).get("VLLM_CPU_KVCACHE_SPACE") == set_to


@pytest.mark.parametrize(
    ("environ", "manifest", "off"),
    [
        ({}, {}, False),
        ({}, {"enforce_eager": True}, True),
        ({"ENFORCE_EAGER": "true"}, {}, True),
        ({"ENFORCE_EAGER": "false"}, {"enforce_eager": True}, False),
        ({"TORCHDYNAMO_DISABLE": "0"}, {"enforce_eager": True}, False),
    ],
)
def test_the_compiler_is_off_for_an_eager_engine(environ: dict[str, str], manifest: dict[str, Any], off: bool) -> None:
    assert ("TORCHDYNAMO_DISABLE" in vllm_release.environment(environ, manifest)) is off


def test_on_a_gpu_the_compiler_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_release, "is_cpu_build", lambda: False)
    found = vllm_release.environment({}, {"enforce_eager": True})
    assert found["VLLM_ENABLE_STARTUP_PLAN"] == "1"
    assert "VLLM_ENABLE_STARTUP_PLAN" not in vllm_release.environment({"VLLM_ENABLE_STARTUP_PLAN": "0"}, {})
    assert not {"TORCHDYNAMO_DISABLE", "VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS"} & found.keys()
