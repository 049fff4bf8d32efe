"""`coldsnap-start`: which program it becomes, and when an image is made for the next boot."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from coldsnap import make_image
from coldsnap.image import later
from coldsnap.image.later import Later
from coldsnap.settings import ROOT

SHOW = '#!/bin/sh\necho "$(basename "$0")" "$@"\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose Python and restorer show their arguments."""
    shutil.copy(ROOT / "coldsnap-start", tmp_path)
    for program in (tmp_path / ".venv" / "bin" / "python", tmp_path / "build" / "image" / "restore"):
        program.parent.mkdir(parents=True)
        program.write_text(SHOW)
        program.chmod(0o755)
    return tmp_path


def start(clone: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [clone / "coldsnap-start", "--test_input", "{}"]
    own = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(command, env=own, cwd="/", capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_it_restores(clone: Path, mode: str) -> None:
    plain = f"{clone}/.venv/bin/python {clone}/handler.py --test_input {{}}"
    expected = f"restore {mode} {clone}/build/image/worker.image {plain}\n"
    assert start(clone, PROCESS_IMAGE=mode).stdout == expected
    assert start(clone, PROCESS_IMAGE="").stdout == expected.replace("restore require", "restore auto")


def test_it_boots_plainly(clone: Path) -> None:
    plain = f"python {clone}/handler.py --test_input {{}}\n"
    assert start(clone, PROCESS_IMAGE="off").stdout == plain
    assert start(clone, PROCESS_IMAGE="on").stdout == plain  # the worker's settings say what is wrong with it
    (clone / "build" / "image" / "restore").unlink()
    assert start(clone).stdout == plain


def test_what_is_required_and_cannot_be_ends_with_the_reason(clone: Path) -> None:
    (clone / "build" / "image" / "restore").unlink()
    done = start(clone, PROCESS_IMAGE="require")
    assert (done.returncode, done.stdout) == (75, "")
    assert "expected what scripts/setup.sh builds with a C compiler, found none" in done.stderr


def test_an_image_is_made_once_no_job_runs() -> None:
    begun = threading.Event()
    busy = [True]
    maker = Later(begun.set, busy=lambda: busy[0], served=lambda: 3)
    maker._look()
    maker._look()
    assert not begun.is_set()
    busy[0] = False
    maker._look()
    assert begun.is_set()
    begun.clear()
    maker._look()
    assert not begun.is_set()


def test_no_image_is_begun_by_a_worker_that_ends() -> None:
    begun = threading.Event()
    maker = Later(begun.set, busy=lambda: False, served=lambda: 0)
    maker.soon()
    maker._look()
    maker._look()
    assert not begun.is_set()


def test_a_file_that_changes_while_an_image_is_made_is_noticed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for file in (old, new):
        file.touch()
    os.utime(old, (1000, 1000))
    os.utime(new, (2000.5, 2000.5))
    assert make_image.changed_since(2000.9, [str(old), str(new)]) == str(new)
    assert make_image.changed_since(2001, [str(old), str(new)]) is None


def test_the_maker_has_the_lowest_priority_and_its_own_log(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 0.2; cut -d' ' -f 41 /proc/self/stat; cat; echo $X"]  # field 41: the policy
    later.start(command, {"X": "own", "PATH": os.environ["PATH"]}, tmp_path)
    log = tmp_path / "make.log"
    until = time.monotonic() + 30
    while "own" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    assert log.read_text() == f"{os.SCHED_IDLE}\nown\n"
