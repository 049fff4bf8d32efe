"""Which layers a scheme leaves alone: found by names and shapes, whatever the family."""

from __future__ import annotations

from pathlib import Path

import pytest
from builder import schemes
from builder.checkpoint import Checkpoint

from coldsnap.errors import BakeError
from tests.loopback.desk.baking import checkpoint

LAYER = "model.layers.0"
PLAIN = {
    f"{LAYER}.self_attn.q_proj.weight": (128, 128),
    f"{LAYER}.mlp.gate_proj.weight": (256, 128),
    f"{LAYER}.input_layernorm.weight": (128,),
}


def read(tmp_path: Path, tensors: dict[str, tuple[int, ...]], **config: object) -> Checkpoint:
    return Checkpoint.read(checkpoint(tmp_path / "model", tensors, **config))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens", (48, 128)),
        ("transformer.wte", (48, 128)),
        ("gpt_neox.embed_in", (48, 128)),
        ("model.word_embeddings", (48, 128)),
        ("model.tok", (48, 128)),  # by its rows: the vocabulary
        ("output", (48, 128)),
        (f"{LAYER}.mlp.gate", (4, 128)),
        (f"{LAYER}.mlp.shared_expert_gate", (1, 128)),
        (f"{LAYER}.block_sparse_moe.gate", (8, 128)),
        (f"{LAYER}.ffn.router.layer", (8, 128)),
        ("vision_tower.encoder.layers.0.mlp.fc1", (128, 128)),
        ("model.visual.blocks.0.attn.qkv", (128, 128)),
        ("audio_tower.layers.0.fc1", (128, 128)),
        ("multi_modal_projector.linear_1", (128, 128)),
    ],
)
def test_embeddings_heads_routers_and_other_towers_are_left_alone(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    found = read(tmp_path, PLAIN | {f"{name}.weight": shape}, vocab_size=48)
    assert schemes.left_alone(found) == tuple(sorted({"lm_head", name}))
    assert {module for module, _ in schemes.quantised(found)} == {
        f"{LAYER}.self_attn.q_proj",
        f"{LAYER}.mlp.gate_proj",
    }


def test_the_vocabulary_of_a_nested_text_config_counts(tmp_path: Path) -> None:
    tensors = PLAIN | {"language_model.odd_name.weight": (320, 128)}
    found = read(tmp_path, tensors, vocab_size=None, text_config={"vocab_size": 320})
    assert "language_model.odd_name" in schemes.left_alone(found)


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.experts.3.gate_proj", "mixer.in_proj"])
def test_linear_layers_are_quantised(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, PLAIN | {f"{LAYER}.{name}.weight": (128, 128)})
    assert f"{LAYER}.{name}" in {module for module, _ in schemes.quantised(found)}


def test_fused_experts_are_quantised(tmp_path: Path) -> None:
    found = read(tmp_path, PLAIN | {f"{LAYER}.mlp.experts.gate_up_proj": (4, 256, 128)})
    assert f"{LAYER}.mlp.experts.gate_up_proj" in {module for module, _ in schemes.quantised(found)}


def test_the_estimate_counts_bits_and_scales(tmp_path: Path) -> None:
    found = read(tmp_path, PLAIN)
    weights = 128 * 128 + 256 * 128
    rows = 128 + 256
    assert schemes.estimate("none", found, 128) == found.size
    assert found.size - schemes.estimate("w8a8", found, 128) == weights - rows * 4
    assert found.size - schemes.estimate("w4a16", found, 64) == weights * 3 // 2 - weights // 64 * 4


def test_a_checkpoint_without_linear_layers_is_refused(tmp_path: Path) -> None:
    found = read(tmp_path, {"model.embed_tokens.weight": (48, 128)})
    with pytest.raises(BakeError, match="has no linear layers"):
        schemes.check("w8a8", found, 128)


def test_without_a_scheme_the_source_decides(tmp_path: Path) -> None:
    assert schemes.choose(None, read(tmp_path, PLAIN)) == "fp8-dynamic"
    assert schemes.choose(None, read(tmp_path, PLAIN, quantization_config={"quant_method": "gptq"})) == "as-is"
