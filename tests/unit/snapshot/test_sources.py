"""Where a boot's model comes from: the order of the places, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldsnap.errors import SettingsError, SnapshotError
from coldsnap.settings import ROOT, Settings
from coldsnap.snapshot.manifest import MANIFEST, Manifest, Quantization, Source, write_manifest
from coldsnap.snapshot.sources import Search, search

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
warned: list[str] = []


def bake(folder: Path, content: bytes = b"{}", repo: str = "org/Model") -> Manifest:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(content)
    return write_manifest(
        folder,
        source=Source(repo=repo, revision=COMMIT),
        quantization=Quantization(),
        served_model_name="m",
        engine_args={},
        versions={},
    )


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def cache(volume: Path) -> Path:
    """The model as the platform caches it, in lower case, two commits of it."""
    repository = volume / "huggingface-cache" / "hub" / "models--org--model"
    for commit in (COMMIT, OTHER):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_bytes(b"{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def look(volume: Path, **environ: str) -> Search:
    warned.clear()
    given = {"SNAPSHOT_VOLUME": str(volume), "SNAPSHOT_CACHE": str(volume.parent / "local")} | environ
    return search(Settings.read(given), given, warned.append)


def test_without_any_setting_the_demo_of_the_image_is_served(volume: Path) -> None:
    found = look(volume)
    supply = found.finish()
    assert (supply.source, supply.folder, supply.manifest) == ("image", ROOT / "snapshots" / "demo", found.manifest)
    assert supply.verified
    assert supply.fetched_bytes == 0
    assert found.offline
    early = found.announced.result(0)
    assert (early.source, early.folder, early.manifest) == ("image", supply.folder, supply.manifest)
    assert supply.beside.keys() == {"read_snapshot"}
    assert not look(volume, SNAPSHOT_VERIFY="size").finish().verified


def test_a_named_folder_comes_before_everything(volume: Path, cache: Path, tmp_path: Path) -> None:
    bake(volume / "coldsnap" / "a")
    bake(tmp_path / "image")
    environ = {"MODEL_NAME": "org/Model", "SNAPSHOT_S3_URI": "s3://bucket/prefix", "ALLOW_HUB": "true"}
    supply = look(volume, SNAPSHOT_DIR=str(tmp_path / "image"), **environ).finish()
    assert (supply.source, supply.folder) == ("image", tmp_path / "image")


def test_a_named_folder_on_the_volume_is_said_to_be_there(volume: Path) -> None:
    bake(volume / "mine")
    assert look(volume, SNAPSHOT_DIR=str(volume / "mine")).finish().source == "volume"


def test_a_named_folder_that_holds_nothing_ends_the_boot_unless_a_bucket_is_named(volume: Path) -> None:
    with pytest.raises(SnapshotError, match=f"{MANIFEST} cannot be read"):
        look(volume, SNAPSHOT_DIR=str(volume / "none"))
    assert look(volume, SNAPSHOT_DIR=str(volume / "none"), SNAPSHOT_S3_URI="s3://bucket/prefix").manifest is None
    assert warned == [f"SNAPSHOT_DIR: {volume}/none holds no {MANIFEST}; looking for the snapshot of SNAPSHOT_S3_URI"]


def test_the_volume_comes_before_the_cache_and_its_newest_snapshot_of_the_model_is_taken(
    volume: Path, cache: Path
) -> None:
    bake(volume / "coldsnap" / "other", repo="org/other")
    bake(volume / "coldsnap" / ".x.partial")
    bake(volume / "coldsnap" / "old")
    newer = bake(volume / "coldsnap" / "new", b"[]")
    text = (volume / "coldsnap" / "new" / MANIFEST).read_text()
    (volume / "coldsnap" / "new" / MANIFEST).write_text(text.replace(f"{newer.created:%Y}", "2999", 1))
    (volume / "coldsnap" / "torn").mkdir()
    (volume / "coldsnap" / "torn" / MANIFEST).write_text("{")
    search = look(volume, MODEL_NAME="org/Model", ALLOW_HUB="true")
    supply = search.finish()
    early = search.announced.result(0)
    assert (early.source, early.folder, early.manifest) == (supply.source, supply.folder, supply.manifest)
    assert (supply.source, supply.folder, supply.verified) == ("volume", volume / "coldsnap" / "new", True)
    assert len(warned) == 1
    assert warned[0].startswith(f"passed over: snapshot {volume}/coldsnap/torn: ")


class TestPlatformCache:
    def test_a_plain_copy_of_the_repository_is_served_unverified(self, volume: Path, cache: Path) -> None:
        found = look(volume, MODEL_NAME="org/Model", ALLOW_HUB="true")
        supply = found.finish()
        assert (supply.source, supply.folder) == ("platform-cache", cache / "snapshots" / COMMIT)
        assert (supply.manifest, supply.verified, supply.fetched_bytes) == (None, False, 0)
        assert found.offline

    def test_one_with_a_manifest_is_verified(self, volume: Path, cache: Path) -> None:
        (cache / "snapshots" / COMMIT / "config.json").unlink()
        (cache / "snapshots" / COMMIT).rmdir()
        bake(cache / "snapshots" / COMMIT)
        supply = look(volume, MODEL_NAME="org/Model").finish()
        assert (supply.source, supply.verified) == ("platform-cache", True)

    @pytest.mark.parametrize("variable", ["REVISION", "MODEL_REVISION"])
    def test_a_revision_is_a_commit_or_a_branch(self, volume: Path, cache: Path, variable: str) -> None:
        (cache / "refs" / "pr").mkdir()
        (cache / "refs" / "pr" / "1").write_text(OTHER)
        for revision in (OTHER, "pr/1"):
            supply = look(volume, MODEL_NAME="org/Model", **{variable: revision}).finish()
            assert supply.folder == cache / "snapshots" / OTHER

    @pytest.mark.parametrize("revision", ["dev", "../snapshots", f"../../secret/{COMMIT}", "a" * 40])
    def test_a_revision_that_is_not_there_is_no_hit(self, volume: Path, cache: Path, revision: str) -> None:
        (volume / "huggingface-cache" / "hub" / "secret").mkdir()
        (volume / "huggingface-cache" / "hub" / "secret" / COMMIT).write_text(COMMIT)
        with pytest.raises(SettingsError, match=r"^MODEL_NAME: 'org/Model' .*ALLOW_HUB=true"):
            look(volume, MODEL_NAME="org/Model", REVISION=revision)

    def test_without_the_branch_main_the_youngest_complete_commit_is_taken(self, volume: Path, cache: Path) -> None:
        (cache / "refs" / "main").unlink()
        (cache / "snapshots" / COMMIT / "config.json").unlink()  # a download that is not done
        assert look(volume, MODEL_NAME="org/Model").finish().folder == cache / "snapshots" / OTHER

    def test_it_is_not_used_for_a_model_that_nobody_named(self, volume: Path, cache: Path) -> None:
        assert look(volume).finish().source == "image"
        with pytest.raises(SettingsError, match=r"^MODEL_NAME: 'org/Model2' "):
            look(volume, MODEL_NAME="org/Model2")


def test_the_hub_is_the_last_and_only_with_permission(volume: Path) -> None:
    with pytest.raises(SettingsError, match=rf"^MODEL_NAME: 'org/Model' .*{volume}.*ALLOW_HUB=true"):
        look(volume, MODEL_NAME="org/Model")
    found = look(volume, MODEL_NAME="org/Model", ALLOW_HUB="true")
    assert not found.offline
    supply = found.finish()
    assert (supply.source, supply.folder, supply.verified, supply.fetched_bytes) == ("hub", None, False, None)


def test_a_bucket_is_no_models_name(volume: Path) -> None:
    with pytest.raises(SettingsError, match=r"^MODEL_NAME: 's3://bucket/x' .*SNAPSHOT_S3_URI"):
        look(volume, MODEL_NAME="s3://bucket/x")


def test_a_snapshot_of_another_model_than_the_one_named_is_refused(volume: Path, tmp_path: Path) -> None:
    bake(tmp_path / "image")
    with pytest.raises(SettingsError, match=rf"^MODEL_NAME: 'org/x' .*{tmp_path}/image holds, which is 'org/Model'"):
        look(volume, SNAPSHOT_DIR=str(tmp_path / "image"), MODEL_NAME="org/x")
