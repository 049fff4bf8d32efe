"""vLLM's CUDA build, imported and configured by the worker on machines whose GPUs are not there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from coldsnap.settings import ROOT, Settings
from coldsnap.testing.pretended_gpus import GPUS

from .conftest import COUNTS, PYTHON, Bench

Probes = dict[tuple[str, int], Future[dict[str, Any]]]
CASES = [(gpu, count) for gpu in GPUS for count in COUNTS]
SERVES = {
    "L4": (2048, 256),
    "4090": (2048, 256),
    "A100": (2048, 256),
    "H100": (8192, 1024),
    "H200": (8192, 1024),
    "B200": (16384, 1024),
}
"""Tokens and sequences in a step of `vllm serve`, as read in vLLM 0.32.0 and 0.33.0."""
FUSES = {("H100", 2), ("H100", 4), ("H200", 2), ("H200", 4), ("B200", 2), ("B200", 4)}
"""Where vLLM fuses the all-reduce with the norm after it: its own look at how has begun CUDA."""
PRICES = {"L4": 0.00019, "4090": 0.00031, "A100": 0.00076, "H100": 0.00116, "H200": 0.00155, "B200": 0.0024}


def begins(calls: list[str]) -> list[str]:
    """Return the calls that begin CUDA or need it: all but the question for the driver's version."""
    return [call for call in calls if not call.endswith(" cuDriverGetVersion")]


@pytest.fixture(scope="module")
def probes(request: pytest.FixtureRequest, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probes]:
    """What the probe said of each case that a test asks for, two at a time; the first alone, to fill the caches."""
    homes = {case: tmp_path_factory.mktemp("home") for case in CASES}

    def run(case: tuple[str, int]) -> dict[str, Any]:
        machine = bench.machine(*case, homes[case] / "calls")
        command = [PYTHON, ROOT / "tests" / "gpu" / "probe.py", str(case[1])]
        environ = bench.environ(machine, homes[case])
        ended = subprocess.run(command, cwd=ROOT, env=environ, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        stacks = homes[case] / "stacks"
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found | {"stacks": stacks.read_text("utf-8") if stacks.exists() else ""}

    asked = [item.callspec.params["case"] for item in request.session.items if "case" in item.fixturenames]
    first, *others = dict.fromkeys(asked)
    found: Probes = {first: Future()}
    found[first].set_result(run(first))
    with ThreadPoolExecutor(2) as pool:
        yield found | {case: pool.submit(run, case) for case in others}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_worker_on(case: tuple[str, int], probes: Probes, bench: Bench) -> None:
    gpu, count = case
    found = probes[case].result()
    assert begins(found["after_import"]) == []
    assert begins(found["after_configuration"]) == [], found["stacks"]
    assert found["start_method"] == "fork"
    # The engine that vLLM's defaults choose on a GPU, and that it can be metered.
    assert (found["scheduler"], found["async"], found["runner"]) == ("AsyncScheduler", True, "V2")
    assert found["executor"] == ("uni" if count == 1 else "mp")
    assert found["graphs"] == "FULL_AND_PIECEWISE"
    assert found["metered"]
    # As the server: what a step may hold, and where the compiler's ranges end.
    tokens, sequences = SERVES[gpu]
    assert found["limits"] == {"tokens": tokens, "sequences": sequences} == found["served"]["limits"]
    assert Settings.read({}).max_concurrency <= sequences  # the engine can run all jobs that are taken
    assert found["fuses"] is (case in FUSES)
    assert found["ranges"] == found["served"]["ranges"]
    # What is measured and paid for.
    assert found["gpus"] == count
    assert found["energy"] == list(range(count))
    assert (found["gpu"], found["price"]) == (GPUS[gpu].name, PRICES[gpu])
    assert found["machine"]["gpu"] == f"{count} x {GPUS[gpu].name} {GPUS[gpu].capability}"
    bench.rows[case] = (
        f"| {gpu} | {count} | {tokens:,}, {sequences:,} | {found['start_method']} | {found['scheduler']} "
        f"| {found['runner']} | {found['graphs']} | {found['executor']} | {found['price']:.5f} |\n"
    )


@pytest.mark.parametrize("case", sorted(FUSES), ids=lambda case: f"{case[0]}-{case[1]}")
def test_the_driver_would_hear_of_it(case: tuple[str, int], probes: Probes) -> None:
    """vLLM's server begins CUDA as it is configured on these machines: the pretended driver sees what is avoided."""
    found = probes[case].result()
    assert any(call.endswith(" cuInit") for call in found["after_serve"])
    assert "flashinfer" in found["stacks"]


def test_each_machine_has_a_fingerprint_of_its_own(
    probes: Probes,
) -> None:
    names = [probe.result()["fingerprint"] for probe in probes.values()]
    assert len(set(names)) == len(names)
