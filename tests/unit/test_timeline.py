"""The phases of a boot, from the kernel's start of the process on."""

from __future__ import annotations

import subprocess
import sys
import time

from coldsnap.settings import ROOT
from coldsnap.timeline import Timeline, process_age


def python(code: str) -> str:
    """Return what a fresh process prints."""
    environ = {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout


def test_the_phases_add_up_to_the_total() -> None:
    ages = iter([0.25, 1.5, 1.5, 4.0])
    timeline = Timeline(lambda: next(ages))
    for phase in ("python", "settings", "nothing", "engine"):
        timeline.mark(phase)
    assert timeline.phases == {"python": 0.25, "settings": 1.25, "nothing": 0.0, "engine": 2.5}
    assert list(timeline.phases) == ["python", "settings", "nothing", "engine"]
    assert sum(timeline.phases.values()) == timeline.total == 4.0


def test_a_phase_marked_twice_has_both_times() -> None:
    ages = iter([1.0, 3.0, 7.0])
    timeline = Timeline(lambda: next(ages))
    for phase in ("a", "b", "a"):
        timeline.mark(phase)
    assert timeline.phases == {"a": 5.0, "b": 2.0}
    assert timeline.total == 7.0


def test_before_the_first_mark_nothing_has_passed() -> None:
    assert Timeline().total == 0.0


def test_work_beside_the_phases_is_not_in_the_total() -> None:
    timeline = Timeline(lambda: 2.0)
    timeline.mark("all")
    timeline.beside["verify"] = 1.5
    assert timeline.total == sum(timeline.phases.values()) == 2.0


def test_a_process_grows_older_as_time_passes() -> None:
    began = time.monotonic()
    before = process_age()
    time.sleep(0.05)
    grown = process_age() - before
    assert 0.05 - 0.001 < grown < time.monotonic() - began + 0.001


def test_the_age_counts_from_the_kernels_start_and_not_from_the_first_line() -> None:
    code = (
        "import time; first = time.monotonic(); time.sleep(0.1); from coldsnap.timeline import process_age;"
        "since_first_line = time.monotonic() - first; print(since_first_line, process_age())"
    )
    began = time.monotonic()
    since_first_line, age = map(float, python(code).split())
    whole = time.monotonic() - began
    assert 0.1 <= since_first_line < age < whole + 0.02  # the kernel counts in hundredths


def test_a_process_with_a_strange_name_has_an_age_too() -> None:
    code = (
        "import pathlib; pathlib.Path('/proc/self/comm').write_text(') 1 2 (x)');"
        "from coldsnap.timeline import process_age; print(process_age())"
    )
    output = python(code)
    assert 0 < float(output) < 60
