"""The check of a large snapshot beside the engine's start: nothing is served before it is over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldsnap import boot, fitness
from coldsnap.engine import EngineInfo
from coldsnap.errors import EngineBootError, SettingsError, SnapshotError, Unfit
from coldsnap.foundation import memory
from coldsnap.settings import ROOT, Settings
from coldsnap.snapshot import sources
from coldsnap.testing.fake_engine import FakeEngine
from coldsnap.timeline import Timeline
from coldsnap.vllm import start as vllm_start

WEIGHTS = "model.safetensors"


class Engine(FakeEngine):
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "is_large", lambda _: True)
    monkeypatch.setattr(fitness, "check", lambda **_: None)
    monkeypatch.setattr(vllm_start, "load", lambda _: None)
    return Path(shutil.copytree(ROOT / "snapshots" / "demo", tmp_path / "snapshot"))


def booted(folder: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[boot.Booted, Timeline]:
    monkeypatch.setattr(vllm_start, "boot", engine)
    timeline = Timeline()
    return boot.boot(Settings.read({"SNAPSHOT_DIR": str(folder)}), timeline, {}), timeline


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_boot_ends_when_all_is_compared_and_says_how_it_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, timeline = booted(folder, lambda **_: Engine(info=EngineInfo("0", "cpu", 1, ("m",), 8)), monkeypatch)
    record = result.cold_start()
    assert record.verified
    assert record.read_gb_per_second is not None
    assert list(timeline.phases)[-1] == "verify_weights"
    assert {"read_snapshot"} <= record.beside.keys()


def test_an_engine_that_has_loaded_wrong_weights_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(info=EngineInfo("0", "cpu", 1, ("m",), 8))
    flip(folder / WEIGHTS)
    with pytest.raises(SnapshotError, match=f"{WEIGHTS}: expected BLAKE3 .*, found "):
        booted(folder, lambda **_: engine, monkeypatch)
    assert engine.closed


def test_weights_that_the_engine_chokes_on_are_the_reason_and_not_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choke(*, mark: Callable[[str], None], **_: object) -> None:
        mark("configure")
        raise EngineBootError("Engine core initialization failed")

    with pytest.raises(EngineBootError, match="initialization failed"):
        booted(folder, choke, monkeypatch)
    flip(folder / WEIGHTS)
    with pytest.raises(SnapshotError, match=f"{WEIGHTS}: expected BLAKE3 "):
        booted(folder, choke, monkeypatch)


def test_a_wrong_setting_is_said_without_waiting_for_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise SettingsError("MAX_MODEL_LEN: expected a number")

    flip(folder / WEIGHTS)  # would be said, if anybody waited for it
    with pytest.raises(SettingsError, match="MAX_MODEL_LEN"):
        booted(folder, refuse, monkeypatch)


def test_an_engine_that_the_kernel_ended_for_its_memory_is_said_to_be_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([1, 2])
    monkeypatch.setattr(memory, "kills", lambda: next(counts))

    def die(*, mark: Callable[[str], None], **_: object) -> None:
        mark("configure")
        raise EngineBootError("Engine core initialization failed")

    with pytest.raises(Unfit, match=r"^memory: .* memory was used up.*\(vLLM: Engine core initialization failed\)$"):
        booted(folder, die, monkeypatch)


def test_a_wrong_configuration_is_refused_before_the_engine_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(**_: object) -> None:
        raise AssertionError("the engine was started")

    flip(folder / "config.json")
    with pytest.raises(SnapshotError, match=r"config\.json: expected BLAKE3"):
        booted(folder, never, monkeypatch)
