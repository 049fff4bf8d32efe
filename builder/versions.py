"""What a snapshot was made with."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions

from coldsnap.errors import BakeError
from coldsnap.settings import ROOT

_MAKERS = ("torch", "transformers", "llmcompressor", "compressed-tensors")


def versions() -> dict[str, str]:
    """Return what made the snapshot, and the vLLM it is meant for, which is not installed here."""
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    pinned = re.search(r"^vllm(?:-cpu)?==(\S+)", lock, re.MULTILINE)
    if not pinned:
        raise BakeError("requirements/cpu.lock names no vllm; run `make lock`")
    coldsnap = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    installed = {each.name: each.version for each in distributions()}
    made_by = {name: installed[name] for name in _MAKERS if name in installed}  # not all are needed to copy weights
    return made_by | {"vllm": pinned[1], "coldsnap": coldsnap}
