"""What the imports of a boot are spared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .worker import ROOT

SEARCHED = """
import json, os
from coldsnap.vllm import release as vllm_release, start as vllm_start
os.environ.update(vllm_release.environment(os.environ, {"enforce_eager": True}))
import sys, importlib.metadata
finders, search = list(sys.meta_path), importlib.metadata.packages_distributions
vllm_start.load(os.environ)
from transformers.utils import import_utils
models = os.path.join(os.path.dirname(os.path.dirname(import_utils.__file__)), "models")
print(json.dumps({
    "remembers": import_utils.create_import_structure_from_path.__module__,
    "left": [str(finder) for finder in sys.meta_path if "coldsnap" in str(finder)],
    "as before": importlib.metadata.packages_distributions is search,
    "modules": sum(map(len, import_utils.define_import_structure(models).values())),
}))
"""
SDK = """
import json, sys
import cpuinfo
before = cpuinfo.get_cpu_info
from coldsnap import worker
worker.import_sdk()
from runpod.serverless.utils import rp_debugger
print(json.dumps({"as before": cpuinfo.get_cpu_info is before, "processor": rp_debugger.PROCESSOR}))
"""


def run(code: str, home: Path) -> dict[str, Any]:
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_what_an_import_searches_for_is_remembered_and_the_same(home: Path) -> None:
    first, second = run(SEARCHED, home), run(SEARCHED, home)
    assert first == second
    assert first["modules"] > 100
    assert (first["remembers"], first["left"], first["as before"]) == ("coldsnap.vllm.remembered", [], True)


def test_the_sdk_is_imported_without_a_look_at_the_processor(home: Path) -> None:
    assert run(SDK, home) == {"as before": True, "processor": "Unable to get processor info."}
