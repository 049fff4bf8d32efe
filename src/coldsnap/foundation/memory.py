"""How much memory this process may still take: what the host has free, within the limits of its cgroups.

A container is ended by its own limit long before the host is full, and the host's figures do not show that limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_EVENTS = ("memory.events", "memory.oom_control")
"""Where version 2 and 1 count what the kernel has ended."""


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return bytes: the least of the host's MemAvailable and of what each cgroup above this process has left.

    Of a cgroup's usage the page cache is not counted, as the kernel takes it back. What is in /dev/shm is: the figures
    of the kernel's lists of files leave it out (cgroup-v2.rst, memory.stat: active_file).
    """
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    host = int(fields["MemAvailable"].split()[0]) * 1024
    folders = [folder for own in _cgroups(proc, cgroups) for folder in own]
    return max(0, min([host, *(left for folder in folders for left in _left(folder))]))


def kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processes beside this one the kernel has ended so far because memory ran out."""
    own = [folders[0] for folders in _cgroups(proc, cgroups) if folders]
    return max((int(_table(folder / name).get("oom_kill", 0)) for folder in own for name in _EVENTS), default=0)


def _cgroups(proc: Path, cgroups: Path) -> Iterator[list[Path]]:
    """Yield the folders of this process's memory cgroup from its own up to the root, for version 2 and for 1.

    Inside a container the path that the kernel names may not be there: then the root of the mount is the container's.
    """
    with contextlib.suppress(FileNotFoundError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in {"", "memory"}:
                root = cgroups / controllers
                relative = PurePosixPath(path.lstrip("/"))
                yield [root / part for part in (relative, *relative.parents) if (root / part).is_dir()]


def _left(folder: Path) -> Iterator[int]:
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with contextlib.suppress(OSError):
            most = (folder / limit).read_text().strip()
            if most != "max":
                stat = _table(folder / "memory.stat")
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(most) - int((folder / usage).read_text()) + cache


def _table(file: Path) -> dict[str, str]:
    """Return a file of names and values, empty if the kernel has no such file."""
    with contextlib.suppress(OSError):
        return dict(line.split() for line in file.read_text().splitlines())
    return {}
