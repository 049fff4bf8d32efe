"""Which weights a scheme quantises, which it leaves alone, and what that comes to in bytes.

Goes by the tensors' names and shapes and by sizes in the config, never by a model's name: a family that nobody
has seen here is treated like the rest.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

from builder.checkpoint import Checkpoint, Tensor
from coldsnap.desk.bake import AS_IS, GROUP_SIZES, SCHEMES
from coldsnap.errors import BakeError

_SCALE_BYTES = 4

_HEAD = "lm_head"
_EMBEDDING = re.compile(r"(.*_)?(embed|embd|embedding)s?(_.*)?|lm_head|wte|wpe|output")
_ROUTER = re.compile(r"(.*_)?(gate|router)|wg")
_OTHER_TOWER = re.compile(r"(.*_)?(vision|visual|vit|image|audio|speech|video|projector|multi_?modal)(_.*)?|mm_.*")
_FLOATS = {"F32", "F16", "BF16"}


def choose(scheme: str | None, checkpoint: Checkpoint) -> str:
    """Return the scheme to use, the default one if none was asked for; refuse one that the source rules out."""
    method = checkpoint.quant_method
    if scheme is None:
        return AS_IS if method else next(iter(SCHEMES))
    if method and scheme != AS_IS:
        raise BakeError(
            f"--scheme {scheme}: {checkpoint.folder} is quantised already ({method}); use --scheme {AS_IS}, "
            f"or bake the model that it was made from"
        )
    if scheme == AS_IS and not method:
        raise BakeError(
            f"--scheme {AS_IS}: {checkpoint.folder}/config.json has no quantization_config; use --scheme none"
        )
    return scheme


def left_alone(checkpoint: Checkpoint, keep: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the modules whose matrix stays: embeddings, head, routers, other towers, and what `keep` names."""
    alone = {_HEAD} | {module for module, _ in _matrices(checkpoint) if _sensitive(module, checkpoint)}
    layers = [module for module, _ in quantised(checkpoint)]
    for pattern in keep:
        if not (kept := fnmatch.filter(layers, pattern)):
            raise BakeError(f"--keep: {pattern!r} matches none of the layers to quantise, such as {layers[0]}")
        alone.update(kept)
    if keep and alone.issuperset(layers):
        raise BakeError("--keep: leaves no layer to quantise; use --scheme none")
    return tuple(sorted(alone))


def quantised(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the modules whose weight is quantised, with that weight."""
    return ((module, tensor) for module, tensor in _matrices(checkpoint) if not _sensitive(module, checkpoint))


def check(scheme: str, checkpoint: Checkpoint, group_size: int) -> None:
    """Raise `BakeError`, naming a layer, unless the checkpoint's shapes suit the scheme."""
    how = SCHEMES[scheme]
    if how.preset is None:
        return
    layers = list(quantised(checkpoint))
    if not layers:
        raise BakeError(f"--scheme {scheme}: {checkpoint.folder} has no linear layers that could be quantised")
    for module, tensor in layers:
        if tensor.dtype not in _FLOATS:
            raise BakeError(f"--scheme {scheme}: {module}.weight: expected a 16 or 32-bit float, found {tensor.dtype}")
        rows, columns = tensor.shape[-2:]
        if how.grouped and columns % group_size:
            good = [size for size in GROUP_SIZES if all(layer.shape[-1] % size == 0 for _, layer in layers)]
            way = f"use --group-size {good[0]}" if good else "no group size divides every layer: use another scheme"
            raise BakeError(
                f"--scheme {scheme}: {module}.weight has {columns} columns, no multiple of the group size "
                f"{group_size}; {way}"
            )
        if rows % how.multiple or columns % how.multiple:
            raise BakeError(
                f"--scheme {scheme}: {module}.weight is {rows} x {columns}; expected multiples of {how.multiple}, "
                f"which {how.bits}-bit kernels need: use another scheme"
            )


def estimate(scheme: str, checkpoint: Checkpoint, group_size: int) -> int:
    """Return about how many bytes the snapshot will take."""
    saved, how = 0, SCHEMES[scheme]
    if how.preset is not None:
        for _, tensor in quantised(checkpoint):
            scales = tensor.elements // (group_size if how.grouped else tensor.shape[-1])
            saved += tensor.size - tensor.elements * how.bits // 8 - scales * _SCALE_BYTES
    return checkpoint.size - saved


def _matrices(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint.tensors.items():
        module, _, parameter = name.rpartition(".")
        fused_experts = len(tensor.shape) == 3 and re.fullmatch(r"gate_up_proj|down_proj", parameter)
        if fused_experts:  # llm-compressor splits these
            yield name, tensor
        elif parameter == "weight" and len(tensor.shape) == 2 and not module.endswith("norm"):
            yield module, tensor


def _sensitive(module: str, checkpoint: Checkpoint) -> bool:
    """Tell whether a module maps to or from tokens, routes to experts, or does not belong to the text model."""
    *path, last = module.split(".")
    tensor = checkpoint.tensors.get(f"{module}.weight") or checkpoint.tensors[module]
    return (
        _EMBEDDING.fullmatch(last) is not None
        or tensor.shape[0] in set(checkpoint.values("vocab_size"))
        or _ROUTER.fullmatch(last) is not None
        or "router" in path
        or any(_OTHER_TOWER.fullmatch(part) for part in (*path, last))
    )
