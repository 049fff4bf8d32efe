"""Fingerprints: what changes one, and what must not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from coldsnap.caches import fingerprint
from coldsnap.errors import CacheError
from coldsnap.testing.fake_nvml import FakeNvml
from coldsnap.vllm import release as vllm_release

NAMES = frozenset({"max_model_len", "enforce_eager", "revision", "tokenizer", "model"})
BASE: dict[str, Any] = {
    "digest": "1b8f",
    "model": "/app/snapshots/demo",
    "manifest": {"max_model_len": 4096, "enforce_eager": True},
    "environ": {"VLLM_USE_FLASHINFER_SAMPLER": "1", "PATH": "/bin"},
    "names": NAMES,
    "folders": {"vllm": Path("/app/.cache/vllm")},
}


def name(**changes: Any) -> str:
    return fingerprint.name_of(fingerprint.of_settings(**BASE | changes))


def test_it_is_the_same_for_the_same_and_a_files_name() -> None:
    assert name() == name()
    assert len(name()) == 32
    assert name().isalnum()


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "1b90"},
        {"digest": None},
        {"model": "/runpod-volume/coldsnap/1b8f"},
        {"manifest": {"max_model_len": 8192, "enforce_eager": True}},
        {"environ": BASE["environ"] | {"MAX_MODEL_LEN": "8192"}},
        {"environ": BASE["environ"] | {"TOKENIZER_NAME": "other"}},
        {"environ": BASE["environ"] | {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}},
        {"environ": BASE["environ"] | {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}},
        {"environ": BASE["environ"] | {"CUDA_HOME": "/usr/local/cuda-13"}},
        {"environ": BASE["environ"] | {"CXX": "clang++"}},
        {"folders": {"vllm": Path("/root/.cache/vllm")}},
    ],
)
def test_what_the_caches_depend_on_changes_it(changes: dict[str, Any]) -> None:
    assert name(**changes) != name()


@pytest.mark.parametrize(
    "more",
    [
        {"RUNPOD_POD_ID": "worker-2", "HOSTNAME": "b", "PATH": "/usr/bin"},
        {"VLLM_API_KEY": "secret", "VLLM_PORT": "8001", "VLLM_LOGGING_LEVEL": "DEBUG", "CUDA_VISIBLE_DEVICES": "1"},
        {"MODEL": "ignored"},
        {"MAX_MODEL_LEN": "4096"},
        {"ENFORCE_EAGER": "true"},
    ],
)
def test_what_is_a_workers_own_or_says_the_same_otherwise_does_not(more: dict[str, str]) -> None:
    assert name(environ=BASE["environ"] | more) == name()


def test_a_variable_need_not_be_utf8() -> None:
    assert name(environ={"CXX": os.fsdecode(b"\xff")}) != name(environ={"CXX": os.fsdecode(b"\xfe")})


def test_no_value_of_the_environment_is_in_it() -> None:
    factors = fingerprint.of_settings(**BASE | {"environ": {"CUDA_TOKEN": "hush", "REVISION": "hush"}})
    assert "hush" not in str(factors)


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: other\n")
    return path


def machine(folder: Path, nvml: FakeNvml | None = None, flags: str = "fpu avx2") -> dict[str, str]:
    return fingerprint.of_machine(gpu=nvml is not None, nvml=nvml, cpuinfo=cpuinfo(folder, flags))


def test_the_machine_is_its_gpus_driver_processor_and_versions(tmp_path: Path) -> None:
    nvml = FakeNvml(free=[80 << 30] * 2, cuda=13010)
    found = machine(tmp_path, nvml)
    assert found["gpu"] == "2 x NVIDIA H100 80GB HBM3 9.0"
    assert found["driver's CUDA"] == "13"
    assert {"python", "processor", "torch", "vllm's folder"} <= found.keys()
    assert nvml.open == 0
    assert machine(tmp_path).keys() == found.keys() - {"gpu", "driver's CUDA"}
    assert machine(tmp_path, flags="avx2 fpu") == machine(tmp_path)
    assert machine(tmp_path, flags="fpu avx2 avx512f") != machine(tmp_path)


V2 = "fpu cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"


def test_hosts_of_one_level_and_drivers_of_one_major_version_share_a_gpus_bundles(tmp_path: Path) -> None:
    one = machine(tmp_path, FakeNvml(cuda=13000), V3)
    assert one == machine(tmp_path, FakeNvml(cuda=13020), f"{V3} vaes sha_ni")
    assert one["processor"].endswith(" v3")
    for flags in (V2, f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"):
        assert machine(tmp_path, FakeNvml(cuda=13000), flags) != one
    assert machine(tmp_path, FakeNvml(cuda=12090), V3) != one
    assert machine(tmp_path, flags=V3) != machine(tmp_path, flags=f"{V3} vaes")  # compiled code is for this one


@pytest.mark.parametrize(
    ("flags", "level"),
    [("fpu", "v1"), ("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave", "v1"), (V2, "v2"), (V3, "v3")],
)
def test_a_level_has_those_below_it(tmp_path: Path, flags: str, level: str) -> None:
    assert machine(tmp_path, FakeNvml(), flags)["processor"].split()[1] == level


def test_a_driver_that_does_not_answer_is_said(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"does not say what GPU this is \(Driver Not Loaded\)"):
        machine(tmp_path, FakeNvml(broken="nvmlInit"))


def test_what_differs_is_named() -> None:
    said = fingerprint.differing({"torch": "2", "gpu": "L4", "same": "1"}, {"torch": "1", "driver": "13", "same": "1"})
    assert said == "driver 13 instead of none, gpu none instead of L4, torch 1 instead of 2"


def test_the_caches_folders_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert vllm_release.cache_folders({}) == {
        "vllm": Path("/home/me/.cache/vllm"),
        "triton": Path("/home/me/.triton/cache"),
        "flashinfer": Path("/home/me/.cache/flashinfer"),
    }
    image = {
        "VLLM_CACHE_ROOT": "/app/.cache/vllm",
        "TRITON_CACHE_DIR": "/app/.cache/triton",
        "FLASHINFER_WORKSPACE_BASE": "/app",
        "TORCHINDUCTOR_CACHE_DIR": "/app/.cache/inductor",
    }
    assert vllm_release.cache_folders(image) == {
        name: Path("/app/.cache", name) for name in ("vllm", "triton", "flashinfer", "inductor")
    }
