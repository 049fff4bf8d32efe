"""The cold start of a model as large as Qwen3-8B, bare and baked, for a machine with a GPU.

    python bench/gpu_coldstart.py [--shape 8b] [--scheme fp8] [--boots 5] [--folder FOLDER] [--out FILE]

Writes a checkpoint of random weights in the given shape (the speed of a boot does not depend on what they say), FP8 in
the format that llm-compressor's FP8_DYNAMIC has, then boots the worker on it: once `bare`, in a home without any cache
and with the KV size measured; then `baked`, in the same home, with `kv_cache_memory_bytes` in the manifest as `bare`
found it. `--shape tiny --scheme bf16` runs on a CPU, as a check of this program.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import Boot, ours  # noqa: E402

from coldsnap.snapshot import manifest as snapshot  # noqa: E402

DEMO = ROOT / "snapshots" / "demo"
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048,
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

    weight = torch.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5
    if not fp8:
        return {f"{name}.weight": weight}
    scale = weight.abs().amax(1, keepdim=True) / 448  # the largest number that E4M3 has
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def checkpoint(folder: Path, shape: dict[str, int], *, fp8: bool, layers_a_file: int = 1) -> None:
    """Write config, tokenizer and the layers' safetensors files, unless `folder` is there."""
    if folder.exists():
        return
    import torch
    from safetensors.torch import save_file

    config = json.loads((DEMO / "config.json").read_text()) | shape | {"max_position_embeddings": 32768}
    config["layer_types"] = ["full_attention"] * shape["num_hidden_layers"]
    config.pop("quantization_config")
    if fp8:
        config["quantization_config"] = FP8
    folder.mkdir(parents=True)
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
        ends["lm_head.weight"] = table.clone()
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


async def main() -> None:
    """Make the checkpoint, boot it, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--scheme", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--boots", type=int, default=5, help="baked boots")
    parser.add_argument("--kv-gib", type=float, help="KV cache of the baked boots; default: half of the GPU's memory")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept, or already is")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu_coldstart.json")
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="gpu-coldstart-"))
    folder: Path = args.folder or home / "checkpoint"
    checkpoint(folder, SHAPES[args.shape], fp8=args.scheme == "fp8")
    common: dict[str, Any] = {"max_model_len": 32768}
    if args.shape == "tiny":  # eager: a CPU's compiler would need a C++ compiler
        common = {"max_model_len": 4096, "enforce_eager": True}
    describe(folder, common, args.scheme)
    more = {"MODEL_NAME": str(folder)}
    boots: dict[str, list[Boot]] = {"bare": [await ours(home, home / "bare.log", **more)]}
    describe(folder, common | {"kv_cache_memory_bytes": kv_bytes(args.kv_gib)}, args.scheme)
    # The first of them fills the compile cache for the new arguments, if they are part of its key.
    boots["baked"] = [await ours(home, home / "baked.log", **more) for _ in range(args.boots + 1)][1:]
    for name, runs in boots.items():
        records = [run.record for run in runs if run.record]
        phases = {p: round(statistics.median(r["phases"][p] for r in records), 3) for p in records[0]["phases"]}
        ready = statistics.median(run.ready for run in runs)
        print(f"{name:6} ready {ready:6.2f} s on {records[0]['gpu']}: {phases}")
    data = {"shape": args.shape, "scheme": args.scheme} | {n: [asdict(run) for run in r] for n, r in boots.items()}
    args.out.write_text(json.dumps(data, indent=1) + "\n")


def kv_bytes(gib: float | None) -> int:
    """Return what the baked boots keep for keys and values."""
    if gib is not None:
        return int(gib * 2**30)
    import torch

    return torch.cuda.get_device_properties(0).total_memory // 2 if torch.cuda.is_available() else 256 << 20


if __name__ == "__main__":
    asyncio.run(main())
