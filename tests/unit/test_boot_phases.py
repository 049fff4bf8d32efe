"""A delay anywhere in a boot lands in the phase that it belongs to, and the phases still add up."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coldsnap import boot, fitness, worker
from coldsnap.engine import EngineInfo
from coldsnap.jobs import post
from coldsnap.settings import Settings
from coldsnap.snapshot import manifest as snapshot
from coldsnap.testing.fake_engine import FakeEngine
from coldsnap.timeline import Timeline
from coldsnap.vllm import start as vllm_start

DELAY = 7.0
PHASES = (
    "python", "settings", "import_vllm", "verify", "configure", "engine", "import_sdk", "import_http", "sdk", "warm_up",
)  # fmt: skip
"""Those of the README's picture, in its order."""
INFO = EngineInfo("0.32.0", "cpu", 1, ("demo",), 512)


def cold_start(slow: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:  # noqa: C901 -- one small function for each phase
    """Boot on a clock that each piece of work moves by a second, and the slow one by `DELAY` more.

    From the environment to the record that a worker writes once it is ready. Return that record.
    """
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

    class Engine(FakeEngine):
        async def warm_up(self) -> None:
            work("warm_up")

    def engine(*, mark: Any, **_: object) -> FakeEngine:
        for phase in ("configure", "engine"):
            work(phase)
            mark(phase)
        return Engine(info=INFO)

    monkeypatch.setattr(snapshot, "load_manifest", manifest)
    monkeypatch.setattr(snapshot, "verify", verify)
    monkeypatch.setattr(fitness, "check", lambda **_: None)
    monkeypatch.setattr(vllm_start, "load", load)
    monkeypatch.setattr(vllm_start, "boot", engine)
    monkeypatch.setattr(post, "trust", lambda: None)
    monkeypatch.setattr(worker, "Metrics", lambda **_: SimpleNamespace(see=lambda *_: None))  # its registry is global
    for name in ("freeze", "set_threshold"):
        monkeypatch.setattr(gc, name, lambda *_: None)
    timeline = Timeline(lambda: now[0])
    work("python")
    timeline.mark("python")
    settings = Settings.read({"COLDSNAP_LEDGER_DIR": str(folder)})

    def longer() -> None:  # in a thread beside the other, and longer than that
        while "import_sdk" not in timeline.phases:
            threading.Event().wait(0.001)
        work("import_http")

    beside: dict[str, Callable[[], object]] = {"import_sdk": lambda: work("import_sdk"), "import_http": longer}
    serving = worker._Worker(boot.boot(settings, timeline, {}, beside_engine=beside))
    work("sdk")
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # it uses a thread: no simulated clock
        runner.run(serving.ready())
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    (record,) = [line for line in lines if line["record"] == "cold_start"]
    found: dict[str, Any] = record
    return found


@pytest.mark.parametrize("slow", PHASES)
def test_a_delay_lands_in_its_phase(slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = cold_start(slow, tmp_path, monkeypatch)
    assert record["phases"] == {phase: 1.0 + DELAY if phase == slow else 1.0 for phase in PHASES}
    assert record["seconds"] == sum(record["phases"].values()) == len(PHASES) + DELAY
    assert record["beside"].keys() == {"fitness", "read_snapshot", "import_sdk", "import_http"}
