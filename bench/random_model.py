"""A checkpoint of random weights in the shape of a real model: how fast it boots and runs does not depend on them.

    python bench/random_model.py FOLDER [--shape 8b] [--scheme fp8]

FP8 in the format that llm-compressor's FP8_DYNAMIC has. Only tokens that are plain words of the demo's tokenizer have a
row in the last layer, so that each token of a greedy answer has text and none ends it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.snapshot import manifest as snapshot  # noqa: E402

DEMO = ROOT / "snapshots" / "demo"
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "tie_word_embeddings": False,
    },
}  # fmt: skip
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True
            },
        }
    },
}  # fmt: skip


def linear(name: str, rows: int, columns: int, *, fp8: bool) -> dict[str, Any]:
    """Return a layer's random weight, and its scales if it is FP8."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"  # eight billion random numbers take a processor minutes
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device) / columns**0.5
    if not fp8:
        return {f"{name}.weight": weight.cpu()}
    scale = weight.abs().amax(1, keepdim=True) / 448  # the largest number that E4M3 has
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn).cpu(), f"{name}.weight_scale": scale.cpu()}


def words(size: int) -> list[int]:
    """Return the tokens below `size` that are plain words."""
    vocabulary: dict[str, int] = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    return [number for text, number in vocabulary.items() if number < size and text.isascii() and text.isalpha()]


def checkpoint(folder: Path, shape: dict[str, int], *, fp8: bool, layers_a_file: int = 1) -> None:
    """Write config, tokenizer and the layers' safetensors files."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((DEMO / "config.json").read_text()) | shape | {"max_position_embeddings": 32768}
    config["layer_types"] = ["full_attention"] * shape["num_hidden_layers"]
    config.pop("quantization_config")
    if fp8:
        config["quantization_config"] = FP8
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    torch.manual_seed(0)

    index: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    tensors: dict[str, torch.Tensor] = {}
    for number in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.{name}.weight": torch.ones(size, dtype=torch.bfloat16)
            for name, size in {
                "input_layernorm": hidden, "post_attention_layernorm": hidden,
                "self_attn.q_norm": head, "self_attn.k_norm": head,
            }.items()
        }  # fmt: skip
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden), ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden), ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors |= linear(f"{layer}.{name}", rows, columns, fp8=fp8)
        if (number + 1) % layers_a_file == 0 or number + 1 == shape["num_hidden_layers"]:
            write(f"layer-{number:02}.safetensors", tensors)
            tensors = {}
    table = torch.randn(shape["vocab_size"], hidden, dtype=torch.bfloat16) * 0.02
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    if not config["tie_word_embeddings"]:
        said = words(shape["vocab_size"])
        ends["lm_head.weight"] = torch.zeros_like(table).index_copy(0, torch.tensor(said), table[said])
    write("ends.safetensors", ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def describe(folder: Path, engine_args: dict[str, Any], scheme: str) -> None:
    """Write the manifest."""
    snapshot.write_manifest(
        folder,
        source=snapshot.Source(),
        quantization=snapshot.Quantization(scheme=scheme),
        served_model_name="random",
        engine_args=engine_args,
        versions={},
    )


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--scheme", choices=["fp8", "bf16"], default="fp8")
    args = parser.parse_args()
    checkpoint(args.folder, SHAPES[args.shape], fp8=args.scheme == "fp8")


if __name__ == "__main__":
    main()
