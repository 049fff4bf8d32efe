"""The whole worker on machines whose GPUs are not there: it comes as far as its engine, which finds no device."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldsnap.settings import ROOT

from .conftest import PYTHON, Bench


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for a worker's temporary files. A socket's path must be short, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("count", [1, 2])
def test_only_the_engines_process_begins_cuda_and_its_failure_is_one_sentence(
    bench: Bench, count: int, tmp_path: Path, temporary: Path
) -> None:
    machine = bench.machine("H100", count, tmp_path / "calls")
    more = {
        "TMPDIR": str(temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "COLDSNAP_LEDGER_DIR": str(tmp_path / "ledger"),
        "TENSOR_PARALLEL_SIZE": str(count),
    }
    before = set(Path("/dev/shm").iterdir())
    command = [PYTHON, "handler.py", "--test_input", '{"input": {"prompt": "Hi"}}']
    worker = subprocess.Popen(
        command,
        cwd=ROOT,
        env=bench.environ(machine, tmp_path) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _, stderr = worker.communicate(timeout=600)
    began = {process for process, calls in machine.calls().items() if "cuInit" in calls}
    assert began, stderr
    assert worker.pid not in began, (tmp_path / "stacks").read_text("utf-8")
    pythons = (tmp_path / "pythons").read_text("utf-8")
    assert "spawn_main" not in pythons  # the engine was forked, and so were its workers
    assert worker.returncode == 1
    ours = [line for line in stderr.splitlines() if line.startswith("coldsnap: ")]
    assert ours == [stderr.splitlines()[-1]]
    assert "No CUDA GPUs are available" in ours[0]
    # vLLM 0.33 starts two that build a library of its humming kernels while it is imported; they end by themselves.
    assert [line for line in _living(worker.pid) if "import humming" not in line] == []
    left = set(Path("/dev/shm").iterdir()) - before
    for _ in range(60):  # another engine on this machine makes some too, and takes them away again
        left = {path for path in left if not _is_mapped(path)}
        if not left:
            break
        time.sleep(1)
    assert left == set()
    assert not (tmp_path / "ledger").exists()


def test_an_older_driver_is_passed_over_in_the_engines_process(bench: Bench, tmp_path: Path) -> None:
    machine = bench.machine("H100", 1, tmp_path / "calls")
    compatible = shutil.copytree(bench.libraries, tmp_path / "compat")
    more = {"VLLM_ENABLE_CUDA_COMPATIBILITY": "1", "VLLM_CUDA_COMPATIBILITY_PATH": str(compatible)}
    command = [PYTHON, "handler.py", "--test_input", '{"input": {"prompt": "Hi"}}']
    environ = bench.environ(machine, tmp_path) | more
    ended = subprocess.run(command, cwd=ROOT, env=environ, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    (calls,) = [calls for calls in machine.calls().values() if "cuInit" in calls]
    assert calls[calls.index("cuInit") + 1] == str(compatible / "libcuda.so.1"), ended.stderr


def _is_mapped(path: Path) -> bool:
    """Return whether a process has this shared memory: another engine on this machine, for one."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path) in (process / "maps").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return not path.exists()


def _living(session: int) -> list[str]:
    """Return the command lines of a session's processes."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                lines += [line] if (line := (process / "cmdline").read_text()) else []  # one that has ended has none
        except (ProcessLookupError, FileNotFoundError):
            continue
    return lines
