"""What a boot leaves out of its imports, and that it is there for whoever needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .worker import ROOT

LOAD = """
import json, os, sys
from coldsnap.vllm import engine as vllm_engine, release as vllm_release
os.environ.update(vllm_release.environment(os.environ, {"enforce_eager": EAGER}))
finders = list(sys.meta_path)
vllm_engine.load(os.environ)
found = {"imported": "torch._inductor.lowering" in sys.modules}
import torch._inductor.lowering as lowering
found["usable"] = callable(lowering.make_fallback)
found["patched"] = getattr(lowering.FALLBACK_ALLOW_LIST, "_vllm_patched", False)
found["left"] = [str(finder) for finder in sys.meta_path if "Refusal" in str(finder)]
print(json.dumps(found))
"""
SDK = """
import json, sys
import cpuinfo
before = cpuinfo.get_cpu_info
from coldsnap import worker
worker._import_sdk()
from runpod.serverless.utils import rp_debugger
print(json.dumps({"as before": cpuinfo.get_cpu_info is before, "processor": rp_debugger.PROCESSOR}))
"""


def run(code: str, home: Path) -> dict[str, Any]:
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_an_eager_engine_has_no_inductor_until_somebody_imports_it(home: Path) -> None:
    found = run(LOAD.replace("EAGER", "True"), home)
    assert found == {"imported": False, "usable": True, "patched": False, "left": []}


def test_an_engine_that_compiles_has_it_with_vllms_patch(home: Path) -> None:
    found = run(LOAD.replace("EAGER", "False"), home)
    assert found == {"imported": True, "usable": True, "patched": True, "left": []}


def test_the_sdk_is_imported_without_a_look_at_the_processor(home: Path) -> None:
    assert run(SDK, home) == {"as before": True, "processor": "Unable to get processor info."}
