"""`coldsnap bake` on GGUF files: what becomes of one, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from coldsnap.snapshot.manifest import load_manifest
from tests.loopback.desk.baking import PYTHON, bake, run

WRITER = Path(__file__).with_name("write_gguf.py")
UP = "model.layers.0.mlp.up_proj.weight"


async def written(path: Path, *fields: str) -> Path:
    ended = await run(PYTHON, WRITER, path, *fields, home=path.parent)
    assert ended.code == 0, ended
    return path


async def test_a_gguf_becomes_a_snapshot_with_its_weights_and_words(tmp_path: Path) -> None:
    model = await written(tmp_path / "Tiny-Q4_K_M.gguf", "general.license=apache-2.0")
    ended = await bake(model, "--scheme", "none", "--out", tmp_path / "out", home=tmp_path)
    assert ended.code == 0, ended
    manifest = load_manifest(tmp_path / "out")
    assert manifest.served_model_name == "Tiny-Q4_K_M"
    assert manifest.bake is not None
    assert manifest.bake.license == "apache-2.0"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest.files.keys()
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert not tokenizer["clean_up_tokenization_spaces"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 (it is no dict): tied, as the file has it
        bfloat16 = weights.get_slice(UP)
        assert bfloat16.get_dtype() == "BF16"
    packed = load_file(model.with_suffix(".safetensors"))["up"]
    assert np.abs(upper_half(tmp_path / "out" / "model.safetensors", UP) - packed).max() <= np.abs(packed).max() / 256


def upper_half(path: Path, name: str) -> np.ndarray:
    """Return a bfloat16 tensor as float32, which numpy lacks the former of."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    halves = np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16
    return halves.view(np.float32).reshape(entry["shape"])


async def test_it_is_unpacked_once_and_quantised(tmp_path: Path) -> None:
    model = await written(tmp_path / "tiny.gguf")
    arguments = (model, "--scheme", "w8a8", "--out", tmp_path / "out")
    killed = await bake(*arguments, home=tmp_path, kill_at=lambda text: "quantise" in text)
    assert killed.code == -9, killed
    ended = await bake(*arguments, home=tmp_path)
    assert ended.code == 0, ended
    assert "unpack     done before" in ended.stderr
    manifest = load_manifest(tmp_path / "out")
    assert manifest.bake is not None
    assert manifest.bake.quality.mean_kl is not None
    assert manifest.bake.quality.mean_kl < 0.1


BAD = {
    "no such architecture": (("architecture=mamba3",), "GGUF model with architecture mamba3 is not supported yet"),
    "one part of several": (("split.count=3",), "is one of 3 parts of a model; expected it whole"),
    "no language model": (("tokenizer=none", "general.type=mmproj"), "has no tokenizer (mmproj)"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_gguf_that_is_no_whole_language_model_is_named(tmp_path: Path, case: str) -> None:
    fields, words = BAD[case]
    model = await written(tmp_path / "bad.gguf", *fields)
    ended = await bake(model, "--out", tmp_path / "out", home=tmp_path)
    assert ended.error.startswith(f"{model}: ")
    assert words in ended.error


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    model = await written(tmp_path / "cut.gguf")
    model.write_bytes(model.read_bytes()[:-1000])
    assert f"{model}: is corrupt or cut short" in (await bake(model, home=tmp_path)).error
    model.write_bytes(model.read_bytes()[:300])
    assert f"{model}: is corrupt or cut short" in (await bake(model, home=tmp_path)).error
    model.write_bytes(b"PK\3\4 a pickle")
    assert (
        "expected a GGUF file, which begins with b'GGUF', found b'PK\\x03\\x04'"
        in (await bake(model, home=tmp_path)).error
    )


async def test_a_file_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    ended = await bake(tmp_path / "no.gguf", home=tmp_path)
    assert ended.error == f"{tmp_path}/no.gguf: expected a GGUF file here, found none"
