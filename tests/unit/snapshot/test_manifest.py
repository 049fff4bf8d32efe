"""The snapshot contract, fault by fault: each is refused with one line that says what and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import orjson
import pytest
from blake3 import blake3
from pydantic import ValidationError

from coldsnap.errors import SnapshotError
from coldsnap.snapshot.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Quantization,
    Source,
    load_manifest,
    verify,
    write_manifest,
)

FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "empty.txt": b"",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 400,
    "model-00002-of-00002.safetensors": b"\0" * 1000,
    "sub/deeper/tokenizer.json": "ünïcödé".encode(),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def bake(folder: Path) -> Manifest:
    return write_manifest(
        folder,
        source=Source(repo="org/model", revision=COMMIT),
        quantization=Quantization(scheme="w8a8", ignore=("lm_head",)),
        served_model_name="demo",
        engine_args={"max_model_len": 512, "compilation_config": {"mode": 0}},
        versions={"vllm": "0.32.0"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    fill(folder)
    bake(folder)
    return folder


def complaint(folder: Path, mode: str = "full") -> str:
    """Return what a boot of `folder` says behind the part that names the folder; it must say something."""
    with pytest.raises(SnapshotError) as raised:
        verify(folder, load_manifest(folder), mode)  # type: ignore[arg-type]
    start = f"snapshot {folder}: "
    assert raised.value.message.startswith(start)
    assert "\n" not in raised.value.message
    return raised.value.message.removeprefix(start)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = orjson.loads((folder / MANIFEST).read_bytes())
    change(data)
    (folder / MANIFEST).write_bytes(orjson.dumps(data))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("mode", ["full", "size"])
def test_a_snapshot_as_it_was_baked_is_accepted(folder: Path, mode: Any) -> None:
    manifest = load_manifest(folder)
    verify(folder, manifest, mode)  # raises what it finds
    assert manifest.files.keys() == FILES.keys()


def test_a_full_check_says_how_fast_it_read_and_what_the_disk_had_to_deliver(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(4 << 20))
    manifest = bake(tmp_path)
    os.sync()  # what is dirty stays in the page cache
    with (tmp_path / "weights").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = getrusage(RUSAGE_SELF).ru_inblock
    first, delivered = verify(tmp_path, manifest), (getrusage(RUSAGE_SELF).ru_inblock - before) * 512
    again = verify(tmp_path, manifest)
    assert first is not None
    assert again is not None
    assert (first.bytes, again.bytes, again.disk_bytes) == (manifest.size, manifest.size, 0)
    assert first.disk_bytes == delivered
    assert first.seconds > 0
    assert verify(tmp_path, manifest, "size") is None


def test_the_manifest_says_what_was_baked(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest.source == Source(repo="org/model", revision=COMMIT)
    assert manifest.quantization == Quantization(scheme="w8a8", ignore=("lm_head",))
    assert manifest.served_model_name == "demo"
    assert manifest.engine_args == {"max_model_len": 512, "compilation_config": {"mode": 0}}
    assert manifest.versions == {"vllm": "0.32.0"}
    assert {name: entry.size for name, entry in manifest.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert manifest.files["empty.txt"].blake3 == blake3(b"").hexdigest()
    assert manifest.size == sum(map(len, FILES.values()))
    assert manifest.schema_version == SCHEMA_VERSION


def test_baking_again_describes_the_same_files(folder: Path) -> None:
    before = load_manifest(folder)
    assert bake(folder).files == before.files


def test_an_interrupted_bake_leaves_nothing_in_the_next_manifest(folder: Path) -> None:
    (folder / f".{MANIFEST}.partial").write_bytes(b"{")
    assert bake(folder).files.keys() == FILES.keys()
    verify(folder, load_manifest(folder))


class TestFiles:
    @pytest.mark.parametrize("mode", ["full", "size"])
    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file_is_named(self, folder: Path, name: str, mode: str) -> None:
        (folder / name).unlink()
        assert complaint(folder, mode) == f"{name}: expected a file of {len(FILES[name])} bytes, found none"

    @pytest.mark.parametrize("mode", ["full", "size"])
    @pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
    def test_a_file_truncated_by_one_byte_is_named(self, folder: Path, name: str, mode: str) -> None:
        size = len(FILES[name])
        os.truncate(folder / name, size - 1)
        assert complaint(folder, mode) == f"{name}: expected {size} bytes, found {size - 1}"

    @pytest.mark.parametrize("mode", ["full", "size"])
    @pytest.mark.parametrize("name", FILES)
    def test_a_file_longer_by_one_byte_is_named(self, folder: Path, name: str, mode: str) -> None:
        size = len(FILES[name])
        os.truncate(folder / name, size + 1)
        assert complaint(folder, mode) == f"{name}: expected {size} bytes, found {size + 1}"

    @pytest.mark.parametrize("mode", ["full", "size"])
    @pytest.mark.parametrize(
        "name", ["aaa.safetensors", "zzz.py", "sub/extra.json", "new/folder/x", ".hidden", "sub/" + MANIFEST]
    )
    def test_an_extra_file_is_named(self, folder: Path, name: str, mode: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        assert complaint(folder, mode) == f"{name}: expected no such file, found one that the manifest does not list"

    @pytest.mark.parametrize("position", [0, 0.5, -1], ids=["first", "middle", "last"])
    @pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
    def test_one_flipped_byte_is_found(self, folder: Path, name: str, position: float) -> None:
        expected = load_manifest(folder).files[name].blake3
        flip(folder / name, int(position * len(FILES[name])) if position > 0 else int(position))
        found = blake3((folder / name).read_bytes()).hexdigest()
        assert complaint(folder) == f"{name}: expected BLAKE3 {expected}, found {found}"

    def test_the_last_of_many_reads_is_hashed_too(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("coldsnap.snapshot.digest._READ_BYTES", 1000)
        verify(folder, load_manifest(folder))
        flip(folder / "model-00001-of-00002.safetensors", -1)
        assert "expected BLAKE3" in complaint(folder)

    def test_size_mode_does_not_hash(self, folder: Path) -> None:
        for name, content in FILES.items():
            if content:
                flip(folder / name, 0)
        verify(folder, load_manifest(folder), "size")
        assert "expected BLAKE3" in complaint(folder)

    def test_two_files_in_each_others_place_are_found(self, folder: Path) -> None:
        edit(
            folder,
            lambda data: data["files"].update({"a": {"size": 3, "blake3": blake3(b"aaa").hexdigest()}}),
        )
        edit(
            folder,
            lambda data: data["files"].update({"b": {"size": 3, "blake3": blake3(b"bbb").hexdigest()}}),
        )
        (folder / "a").write_bytes(b"bbb")
        (folder / "b").write_bytes(b"aaa")
        assert complaint(folder).startswith("a: expected BLAKE3")

    def test_the_first_of_several_faults_by_name_is_reported(self, folder: Path) -> None:
        for name in ("model-00002-of-00002.safetensors", "config.json"):
            flip(folder / name, 0)
        assert complaint(folder).startswith("config.json: ")

    def test_a_folder_in_place_of_a_file_is_a_missing_file(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        assert complaint(folder) == "config.json: expected a file of 23 bytes, found none"

    def test_a_pipe_in_place_of_a_file_does_not_hold_the_boot_up(self, folder: Path) -> None:
        (folder / "empty.txt").unlink()
        os.mkfifo(folder / "empty.txt")
        assert complaint(folder) == "empty.txt: expected a file of 0 bytes, found none"

    def test_a_missing_folder_is_named(self, folder: Path) -> None:
        manifest = load_manifest(folder)
        elsewhere = folder.parent / "elsewhere"
        with pytest.raises(SnapshotError, match=f"^snapshot {elsewhere}: expected a folder, found none$"):
            verify(elsewhere, manifest)


class TestLinks:
    @pytest.fixture
    def hub(self, tmp_path: Path, folder: Path) -> Path:
        """Return the snapshot as a hub cache holds it: names are links into a folder of blobs."""
        cache = tmp_path / "models--org--model"
        blobs, linked = cache / "blobs", cache / "snapshots" / COMMIT
        blobs.mkdir(parents=True)
        for name in (*FILES, MANIFEST):
            blob = blobs / blake3(name.encode()).hexdigest()
            (folder / name).rename(blob)
            (linked / name).parent.mkdir(parents=True, exist_ok=True)
            (linked / name).symlink_to(os.path.relpath(blob, (linked / name).parent))
        return linked

    def test_a_hub_cache_of_links_is_accepted(self, hub: Path) -> None:
        verify(hub, load_manifest(hub))
        assert all((hub / name).is_symlink() for name in FILES)

    def test_so_is_a_link_to_the_folder(self, hub: Path, tmp_path: Path) -> None:
        (tmp_path / "current").symlink_to(hub)
        manifest = load_manifest(tmp_path / "current")
        verify(tmp_path / "current", manifest)
        assert manifest.digest == load_manifest(hub).digest

    def test_an_altered_blob_is_found_behind_its_link(self, hub: Path) -> None:
        flip(hub / "model-00001-of-00002.safetensors", 7)
        assert complaint(hub).startswith("model-00001-of-00002.safetensors: expected BLAKE3")

    @pytest.mark.parametrize("mode", ["full", "size"])
    def test_a_link_whose_blob_is_gone_is_a_missing_file(self, hub: Path, mode: str) -> None:
        (hub / "config.json").resolve().unlink()
        assert complaint(hub, mode) == "config.json: expected a file of 23 bytes, found none"

    def test_a_link_to_itself_is_a_missing_file(self, hub: Path) -> None:
        (hub / "config.json").unlink()
        (hub / "config.json").symlink_to("config.json")
        assert complaint(hub) == "config.json: expected a file of 23 bytes, found none"

    def test_a_dangling_link_is_an_extra_file(self, folder: Path) -> None:
        (folder / "extra").symlink_to("nowhere")
        assert complaint(folder).startswith("extra: expected no such file")

    def test_a_linked_folder_cannot_bring_files_in(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "modeling.py").touch()
        (folder / "code").symlink_to(tmp_path / "elsewhere")
        assert complaint(folder).startswith("code: expected no such file")

    def test_a_link_to_the_folder_above_does_not_turn_in_circles(self, folder: Path) -> None:
        (folder / "sub" / "above").symlink_to("..")
        assert complaint(folder).startswith("sub/above: expected no such file")


class TestManifest:
    def test_a_folder_without_one_is_no_snapshot(self, folder: Path) -> None:
        (folder / MANIFEST).unlink()
        assert complaint(folder) == (
            "coldsnap.json cannot be read (No such file or directory); expected a baked snapshot"
        )

    def test_a_folder_in_its_place_is_no_manifest(self, folder: Path) -> None:
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).mkdir()
        assert "cannot be read (Is a directory)" in complaint(folder)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"not json",
            b"\xff\xfe",
            b'{"a": 1} {}',
            b"NaN",
            b"[" * 100_000,
            b"version https://git-lfs",
        ],
        ids=["empty", "cut", "words", "not UTF-8", "two", "NaN", "deep", "a git-lfs pointer"],
    )
    def test_what_is_not_json_is_said_to_be_so(self, folder: Path, content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        assert complaint(folder).startswith("coldsnap.json is not JSON: ")

    @pytest.mark.parametrize("cut", [1, 100, -2])
    def test_a_truncated_manifest_is_not_json(self, folder: Path, cut: int) -> None:
        content = (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).write_bytes(content[:cut])
        assert complaint(folder).startswith("coldsnap.json is not JSON: ")

    @pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
    def test_other_json_is_no_manifest(self, folder: Path, content: str) -> None:
        (folder / MANIFEST).write_text(content)
        assert complaint(folder).startswith("coldsnap.json: the document: ")

    def test_a_newer_schema_asks_for_a_newer_coldsnap(self, folder: Path) -> None:
        edit(folder, lambda data: data.update(schema_version=SCHEMA_VERSION + 1, something_new={}))
        assert complaint(folder) == (
            "coldsnap.json: schema_version: expected 1 or less, found 2; it needs a newer coldsnap"
        )

    @pytest.mark.parametrize("version", [0, -1, "1", "2", None, [], 1.5])
    def test_a_schema_that_never_was_is_refused(self, folder: Path, version: object) -> None:
        edit(folder, lambda data: data.update(schema_version=version))
        assert complaint(folder).startswith("coldsnap.json: schema_version: ")

    @pytest.mark.parametrize(
        "field",
        ["created", "served_model_name", "source", "quantization", "engine_args", "versions", "files"],
    )
    def test_a_missing_field_is_named(self, folder: Path, field: str) -> None:
        edit(folder, lambda data: data.pop(field))
        assert complaint(folder) == f"coldsnap.json: {field}: Field required"

    def test_an_unknown_field_is_named(self, folder: Path) -> None:
        edit(folder, lambda data: data.update(extra=1))
        assert complaint(folder) == "coldsnap.json: extra: Extra inputs are not permitted"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("created", "yesterday"),
            ("created", "2026-01-01T00:00:00"),
            ("served_model_name", ""),
            ("served_model_name", None),
            ("engine_args", []),
            ("versions", {"vllm": 1}),
            ("files", {}),
            ("files", []),
        ],
    )
    def test_a_wrong_field_is_named(self, folder: Path, field: str, value: object) -> None:
        edit(folder, lambda data: data.update({field: value}))
        assert complaint(folder).startswith(f"coldsnap.json: {field}")

    @pytest.mark.parametrize(
        "name",
        [
            "../outside",
            "sub/../../outside",
            "sub/..",
            "..",
            ".",
            "",
            "/etc/passwd",
            "//host/share",
            "./config.json",
            "sub//x",
            "sub/",
            MANIFEST,
        ],
    )
    def test_a_name_that_leads_elsewhere_is_refused(self, folder: Path, name: str) -> None:
        (folder.parent / "outside").write_bytes(b"")
        entry = {"size": 0, "blake3": blake3(b"").hexdigest()}
        edit(folder, lambda data: data["files"].update({name: entry}))
        assert complaint(folder).startswith(f"coldsnap.json: files.{name}")
        assert "plain relative path" in complaint(folder)

    @pytest.mark.parametrize(
        "digest",
        ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "blake3:" + "0" * 57, None, 0],
    )
    def test_a_digest_of_the_wrong_form_is_named(self, folder: Path, digest: object) -> None:
        edit(folder, lambda data: data["files"]["config.json"].update(blake3=digest))
        assert complaint(folder).startswith("coldsnap.json: files.config.json.blake3: ")

    @pytest.mark.parametrize("size", [-1, "x", None, 1.5])
    def test_a_size_of_the_wrong_form_is_named(self, folder: Path, size: object) -> None:
        edit(folder, lambda data: data["files"]["config.json"].update(size=size))
        assert complaint(folder).startswith("coldsnap.json: files.config.json.size: ")

    @pytest.mark.parametrize(
        "revision",
        ["main", "v1.0", "", COMMIT[:7], COMMIT[:-1], COMMIT + "0", COMMIT.upper(), COMMIT + "\n", None],
    )
    def test_a_hub_source_must_be_pinned_to_a_commit(self, folder: Path, revision: str | None) -> None:
        edit(folder, lambda data: data["source"].update(revision=revision))
        assert complaint(folder).startswith("coldsnap.json: source: ")
        assert "must be a full commit hash, not a branch or tag" in complaint(folder)

    @pytest.mark.parametrize("revision", [COMMIT, COMMIT + COMMIT[:24]], ids=["SHA-1", "SHA-256"])
    def test_a_full_commit_hash_is_a_revision(self, revision: str) -> None:
        assert Source(repo="org/model", revision=revision).revision == revision

    def test_a_local_source_has_no_revision(self) -> None:
        assert Source() == Source(repo="local", revision=None)
        with pytest.raises(ValidationError, match="must be a full commit hash"):
            Source(repo="local", revision="main")


class TestDigest:
    def test_it_is_the_same_wherever_the_content_is(self, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        fill(other)
        assert bake(other).digest == load_manifest(folder).digest

    def test_it_does_not_depend_on_what_surrounds_the_content(self, folder: Path) -> None:
        before = load_manifest(folder).digest
        edit(folder, lambda data: data.update(served_model_name="other", engine_args={}))
        edit(folder, lambda data: data.update(files=dict(reversed(data["files"].items()))))
        assert load_manifest(folder).digest == before

    def test_it_changes_with_content_and_with_names(self, folder: Path) -> None:
        digests = {load_manifest(folder).digest}
        flip(folder / "config.json", 0)
        digests.add(bake(folder).digest)
        (folder / "config.json").rename(folder / "config2.json")
        digests.add(bake(folder).digest)
        (folder / "empty.txt").unlink()
        digests.add(bake(folder).digest)
        assert len(digests) == 4

    def test_it_is_what_other_tools_can_compute(self, folder: Path) -> None:
        lines = "".join(f"{name}\0{blake3(FILES[name]).hexdigest()}\n" for name in sorted(FILES))
        assert load_manifest(folder).digest == blake3(lines.encode()).hexdigest()
