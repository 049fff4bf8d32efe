"""Writes a tiny Llama as llama.cpp would, its matrices in Q4_K: python write_gguf.py FILE [KEY=VALUE ...]

Runs in `.venv-bake`, which has gguf. Beside FILE it leaves the first up projection, unpacked, for comparison.
The weights are random blocks with one small scale each. `KEY=VALUE` adds a field, or changes the architecture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from safetensors.numpy import save_file

TOKENIZER = Path(__file__).parents[3] / "snapshots" / "demo" / "tokenizer.json"
WIDTH, LAYERS, HEADS, KEY_HEADS = 256, 2, 4, 2
BLOCK_BYTES = 144
"""Of Q4_K: two 16-bit scales, 12 bytes of scales, 128 of weights, for 256 weights."""
NORMAL, CONTROL = 1, 3


def blocks(dice: np.random.Generator, rows: int) -> np.ndarray:
    """Return a matrix of `rows` x `WIDTH` in Q4_K."""
    data = dice.integers(0, 256, (rows, BLOCK_BYTES), dtype=np.uint8)
    data[:, :4] = np.array([2e-4, 2e-3], np.float16).view(np.uint8)
    return data


def main() -> None:
    path, *fields = sys.argv[1:]
    more = dict(field.split("=", 1) for field in fields)
    words = json.loads(TOKENIZER.read_text())
    tokens = sorted(words["model"]["vocab"], key=words["model"]["vocab"].__getitem__)
    added = [entry["content"] for entry in words["added_tokens"] if entry["id"] >= len(tokens)]
    writer = GGUFWriter(path, more.pop("architecture", "llama"))
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens + added))
    if more.pop("tokenizer", "gpt2") == "gpt2":
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens + added)
        writer.add_token_types([NORMAL] * len(tokens) + [CONTROL] * len(added))
        writer.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
        writer.add_bos_token_id(len(tokens))
        writer.add_eos_token_id((tokens + added).index("<|im_end|>"))
    for key, value in more.items():
        writer.add_uint16(key, int(value)) if value.isdigit() else writer.add_string(key, value)
    dice = np.random.default_rng(0)
    kv = WIDTH * KEY_HEADS // HEADS
    up = None
    writer.add_tensor("token_embd.weight", dice.normal(0, 0.1, (len(tokens + added), WIDTH)).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        rows = {"attn_q": WIDTH, "attn_k": kv, "attn_v": kv, "attn_output": WIDTH}
        for name, height in {**rows, "ffn_gate": WIDTH, "ffn_up": WIDTH, "ffn_down": WIDTH}.items():
            data = blocks(dice, height)
            up = data if up is None and name == "ffn_up" else up
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=GGMLQuantizationType.Q4_K)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({"up": dequantize(up, GGMLQuantizationType.Q4_K)}, Path(path).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
