"""What a step of gpu_acceptance.py works with: homes, the model, boots; and what it has found.

A step runs in a process of its own. What it finds is written as it is found, so that one that is cut off still tells.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import ours  # noqa: E402
from live_worker import total_bytes  # noqa: E402
from random_model import DEMO, describe  # noqa: E402

from coldsnap.snapshot.manifest import load_manifest  # noqa: E402

_CHILD = {
    "weights": r"Loading weights took ([\d.]+) seconds",
    "model": r"Model loading took [\d.]+ GiB.* and ([\d.]+) seconds",
    "compile or load": r"torch\.compile took ([\d.]+) s",
    "graphs": r"Graph capturing finished in ([\d.]+) secs",
    "KV, profile and warm-up": r"init engine \(.*\) took ([\d.]+) s",
}
"""The engine's phases, as vLLM says them in its log, 0.26 to 0.33."""


@dataclass
class Bench:
    """What a step works with, and what it has found: `claims` in the order of asking, `facts` by name."""

    work: Path
    shape: str
    found: Path
    """The file that keeps what is found."""
    claims: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def must(self, says: str, value: Any, goal: str, *, holds: bool, speed: bool = False) -> None:
        """Note a claim of ours, and whether it holds; of `speed`, where that can be told."""
        judged = holds if not speed or (self.gpu and self.shape == "8b") else None
        self.claims.append({"claim": says, "found": value, "goal": goal, "holds": judged})
        self._keep()

    def fact(self, **facts: Any) -> None:
        """Note what nothing was claimed of."""
        self.facts |= facts
        self._keep()

    def _keep(self) -> None:
        self.found.write_text(json.dumps({"claims": self.claims, "facts": self.facts}))

    @cached_property
    def gpu(self) -> bool:
        return total_bytes() > 0

    @property
    def few(self) -> int:
        """How often to measure what is measured in turn: once where only the program is proven."""
        return 3 if self.gpu else 1

    @property
    def kv_bytes(self) -> int:
        """A KV cache that leaves room for three engines on the GPU."""
        return min(12 << 30, total_bytes() // 10) or 256 << 20

    def home(self, name: str, *, fresh: bool = False) -> Path:
        """Return a machine's home folder, which has its caches."""
        home = self.work / name
        if fresh:
            shutil.rmtree(home, ignore_errors=True)
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        return home

    def model(self, **engine_args: Any) -> Path:
        """Return the model's snapshot, baked with these arguments; it is made where it is not there yet."""
        folder, scheme = self.work / f"model-{self.shape}", "fp8" if self.gpu else "bf16"
        if not (folder / "model.safetensors.index.json").exists():
            begun = time.monotonic()
            program = [sys.executable, str(ROOT / "bench" / "random_model.py"), str(folder)]
            subprocess.run([*program, "--shape", self.shape, "--scheme", scheme], check=True)
            self.fact(model_made_seconds=round(time.monotonic() - begun, 1))
        arguments = {"max_model_len": 32768 if self.shape == "8b" else 4096} | engine_args
        if not self.gpu:  # vLLM's server would compile
            arguments |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
        if not (folder / "coldsnap.json").exists() or load_manifest(folder).engine_args != arguments:
            describe(folder, arguments, scheme)
        return folder

    def environ(self, home: Path, model: Path | None = None, **more: str) -> dict[str, str]:
        """Return a worker's own variables."""
        own = {"SNAPSHOT_DIR": str(model or DEMO), "TMPDIR": str(home / "tmp"), "CACHE_URI": "off"}
        log = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        return own | log | more

    async def boot(self, home: Path, name: str, model: Path, **more: str) -> dict[str, Any]:
        """Boot once; return seconds to ready, the record, and the engine's own phases."""
        log = home / f"{name}.log"
        boot = await ours(home, log, **self.environ(home, model, **more))
        assert boot.record is not None
        said = log.read_text("utf-8", "replace")
        child = {phase: float(hits[-1]) for phase, seen in _CHILD.items() if (hits := re.findall(seen, said))}
        return {"ready": round(boot.ready, 3), "first_chunk": round(boot.first_chunk, 3),
                "engine": child, "record": boot.record}  # fmt: skip


def ready(boots: list[dict[str, Any]]) -> float:
    """Return the median of the boots' seconds to ready."""
    return float(round(statistics.median(boot["ready"] for boot in boots), 3))
