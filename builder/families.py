"""Bake and serve tiny random-weight checkpoints of several families in every scheme; write docs/families.md.

A pair passes if the worker, `handler.py` on vLLM's CPU build, gives the prompt's tokens the log probabilities
that transformers gives them with the same snapshot: layers mixed up, left out or wrongly scaled do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[0:1] = [str(ROOT), str(ROOT / "src")]

from builder.bake import bake  # noqa: E402 (the path is set above)
from builder.gate import Unmeasurable, load  # noqa: E402
from builder.quantise import quiet  # noqa: E402
from builder.versions import versions  # noqa: E402
from coldsnap.desk.bake import AS_IS, SCHEMES, configure  # noqa: E402
from coldsnap.errors import BakeError  # noqa: E402

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COMMON = {
    "vocab_size": 1280,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,  # so that a token's successors differ clearly
    "bos_token_id": None,
    "eos_token_id": 1273,
    "pad_token_id": 1271,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("qwen3", {"head_dim": 64}),
    "Qwen3-MoE": ("qwen3_moe", {"head_dim": 64, **EXPERTS}),
    "Qwen2.5": ("qwen2", {}),
    "Llama 3": ("llama", {"rope_theta": 500000.0}),
    "Mistral": ("mistral", {}),
    "Gemma 3": ("gemma3_text", {"head_dim": 64}),
    "Phi": ("phi3", {}),
}
"""transformers' `model_type`, and what differs from `COMMON`."""
PROMPT = "A snapshot is a folder with quantised safetensors, the config, the tokenizer and a manifest."
TOLERANCE = 0.15
"""Nats a token, mean: bfloat16 in another order of sums stays well below, a wrong layer is above 1."""
_ERROR = re.compile(r"\b(\w+Error|\w+Exception): .+?(?=\. [A-Z]| \(|$)")
"""An error's first sentence, without what is in brackets."""
ENGINE_ARGS = ("max_model_len=512", "enforce_eager=true", "dtype=bfloat16")


@dataclass(frozen=True)
class Outcome:
    """`mark` stands in the table, `note` below it."""

    mark: str
    note: str | None = None


def write_checkpoint(family: str, folder: Path) -> None:
    """Write a random-weight checkpoint, the same one each time, with the demo's tokenizer."""
    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, more = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | more))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(ROOT / "snapshots" / "demo" / name, folder / name)


def try_out(scheme: str, checkpoint: Path, out: Path) -> Outcome:
    """Bake, serve, compare."""
    parser = argparse.ArgumentParser()
    configure(parser)
    arguments = [str(checkpoint), "--scheme", scheme, "--out", str(out), "--served-name", "tiny"]
    arguments += [word for argument in ENGINE_ARGS for word in ("--engine-arg", argument)]
    try:
        bake(parser.parse_args(arguments))
    except BakeError as error:
        return Outcome("not baked", error.message)
    try:
        served = serve(out)
    except RuntimeError as error:
        return Outcome("not served", str(error))
    try:
        expected = log_probabilities(out, checkpoint)
    except Unmeasurable as reason:
        return Outcome("served", f"not compared: {reason}")
    difference = sum(abs(a - b) for a, b in zip(served, expected, strict=True)) / len(expected)
    if difference > TOLERANCE:
        return Outcome("**wrong**", f"log probabilities differ by {difference:.3f} nats a token")
    return Outcome(f"✓ {difference:.3f}")


def serve(snapshot: Path) -> list[float]:
    """Run one job in the worker; return the log probabilities of the prompt's tokens but the first."""
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 0}
    job = {"input": {"openai_route": "/v1/completions", "openai_input": request}}
    environ = os.environ | {"SNAPSHOT_DIR": str(snapshot), "COLDSNAP_LEDGER_DIR": str(snapshot.parent / "ledger")}
    environ |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [ROOT / ".venv" / "bin" / "python", ROOT / "handler.py", "--test_input", json.dumps(job)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    result = re.search(r"^── result ─+\n(\{.*?^\})", ended.stdout, re.MULTILINE | re.DOTALL)
    if ended.returncode or not result:
        raise RuntimeError(_reason(ended.stdout + ended.stderr))
    answer = json.loads(result[1])
    logprobs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1 : answer["usage"]["prompt_tokens"]]
    return logprobs


def log_probabilities(snapshot: Path, checkpoint: Path) -> list[float]:
    """Return what transformers gives with the snapshot's weights."""
    import torch

    model, tokenizer = load(snapshot, sum(path.stat().st_size for path in checkpoint.iterdir()))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1].float()
    log_probabilities: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return log_probabilities


def _reason(output: str) -> str:
    """Return the line of a failed boot that says why: the engine's own error, else ours, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    theirs = [found[0] for line in lines if (found := _ERROR.search(line)) and "Engine core init" not in line]
    ours = [line for line in lines if line.startswith("coldsnap: ")]
    return (theirs or ours or lines or ["no output"])[-1]


def table(outcomes: dict[str, dict[str, Outcome]], schemes: Iterable[str]) -> str:
    """Return the page."""
    tools = versions()
    notes: list[str] = []
    rows = [f"| family | {' | '.join(schemes)} |", f"|---|{'---|' * len(list(schemes))}"]
    for family, row in outcomes.items():
        cells = []
        for outcome in row.values():
            mark = outcome.mark
            if outcome.note:
                if outcome.note not in notes:
                    notes.append(outcome.note)
                mark += f" ({notes.index(outcome.note) + 1})"
            cells.append(mark)
        rows.append(f"| {family} (`{FAMILIES[family][0]}`) | {' | '.join(cells)} |")
    listed = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join(
        [
            "# Families",
            "",
            "Written by `make families`: tiny random-weight checkpoints, baked by `coldsnap bake` and served by",
            f"`handler.py` on vLLM {tools['vllm']}'s CPU build, beside transformers {tools['transformers']}.",
            "",
            *rows,
            "",
            "A tick means that vLLM and transformers give a prompt's tokens the same log probabilities with the same",
            f"snapshot; the number is their mean difference in nats a token, at most {TOLERANCE}. Nothing here says",
            "how well a family answers once it is quantised: the weights are random.",
            "",
            *listed,
            "",
        ]
    )


def main() -> None:
    """Write the checkpoints that are asked for, or try everything out and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, metavar="DIR", help="only write the families' checkpoints below DIR")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(FAMILIES)}")
    options = parser.parse_args()
    chosen = options.families or list(FAMILIES)
    if options.write:
        for family in chosen:
            write_checkpoint(family, options.write / FAMILIES[family][0])
        return
    schemes = [scheme for scheme in SCHEMES if scheme != AS_IS]
    outcomes: dict[str, dict[str, Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="coldsnap-families-") as work:
        for family in chosen:
            model_type, _ = FAMILIES[family]
            checkpoint = Path(work, model_type)
            write_checkpoint(family, checkpoint)
            outcomes[family] = {}
            for scheme in schemes:
                outcome = try_out(scheme, checkpoint, Path(work, f"{model_type}-{scheme}"))
                outcomes[family][scheme] = outcome
                print(f"{family:<10} {scheme:<12} {outcome.mark}  {outcome.note or ''}", flush=True)
    if chosen == list(FAMILIES):
        (ROOT / "docs" / "families.md").write_text(table(outcomes, schemes), encoding="utf-8")


if __name__ == "__main__":
    main()
