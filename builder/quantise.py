"""From a checkpoint to the files of a snapshot: copied, or quantised by llm-compressor."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from builder.checkpoint import CONFIG, INDEX, Checkpoint
from coldsnap.desk.bake import SCHEMES
from coldsnap.errors import BakeError
from coldsnap.snapshot.manifest import Quantization

_PRESET_GROUP = 128
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

    how = SCHEMES[scheme]
    preset: str | QuantizationScheme | None = how.preset
    if how.grouped and group_size != _PRESET_GROUP:
        preset = preset_name_to_scheme(how.preset, ["Linear"])
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
    checkpoint: Checkpoint, target: Path, quantization: Quantization, *, method: str, data: Path, samples: int
) -> None:
    """Quantise with data: GPTQ or AWQ, which choose the weights by what they do to the layers' outputs on it.

    Needs a model class of transformers' and its memory, unlike `quantise`.
    """
    quiet()
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if method == "awq" and not torch.accelerator.is_available():
        raise BakeError("--calibrate-method awq: llm-compressor's AWQ needs a GPU and a torch for it; use gptq here")
    scheme = preset_name_to_scheme(SCHEMES[quantization.scheme].preset, ["Linear"])
    if quantization.group_size is not None:
        scheme.weights.group_size = quantization.group_size
    how: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": list(quantization.ignore)}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    tokens = [
        tokenizer(text, truncation=True, max_length=_CALIBRATION_TOKENS) for text in texts(data, samples, tokenizer)
    ]
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of its own
            model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
            oneshot(
                model=model,
                dataset=Dataset.from_list(
                    [{key: entry[key] for key in ("input_ids", "attention_mask")} for entry in tokens]
                ),
                recipe=[GPTQModifier(**how)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**how)],
                num_calibration_samples=len(tokens),
                max_seq_length=_CALIBRATION_TOKENS,
                shuffle_calibration_samples=False,
            )
            model.save_pretrained(target, save_compressed=True)
    except (ValueError, RuntimeError, KeyError, AttributeError, torch.linalg.LinAlgError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BakeError(
            f"--calibrate: {method} does not take {checkpoint.folder}: {reason}; leave --calibrate out"
        ) from error
    (target / "recipe.yaml").unlink(missing_ok=True)
    for name in checkpoint.files:
        if not name.startswith("model") and name != CONFIG:
            shutil.copyfile(checkpoint.folder / name, target / name)


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
    samples: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BakeError(f"--calibrate: {path}:{number}: expected JSON: {error}") from error
        match entry:
            case {"messages": list(messages)}:
                samples.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))  # type: ignore[attr-defined]
            case {"text": str(text)} | {"prompt": str(text)} if text:
                samples.append(text)
            case _:
                raise BakeError(f"--calibrate: {path}:{number}: expected an object with `text`, `prompt` or `messages`")
        if len(samples) == count:
            break
    if not samples:
        raise BakeError(f"--calibrate: {path}: holds no texts")
    return samples


def _lines(path: Path) -> Iterable[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BakeError(f"--calibrate: {path}: expected a UTF-8 file: {error}") from error
