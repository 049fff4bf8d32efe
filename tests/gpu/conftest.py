"""Fixtures of `make gpu-seam`: the driver that is not there, built once; what was found, written down at the end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from coldsnap.settings import ROOT
from coldsnap.testing import pretended_gpus
from coldsnap.testing.pretended_gpus import GPUS, Machine

PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
PAGE = ROOT / "docs" / "gpu.md"
COUNTS = (1, 2, 4)
HEAD = (
    "| GPU | GPUs | tokens, sequences in a step | start | scheduler | runner | graphs | executor | $ a GPU-second |\n"
)


class Bench:
    """Where the driver's libraries are, and rows of the page's table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries = ROOT / "build" / "pretended-gpus"
        self.rows: dict[tuple[str, int], str] = {}

    def machine(self, gpu: str, count: int, log: Path) -> Machine:
        """Return a machine with `count` GPUs."""
        return Machine(GPUS[gpu], count, self.libraries, log)

    def environ(self, machine: Machine, home: Path) -> dict[str, str]:
        """Return the whole environment of a process on this machine. Compile caches and the like are shared."""
        return {
            **machine.environ(),
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "VLLM_CACHE_ROOT": str(self.folder / "vllm"),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "gpu" / "site")]),
            "PRETENDED_STACKS": str(home / "stacks"),
            "PRETENDED_PYTHONS": str(home / "pythons"),
        }


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    if not PYTHON.exists():
        pytest.exit("these tests need vLLM's CUDA build: make gpu-seam", 1)
    bench = Bench(tmp_path_factory.mktemp("shared"))
    pretended_gpus.build(bench.libraries)
    yield bench
    _write(bench.rows)


def _write(rows: Mapping[tuple[str, int], str]) -> None:
    """Put the rows of the cases that were run into the page's table; the others stay."""
    page = PAGE.read_text("utf-8")
    before, table, after = re.split(r"(?<=<!-- gpu-seam -->\n)(.*)(?=<!-- /gpu-seam -->)", page, flags=re.DOTALL)
    kept = {
        (gpu, int(count)): row for row, gpu, count in re.findall(r"^(\| (\w+) \| (\d+) \|.*\n)", table, re.MULTILINE)
    }
    found = kept | dict(rows)
    lines = [found[gpu, count] for gpu in GPUS for count in COUNTS if (gpu, count) in found]
    rule = re.sub(r"[^|\n]+", "---", HEAD)
    PAGE.write_text(before + HEAD + rule + "".join(lines) + after, "utf-8")
