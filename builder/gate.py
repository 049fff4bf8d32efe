"""The quality gate: how far a snapshot's answers are from its original's, on a text.

Both are run with transformers, one after the other, in the precision they are stored in. What cannot be run here
(not enough memory, a format or architecture that transformers does not load on this machine) is said, not guessed.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from builder.checkpoint import Checkpoint
from builder.quantise import quiet
from coldsnap.errors import BakeError
from coldsnap.snapshot.manifest import Quality

DEFAULT_TEXT = Path(__file__).with_name("gate_text.txt")
_WINDOW = 256
_PROMPT_WORDS = 12
_NEW_TOKENS = 16
_MEMORY = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)
_MEMORY_FACTOR = 1.2
_LOST = ("missing_keys", "mismatched_keys", "error_msgs")
_SCALE = re.compile(r".*\.(weight|input)_\w+")
"""What compressed-tensors adds to a weight."""


@dataclass(frozen=True)
class Text:
    """What is measured on: at most `tokens` of `content`, and the beginnings of `prompts` of its paragraphs."""

    name: str
    content: str
    tokens: int
    prompts: int

    @classmethod
    def read(cls, path: Path | None, tokens: int, prompts: int) -> Text:
        path = path or DEFAULT_TEXT
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BakeError(f"--gate-text: {path}: expected a UTF-8 text: {error}") from error
        if not content.strip():
            raise BakeError(f"--gate-text: {path}: expected a text, found none")
        return cls(path.name, content, tokens, prompts)

    @property
    def digest(self) -> str:
        return blake3(self.content.encode()).hexdigest()

    def beginnings(self) -> list[str]:
        """Return the first words of the paragraphs."""
        paragraphs = [part.split() for part in self.content.split("\n\n") if part.strip()]
        return [" ".join(words[:_PROMPT_WORDS]) for words in paragraphs[: self.prompts]]


class Unmeasurable(Exception):
    """This model cannot be run here; the message is the reason."""


@dataclass(frozen=True)
class _Answers:
    """What a model says: logits (windows of tokens x vocabulary), the tokens, greedy continuations."""

    logits: list[Any]
    windows: list[Any]
    continuations: list[list[int]]

    @property
    def perplexity(self) -> float:
        from torch.nn.functional import cross_entropy

        loss, count = 0.0, 0
        for logits, ids in zip(self.logits, self.windows, strict=True):
            loss += cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").item()
            count += len(ids) - 1
        return math.exp(min(loss / count, 700.0)) if math.isfinite(loss) else math.nan


def measure(original: Checkpoint, snapshot: Path, text: Text) -> Quality:
    """Compare the snapshot with the original it was made from."""
    try:
        theirs = _ask(original.folder, original.size, text)
        ours = _ask(snapshot, original.size, text)
    except Unmeasurable as reason:
        return Quality(text=text.name, not_measured=str(reason))
    if len(theirs.windows) != len(ours.windows) or theirs.logits[0].shape != ours.logits[0].shape:
        raise BakeError(f"{snapshot}: its tokenizer or vocabulary is not the original's")
    perplexity = ours.perplexity
    if not math.isfinite(perplexity):
        raise BakeError(f"{original.folder}: quantised, it answers with what is no number; use another scheme")
    divergence, same, tokens = 0.0, 0, 0
    for reference, logits in zip(theirs.logits, ours.logits, strict=True):
        expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
        divergence += (expected.exp() * (expected - found)).sum().item()
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(logits)
    identical = sum(a == b for a, b in zip(theirs.continuations, ours.continuations, strict=True))
    return Quality(
        text=text.name,
        measured_with=f"transformers {version('transformers')} on cpu",
        tokens=tokens,
        perplexity=round(perplexity, 4),
        original_perplexity=round(theirs.perplexity, 4),
        mean_kl=round(max(divergence / tokens, 0.0), 6),
        top1_agreement=round(same / tokens, 4),
        greedy_prompts=len(ours.continuations),
        greedy_identical=identical,
    )


def judge(quality: Quality, max_kl: float | None, max_ppl_ratio: float | None) -> None:
    """Raise `BakeError` if the limits are exceeded, or cannot be held to because nothing was measured."""
    limits = [name for name, limit in (("--max-kl", max_kl), ("--max-ppl-ratio", max_ppl_ratio)) if limit is not None]
    if quality.not_measured is not None:
        if limits:
            raise BakeError(f"{limits[0]}: the quality could not be measured: {quality.not_measured}")
        return
    assert quality.mean_kl is not None
    assert quality.perplexity is not None
    assert quality.original_perplexity is not None
    if max_kl is not None and quality.mean_kl > max_kl:
        raise BakeError(f"--max-kl: the mean KL divergence is {quality.mean_kl:.4g} nats a token, above {max_kl:g}")
    ratio = quality.perplexity / quality.original_perplexity
    if max_ppl_ratio is not None and ratio > max_ppl_ratio:
        raise BakeError(
            f"--max-ppl-ratio: perplexity went from {quality.original_perplexity:.4g} to {quality.perplexity:.4g}, "
            f"{ratio:.4g} times, above {max_ppl_ratio:g}"
        )


def _ask(folder: Path, size: int, text: Text) -> _Answers:
    quiet()

    with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws bars of its own
        return _answers(*load(folder, size), text)


def _answers(model: Any, tokenizer: Any, text: Text) -> _Answers:
    import torch

    ids = tokenizer(text.content, return_tensors="pt")["input_ids"][0][: text.tokens]
    windows = [window for window in ids.split(_WINDOW) if len(window) > 1]
    if not windows:
        raise BakeError(f"--gate-text: {text.name}: expected at least two tokens")
    with torch.inference_mode():
        logits = [model(input_ids=window[None]).logits[0] for window in windows]
        continuations = []
        for beginning in text.beginnings():
            prompt = tokenizer(beginning, return_tensors="pt")
            output = model.generate(**prompt, do_sample=False, max_new_tokens=_NEW_TOKENS)
            continuations.append(output[0, prompt["input_ids"].shape[1] :].tolist())
    return _Answers(logits, windows, continuations)


def load(folder: Path, size: int) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if reason := too_large(size):
        raise Unmeasurable(reason)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # whatever a foreign model's class raises: it means `not measured`
        raise Unmeasurable(load_error(error)) from error
    if reason := lost(report):
        raise Unmeasurable(reason)
    return model.eval(), tokenizer


def too_large(size: int) -> str | None:
    """Say that a model of `size` bytes does not fit into this machine's memory, if so."""
    needed = int(size * _MEMORY_FACTOR)
    available = _MEMORY.search(Path("/proc/meminfo").read_text())
    if available and (free := int(available[1]) * 1024) < needed:
        return f"needs {needed:,} bytes of memory, {free:,} are free"
    return None


def load_error(error: Exception) -> str:
    """Say in one line that transformers does not load a model, and why."""
    name, text = type(error).__name__, str(error).strip()
    reason = f"{name}: {text.splitlines()[0]}" if text else name
    return f"transformers {version('transformers')} does not load it: {reason}"


def lost(report: Mapping[str, Any]) -> str | None:
    """Say which weights a loaded model goes on without, random or unscaled, going by transformers' `report`."""
    unused = [key for key in report.get("unexpected_keys", ()) if _SCALE.fullmatch(str(key))]
    for kind, keys in (*((kind, report.get(kind)) for kind in _LOST), ("unused", unused)):
        if keys:
            return (
                f"transformers {version('transformers')} cannot use all of its weights ({kind}: {min(map(str, keys))})"
            )
    return None
