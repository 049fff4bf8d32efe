"""A checkpoint on disk: its config and the names, shapes and types of its tensors, from safetensors headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coldsnap.errors import BakeError

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_WEIGHTS = re.compile(r"(?!consolidated|adapter_)[^/]+\.safetensors")  # consolidated*: Mistral's second copy
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_BESIDE = re.compile(
    r"(?!training_|trainer_|all_results|adapter_)[^/]+\.json|[^/]+\.(jinja|model|tiktoken)"
    r"|(merges|vocab)\.txt|(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*",
    re.IGNORECASE,
)
_FOREIGN = re.compile(r"(?!model\.safetensors)[^/]+\.index\.json|coldsnap\.json|quantize_config\.json|recipe\.yaml")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor; `dtype` is safetensors' name of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * _BYTES.get(self.dtype, 1)


def wanted(names: Iterable[str], model: str) -> list[str]:
    """Return the files of `model` to take: safetensors, config, tokenizer, licence. Pickle is refused.

    Only the top folder counts; Python code that a repository brings is never taken.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if _WEIGHTS.fullmatch(name)]
    if not weights:
        pickles = sorted(name for name in top if _PICKLE.fullmatch(name))
        if pickles:
            raise BakeError(
                f"{model}: has pickle weights only ({pickles[0]}), which run code when they are loaded; "
                f"expected *.safetensors: ask its author for them, or convert it yourself where that can do no harm"
            )
        raise BakeError(f"{model}: has no weights in its top folder; expected *.safetensors")
    if CONFIG not in top:
        raise BakeError(f"{model}: has no {CONFIG}; expected a model's checkpoint, as `save_pretrained` writes it")
    beside = [name for name in top if _BESIDE.fullmatch(name) and not _FOREIGN.fullmatch(name)]
    return sorted({*weights, *beside})


@dataclass(frozen=True)
class Checkpoint:
    """A folder's `files` (those that `wanted` names), and what is in them."""

    folder: Path
    files: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read configs and headers; `BakeError` names a file that is missing or damaged."""
        files = wanted((path.name for path in sorted(folder.iterdir()) if path.is_file()), str(folder))
        weights = [name for name in files if name.endswith(".safetensors")]
        if INDEX in files:
            shards = _object(folder / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise BakeError(f"{folder / INDEX}: expected `weight_map` to list the tensors' files")
            index = {str(name): str(file) for name, file in shards.items()}
            for file in sorted(set(index.values())):
                if file not in weights:
                    raise BakeError(f"{folder}: {file}: expected a shard that {INDEX} lists, found none")
            used = set(index.values())
        else:
            index, used = {}, {"model.safetensors"} if "model.safetensors" in weights else set(weights)
        tensors = {tensor.name: tensor for name in sorted(used) for tensor in _header(folder / name)}
        for name, file in index.items():
            if name not in tensors or tensors[name].file != file:
                raise BakeError(f"{folder}: {file}: expected the tensor {name}, which {INDEX} lists, found none")
        needed_files = tuple(name for name in files if name in used or name not in weights)
        return cls(folder, needed_files, _object(folder / CONFIG), tensors)

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    @property
    def weights(self) -> list[str]:
        """The files that hold tensors."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def quant_method(self) -> str | None:
        """How config.json says that the weights are quantised already."""
        section = next(self.values("quantization_config"), None) or next(self.values("compression_config"), None)
        if not section:
            return None
        return str(section.get("quant_method") or "unknown") if isinstance(section, dict) else "unknown"

    def values(self, *keys: str) -> Iterator[Any]:
        """Yield what the config says under any of `keys`, its nested sections (`text_config`) included."""
        for section in (self.config, *(part for part in self.config.values() if isinstance(part, dict))):
            for key in keys:
                if section.get(key) is not None:
                    yield section[key]


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BakeError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise BakeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _header(path: Path) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # checks that the tensors cover the file exactly
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                yield Tensor(name, tuple(part.get_shape()), str(part.get_dtype()), path.name)
    except (SafetensorError, OSError) as error:
        raise BakeError(f"{path}: is corrupt or cut short: {error}; fetch it again") from error
