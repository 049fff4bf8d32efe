"""A delay anywhere in a boot lands in the phase that it belongs to, and the phases still add up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from coldsnap import boot, fitness, snapshot, vllm_engine
from coldsnap.engine import EngineInfo
from coldsnap.settings import Settings
from coldsnap.testing.fake_engine import FakeEngine
from coldsnap.timeline import Timeline

DELAY = 7.0
PHASES = ("python", "settings", "import_vllm", "verify", "configure", "engine", "import_sdk", "warm_up")
INFO = EngineInfo("0.32.0", "cpu", 1, ("demo",), 512)


def booted(slow: str, monkeypatch: pytest.MonkeyPatch) -> boot.Booted:
    """Boot on a clock that each piece of work moves by a second, and the slow one by `DELAY` more."""
    now = [0.0]
    imported = threading.Event()
    load_manifest = snapshot.load_manifest

    def work(phase: str) -> None:
        now[0] += 1.0 + (DELAY if phase == slow else 0.0)

    def manifest(folder: Path) -> snapshot.Manifest:
        work("settings")
        return load_manifest(folder)

    def load(_: object) -> None:
        work("import_vllm")
        imported.set()

    def verify(_: Path, __: snapshot.Manifest, mode: str) -> None:
        if mode == "full":  # beside the import, and not yet done when that is
            imported.wait()
            while "import_vllm" not in timeline.phases:
                threading.Event().wait(0.001)
            work("verify")

    def engine(*, mark: Any, **_: object) -> FakeEngine:
        for phase in ("configure", "engine"):
            work(phase)
            mark(phase)
        return FakeEngine(info=INFO)

    monkeypatch.setattr(snapshot, "load_manifest", manifest)
    monkeypatch.setattr(snapshot, "verify", verify)
    monkeypatch.setattr(fitness, "check", lambda **_: None)
    monkeypatch.setattr(vllm_engine, "load", load)
    monkeypatch.setattr(vllm_engine, "boot", engine)
    timeline = Timeline(lambda: now[0])
    work("python")
    timeline.mark("python")
    done = boot.boot(Settings.read({}), timeline, {}, beside_engine={"import_sdk": lambda: work("import_sdk")})
    work("warm_up")
    timeline.mark("warm_up")
    return done


@pytest.mark.parametrize("slow", PHASES)
def test_a_delay_lands_in_its_phase(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = booted(slow, monkeypatch).cold_start()
    assert record.phases == {phase: 1.0 + DELAY if phase == slow else 1.0 for phase in PHASES}
    assert record.seconds == sum(record.phases.values()) == len(PHASES) + DELAY
    assert record.beside.keys() == {"fitness", "read_snapshot", "import_sdk"}
