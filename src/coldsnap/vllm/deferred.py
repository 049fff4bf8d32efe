"""What is left out of the import of vLLM because a boot does without it: which modules wait, and for whom.

The tables are policy, `imports` is the mechanism. Nothing here imports vLLM: `vllm_engine.load` does, meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coldsnap.vllm import release as vllm_release
from coldsnap.vllm import remembered
from coldsnap.vllm.imports import Deferral

_TESTED = ("0.32.0",)
"""Releases of which it is known what they need while they are imported."""

# fmt: off
_LATER = (
    "aiohttp", "boto3", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "vllm.connections",
    "vllm.entrypoints.mcp.tool_server", "vllm.entrypoints.serve", "vllm.parser", "vllm.parser.engine.adapters",
    "vllm.transformers_utils.processor",
)
"""Modules that the front end needs: imported beside the engine's start."""
_ON_DEMAND = (
    "compressed_tensors.modeling", "compressed_tensors.modeling.attention", "compressed_tensors.modeling.kvcache",
    "compressed_tensors.offload", "torch._dynamo.symbolic_convert", "transformers.activations",
    "transformers.generation.utils", "transformers.image_processing_utils", "transformers.modeling_utils",
)
# fmt: on
"""Modules that only a compiler, a compressor and transformers' own models need, and that import each other."""


def _unchanged(function: Any = None, *_: object, **__: object) -> Any:
    """What each of `torch._dynamo`'s decorators amounts to when TORCHDYNAMO_DISABLE is set."""
    return (lambda decorated: decorated) if function is None else function


_WITHOUT_COMPILER: Mapping[str, Mapping[str, Any]] = {
    "torch._dynamo": {
        "allow_in_graph": _unchanged,
        "assume_constant_result": _unchanged,
        "decorators": SimpleNamespace(mark_unbacked=lambda *_: None),  # at every request for log probabilities
        "disable": _unchanged,
        "optimize": lambda *_, **__: _unchanged,
        "trace_rules": SimpleNamespace(clear_lru_cache=lambda: None),
    },
    "torch._inductor": {},
}
_COMPILERS_PARTS = (
    "torch._dynamo.backends",
    "torch._dynamo.config",
    "torch._dynamo.symbolic_convert",
    "torch._inductor.compiler_bisector",
    "torch._inductor.config",
    "torch._inductor.custom_graph_pass",
    "torch._inductor.runtime",
)
"""Parts of torch's compiler that do without the whole of it."""


@contextlib.contextmanager
def put_off(environ: Mapping[str, str]) -> Iterator[None]:
    """Put modules off from now on; inside, also answer from memory what is searched for in the whole environment."""
    file = vllm_release.cache_folders(environ)["vllm"].with_name("coldsnap") / "imports"
    found = remembered.Remembered(file, remembered.environment_key())
    tested = vllm_release.version().partition("+")[0] in _TESTED
    Deferral(
        _LATER if tested else (), after={"transformers.utils.import_utils": lambda module: _remember(module, found)}
    ).begin()
    if tested and _compiler_is_off(environ):
        Deferral(_ON_DEMAND, _WITHOUT_COMPILER, _COMPILERS_PARTS).begin()
    search = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: found.answer("packages_distributions", search)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = search
    found.keep()


@contextlib.contextmanager
def without_lowering(environ: Mapping[str, str]) -> Iterator[None]:
    """Let imports of Inductor's lowering fail where the compiler is switched off.

    vLLM patches it as it is imported, and goes without where there is none: a tenth of the whole import.
    """
    refusal = _Refusal("torch._inductor.lowering")
    if _compiler_is_off(environ):
        sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        if refusal in sys.meta_path:
            sys.meta_path.remove(refusal)


class _Refusal(importlib.abc.MetaPathFinder):
    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        del path, target
        if name == self._module:
            raise ModuleNotFoundError(f"{name} is put off", name=name)


def _compiler_is_off(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHDYNAMO_DISABLE") == "1"


def _remember(module: Any, found: remembered.Remembered) -> None:
    """Spare transformers its look at the source of its 3,000 files, twice, for which class is where."""
    search = module.create_import_structure_from_path

    def remembering(path: Any) -> Any:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        return found.answer(str(folder), lambda: search(folder)) if folder.name == "models" else search(path)

    module.create_import_structure_from_path = remembering
