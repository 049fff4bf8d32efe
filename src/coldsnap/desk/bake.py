"""The `bake` command: its arguments. The work is done by `builder/bake.py`, in an environment of its own.

llm-compressor's pins conflict with vLLM's, so `run` sets `.venv-bake` up and goes on in it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldsnap.errors import BakeError
from coldsnap.foundation.s3 import Place
from coldsnap.settings import ROOT


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is done to a model's weights."""

    preset: str | None = None
    """llm-compressor's name for it, None where the weights stay as they are."""
    bits: int = 16
    """Bits of a quantised weight."""
    grouped: bool = False
    """Whether a scale is shared by a group of columns, `--group-size`, and not by a whole channel."""
    fitted: bool = False
    """Whether weights can be fitted to data; FP8 rounds well enough without."""
    multiple: int = 1
    """What both sides of a weight must be a multiple of, for the GPUs' matrix kernels."""


AS_IS = "as-is"
SCHEMES: Mapping[str, Scheme] = {
    # FP8 or int8 weights, and activations quantised to the same as they come.
    "fp8-dynamic": Scheme("FP8_DYNAMIC", bits=8, multiple=16),
    "w8a8": Scheme("W8A8", bits=8, fitted=True, multiple=16),
    # 4-bit integer weights; activations stay 16 bit.
    "w4a16": Scheme("W4A16", bits=4, grouped=True, fitted=True),
    "none": Scheme(),
    # Quantised already by the source: AWQ, GPTQ, compressed-tensors, FP8, bitsandbytes, MXFP4, ...
    AS_IS: Scheme(),
}
METHODS = ("gptq", "awq")
GROUP_SIZES = (128, 64, 32)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a checkpoint, a GGUF file, or a model's id on the hub")
    add("--revision", help="branch, tag or commit on the hub (default: main); it is pinned to the commit")
    add("--scheme", type=_scheme, metavar="|".join(SCHEMES), help="default: fp8-dynamic, or as-is if quantised already")
    add("--out", type=Path, help="the snapshot's folder (default: snapshots/NAME-SCHEME in the clone)")
    add("--group-size", type=int, choices=GROUP_SIZES, default=128, help="w4a16: columns that share a scale")
    add("--keep", action="append", default=[], metavar="PATTERN", help="layers to leave in 16 bit, as a shell would "
        "match their names: '*.down_proj'; may be repeated")  # fmt: skip
    add("--calibrate", type=Path, metavar="JSONL", help="fit the weights to these texts: one object a line, with "
        "`text`, `prompt` or `messages`")  # fmt: skip
    add("--calibrate-method", choices=METHODS, default="gptq", help="how to fit them (default: gptq)")
    add("--calibrate-samples", type=_count, default=256, metavar="N", help="lines used at most (default: 256)")
    add("--max-kl", type=_limit, metavar="NATS", help="fail if the mean KL divergence a token is above this")
    add("--max-ppl-ratio", type=_limit, metavar="X", help="fail if perplexity grows by more than this factor")
    add("--gate-text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: builder/gate_text.txt)")
    add("--gate-tokens", type=_count, default=1024, metavar="N", help="tokens of it used at most (default: 1024)")
    add("--gate-prompts", type=_count, default=8, metavar="N", help="paragraphs continued greedily (default: 8)")
    add("--served-name", help="name that requests use (default: the hub id or the folder's name)")
    add("--engine-arg", type=_engine_arg, action="append", default=[], metavar="NAME=VALUE", dest="engine_args",
        help="bake in an argument of vLLM, e.g. max_model_len=8192; may be repeated")  # fmt: skip
    add("--push", type=_place, metavar="S3_URI", help="send the snapshot to s3://bucket/prefix afterwards")


def run(options: argparse.Namespace) -> int:  # noqa: ARG001 (parsed again in the other environment)
    """Make `.venv-bake` and go on in it; does not return."""
    setup = subprocess.run([ROOT / "scripts" / "setup.sh", "bake"], check=False)  # noqa: S603
    if setup.returncode:
        raise BakeError("the environment .venv-bake could not be made; the message above says why")
    python = str(ROOT / ".venv-bake" / "bin" / "python")
    sys.stdout.flush()
    os.execv(python, [python, str(ROOT / "builder" / "bake.py"), *sys.argv[2:]])  # noqa: S606


def _scheme(name: str) -> str:
    if name in SCHEMES:
        return name
    near = difflib.get_close_matches(name.lower().replace("_", "-"), SCHEMES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(SCHEMES)}"
    raise BakeError(f"--scheme: unknown scheme {name!r}; {hint}")


def _place(uri: str) -> Place:
    return Place.parse(uri, "--push")


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text!r}")
    return value


def _engine_arg(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise BakeError(f"--engine-arg: expected NAME=VALUE with a vLLM argument's Python name, found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
