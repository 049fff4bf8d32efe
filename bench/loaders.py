"""Which of vLLM's loaders to boot with: weights' seconds and the whole boot, by loader and by source.

    python bench/loaders.py make FOLDER                 # the checkpoint: 3.4 GB, random weights, Qwen3-1.7B's shape
    python bench/loaders.py disk FOLDER                 # the disk's own rate
    python bench/loaders.py boots FOLDER [--states …] [--loaders …] [--rounds 3] [--extra LIBRARIES]
    python bench/loaders.py s3 FOLDER [--rounds 3] [--extra LIBRARIES]
    python bench/loaders.py report                             # bench/results/loaders.md

Each part adds to bench/results/loaders.json. A boot is `handler.py --test_input` with one token to make, so everything
is the worker's own but the setting that picks the loader. The loaders take turns in each round. `read-ahead` is
SNAPSHOT_VERIFY=full, which reads and hashes every file while Python imports; `alone` is `size`, which leaves the
reading to the loader. Evicted is the snapshot only (`posix_fadvise(DONTNEED)`), the environment stays cached.
LIBRARIES is a folder with what is not in the worker's environment, made by

    pip install --no-deps --target LIBRARIES runai-model-streamer==0.17.0 runai-model-streamer-s3==0.17.0 humanize

The disk is read with O_DIRECT, in blocks of 8 MiB, by 1, 4 and 16 threads, each block by one of them; and through the
page cache, evicted before, by one thread a file.

Predicted, before the first run, on two CPU cores:
- warm, alone: `prefetch` within 3% of the default (mmap), `threads` 0 to 20% faster weights, `eager` and
  `runai_streamer` 30% slower (each byte is copied once more), `sharded_state` within 10%.
- evicted, alone: the default at half of the disk's rate; `prefetch`, `threads` and `runai_streamer` at more than 80%.
- evicted, read-ahead: all within 5% of the default, because the weights are in the page cache by then; and the default
  boots at least 10% faster than evicted and alone, because it reads while Python imports.
- S3: `runai_streamer` straight to memory boots 10 to 20% faster than our fetch to disk, which writes every byte once;
  on a real network the line is the limit and the two are equal.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from coldstart import base, evict  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "loaders.json"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
ENGINE = {"max_model_len": 2048, "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
LOADERS: dict[str, dict[str, str]] = {
    "default": {},
    "eager": {"SAFETENSORS_LOAD_STRATEGY": "eager"},
    "prefetch": {"SAFETENSORS_LOAD_STRATEGY": "prefetch"},
    "threads": {"MODEL_LOADER_EXTRA_CONFIG": '{"enable_multithread_load": true, "num_threads": 4}'},
    "runai_streamer": {"LOAD_FORMAT": "runai_streamer"},
    "sharded_state": {"LOAD_FORMAT": "sharded_state"},
    "fastsafetensors": {"LOAD_FORMAT": "fastsafetensors"},
    "instanttensor": {"LOAD_FORMAT": "instanttensor"},
}
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
WAYS = ("fetch, then default", "runai_streamer from S3")
STATES = ("warm, alone", "evicted, alone", "evicted, read-ahead")
JOB = {"input": {"prompt": "hi", "sampling_params": {"max_tokens": 1}}}
BLOCK = 8 << 20


def make(folder: Path) -> None:
    """Write the checkpoint, and the same as vLLM's `sharded_state`: parameters under the names the engine has.

    vLLM's own `save_sharded_state` saves no linear layer on a CPU: their weights are repacked as they are loaded.
    """
    import torch
    from random_model import checkpoint, describe
    from safetensors.torch import load_file, save_file

    plain, sharded = folder / "plain", folder / "sharded"
    if not plain.exists():
        checkpoint(plain, SHAPE, fp8=False, layers_a_file=7)
    describe(plain, ENGINE, "none")
    sharded.mkdir(exist_ok=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in [name for name in tensors if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
                first, whole = ("q", "qkv") if "q_proj" in name else ("gate", "gate_up")
                parts = [name.replace(f"{first}_", f"{part}_") for part in FUSED[whole]]
                tensors[name.replace(f"{first}_", f"{whole}_")] = torch.cat([tensors.pop(part) for part in parts])
            if "model.embed_tokens.weight" in tensors:  # tied: of two names for one tensor the loader keeps the first
                tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, sharded / f"model-rank-0-part-{number}.safetensors", {"format": "pt"})
        elif path.name not in {"coldsnap.json", "model.safetensors.index.json"}:
            shutil.copy(path, sharded / path.name)
    # What the engine's attention has and a checkpoint has not.
    scales = {
        f"model.layers.{number}.self_attn.attn._{name}_scale": torch.tensor(1.0)
        for number in range(SHAPE["num_hidden_layers"])
        for name in ("q", "k", "v", "prob")
    }
    save_file(scales, sharded / "model-rank-0-part-scales.safetensors", {"format": "pt"})
    describe(sharded, ENGINE, "none")


def disk(folder: Path) -> dict[str, float]:
    """Return the disk's rates in GB/s by way of reading."""
    files = sorted((folder / "plain").glob("*.safetensors"))
    blocks = [(path, start) for path in files for start in range(0, path.stat().st_size - BLOCK, BLOCK)]
    rates: dict[str, list[float]] = {}
    for _ in range(3):
        for threads in (1, 4, 16):
            evict(folder)
            handles = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}

            def read(mine: list[tuple[Path, int]], handles: dict[Path, int] = handles) -> None:
                buffer = mmap.mmap(-1, BLOCK)  # aligned, as O_DIRECT wants it
                for path, start in mine:
                    assert os.preadv(handles[path], [buffer], start) == BLOCK

            rate = timed(read, [blocks[n::threads] for n in range(threads)], len(blocks) * BLOCK)
            rates.setdefault(f"direct, {threads} threads", []).append(rate)
            for handle in handles.values():
                os.close(handle)
        for state in ("evicted", "cached"):
            if state == "evicted":
                evict(folder)
            rate = timed(slurp, files, sum(path.stat().st_size for path in files))
            rates.setdefault(f"page cache {state}, a thread a file", []).append(rate)
    return {name: statistics.median(found) for name, found in rates.items()}


def slurp(path: Path) -> None:
    """Read a file as anybody would."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def timed(work: Callable[[Any], None], shares: list[Any], size: int) -> float:
    """Return the GB/s of `size` bytes when each share of the work has a thread."""
    begun = time.monotonic()
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(work, shares))
    return size / (time.monotonic() - begun) / 1e9


def run(command: list[str], home: Path, more: dict[str, str]) -> dict[str, Any]:
    """Boot for one job; return the record of the cold start, or what was refused."""
    ledger = home / "ledger" / "ledger.jsonl"
    ledger.unlink(missing_ok=True)
    env = base(home) | {"COLDSNAP_LEDGER_DIR": str(ledger.parent), "VLLM_LOGGING_LEVEL": "INFO"} | more
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        errors = re.findall(r"Worker pid.*\] (\w+Error: .*)", said)
        return {"refused": errors[-1][:200] if errors else said[-200:]}
    record: dict[str, Any] = json.loads(ledger.read_text().splitlines()[0])
    took = re.search(r"Loading weights took ([\d.]+) seconds", said)
    return {"seconds": record["seconds"], "phases": record["phases"], "beside": record["beside"],
            "weights": float(took[1]) if took else None}  # fmt: skip


def boots(folder: Path, states: list[str], loaders: list[str], rounds: int, extra: str) -> None:
    """Boot each loader in each state, in turn, and keep what was found after each round."""
    command = [sys.executable, str(ROOT / "handler.py"), "--test_input", json.dumps(JOB)]
    run(command, folder, {"SNAPSHOT_DIR": str(folder / "plain")})  # fills the home's caches
    for state in states:
        for number in range(rounds):
            turn = {}
            for name in loaders if number % 2 == 0 else loaders[::-1]:
                place = folder / ("sharded" if name == "sharded_state" else "plain")
                if state.startswith("warm"):
                    list(map(slurp, place.glob("*.safetensors")))
                else:
                    evict(folder / "plain", folder / "sharded")
                more = LOADERS[name] | {"SNAPSHOT_DIR": str(place), "PYTHONPATH": extra}
                more["SNAPSHOT_VERIFY"] = "full" if state.endswith("read-ahead") else "size"
                turn[name] = run(command, folder, more)
                print(state, name, json.dumps(turn[name]), file=sys.stderr)
            keep(state, turn)
            loaders = [name for name in loaders if "refused" not in turn[name]]


def s3(folder: Path, rounds: int, extra: str) -> None:
    """Fetch from a bucket on loopback and boot; and boot with the weights streamed from it."""
    pushed, cache = folder / "pushed", folder / "cache"
    manifest = json.loads((folder / "plain" / "coldsnap.json").read_text())
    (pushed / "blobs").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "plain" / "coldsnap.json", pushed)
    for name, entry in manifest["files"].items():
        if not (blob := pushed / "blobs" / entry["blake3"]).exists():
            blob.hardlink_to(folder / "plain" / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = [f"pushed={pushed}", f"plain={folder / 'plain'}"]
    server = subprocess.Popen([sys.executable, str(ROOT / "bench" / "object_server.py"), str(port), *served])
    account = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1", "PYTHONPATH": extra,
               "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "SNAPSHOT_CACHE": str(cache),
               "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "SNAPSHOT_VOLUME": str(folder / "none")}  # fmt: skip
    handler = [sys.executable, str(ROOT / "handler.py"), "--test_input", json.dumps(JOB)]
    streamed = [sys.executable, __file__, "stream", "s3://bucket/plain"]
    ways = {WAYS[0]: (handler, {"SNAPSHOT_S3_URI": "s3://bucket/pushed"}), WAYS[1]: (streamed, {})}
    try:
        time.sleep(1)
        run(streamed, folder, account)  # fills the home's caches
        for number in range(rounds):
            turn = {}
            for name, (command, more) in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
                shutil.rmtree(cache, ignore_errors=True)
                os.sync()
                list(map(slurp, (folder / "plain").glob("*.safetensors")))  # the server's disk is not what is measured
                turn[name] = run(command, folder, account | more)
                print(name, json.dumps(turn[name]), file=sys.stderr)
            keep("S3 on loopback", turn)
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(cache, ignore_errors=True)


def stream(uri: str) -> None:
    """Boot the worker's engine with weights straight from a bucket, which the worker itself does not offer."""
    from coldsnap.timeline import Timeline
    from coldsnap.vllm import release as vllm_release
    from coldsnap.vllm import start as vllm_start
    from coldsnap.vllm.grammar import Grammars

    timeline = Timeline()
    os.environ.update(vllm_release.environment(os.environ, ENGINE))
    timeline.mark("settings")
    vllm_start.load(os.environ)
    timeline.mark("import_vllm")
    grammars = Grammars(vllm_start.follow_grammars, most_bytes=100_000, seconds=2.0)
    grammars.start()
    engine = vllm_start.boot(
        model=uri, fixed={"load_format": "runai_streamer"}, manifest=ENGINE, environ=os.environ, engine_environ={},
        digest=None, chunk_interval=0.004, stall_seconds=60.0, metrics=False, grammars=grammars, max_n=32,
        mark=timeline.mark, warn=print,
    )  # fmt: skip
    record = {"seconds": timeline.total, "phases": timeline.phases, "beside": {}}
    folder = Path(os.environ["COLDSNAP_LEDGER_DIR"])
    folder.mkdir(exist_ok=True)
    (folder / "ledger.jsonl").write_text(json.dumps(record) + "\n")
    engine.close()


def keep(state: str, turn: dict[str, dict[str, Any]]) -> None:
    """Add one round to the results, each boot with its ratio to the round's first contender."""
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    first = next(name for name in (*LOADERS, *WAYS) if name in turn)
    for name, found in turn.items():
        if "seconds" in found:
            found["ratio"] = round(found["seconds"] / turn[first]["seconds"], 4)
        data.setdefault("boots", {}).setdefault(state, {}).setdefault(name, []).append(found)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def report() -> None:
    """Write what was found as Markdown: medians, and each boot's ratio to the default's of the same round."""
    data = json.loads(RESULTS.read_text())
    lines = ["Written by `bench/loaders.py`, which says what was run. Two CPU cores, shared virtual disk.", ""]
    lines += ["| way of reading the disk | GB/s |", "|---|---|"]
    lines += [f"| {name} | {rate:.2f} |" for name, rate in data["disk"].items()]
    for state, found in data["boots"].items():
        lines += [
            "",
            f"{state}:",
            "",
            "| | whole boot | all | to the default | `engine` | weights | waited for the read |",
        ]
        lines += ["|---" * 7 + "|"]
        for name, runs in found.items():
            if refused := [run["refused"] for run in runs if "refused" in run]:
                lines.append(f"| {name} | refused: {refused[0]} |" + " |" * 5)
                continue
            whole = [run["seconds"] for run in runs]
            ratio = statistics.median(run["ratio"] for run in runs)
            weights = [run["weights"] for run in runs if run["weights"] is not None]
            waited = [run["phases"].get("verify", run["phases"].get("fetch", 0.0)) for run in runs]
            engine = statistics.median(run["phases"]["engine"] for run in runs)
            lines.append(
                f"| {name} | {statistics.median(whole):.2f} s | {', '.join(f'{each:.2f}' for each in whole)} "
                f"| {ratio:.2f} | {engine:.2f} s | {f'{statistics.median(weights):.2f} s' if weights else '–'} "
                f"| {statistics.median(waited):.2f} s |"
            )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Do one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["make", "disk", "boots", "s3", "stream", "report"])
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    parser.add_argument("--states", nargs="+", default=STATES, choices=STATES)
    parser.add_argument("--loaders", nargs="+", default=list(LOADERS), choices=list(LOADERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extra", default="")
    args = parser.parse_args()
    folder = Path(args.folder).absolute()
    if args.part == "make":
        make(folder)
    elif args.part == "disk":
        data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        data["disk"] = disk(folder)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
        print(data["disk"])
    elif args.part == "boots":
        boots(folder, list(args.states), args.loaders, args.rounds, args.extra)
    elif args.part == "s3":
        s3(folder, args.rounds, args.extra)
    elif args.part == "stream":
        stream(args.folder)
    else:
        report()


if __name__ == "__main__":
    main()
