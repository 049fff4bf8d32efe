"""The acceptance's runner: what is bounded, kept and judged. tests/engine/test_gpu_acceptance.py runs the steps."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from bench import gpu_acceptance
from bench.gpu_acceptance import Step, bounded, page, result, run
from scripts.missing import normal

from coldsnap.settings import ROOT

PROGRAM = ROOT / "bench" / "gpu_acceptance.py"
STARTS_ANOTHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print(child.pid, flush=True)
time.sleep({seconds})
"""
CLAIM = {"claim": "it is fast", "found": 1, "goal": "2", "holds": True}


def command(seconds: float) -> list[str]:
    return [sys.executable, "-c", STARTS_ANOTHER.format(seconds=seconds)]


@pytest.mark.parametrize(("seconds", "state"), [(0, "passed"), (600, "cut off")])
def test_nothing_that_a_step_has_started_is_left(tmp_path: Path, seconds: float, state: str) -> None:
    log, stopped = tmp_path / "log", threading.Event()

    def stop_once_it_has_a_child() -> None:
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.01)
        if state == "cut off":
            stopped.set()

    watch = threading.Thread(target=stop_once_it_has_a_child)
    watch.start()
    assert bounded(command(seconds), log, 300, stopped)[0] == state
    watch.join()
    stat = Path(f"/proc/{int(log.read_text())}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_step_is_cut_off_at_its_limit(tmp_path: Path) -> None:
    assert bounded(command(600), tmp_path / "log", 0.2, threading.Event())[0] == "cut off"


def test_a_step_that_breaks_says_so_and_is_not_waited_for(tmp_path: Path) -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no GPU')"]
    assert bounded(broken, tmp_path / "demo.log", 60, threading.Event())[0] == "broke"
    assert result("demo", "broke", 1.0, tmp_path)["log"] == ["no GPU"]


def test_a_step_that_is_cut_off_tells_what_it_had_found(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"claims": [CLAIM], "facts": {"gpu": "H200"}}))
    (tmp_path / "demo.log").write_text("one\ntwo\n")
    found = result("demo", "cut off", 1.0, tmp_path)
    assert (found["claims"], found["facts"], found["log"]) == ([CLAIM], {"gpu": "H200"}, ["one", "two"])


@pytest.mark.parametrize(("holds", "state"), [(True, "passed"), (None, "passed"), (False, "failed")])
def test_a_step_fails_where_one_of_its_claims_does(tmp_path: Path, holds: bool | None, state: str) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"claims": [CLAIM, CLAIM | {"holds": holds}], "facts": {}}))
    assert result("demo", "passed", 1.0, tmp_path)["state"] == state


def options(folder: Path, minutes: float = 1.0) -> argparse.Namespace:
    return argparse.Namespace(out=folder / "out", work=folder / "work", minutes=minutes, slack=1.0, shape="tiny")


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def test_each_result_is_on_the_disk_before_the_next_step_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stand_in(command: list[str], log: Path, limit: float, stopped: threading.Event) -> tuple[str, float]:
        del limit, stopped
        seen.append([each["step"] for each in kept(tmp_path)] if (tmp_path / "out" / "results.jsonl").exists() else [])
        log.write_text("")
        return ("broke" if "demo" in command else "passed"), 1.0

    monkeypatch.setattr(gpu_acceptance, "bounded", stand_in)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    steps = {name: gpu_acceptance.STEPS[name] for name in ("machine", "demo", "books")}
    assert run(steps, options(tmp_path)) == 1
    assert seen == [[], ["machine"], ["machine", "demo"]]
    assert [each["state"] for each in kept(tmp_path)] == ["passed", "broke", "passed"]
    assert run({"demo": Step(steps["demo"].run, 1), "books": steps["books"]}, options(tmp_path, minutes=0)) == 1
    assert [each["state"] for each in kept(tmp_path)[3:]] == ["not reached", "not reached"]
    shown = (tmp_path / "out" / "acceptance.md").read_text()
    assert "| machine | passed |" in shown
    assert "| demo | not reached |" in shown  # the latest of a step's results


def test_the_page_has_the_claims_and_says_what_the_run_proves() -> None:
    failed = CLAIM | {"found": "a|b", "holds": False}
    shown = page([{"step": "demo", "state": "failed", "seconds": 1.0, "claims": [failed], "facts": {}}], "tiny")
    assert "| demo | it is fast | a/b | 2 | **FAILS** |" in shown
    assert "proves the program, not a GPU" in shown


def test_a_dry_run_lists_the_steps_in_the_order_of_their_worth() -> None:
    ended = subprocess.run([sys.executable, PROGRAM, "--dry"], capture_output=True, text=True, check=True)
    names = re.findall(r"^(\w+) +\d+ s  \S", ended.stdout, re.MULTILINE)
    assert names[:4] == ["machine", "demo", "cold_start", "load"]
    assert names == list(gpu_acceptance.STEPS)


def test_an_unknown_step_is_refused_by_name() -> None:
    ended = subprocess.run(
        [sys.executable, PROGRAM, "--steps", "demo,bogus"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "--steps: expected some of machine, demo" in ended.stderr
    assert "found bogus" in ended.stderr


def test_sigterm_ends_the_step_keeps_its_result_and_reaches_no_other(tmp_path: Path) -> None:
    program = [sys.executable, PROGRAM, "--shape", "tiny", "--steps", "demo,books", "--out", tmp_path / "out"]
    with subprocess.Popen([*program, "--work", tmp_path / "work"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("demo: ")
        process.terminate()
        assert process.wait(30) == 1
    assert [each["state"] for each in kept(tmp_path)] == ["cut off", "not reached"]


def test_the_program_needs_no_package_that_a_workers_environment_lacks() -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "bench")!r}]
import importlib.metadata as metadata
import gpu_acceptance, bare_engine
names = metadata.packages_distributions()
print(*sorted({{names[name][0] for name in {{each.partition(".")[0] for each in sys.modules}} if name in names}}))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lock = (ROOT / "requirements" / "gpu.lock").read_text("utf-8")
    locked = {normal(name) for name in re.findall(r"^([A-Za-z0-9_.-]+)==", lock, re.MULTILINE)}
    needed = {normal(name) for name in ended.stdout.split()} - {"coldsnap"}
    assert {"aiohttp", "orjson"} <= needed
    assert needed - locked == set()
