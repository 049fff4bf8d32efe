"""The parts of `make image-check` that decide: a check that cannot fail would be none."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from scripts import image_check

from coldsnap.settings import ROOT

SECRET = "hf_Zk3vQ0s9XyTtR2mL8aBc"


def layout(folder: Path, *, files: Mapping[str, bytes], config: str = "{}") -> Path:
    """Write an OCI layout of one layer, as `buildah push --disable-compression` does."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with tarfile.open(blobs / "11", "w") as layer:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            layer.addfile(member, io.BytesIO(content))
    (blobs / "22").write_text(config)
    return folder


def found(folder: Path) -> list[str]:
    return list(image_check.holders(folder, ["another-secret", SECRET]))


def test_an_image_without_the_secret_passes(tmp_path: Path) -> None:
    assert found(layout(tmp_path, files={"app/handler.py": b"print()", "app/empty": b""})) == []


@pytest.mark.parametrize("before", [0, 1, 2, 5, (8 << 20) - 7])
def test_a_file_that_holds_the_secret_is_named(tmp_path: Path, before: int) -> None:
    content = os.urandom(before) + SECRET.encode() + b"\n"
    assert found(layout(tmp_path, files={"app/x": b"", "root/.netrc": content})) == ["11/root/.netrc"]


@pytest.mark.parametrize("before", [b"", b"a", b"ab", b"abc"])
def test_so_is_one_that_holds_it_in_base64(tmp_path: Path, before: bytes) -> None:
    content = b"auth: " + base64.b64encode(before + SECRET.encode() + b":x")
    assert found(layout(tmp_path, files={"auth.json": content})) == ["11/auth.json"]


def test_so_is_a_name(tmp_path: Path) -> None:
    assert found(layout(tmp_path, files={f"tmp/{SECRET}": b""})) == [f"11/tmp/{SECRET}"]


def test_so_is_the_history(tmp_path: Path) -> None:
    config = f'{{"history": [{{"created_by": "ARG TOKEN={SECRET}"}}]}}'
    assert found(layout(tmp_path, files={}, config=config)) == ["22 (configuration and history)"]


def test_a_layer_that_cannot_be_read_is_no_clean_layer(tmp_path: Path) -> None:
    blob = layout(tmp_path, files={"a": b"1" * 4096}) / "blobs" / "sha256" / "11"
    blob.write_bytes(blob.read_bytes()[:2048])
    with pytest.raises(tarfile.ReadError):
        found(tmp_path)


def test_neither_is_one_in_a_form_that_is_not_known(tmp_path: Path) -> None:
    (layout(tmp_path, files={}) / "blobs" / "sha256" / "33").write_bytes(b"\x28\xb5\x2f\xfd a zstd frame")
    with pytest.raises(ValueError, match=r"codec|Expecting"):
        found(tmp_path)


def test_a_place_that_is_not_there_is_named() -> None:
    environ = os.environ | {"IMAGE_CHECK_TMP": "/nowhere"}
    command = [sys.executable, "scripts/image_check.py"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environ)
    assert ended.returncode == 1
    assert ended.stderr == "coldsnap: image-check: IMAGE_CHECK_TMP: expected a folder, found none at /nowhere\n"


def test_a_command_that_fails_shows_the_end_of_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(image_check.Failed, match=r"^sh ended with 3"):
        image_check.run(["sh", "-c", "seq 40; exit 3"])
    assert capsys.readouterr().err.split() == [str(number) for number in range(16, 41)]


def test_pips_settings_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:password@index.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    lines = image_check.pip_conf().splitlines()
    assert lines[0] == "[global]"
    assert "index-url = https://user:password@index.example/simple" in lines
    assert "find-links = /wheels /more" in lines


def test_without_root_it_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.geteuid = lambda: 1000; sys.path.insert(0, '.'); import scripts.image_check as c; c.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "coldsnap: image-check: needs root, for debootstrap and to build without a container engine: "
        "sudo make image-check\n"
    )
