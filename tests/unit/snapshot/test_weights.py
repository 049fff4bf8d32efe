"""The late check of the weights: what is compared when, in a real process beside this one, and what a fault says."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from coldsnap.errors import SnapshotError
from coldsnap.snapshot import weights as module
from coldsnap.snapshot.digest import Hashing, digests
from coldsnap.snapshot.manifest import Manifest, Quantization, Source, load_manifest, write_manifest
from coldsnap.snapshot.weights import WeightsCheck, is_large

WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(WEIGHTS)
    (folder / "model-2.safetensors").write_bytes(WEIGHTS[::-1])
    write_manifest(
        folder,
        source=Source(repo="local", revision="0" * 64),
        quantization=Quantization(scheme="none"),
        served_model_name="m",
        engine_args={},
        versions={},
    )
    return folder


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return load_manifest(folder)


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_a_whole_snapshot_is_read_once_whether_memory_holds_it_or_not(
    folder: Path, manifest: Manifest, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: room)
    check = WeightsCheck(folder, manifest)
    check.engine_starts()
    assert check.result().bytes == manifest.size


def test_where_memory_cannot_hold_it_nothing_is_read_before_the_engine_starts(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: manifest.size - 1)
    check = WeightsCheck(folder, manifest)
    flip(folder / "model-1.safetensors")  # after the check has begun, before anything was read
    check.engine_starts()
    with pytest.raises(SnapshotError, match=r"model-1\.safetensors: expected BLAKE3"):
        check.result()


@pytest.mark.parametrize(("at_once", "advice"), [(4, os.POSIX_FADV_WILLNEED), (1, os.POSIX_FADV_SEQUENTIAL)])
def test_a_whole_file_is_read_ahead_only_where_memory_holds_them_all(
    folder: Path, at_once: int, advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: given.append(arguments[1:]))
    digests(folder, ["model-1.safetensors", "model-2.safetensors"], at_once)
    assert given == [(0, 0, advice)] * 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_wrong_weight_names_file_both_digests_and_what_helps(folder: Path, manifest: Manifest) -> None:
    flip(folder / "model-2.safetensors")
    check = WeightsCheck(folder, manifest, "; delete it and it is fetched again")
    expected = manifest.files["model-2.safetensors"].blake3
    with pytest.raises(
        SnapshotError, match=f"model-2.safetensors: expected BLAKE3 {expected}, found [0-9a-f]{{64}}; delete"
    ):
        check.result()


@pytest.mark.parametrize("spoil", ["config", "size", "extra"])
def test_what_decides_how_the_engine_behaves_is_refused_before_it_starts(
    folder: Path, manifest: Manifest, spoil: str
) -> None:
    if spoil == "config":
        (folder / "config.json").write_text("[]")
    elif spoil == "size":
        (folder / "model-1.safetensors").write_bytes(WEIGHTS[:-1])
    else:
        (folder / "code.py").write_text("")
    name = {"config": "config.json", "size": "model-1.safetensors", "extra": "code.py"}[spoil]
    with pytest.raises(SnapshotError, match=name):
        WeightsCheck(folder, manifest)


def test_a_file_that_is_gone_is_named(folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    check = WeightsCheck(folder, manifest)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"model-1\.safetensors: expected a readable file, found: No such file"):
        check.result()


def test_a_process_that_was_killed_is_no_proof(folder: Path) -> None:
    hashing = Hashing(folder, ["model-1.safetensors"])
    os.kill(hashing._process.pid, signal.SIGKILL)
    with pytest.raises(SnapshotError, match="its digests are not known, because the process that reads it was ended"):
        hashing.result()


def test_a_ctrl_c_at_the_terminal_does_not_reach_the_process(folder: Path) -> None:
    hashing = Hashing(folder, [])
    assert os.getpgid(hashing._process.pid) != os.getpgid(0)
    hashing.end()


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless")  # whoever reads it waits for a writer
    hashing = Hashing(tmp_path, ["endless"])
    hashing.begin()
    assert hashing._process.stdin is not None
    hashing._process.stdin.close()  # as the kernel does when the parent ends
    assert hashing._process.wait(60) == 1


def test_only_weights_that_take_long_are_late(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_large(manifest)
    monkeypatch.setattr(module, "_LATE_BYTES", len(WEIGHTS))
    assert is_large(manifest)
