"""Which releases of others are patched, and what is said where one is not."""

from __future__ import annotations

import re

import pytest

from coldsnap import patches
from coldsnap.settings import ROOT


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_degraded", [])


def test_a_release_that_is_known_is_patched_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(patches.allowed(name) for name in patches.PATCHES)
    assert patches.degraded() == []
    assert capsys.readouterr().err == ""


def test_another_release_goes_its_plain_way_and_is_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patches, "installed", lambda _: "9.9.9")
    assert not any(patches.allowed(name) for name in ("pace", "dispatch", "pace"))
    assert patches.degraded() == ["pace", "dispatch"]
    pace, dispatch = capsys.readouterr().err.splitlines()
    assert pace.startswith("coldsnap: vllm 9.9.9: not one of the tested releases 0.26.0, 0.32.0, 0.33.0; without ")
    assert "the SDK's own loop, in which jobs start up to 0.1 s later" in dispatch


def test_a_known_release_of_another_shape_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert not patches.allowed("dispatch", unlike="JobScaler has no run")
    assert patches.degraded() == ["dispatch"]
    assert ": JobScaler has no run; without the patch 'dispatch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.32.0.post1", True),
        ("0.32.1", False),
        ("0.3", False),
        ("none", False),
    ],
)
def test_a_build_or_a_post_release_is_of_its_release(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "installed", lambda _: version)
    assert patches.allowed("pace") is known


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert patches.installed("no-such-package") == "none"


class TestSupportedReleases:
    """The releases of `patches.KNOWN` are those that the requirements name, and 0.26.0, which runs on a GPU."""

    LOCKS = tuple(path.read_text("utf-8") for path in (ROOT / "requirements").glob("*.lock"))

    @pytest.mark.parametrize(("package", "names"), [("vllm", "vllm(?:-cpu)?"), ("runpod", "runpod")])
    def test_what_the_locks_pin_is_known(self, package: str, names: str) -> None:
        pinned = {version for text in self.LOCKS for version in re.findall(rf"^{names}==([\w.]+)", text, re.MULTILINE)}
        assert pinned
        assert [version for version in pinned if not patches.known(package, version)] == []

    def test_the_worker_s_transformers_is_known(self) -> None:
        locks = [(ROOT / "requirements" / f"{name}.lock").read_text("utf-8") for name in ("cpu", "gpu")]
        pinned = {version for text in locks for version in re.findall(r"^transformers==([\w.]+)", text, re.MULTILINE)}
        assert pinned
        assert all(patches.known("transformers", version) for version in pinned)

    def test_no_other_vllm_is_supported(self) -> None:
        named = {
            version for text in self.LOCKS for version in re.findall(r"^vllm(?:-cpu)?==([\w.]+)", text, re.MULTILINE)
        }
        assert {*patches.VLLM} == named | {"0.26.0"}
