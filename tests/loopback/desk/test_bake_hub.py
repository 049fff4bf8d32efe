"""`coldsnap bake` of a model on a hub: pinned, fetched, resumed, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldsnap.snapshot.manifest import load_manifest, verify
from coldsnap.testing.fake_hub import FakeHub, Repository
from tests.loopback.desk.baking import Baked, bake, checkpoint

LARGE = {"model.embed_tokens.weight": (48, 64), "model.layers.0.mlp.up_proj.weight": (4096, 3072)}
"""25 MB: the library writes in pieces of 10 MB, and goes on after the last of them."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = checkpoint(tmp_path / "model")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def fetch(hub: FakeHub, home: Path, *arguments: str, repo: str = "org/model", **environ: str) -> Baked:
    command = (repo, "--scheme", "none", "--out", home / "out", *arguments)
    return await bake(*command, home=home, HF_HUB_OFFLINE="0", **hub.environment(), **environ)


async def test_a_branch_becomes_a_commit_and_the_files_a_snapshot(files: dict[str, bytes], tmp_path: Path) -> None:
    pickle = {"pytorch_model.bin": b"?", "README.md": b"?", "onnx/model.onnx": b"?"}
    repository = Repository(files | pickle, branches=("main", "v2"), license="apache-2.0")
    async with FakeHub({"org/model": repository}) as hub:
        ended = await fetch(hub, tmp_path, "--revision", "v2")
    assert ended.code == 0, ended
    manifest = load_manifest(tmp_path / "out")
    verify(tmp_path / "out", manifest)
    assert (manifest.source.repo, manifest.source.revision) == ("org/model", repository.commit)
    assert manifest.served_model_name == "org/model"
    assert manifest.files.keys() == files.keys()
    assert manifest.bake is not None
    assert manifest.bake.license == "apache-2.0"
    assert list(manifest.bake.seconds) == ["resolve", "download", "quantise", "check", "manifest"]
    assert not any("pytorch_model" in request for request in hub.requests)


async def test_a_broken_connection_is_resumed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", LARGE)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    async with FakeHub({"org/model": Repository(files)}, cut_after=11_000_000, cuts=2) as hub:
        ended = await fetch(hub, tmp_path)
    assert ended.code == 0, ended
    assert hub.cuts == 0
    assert hub.ranges == ["bytes=10485760-", "bytes=20971520-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == files["model.safetensors"]


async def test_a_killed_download_is_resumed_at_the_commit_that_was_pinned(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    old = Repository(files)
    async with FakeHub({"org/model": old}) as hub:
        command = ("org/model", "--scheme", "none", "--out", tmp_path / "out")
        environ = hub.environment() | {"HF_HUB_OFFLINE": "0"}
        killed = await bake(*command, home=tmp_path, kill_at=lambda text: "download" in text, **environ)
        assert killed.code == -9
        assert not (tmp_path / "out").exists()
        before = hub.requests["GET /api/models/org/model"]
        ended = await fetch(hub, tmp_path)
        assert ended.code == 0, ended
        assert hub.requests["GET /api/models/org/model"] == before
    assert load_manifest(tmp_path / "out").source.revision == old.commit


async def test_a_file_that_arrives_corrupt_is_refused_and_fetched_again(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    repository = Repository(files, corrupt={"model.safetensors"})
    async with FakeHub({"org/model": repository}) as hub:
        ended = await fetch(hub, tmp_path)
        assert "org/model: model.safetensors arrived corrupt: expected SHA-256" in ended.error
        assert not (tmp_path / "out").exists()
        repository.corrupt.clear()
        again = await fetch(hub, tmp_path)
    assert again.code == 0, again


async def test_a_gated_model_opens_with_the_right_token(files: dict[str, bytes], tmp_path: Path) -> None:
    async with FakeHub({"org/model": Repository(files, access="gated")}) as hub:
        for token in ({}, {"HF_TOKEN": "hf_wrong"}):  # 401 and 403
            ended = await fetch(hub, tmp_path, **token)
            assert ended.error == (
                f"org/model: is gated: accept its licence at {hub.endpoint}/org/model and set HF_TOKEN to a token "
                f"of the account that did"
            )
        ended = await fetch(hub, tmp_path, HF_TOKEN="hf_right")
    assert ended.code == 0, ended


REFUSED: dict[str, tuple[Repository, tuple[str, ...], str]] = {
    "no such revision": (
        Repository({"config.json": b"{}"}, branches=("main", "release")), ("--revision", "relaese"),
        "--revision 'relaese': org/model has no such branch, tag or commit; did you mean 'release'?",
    ),
    "private": (Repository({}, access="private"), (), "org/model: "),
    "pickle weights only": (
        Repository({"config.json": b"{}", "pytorch_model.bin": b"?"}), (),
        "org/model: has pickle weights only (pytorch_model.bin), which run code",
    ),
    "no space": (
        Repository({"config.json": b"{}"}, promised={"model.safetensors": 1 << 50}), (),
        f"the bake needs {2 * ((1 << 50) + 2):,} bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    repository, arguments, words = REFUSED[case]
    async with FakeHub({"org/model": repository}) as hub:
        ended = await fetch(hub, tmp_path, *arguments)
    assert words in ended.error
    assert not (tmp_path / "out").exists()


async def test_a_model_that_does_not_exist_is_named(tmp_path: Path) -> None:
    async with FakeHub({}) as hub:
        ended = await fetch(hub, tmp_path, repo="org/modle")
    assert ended.error.startswith(f"org/modle: {hub.endpoint} has no such model, or it is private")


async def test_a_hub_that_is_not_there_is_named(tmp_path: Path) -> None:
    ended = await bake(
        "org/model", "--out", tmp_path / "out", home=tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert ended.error.startswith("org/model: no folder here, and http://127.0.0.1:9 could not be reached or broke off")
