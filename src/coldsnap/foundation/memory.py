"""How much memory this process may still take: what the host has free, within the limits of its cgroups.

A container is ended by its own limit long before the host is full, and the host's figures do not show that limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return bytes: the least of the host's MemAvailable and of what each cgroup above this process has left.

    Of a cgroup's usage the page cache is not counted, as the kernel takes it back (cgroup-v2.rst, memory.stat: file).
    """
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    host = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([host, *(left for folder in _folders(proc, cgroups) for left in _left(folder))]))


def _folders(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory cgroups, version 2 or 1, from its own up to the root.

    Inside a container the path that the kernel names may not be there: then the root of the mount is the container's.
    """
    with contextlib.suppress(FileNotFoundError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in {"", "memory"}:
                root = cgroups / controllers
                relative = PurePosixPath(path.lstrip("/"))
                yield from (root / part for part in (relative, *relative.parents) if (root / part).is_dir())


def _left(folder: Path) -> Iterator[int]:
    for limit, usage, cache in (
        ("memory.max", "memory.current", "file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        with contextlib.suppress(OSError):
            most = (folder / limit).read_text().strip()
            if most != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(most) - int((folder / usage).read_text()) + int(stat.get(cache, 0))
