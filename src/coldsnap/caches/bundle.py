"""A cache bundle: the compile caches of one fingerprint, in one file.

    a line of JSON: format, fingerprint, factors, files     what it is for, and what is in it
    the files' bytes, one after the other, zstd
    BLAKE3 of all that, 32 bytes

No link, device or mode can be said in it. Nothing is unpacked before the digest has been compared, nothing outside
of the caches' folders, and no file that is there is touched.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
from blake3 import blake3

from coldsnap.caches import fingerprint
from coldsnap.errors import CacheError

_PLANS = "startup_plan"
ROOTS: Mapping[str, tuple[str, ...] | None] = {
    "vllm": ("modelinfos", "torch_compile_cache", _PLANS, "flashinfer_autotune_cache", "deep_gemm"),
    "inductor": None,
    "triton": None,
    "flashinfer": None,
}
"""The caches, and the folders in them that go into a bundle; None: all of them.

Not vLLM's table of which GPUs reach each other: it is the machine's, not its kind's.
"""
MOST_BYTES = 1 << 30
"""Largest size of a bundle, compressed; what it holds may be four times as much."""
_MOST_UNPACKED = 4 * MOST_BYTES
_LEFT_OUT = frozenset({"locks", "precompiled_headers"})
"""Folders of no use without the process that made them, or without a compiler."""
_NATIVE = (".so", ".o")
"""Machine code. Inductor's is made for the processor that ran the compiler; Triton's and FlashInfer's for any."""
_OURS = ".coldsnap-"
_FORMAT = 1
_DIGEST_BYTES = 32
_LEVEL = 3
SETTLED_SECONDS = 1.0
"""A file that was changed more lately may still be written to, and waits for the next bundle."""
_LEFT_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """A file in a cache: `name` begins with the cache's."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Header:
    """What a bundle says of itself. `saves_seconds` is what the boot took in which there was none."""

    fingerprint: str
    factors: Mapping[str, str]
    files: tuple[Entry, ...]
    saves_seconds: float = 0.0
    generation: int = 1
    """How often it was made, each time with what a boot had still had to compute."""

    def line(self) -> bytes:
        """Return it as the first line of a bundle."""
        fields = {
            "coldsnap_bundle": _FORMAT,
            "fingerprint": self.fingerprint,
            "factors": dict(self.factors),
            "saves_seconds": self.saves_seconds,
            "generation": self.generation,
            "files": [[entry.name, entry.size, entry.mtime_ns] for entry in self.files],
        }
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def parse(cls, line: bytes) -> Header:
        """Read the first line. Raises `CacheError` for anything but what `line` writes and `unpack` may take."""
        try:
            fields: dict[str, Any] = orjson.loads(line)
            if fields["coldsnap_bundle"] != _FORMAT:
                raise CacheError(f"it has format {fields['coldsnap_bundle']}, this release reads {_FORMAT}")
            files = tuple(Entry(str(name), int(size), int(mtime)) for name, size, mtime in fields["files"])
            header = cls(
                str(fields["fingerprint"]),
                dict(fields["factors"]),
                files,
                float(fields["saves_seconds"]),
                int(fields["generation"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError("it does not begin as a bundle does") from error
        if wrong := next((entry for entry in files if entry.size < 0 or not _is_safe(entry.name)), None):
            raise CacheError(f"it holds {wrong.name!r:.200}, which is no file of a cache")
        if sum(entry.size for entry in files) > _MOST_UNPACKED:
            raise CacheError(f"it holds more than {_MOST_UNPACKED} bytes")
        return header


@dataclass(frozen=True)
class Unpacked:
    """What was done with a bundle: how many of its files are new here; the others were there already."""

    header: Header
    new: int


def entries(roots: Mapping[str, Path], *, any_processor: bool = False) -> list[Entry]:
    """Return the files of the caches, but for those that may still be written to.

    With `any_processor` what Inductor compiled for the processor of this machine is left out: on a GPU that is little,
    and a bundle without it fits every machine with the same GPU.
    """
    settled = time.time() - SETTLED_SECONDS
    files = []
    for root, folders in ROOTS.items():
        if root not in roots:
            continue
        for start in ("",) if folders is None else folders:
            for path, stat in _walk(roots[root] / start):
                name = f"{root}/{path.relative_to(roots[root]).as_posix()}"
                if stat.st_mtime < settled and not (any_processor and _is_native(name)):
                    files.append(Entry(name, stat.st_size, stat.st_mtime_ns))
    return sorted(files, key=lambda entry: entry.name)


def forget_plans(roots: Mapping[str, Path]) -> None:
    """Remove vLLM's startup plans, the KV-cache sizes that a boot without a bundle has measured.

    Its compiler may have held memory meanwhile, and a plan is every worker's once it is in a bundle. The next boot,
    which need not compile, measures anew.
    """
    for plan in (roots["vllm"] / _PLANS).glob("*.json") if "vllm" in roots else ():
        plan.unlink(missing_ok=True)


def pack(
    roots: Mapping[str, Path],
    header: Callable[[tuple[Entry, ...]], Header],
    *,
    most_bytes: int = MOST_BYTES,
    any_processor: bool = False,
) -> bytes:
    """Return a bundle of what is in the caches. Raises `CacheError` if it is too large or a file cannot be read."""
    zstd = _zstd()
    chosen = [entry for entry in entries(roots, any_processor=any_processor) if _is_safe(entry.name)]
    if sum(entry.size for entry in chosen) > 4 * most_bytes:
        raise CacheError(f"the caches hold more than {4 * most_bytes} bytes; a bundle takes no more")
    packed, body = [], io.BytesIO()
    with zstd.ZstdFile(body, "w", level=_LEVEL) as file:
        for entry in chosen:
            path = _path(entry.name, roots)
            try:
                content = path.read_bytes()
                now = path.stat()
            except FileNotFoundError:  # the engine tidied up
                continue
            if (len(content), now.st_mtime_ns) != (entry.size, entry.mtime_ns):  # it was being written
                continue
            file.write(content)
            packed.append(entry)
            if body.tell() > most_bytes:
                raise CacheError(f"it has more than {most_bytes} bytes")
    content = header(tuple(packed)).line() + body.getvalue()
    if len(content) + _DIGEST_BYTES > most_bytes:
        raise CacheError(f"it has more than {most_bytes} bytes")
    return content + blake3(content).digest()


def unpack(content: bytes, factors: Mapping[str, str], roots: Mapping[str, Path]) -> Unpacked:
    """Put what a bundle holds into the caches, where it is missing.

    Raises `CacheError` if the bundle is damaged or was made for other `factors`; then nothing has been unpacked.
    `OSError` if a cache's folder cannot be written to.
    """
    whole, digest = memoryview(content)[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if blake3(whole).digest() != digest:
        raise CacheError(f"its BLAKE3 digest is not that of its {len(content)} bytes")
    end = content.find(b"\n") + 1
    header = Header.parse(content[:end])
    if dict(header.factors) != dict(factors) or header.fingerprint != fingerprint.name_of(factors):
        raise CacheError(f"it was made for {fingerprint.differing(factors, header.factors)}")
    zstd = _zstd()
    staging: dict[str, Path] = {}
    try:
        with zstd.ZstdFile(io.BytesIO(whole[end:])) as file:
            for entry in header.files:
                data = file.read(entry.size)
                if len(data) != entry.size:
                    raise CacheError(f"it ends in the middle of {entry.name}")
                _write(_beside(entry.name, roots, staging), data, entry.mtime_ns)
        return Unpacked(header, sum(_merge(folder, roots[root]) for root, folder in staging.items()))
    except (zstd.ZstdError, EOFError) as error:
        raise CacheError(f"it cannot be decompressed: {error}") from error
    finally:
        for folder in staging.values():
            shutil.rmtree(folder, ignore_errors=True)


def _zstd() -> Any:
    """Return the standard library's module, or the one that stands in for it before Python 3.14."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        from backports import zstd
    return zstd


def _is_safe(name: str) -> bool:
    """Return whether `name` is a file below a cache's folder, and nothing else on any way of reading it."""
    path = PurePosixPath(name)
    root, *rest = path.parts or ("",)
    if root not in ROOTS or not rest or str(path) != name or "\0" in name:
        return False
    folders = ROOTS[root]
    return ".." not in rest and (folders is None or (rest[0] in folders and len(rest) > 1))


def _is_native(name: str) -> bool:
    """Return whether a cache's file holds code that a compiler made for this machine's processor."""
    path = PurePosixPath(name)
    return path.suffix in _NATIVE and path.parts[0] in {"vllm", "inductor"} and "triton" not in path.parts


def _path(name: str, roots: Mapping[str, Path]) -> Path:
    root, _, rest = name.partition("/")
    return roots[root] / rest


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    with contextlib.suppress(FileNotFoundError):
        for item in os.scandir(folder):
            if item.is_dir(follow_symlinks=False):
                if item.name not in _LEFT_OUT and not item.name.startswith((_OURS, "tmp.")):  # Triton's, of a process
                    yield from _walk(Path(item.path))
            elif item.is_file(follow_symlinks=False) and not item.name.endswith((".lock", ".tmp")):
                with contextlib.suppress(FileNotFoundError):
                    yield Path(item.path), item.stat(follow_symlinks=False)


def _beside(name: str, roots: Mapping[str, Path], staging: dict[str, Path]) -> Path:
    """Return where a file is unpacked to first: in a folder on the cache's own file system."""
    root, _, rest = name.partition("/")
    if root not in staging:
        roots[root].mkdir(parents=True, exist_ok=True)
        _tidy(roots[root])
        staging[root] = Path(tempfile.mkdtemp(prefix=_OURS, dir=roots[root]))
    return staging[root] / rest


def _tidy(root: Path) -> None:
    """Remove what processes that were killed have left."""
    for folder in root.glob(f"{_OURS}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, data: bytes, mtime_ns: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))  # ninja, with which FlashInfer builds, goes by it


def _merge(source: Path, target: Path) -> int:
    """Move what is missing in `target` there, each file or folder at once; return how many files that were."""
    new = 0
    for item in list(source.iterdir()):
        there = target / item.name
        if item.is_dir():
            there.mkdir(exist_ok=True)
            new += _merge(item, there)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(item, there)
                new += 1
    return new
