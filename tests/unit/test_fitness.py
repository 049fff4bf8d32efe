"""The checks before the engine: each names itself and what would help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coldsnap import fitness
from coldsnap.errors import BootError, Unfit
from coldsnap.settings import ROOT
from coldsnap.testing.fake_nvml import FakeNvml

WEIGHTS = 8 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:       99999999 kB\nMemAvailable:   16777216 kB\n")
    return tmp_path


def complaint(proc: Path, nvml: FakeNvml | None = None, weights: int = WEIGHTS) -> Unfit:
    with pytest.raises(Unfit) as caught:
        fitness.check(weights=weights, gpu=nvml is not None, scratch=proc / "ledger", nvml=nvml, proc=proc)
    assert isinstance(caught.value, BootError)
    assert nvml is None or nvml.open == 0
    return caught.value


def test_a_machine_that_has_everything_passes(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_runtime", lambda: (13, 0))
    nvml = FakeNvml()
    fitness.check(weights=WEIGHTS, gpu=True, scratch=proc / "not" / "there", nvml=nvml, proc=proc)
    fitness.check(weights=WEIGHTS, gpu=False, scratch=proc, proc=proc)
    assert nvml.open == 0


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_does_not_answer(proc: Path, broken: str) -> None:
    error = complaint(proc, FakeNvml(broken=broken))
    assert error.check == "gpu"
    assert "Driver Not Loaded" in error.message


def test_no_gpu(proc: Path) -> None:
    assert "--gpus all" in complaint(proc, FakeNvml(free=[])).message


def test_a_driver_older_than_the_environments_cuda_names_the_fix(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_runtime", lambda: (13, 0))
    error = complaint(proc, FakeNvml(cuda=12020))
    assert error.check == "cuda"
    assert error.message == (
        "cuda: driver 535.104.05 supports CUDA 12.2, this environment needs 13.0 or newer: allow only CUDA 13.0 and "
        "newer in the endpoint's settings"
    )


def test_forward_compatibility_runs_on_any_driver(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_runtime", lambda: (13, 0))
    nvml = FakeNvml(cuda=12020)
    fitness.check(weights=1, gpu=True, scratch=proc, any_driver=True, nvml=nvml, proc=proc)
    assert nvml.open == 0


def test_a_newer_minor_version_of_the_same_cuda_runs(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_runtime", lambda: (12, 9))
    nvml = FakeNvml(cuda=12020)
    fitness.check(weights=WEIGHTS, gpu=True, scratch=proc, nvml=nvml, proc=proc)
    assert nvml.open == 0


def test_a_gpu_that_is_taken(proc: Path) -> None:
    error = complaint(proc, FakeNvml(free=[3 << 30, 4 << 30]))
    assert error.check == "gpu_memory"
    assert "7.52 GB are free on this worker's GPUs (2), the weights alone are 8.59" in error.message
    fitness.check(weights=WEIGHTS, gpu=True, scratch=proc, nvml=FakeNvml(free=[5 << 30, 5 << 30]), proc=proc)


def test_too_little_memory(proc: Path) -> None:
    assert complaint(proc, weights=16 << 30).check == "memory"  # on a CPU the weights are in it
    fitness.check(weights=16 << 30, gpu=True, scratch=proc, nvml=FakeNvml(), proc=proc)


def test_a_containers_limit_counts_not_the_hosts(proc: Path, tmp_path: Path) -> None:
    (proc / "self").mkdir()
    (proc / "self" / "cgroup").write_text("0::/\n")
    for name, content in {"memory.max": f"{2 << 30}", "memory.current": f"{3 << 29}", "memory.stat": "file 0"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(Unfit, match=r"memory: 0\.54 GB of host memory are available to this container"):
        fitness.check(weights=0, gpu=False, scratch=proc, proc=proc, cgroups=tmp_path)


def test_several_gpus_need_shared_memory(proc: Path) -> None:
    nvml = FakeNvml(free=[80 << 30] * 2)
    with pytest.raises(
        Unfit, match=r"shared_memory: .*/none has 0\.00 GB free, an engine on 2 GPUs needs 0\.27: .*--shm-size"
    ):
        fitness.check(weights=1, gpu=True, gpus=2, scratch=proc, nvml=nvml, proc=proc, shared=proc / "none")
    fitness.check(weights=1, gpu=True, gpus=1, scratch=proc, nvml=nvml, proc=proc, shared=proc / "none")


@pytest.mark.parametrize(("hard", "left"), [(512, None), (4096, 4096), (1_000_000, 65_535)])
def test_open_files_are_raised_as_far_as_they_may_or_refused(hard: int, left: int | None) -> None:
    code = f"""
import resource
from coldsnap import errors, fitness
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
try:
    fitness._open_files()
except errors.Unfit as error:
    print(error.message)
else:
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    environ = {"PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", code], env=environ, check=False, capture_output=True, text=True)
    if "not allowed to raise" in ended.stderr:
        pytest.skip("this user may not have so many open files")
    said = "open_files: this process may open 512 files at once, the worker needs 1024: "
    assert ended.stdout.strip().startswith(said if left is None else str(left))


def test_a_full_disk(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_LEAST_DISK", 1 << 62)
    error = complaint(proc)
    assert error.check == "disk"
    assert "TMPDIR" in error.message


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path)}
    advice = fitness.no_compiler(nothing)
    assert advice is not None
    assert "install gcc" in advice
    assert fitness.no_compiler(nothing | {"CC": "/opt/cc"}) is None
    (tmp_path / "clang").touch(0o755)
    assert fitness.no_compiler(nothing) is None


def test_it_imports_no_torch() -> None:
    code = (
        "import sys, pathlib; from coldsnap import fitness;"
        "fitness.check(weights=1, gpu=False, scratch=pathlib.Path('.')); print('torch' in sys.modules)"
    )
    environ = {"PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_a_processor_that_cuts_8_bit_products_off_is_told_for_snapshots_that_have_some(
    tmp_path: Path, flag: str
) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2\n")
    advice = fitness.cut_off_products("w8a8", gpu=False, proc=tmp_path)
    assert advice is not None
    assert "bake --scheme none or w4a16" in advice
    assert fitness.cut_off_products("w8a8", gpu=True, proc=tmp_path) is None
    assert fitness.cut_off_products("w4a16", gpu=False, proc=tmp_path) is None
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu avx2 {flag}\n")
    assert fitness.cut_off_products("w8a8", gpu=False, proc=tmp_path) is None
