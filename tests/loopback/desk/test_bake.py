"""`coldsnap bake` on local checkpoints, from the outside: what it makes, what it refuses, what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from builder.stages import size_of
from safetensors import safe_open

from coldsnap import cli
from coldsnap.foundation.s3 import Place
from coldsnap.settings import ROOT
from coldsnap.snapshot.manifest import load_manifest, verify
from tests.engine.worker import run_handler
from tests.loopback.desk.baking import PYTHON, Baked, bake, checkpoint, environment, run

W8A8 = ("--scheme", "w8a8", "--engine-arg", "max_model_len=512", "--engine-arg", "enforce_eager=true")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral with random weights."""
    folder = tmp_path_factory.mktemp("families")
    subprocess.run([PYTHON, ROOT / "builder" / "families.py", "--write", folder, "Mistral"], check=True)
    return folder / "mistral"


@pytest.fixture(scope="session")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Baked]:
    """A snapshot of it, made by the command of the other environment."""
    out = tmp_path_factory.mktemp("baked") / "snapshot"
    limits = ("--max-kl", "0.05", "--max-ppl-ratio", "1.1")
    command = (ROOT / ".venv" / "bin" / "coldsnap", "bake", model, "--out", out, *W8A8, *limits)
    found = subprocess.run(
        command, cwd=out.parent, env=environment(out.parent), capture_output=True, text=True, check=False
    )
    ended = Baked(found.returncode, found.stdout, found.stderr)
    assert ended.code == 0, ended
    return out, ended


class TestSnapshot:
    async def test_the_handler_serves_it(self, folder: tuple[Path, Baked], tmp_path: Path) -> None:
        job = {"input": {"prompt": "A cold start", "sampling_params": {"max_tokens": 5, "ignore_eos": True}}}
        environ = {"SNAPSHOT_DIR": str(folder[0]), "VLLM_CPU_KVCACHE_SPACE": "1"}
        ended = await run_handler("--test_input", json.dumps(job), home=tmp_path, cwd=tmp_path, **environ)
        assert ended.code == 0, ended
        assert '"completion_tokens": 5' in ended.stdout
        assert "── mistral on cpu" in ended.stdout

    async def test_the_manifest_says_how_it_was_made(self, folder: tuple[Path, Baked], model: Path) -> None:
        manifest = load_manifest(folder[0])
        verify(folder[0], manifest)
        assert manifest.source.repo == "local"
        assert len(manifest.source.revision or "") == 64
        assert manifest.quantization.scheme == "w8a8"
        assert manifest.quantization.ignore == ("lm_head", "model.embed_tokens")
        assert manifest.engine_args == {"max_model_len": 512, "enforce_eager": True}
        assert manifest.bake is not None
        assert list(manifest.bake.seconds) == ["resolve", "quantise", "check", "manifest"]
        assert manifest.bake.source_bytes == size_of(model)
        quality = manifest.bake.quality
        assert quality.not_measured is None
        assert quality.mean_kl is not None
        assert 0 < quality.mean_kl < 0.05
        assert quality.greedy_prompts == 8
        assert quality.tokens == 1024

    async def test_the_report_shows_both_sizes_and_the_quality(self, folder: tuple[Path, Baked]) -> None:
        out, ended = folder
        manifest = load_manifest(out)
        assert manifest.bake is not None
        assert f"{manifest.bake.source_bytes:,} -> {manifest.size:,} bytes" in ended.stdout
        assert f"{manifest.bake.quality.mean_kl} nats a token" in ended.stdout
        assert manifest.digest in ended.stdout

    async def test_it_can_be_pushed(
        self, folder: tuple[Path, Baked], model: Path, s3_place: Place, tmp_path: Path
    ) -> None:
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        ended = await bake(model, "--out", folder[0], *W8A8, "--push", s3_place, home=tmp_path, **aws)
        assert ended.code == 0, ended
        manifest = load_manifest(folder[0])
        assert f"{manifest.size} of them sent" in ended.stdout
        pulled = tmp_path / "pulled"
        assert cli.main(["pull", str(s3_place), str(pulled)]) == 0
        assert load_manifest(pulled).digest == manifest.digest
        verify(pulled, manifest)

    async def test_a_place_that_is_none_is_refused_before_the_bake(self, model: Path, tmp_path: Path) -> None:
        ended = await bake(model, "--out", tmp_path / "out", *W8A8, "--push", "bucket/prefix", home=tmp_path)
        assert ended.error.startswith("--push: expected s3://bucket/prefix, the bucket of 3 to 63 of a-z, 0-9, . and -")
        assert not (tmp_path / "out").exists()

    async def test_nothing_is_left_beside_it(self, folder: tuple[Path, Baked]) -> None:
        out = folder[0]
        assert not out.with_name(".snapshot.bake").exists()

    async def test_the_same_bake_again_finds_it_done(self, folder: tuple[Path, Baked], model: Path) -> None:
        out = folder[0]
        before = (out / "coldsnap.json").read_bytes()
        ended = await bake(model, "--out", out, *W8A8, home=out.parent)
        assert ended.code == 0, ended
        assert "quantise" not in ended.stderr
        assert (out / "coldsnap.json").read_bytes() == before

    async def test_another_bake_does_not_replace_it(self, folder: tuple[Path, Baked], model: Path) -> None:
        out = folder[0]
        ended = await bake(model, "--out", out, "--scheme", "none", home=out.parent)
        assert ended.error == f"{out}: holds another snapshot already; remove it or name another --out"

    async def test_killed_at_each_stage_it_ends_with_the_same_digests(
        self, folder: tuple[Path, Baked], model: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "snapshot"
        work = tmp_path / ".snapshot.bake"
        moments = {
            "resolve": lambda text: "resolve" in text,
            "quantise": lambda text: "quantise" in text,
            "in the middle of quantise": lambda text: (work / "snapshot.partial" / "config.json").exists(),
            "check": lambda text: "check " in text,
            "manifest": lambda text: "manifest" in text,
        }
        for stage, moment in moments.items():
            ended = await bake(model, "--out", out, *W8A8, home=tmp_path, kill_at=moment)
            assert ended.code == -9, (stage, ended)
            assert work.exists()
            if out.exists():  # the kill came after the last rename, which is whole
                verify(out, load_manifest(out))
        ended = await bake(model, "--out", out, *W8A8, home=tmp_path)
        assert ended.code == 0, ended
        assert load_manifest(out).files == load_manifest(folder[0]).files
        assert not work.exists()

    async def test_a_limit_that_is_exceeded_fails_the_bake(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "snapshot"
        ended = await bake(model, "--out", out, *W8A8, "--max-kl", "1e-6", home=tmp_path)
        assert "--max-kl: the mean KL divergence is 0.00" in ended.error
        assert not out.exists()
        again = await bake(model, "--out", out, *W8A8, home=tmp_path)  # without the limit, from where it was
        assert again.code == 0, again
        assert "quantise   done before" in again.stderr


async def test_the_gate_finds_no_difference_between_a_model_and_itself(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from builder.gate import Text, measure\n"
        "from builder.checkpoint import Checkpoint; folder = Path(sys.argv[1])\n"
        "print(measure(Checkpoint.read(folder), folder, Text.read(None, 300, 2)).model_dump_json())"
    )
    ended = await run(PYTHON, "-c", code, model, home=tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'src'}")
    assert ended.code == 0, ended
    quality = json.loads(ended.stdout)
    assert quality["mean_kl"] == 0
    assert quality["perplexity"] == quality["original_perplexity"]
    assert (quality["top1_agreement"], quality["greedy_identical"], quality["greedy_prompts"]) == (1, 2, 2)
    assert quality["tokens"] == 300


async def test_weights_can_be_fitted_to_the_users_texts(model: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "What is a cold start?"}]}
    lines = [{"text": "A snapshot is a folder."}, {"prompt": "Once upon a time"}, chat]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fitted = ("--out", tmp_path / "out", "--scheme", "w4a16", "--calibrate", data)
    awq = await bake(model, *fitted, "--calibrate-method", "awq", home=tmp_path)
    assert awq.error == "--calibrate-method awq: llm-compressor's AWQ needs a GPU and a torch for it; use gptq here"
    ended = await bake(model, *fitted, home=tmp_path)
    assert ended.code == 0, ended
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.quantization.calibration or "").startswith("gptq on up to 256 lines of a file with BLAKE3 ")
    assert manifest.bake is not None
    assert manifest.bake.quality.not_measured is None
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"} <= manifest.files.keys()
    assert "recipe.yaml" not in manifest.files


def truncated(folder: Path) -> None:
    path = checkpoint(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickled(folder: Path) -> None:
    (checkpoint(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")


def odd(folder: Path) -> None:
    checkpoint(folder, {"model.embed_tokens.weight": (48, 64), "model.layers.0.mlp.up_proj.weight": (128, 96)})


def odder(folder: Path) -> None:
    checkpoint(folder, {"model.layers.0.mlp.up_proj.weight": (128, 100)})


def without_config(folder: Path) -> None:
    (checkpoint(folder) / "config.json").unlink()


def without_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
    (checkpoint(folder) / "model.safetensors.index.json").write_text(json.dumps(index))


def gigantic(folder: Path) -> None:
    """Write a header that promises 2 TB, and a file of that size with nothing in it."""
    path = checkpoint(folder) / "model.safetensors"
    size = 2 << 40
    header = json.dumps({"a.weight": {"dtype": "F16", "shape": [1 << 20, 1 << 20], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def awq(folder: Path) -> None:
    checkpoint(folder, quantization_config={"quant_method": "awq", "bits": 4})


def newer(folder: Path) -> None:
    (checkpoint(folder) / "coldsnap.json").write_text('{"schema_version": 99}')


BAD: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "a scheme misspelt": (checkpoint, ("--scheme", "w4a61"), "--scheme: unknown scheme 'w4a61'; did you mean 'w4a16'?"),
    "a group that does not divide": (
        odd,
        ("--scheme", "w4a16"),
        "up_proj.weight has 96 columns, no multiple of the group size 128; use --group-size 32",
    ),
    "no group that divides": (odder, ("--scheme", "w4a16"), "no group size divides every layer: use another scheme"),
    "sides that kernels do not take": (odder, ("--scheme", "w8a8"), "up_proj.weight is 128 x 100; expected multiples"),
    "a corrupt shard": (truncated, ("--scheme", "none"), "model.safetensors: is corrupt or cut short"),
    "a shard missing": (without_a_shard, ("--scheme", "none"), "model-00002-of-00002.safetensors: expected a shard"),
    "pickle weights only": (pickled, ("--scheme", "none"), "has pickle weights only (pytorch_model.bin)"),
    "no config": (without_config, ("--scheme", "none"), "has no config.json"),
    "no space": (gigantic, ("--scheme", "none"), "the bake needs 2,199,0"),
    "quantised already": (awq, ("--scheme", "w8a8"), "is quantised already (awq); use --scheme as-is"),
    "not quantised": (checkpoint, ("--scheme", "as-is"), "has no quantization_config; use --scheme none"),
    "a newer manifest": (newer, ("--scheme", "none"), "schema_version: expected 1 or less, found 99"),
    "a revision of a folder": (checkpoint, ("--revision", "main"), "--revision: "),
    "a limit on what is not measured": (checkpoint, ("--scheme", "none", "--max-kl", "1"), "could not be measured"),
    "nothing to calibrate": (checkpoint, ("--scheme", "none", "--calibrate", __file__), "none has nothing to fit"),
    "nothing to keep": (checkpoint, ("--scheme", "none", "--keep", "*"), "--keep: none leaves every layer as it is"),
    "no such layer": (
        checkpoint,
        ("--keep", "*.dawn_proj"),
        "--keep: '*.dawn_proj' matches none of the layers to quan",
    ),
    "every layer kept": (checkpoint, ("--keep", "*"), "--keep: leaves no layer to quantise; use --scheme none"),
    "a text that is not there": (checkpoint, ("--gate-text", "no.txt"), "--gate-text: no.txt: expected a UTF-8 text"),
    "an engine argument without value": (checkpoint, ("--engine-arg", "x"), "--engine-arg: expected NAME=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    make, arguments, words = BAD[case]
    make(tmp_path / "model")
    ended = await bake(tmp_path / "model", "--out", tmp_path / "out", *arguments, home=tmp_path)
    assert words in ended.error
    assert not (tmp_path / "out").exists()


async def test_a_newer_snapshot_at_its_place_is_left_alone(tmp_path: Path) -> None:
    newer(tmp_path / "out")
    ended = await bake(checkpoint(tmp_path / "model"), "--out", tmp_path / "out", home=tmp_path)
    assert "it needs a newer coldsnap" in ended.error


async def test_a_folder_at_its_place_is_left_alone(tmp_path: Path) -> None:
    ended = await bake(checkpoint(tmp_path / "model"), "--out", tmp_path / "model", home=tmp_path)
    assert "is there already and is no snapshot" in ended.error


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = await bake(checkpoint(tmp_path / "model"), "--out", tmp_path / "file" / "out", home=tmp_path)
    assert ended.error == f"{tmp_path}/file/.out.bake: Not a directory"


async def test_a_model_that_is_neither_here_nor_an_id_is_named(tmp_path: Path) -> None:
    ended = await bake("./no/such/folder", "--out", tmp_path / "out", home=tmp_path)
    assert ended.error.startswith("'./no/such/folder': is neither a folder here nor a model's id")


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes", "mxfp4"])
async def test_what_is_quantised_already_is_taken_as_it_is(tmp_path: Path, method: str) -> None:
    model = checkpoint(tmp_path / "model", quantization_config={"quant_method": method})
    ended = await bake(model, "--out", tmp_path / "out", home=tmp_path)
    assert ended.code == 0, ended
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.quantization.scheme, manifest.quantization.method) == ("as-is", method)
    assert "the source is quantised already" in ended.stdout
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


async def test_only_what_a_boot_needs_is_taken(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling.py", "README.md", "a.gguf", "LICENSE"):
        (model / name).write_bytes(b"?")
    (model / "original").mkdir()
    shutil.copy(model / "model.safetensors", model / "original" / "model.safetensors")
    ended = await bake(model, "--scheme", "none", "--out", tmp_path / "out", home=tmp_path)
    assert ended.code == 0, ended
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"coldsnap.json", "config.json", "model.safetensors", "tokenizer.json", "LICENSE"}


async def test_a_checkpoint_that_changes_between_two_bakes_is_noticed(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    arguments = ("--scheme", "none", "--out", tmp_path / "out")
    await bake(model, *arguments, home=tmp_path, kill_at=lambda text: "check" in text)
    (model / "tokenizer.json").write_text('{"changed": true}')
    if not (tmp_path / "out").exists():
        ended = await bake(model, *arguments, home=tmp_path)
        assert ended.code == 0, ended
        assert "changed" in (tmp_path / "out" / "tokenizer.json").read_text()


async def test_layers_can_be_kept_as_they_are(model: Path, tmp_path: Path) -> None:
    arguments = (model, "--out", tmp_path / "out", "--scheme", "w8a8")
    ended = await bake(*arguments, "--keep", "*.0.mlp.down_proj", home=tmp_path)
    assert ended.code == 0, ended
    ignored = load_manifest(tmp_path / "out").quantization.ignore
    assert ignored == ("lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as weights:
        kept, other = (weights.get_slice(f"model.layers.{layer}.mlp.down_proj.weight") for layer in (0, 1))
        assert (kept.get_dtype(), other.get_dtype()) == ("BF16", "I8")
    another = await bake(*arguments, "--keep", "*.1.mlp.down_proj", home=tmp_path)
    assert "holds another snapshot already" in another.error
