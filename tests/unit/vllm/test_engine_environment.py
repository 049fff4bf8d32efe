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
    ("environ", "manifest", "eager"),
    [
        ({}, {}, True),
        ({}, {"enforce_eager": None}, True),
        ({}, {"enforce_eager": True}, True),
        ({"ENFORCE_EAGER": "true"}, {"enforce_eager": False}, True),
        ({"ENFORCE_EAGER": " "}, {}, True),
        ({}, {"enforce_eager": False}, False),
        ({"ENFORCE_EAGER": "false"}, {}, False),
        ({"ENFORCE_EAGER": "false"}, {"enforce_eager": True}, False),
        ({"COMPILATION_CONFIG": '{"mode": 3}'}, {}, False),
        ({}, {"optimization_level": 2}, False),
        ({"ENFORCE_EAGER": "true"}, {"optimization_level": 2}, True),
    ],
)
def test_a_processor_compiles_only_where_somebody_has_asked_for_it(
    environ: dict[str, str], manifest: dict[str, Any], eager: bool
) -> None:
    found = vllm_release.environment(environ, manifest)
    assert ("TORCHDYNAMO_DISABLE" in found) is eager
    assert ("VLLM_USE_AOT_COMPILE" in found) is not eager  # what it saves, it cannot load
    assert vllm_release.defaults(environ, manifest).get("enforce_eager", False) == eager


def test_what_the_user_says_of_the_compiler_stays() -> None:
    said = {"TORCHDYNAMO_DISABLE": "0", "VLLM_USE_AOT_COMPILE": "1"}
    assert not said.keys() & vllm_release.environment(said, {"enforce_eager": True}).keys()
    assert not said.keys() & vllm_release.environment(said, {"enforce_eager": False}).keys()


def test_on_a_gpu_the_compiler_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_release, "is_cpu_build", lambda: False)
    found = vllm_release.environment({}, {"enforce_eager": True})
    assert found["VLLM_ENABLE_STARTUP_PLAN"] == "1"
    assert "VLLM_ENABLE_STARTUP_PLAN" not in vllm_release.environment({"VLLM_ENABLE_STARTUP_PLAN": "0"}, {})
    assert not {"TORCHDYNAMO_DISABLE", "VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS"} & found.keys()
    assert vllm_release.defaults({}, {}).keys() == {"allowed_media_domains"}
    assert "VLLM_USE_AOT_COMPILE" not in vllm_release.environment({"ENFORCE_EAGER": "false"}, {})


def test_vllms_table_of_fused_allreduces_is_read_without_an_import_of_it() -> None:
    sizes = vllm_release.fused_allreduce_sizes()
    assert sizes[90] == {2: 64, 4: 2, 8: 0.5}
    assert sizes[100].items() >= {2: 64, 4: 32, 8: 1}.items()


@pytest.mark.parametrize(("value", "moves"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_a_driver_older_than_vllms_cuda_needs_a_program_of_its_own(
    monkeypatch: pytest.MonkeyPatch, value: str, moves: bool
) -> None:
    environ = {"VLLM_ENABLE_CUDA_COMPATIBILITY": value}
    assert not vllm_release.moves_libraries(environ)  # a processor has no driver
    monkeypatch.setattr(vllm_release, "is_cpu_build", lambda: False)
    assert vllm_release.moves_libraries(environ) is moves
    assert not vllm_release.moves_libraries({})
