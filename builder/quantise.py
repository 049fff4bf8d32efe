"""From a checkpoint to the files of a snapshot: copied, or quantised by llm-compressor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from builder.checkpoint import INDEX, Checkpoint
from coldsnap.errors import BakeError
from coldsnap.snapshot import Quantization

_PRESETS = {"fp8-dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16"}
_PRESET_GROUP = 128
CALIBRATED = ("w8a8", "w4a16")
"""Schemes whose weights can be fitted to data; FP8 rounds well enough without."""
_CALIBRATION_TOKENS = 512


def copy(checkpoint: Checkpoint, target: Path) -> None:
    """Copy the checkpoint's files to the folder `target`."""
    target.mkdir()
    for name in checkpoint.files:
        shutil.copyfile(checkpoint.folder / name, target / name)


def quantise(
    checkpoint: Checkpoint, target: Path, scheme: str, ignore: Sequence[str], group_size: int = _PRESET_GROUP
) -> None:
    """Quantise without data: weights rounded to nearest, activations scaled at run time."""
    quiet()
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from llmcompressor.entrypoints.model_free import model_free_ptq

    preset: str | QuantizationScheme = _PRESETS[scheme]
    if scheme == "w4a16" and group_size != _PRESET_GROUP:
        preset = preset_name_to_scheme(_PRESETS[scheme], ["Linear"])
        preset.weights.group_size = group_size
    staged = target.with_name("input")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for name in checkpoint.files:  # llm-compressor takes all that it finds in a folder
        (staged / name).symlink_to((checkpoint.folder / name).resolve())
    try:
        model_free_ptq(staged, target, scheme=preset, ignore=ignore, device="cpu")
    except ValueError as error:
        raise BakeError(f"--scheme {scheme}: {checkpoint.folder}: {str(error).splitlines()[0]}") from error
    shutil.rmtree(staged)
    if len(checkpoint.weights) == 1:
        (target / INDEX).unlink(missing_ok=True)  # there is one file to index


def fit(
    checkpoint: Checkpoint, target: Path, quantization: Quantization, method: str, data: Path, samples: int
) -> None:
    """Quantise with data: GPTQ or AWQ, which choose the weights by what they do to the layers' outputs on it."""
    raise NotImplementedError


def readable(folder: Path) -> None:
    """Let everyone read the files: safetensors writes 0600, and an image runs as another user."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def quiet() -> None:
    """Keep the libraries' logs and bars off the terminal. Call it before they are imported."""
    from loguru import logger

    logger.remove()
    from transformers import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def texts(path: Path, count: int, tokenizer: object) -> list[str]:
    """Read up to `count` texts from a JSONL file: `text`, `prompt`, or `messages` in the chat template."""
    found: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BakeError(f"--calibrate: {path}:{number}: expected JSON: {error}") from error
        match entry:
            case {"messages": list(messages)}:
                found.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))  # type: ignore[attr-defined]
            case {"text": str(text)} | {"prompt": str(text)} if text:
                found.append(text)
            case _:
                raise BakeError(
                    f"--calibrate: {path}:{number}: expected an object with `text`, `prompt` or `messages`"
                )
        if len(found) == count:
            break
    if not found:
        raise BakeError(f"--calibrate: {path}: holds no texts")
    return found


def _lines(path: Path) -> Iterable[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BakeError(f"--calibrate: {path}: expected a UTF-8 file: {error}") from error
