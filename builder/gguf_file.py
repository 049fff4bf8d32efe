"""A GGUF file as the model to bake: its weights, in whatever format of llama.cpp's, become 16-bit safetensors.

A snapshot is compared with these weights. What the file's own quantisation lost is lost before and not in that figure.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from builder.checkpoint import Checkpoint
from builder.gate import load_error, lost, too_large
from builder.quantise import quiet
from builder.source import room
from builder.stages import Stages
from coldsnap.errors import BakeError
from coldsnap.snapshot.manifest import Source

_MAGIC = b"GGUF"
_BYTES_A_PARAMETER = 2
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
"""transformers' names of special tokens, and GGUF's."""


@dataclass
class GgufFile:
    """A model in one GGUF file. It is pinned by the file's BLAKE3 digest."""

    path: Path
    out: Path
    license: str | None = None
    _size: int = field(default=0, init=False)

    def pin(self, stages: Stages) -> Source:
        header = _header(self.path)
        self.license = _value(header, "general.license")
        self._size = _BYTES_A_PARAMETER * sum(int(tensor.n_elements) for tensor in header.tensors)
        if "unpack" not in stages.seconds:
            room(self.out, 2 * self._size)  # unpacked and, at most as large, baked
            if reason := too_large(self._size):
                raise BakeError(f"{self.path}: unpacked, it {reason}; bake it on a larger machine")
        digest = blake3(max_threads=blake3.AUTO)
        digest.update_mmap(self.path)
        # It may have changed since an earlier bake.
        report = stages.run("resolve", lambda: {"digest": digest.hexdigest()}, again=True)
        return Source(repo="local", revision=report["digest"])

    def checkpoint(self, stages: Stages) -> Checkpoint:
        folder = stages.work / "source"
        stages.forget(since="unpack", unless={"digest": stages.report("resolve")["digest"]})
        stages.run("unpack", lambda: unpack(self.path, folder) or {}, total=self._size)
        return Checkpoint.read(folder)


def unpack(path: Path, folder: Path) -> None:
    """Write the file's model to `folder`: bfloat16 safetensors, config and tokenizer, as `save_pretrained` does."""
    header = _header(path)
    quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_suffix(".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):  # bars of its own
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model, report = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        except Exception as error:  # whatever a reader of foreign files raises
            raise BakeError(f"{path}: {load_error(error)}; expected a model's GGUF that transformers reads") from error
        if missing := lost(report):
            raise BakeError(f"{path}: {missing}; expected the whole model in one file")
        for name, key in _SPECIAL.items():  # transformers 5.17 takes SmolLM2's <|im_start|> for the end of a text
            if (number := _value(header, f"tokenizer.ggml.{key}_token_id")) is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(number)))
        tokenizer.clean_up_tokenization_spaces = False  # it would take spaces before punctuation out of every answer
        model.hf_quantizer = None  # it is an ordinary model now, which `save_pretrained` must be told
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(folder)


def _header(path: Path) -> Any:
    """Return gguf's reader of the file; raise `BakeError` for what is no whole model."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise BakeError(f"{path}: expected a GGUF file, which begins with {_MAGIC!r}, found {magic!r}")
        header = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BakeError(f"{path}: is corrupt or cut short: {reason}; fetch it again") from error
    except OSError as error:
        raise BakeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if (parts := int(_value(header, "split.count") or 1)) > 1:
        raise BakeError(
            f"{path}: is one of {parts} parts of a model; expected it whole: join them with `llama-gguf-split --merge`"
        )
    if _value(header, "tokenizer.ggml.model") is None:
        kind = _value(header, "general.type") or _value(header, "general.architecture")
        raise BakeError(
            f"{path}: has no tokenizer ({kind}); expected a language model, not a part or an adapter of one"
        )
    return header


def _value(header: Any, key: str) -> Any:
    entry = header.get_field(key)
    return None if entry is None else entry.contents()
