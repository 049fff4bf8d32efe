"""How much memory is left: the host's figure, and the limits of the cgroups above a process, of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldsnap.foundation.memory import available_memory, kills

GIB = 1 << 30
MEMINFO = f"MemTotal: 99999999 kB\nMemAvailable: {16 * GIB // 1024} kB\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    return tmp_path / "proc"


def cgroup(folder: Path, limit: str, usage: int, cache: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    prefix = "" if version == 2 else "total_"
    lists = f"{prefix}active_file {cache // 2}\n{prefix}inactive_file {cache - cache // 2}\n"
    (folder / "memory.stat").write_text(f"anon 1\nfile {usage}\ntotal_cache {usage}\n{lists}")


def test_without_cgroups_it_is_the_hosts(proc: Path, tmp_path: Path) -> None:
    assert available_memory(proc, tmp_path) == 16 * GIB


def test_a_containers_limit_counts_and_its_page_cache_does_not(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    cgroup(tmp_path / "cg", str(8 * GIB), 5 * GIB, 3 * GIB)
    assert available_memory(proc, tmp_path / "cg") == 6 * GIB


def test_the_tightest_of_the_groups_above_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/pods/one/worker\n")
    cgroup(tmp_path / "cg" / "pods" / "one" / "worker", "max", GIB, 0)
    cgroup(tmp_path / "cg" / "pods" / "one", str(4 * GIB), 3 * GIB, GIB)
    cgroup(tmp_path / "cg" / "pods", str(64 * GIB), 3 * GIB, 0)
    assert available_memory(proc, tmp_path / "cg") == 2 * GIB


def test_version_1_inside_a_container_whose_path_is_not_mounted(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    cgroup(tmp_path / "cg" / "memory", str(2 * GIB), GIB, 0, version=1)
    assert available_memory(proc, tmp_path / "cg") == GIB


def test_more_used_than_allowed_is_none_left(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    cgroup(tmp_path / "cg", str(GIB), 2 * GIB, 0)
    assert available_memory(proc, tmp_path / "cg") == 0


def test_what_lies_in_shared_memory_is_used_and_not_cache(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    cgroup(tmp_path / "cg", str(8 * GIB), 5 * GIB, 0)  # `file` and `total_cache` count it
    assert available_memory(proc, tmp_path / "cg") == 3 * GIB


@pytest.mark.parametrize(
    ("line", "folder", "file"),
    [("0::/a", "a", "memory.events"), ("4:memory:/a", "memory/a", "memory.oom_control")],
)
def test_the_kernels_kills_are_those_of_this_processs_own_group(
    proc: Path, tmp_path: Path, line: str, folder: str, file: str
) -> None:
    assert kills(proc, tmp_path / "cg") == 0
    (proc / "self" / "cgroup").write_text(f"{line}\n")
    own = tmp_path / "cg" / folder
    own.mkdir(parents=True)
    assert kills(proc, tmp_path / "cg") == 0
    (own / file).write_text("oom 3\noom_kill 2\n")
    (own.parent / file).write_text("oom 3\noom_kill 7\n")
    assert kills(proc, tmp_path / "cg") == 2
