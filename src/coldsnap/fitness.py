"""Whether this machine can run the engine, asked before it is started and without CUDA in this process.

The SDK's own checks create a CUDA context here, after which the engine could not be forked; NVML needs none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldsnap.errors import BootError, Unfit
from coldsnap.foundation import memory
from coldsnap.foundation.nvml import driver

_LEAST_DISK = 100 << 20
"""Bytes free for temporary files; a ledger that cannot be written ends no worker."""
_LEAST_MEMORY = 1 << 30
"""Bytes of host memory for Python, vLLM and its processes; on a CPU the weights come on top."""
_LEAST_SHARED = 256 << 20
"""Bytes of /dev/shm for each GPU beyond the first: vLLM's queue to its workers has ten messages of 24 MiB."""
_LEAST_FILES, _WISHED_FILES = 1024, 65_535
"""Open files: a socket for each job's posts and requests. vLLM's server asks for the larger number too."""
_GIGA = 1e9
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""The kernel's names for instructions that add 8-bit products in 32 bits."""
_COMPILERS = ("cc", "gcc", "clang")
"""What Triton and FlashInfer call, if `CC` names none."""
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")


def check(
    *,
    weights: int,
    gpu: bool,
    scratch: Path,
    gpus: int = 1,
    any_driver: bool = False,
    nvml: Any = None,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    shared: Path = Path("/dev/shm"),  # noqa: S108 -- where POSIX has it
) -> None:
    """Raise `Unfit`, which names the check and what would help, if the engine could not run here.

    `weights` is the snapshot's size in bytes, `gpu` whether this vLLM needs one and `gpus` how many, `any_driver`
    whether the image has CUDA's forward compatibility; `nvml` stands in for pynvml.
    """
    _disk(scratch)
    _memory(memory.available_memory(proc, cgroups), _LEAST_MEMORY + (0 if gpu else weights))
    _open_files()
    if gpus > 1:
        _shared_memory(shared, gpus)
    if gpu:
        _gpus(nvml or driver(), weights, None if any_driver else _runtime())


def scratch() -> Path:
    """Return the folder for temporary files, the first of Python's candidates that takes one."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise Unfit(
            "disk", f"no temporary file can be written ({error.strerror}): set TMPDIR to a folder that takes some"
        ) from error


def no_compiler(environ: Mapping[str, str]) -> str | None:
    """Return what to do where a GPU's engine finds no C compiler, None if it finds one.

    Not a reason to refuse the boot: what Triton has in its cache it does not build again.
    """
    path = environ.get("PATH")
    if environ.get("CC") or any(shutil.which(name, path=path) for name in _COMPILERS):
        return None
    return (
        f"this machine has no C compiler ({', '.join(_COMPILERS)} or CC): the engine does not start unless the caches "
        "hold all its kernels; install gcc, or use the image"
    )


def cut_off_products(scheme: str, *, gpu: bool, proc: Path = Path("/proc")) -> str | None:
    """Return what to do where a processor's 8-bit products are wrong, None where they are right.

    Without VNNI oneDNN adds two products in 16 bits, which saturate; a manifest's quality was measured without them.
    """
    if gpu or scheme != "w8a8" or _VNNI & set((proc / "cpuinfo").read_text().split()):
        return None
    return (
        f"the snapshot is {scheme} and this processor has no VNNI: sums of 8-bit products are cut off at 16 bits, and "
        "answers can be wrong; bake --scheme none or w4a16 for it, or use a newer processor"
    )


def check_kills(before: int, error: BootError) -> None:
    """Raise `Unfit` instead of `error` if since `before` the kernel has ended a process because memory ran out."""
    if memory.kills() > before:
        raise Unfit(
            "memory",
            "the kernel ended a process of the engine because the container's memory was used up: choose a worker with "
            f"more host memory, or a smaller model or KV cache (vLLM: {error.message})",
        ) from error


def _disk(scratch: Path) -> None:
    folder = next(path for path in (scratch, *scratch.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < _LEAST_DISK:
        raise Unfit(
            "disk",
            f"{folder} has {free / _GIGA:.2f} GB free, temporary files need {_LEAST_DISK / _GIGA:.2f}: "
            "give the endpoint a larger container disk, or set TMPDIR to a volume",
        )


def _memory(free: int, needed: int) -> None:
    if free < needed:
        raise Unfit(
            "memory",
            f"{free / _GIGA:.2f} GB of host memory are available to this container, the engine needs "
            f"{needed / _GIGA:.2f}: choose a larger worker, or end what else runs on this machine",
        )


def _open_files() -> None:
    """Raise the soft limit of open files as far as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WISHED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WISHED_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < _LEAST_FILES:
        raise Unfit(
            "open_files",
            f"this process may open {most} files at once, the worker needs {_LEAST_FILES}: start the container with "
            f"--ulimit nofile={_WISHED_FILES}",
        )


def _shared_memory(shared: Path, gpus: int) -> None:
    free, needed = shutil.disk_usage(shared).free if shared.is_dir() else 0, (gpus - 1) * _LEAST_SHARED
    if free < needed:
        raise Unfit(
            "shared_memory",
            f"{shared} has {free / _GIGA:.2f} GB free, an engine on {gpus} GPUs needs {needed / _GIGA:.2f}: start the "
            "container with --shm-size=8g or --ipc=host",
        )


def _gpus(nvml: Any, weights: int, runtime: tuple[int, int] | None) -> None:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise Unfit(
            "gpu", f"the NVIDIA driver does not answer ({error}): start the container with a GPU (--gpus all)"
        ) from error
    try:
        count = nvml.nvmlDeviceGetCount()
        if count == 0:
            raise Unfit("gpu", "the driver lists no GPU: start the container with one (--gpus all)")
        driver, supported = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion_v2()
        if runtime is not None and supported // 1000 < runtime[0]:
            raise Unfit(
                "cuda",
                f"driver {driver} supports CUDA {supported // 1000}.{supported % 1000 // 10}, this environment needs "
                f"{runtime[0]}.0 or newer: allow only CUDA {runtime[0]}.0 and newer in the endpoint's settings",
            )
        free = [nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free for index in range(count)]
    except nvml.NVMLError as error:
        raise Unfit("gpu", f"the NVIDIA driver fails ({error}): replace the worker") from error
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    if sum(free) < weights:
        raise Unfit(
            "gpu_memory",
            f"{sum(free) / _GIGA:.2f} GB are free on this worker's GPUs ({count}), the weights alone are "
            f"{weights / _GIGA:.2f}: choose a larger GPU, or end what else runs on it",
        )


def _runtime() -> tuple[int, int] | None:
    """Return the version of the CUDA that the environment brings, without an import of torch."""
    for name in _RUNTIMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            major, minor = importlib.metadata.version(name).split(".")[:2]
            return int(major), int(minor)
    return None
