"""Which layers a snapshot loses most by: each is put back as the original has it, and the KL divergence taken again.

    .venv-bake/bin/python builder/sensitivity.py CHECKPOINT SNAPSHOT [--text FILE] [--tokens 256] [--only 'PATTERN']

Prints the layers, those that matter most first, and what is left of the divergence when the first 1, 2, 4, ... of them
are put back: what to name with `coldsnap bake --keep`. vLLM runs q, k and v as one layer, gate and up too, so these go
together.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:1] = [str(ROOT), str(ROOT / "src")]

from builder.checkpoint import Checkpoint  # noqa: E402 (the path is set above)
from builder.gate import Text, load  # noqa: E402
from builder.quantise import quiet  # noqa: E402
from builder.schemes import quantised  # noqa: E402

_FUSED = ((re.compile(r"\.[qkv]_proj$"), ".[qkv]_proj"), (re.compile(r"\.(gate|up)_proj$"), ".[gu]*_proj"))


def groups(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return the modules by the pattern that names those which vLLM runs as one layer."""
    found: dict[str, list[str]] = {}
    for module in modules:
        pattern = module
        for name, together in _FUSED:
            pattern = name.sub(together, pattern)
        found.setdefault(pattern, []).append(module)
    return found


class Pair:
    """An original and its snapshot, in memory."""

    def __init__(self, checkpoint: Checkpoint, snapshot: Path, text: Text) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws bars of its own
            self._original, tokenizer = load(checkpoint.folder, checkpoint.size)
            self._model, _ = load(snapshot, checkpoint.size)
        self._ids = tokenizer(text.content, return_tensors="pt")["input_ids"][:, : text.tokens]
        self._expected = self._logits(self._original)
        self._quantised: dict[str, Any] = {}

    def _logits(self, model: Any) -> Any:
        import torch

        with torch.inference_mode():
            return model(input_ids=self._ids).logits[0].float().log_softmax(-1)

    def divergence(self) -> float:
        """Return the mean KL divergence a token."""
        answers = self._logits(self._model)
        return float((self._expected.exp() * (self._expected - answers)).sum(-1).mean())

    def put_back(self, modules: Iterable[str]) -> None:
        """Let the original's `modules` take the place of the snapshot's."""
        for name in modules:
            self._quantised.setdefault(name, self._model.get_submodule(name))
            self._model.set_submodule(name, self._original.get_submodule(name))

    def undo(self) -> None:
        """Let the snapshot be what it was."""
        for name, module in self._quantised.items():
            self._model.set_submodule(name, module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="layers to try, as a shell would match them")
    args = parser.parse_args()
    quiet()
    checkpoint = Checkpoint.read(args.checkpoint)
    pair = Pair(checkpoint, args.snapshot, Text.read(args.text, args.tokens, 0))
    before = pair.divergence()
    print(f"{before:.5f} as it is", flush=True)
    left: dict[str, float] = {}
    layers = groups(module for module, _ in quantised(checkpoint) if fnmatch(module, args.only))
    for pattern, modules in layers.items():
        pair.put_back(modules)
        left[pattern] = pair.divergence()
        pair.undo()
    order = sorted(left, key=left.__getitem__)
    for pattern in order[:20]:
        print(f"{left[pattern]:.5f} without {pattern}", flush=True)
    count = 1
    while count <= len(order):
        pair.put_back(module for pattern in order[:count] for module in layers[pattern])
        print(f"{pair.divergence():.5f} without the first {count}", flush=True)
        count *= 2


if __name__ == "__main__":
    main()
