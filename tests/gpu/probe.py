"""What vLLM's CUDA build makes of the machine that it runs on, for one tensor-parallel size; JSON, on the last line.

Run with `.venv-gpu/bin/python` by `test_seam.py`. Nothing that would begin CUDA may come before `after_configuration`.
"""

import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from coldsnap.caches import fingerprint
from coldsnap.cost import prices
from coldsnap.settings import ROOT
from coldsnap.vllm import moved
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm import start as vllm_start

MODEL = str(ROOT / "snapshots" / "demo")


def calls() -> list[str]:
    """Return what was called of the driver so far."""
    log = Path(os.environ["PRETENDED_CALLS"])
    return log.read_text("utf-8").splitlines() if log.exists() else []


def limits(config: object) -> dict[str, int]:
    scheduler = config.scheduler_config
    return {"tokens": scheduler.max_num_batched_tokens, "sequences": scheduler.max_num_seqs}


def served(gpus: str) -> object:
    """Return the configuration that `vllm serve` would have: its server's own default says who asks."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    server = moved.first(
        "vllm.entrypoints.launchers.api_server.entry:build_async_engine_client",
        "vllm.entrypoints.openai.api_server:build_async_engine_client",
    )
    asks = inspect.signature(server).parameters["usage_context"].default
    cli = importlib.import_module(moved.parser_module())
    args = cli.make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", MODEL, "--tensor-parallel-size", gpus])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config(asks)


def main(gpus: str) -> None:
    os.environ.update(vllm_release.environment(os.environ, {}))
    vllm_start.load(os.environ)
    after_import = calls()
    _, config = vllm_start.configure(
        model=MODEL, fixed={}, manifest={}, environ={"TENSOR_PARALLEL_SIZE": gpus}, warn=sys.exit
    )
    after_configuration = calls()

    from vllm.platforms import current_platform
    from vllm.utils.system_utils import get_mp_context

    parallel, name = config.parallel_config, current_platform.get_device_name()
    machine = fingerprint.of_machine(gpu=True)
    found = {
        "after_import": after_import,
        "after_configuration": after_configuration,
        "start_method": get_mp_context().get_start_method(),
        "scheduler": config.scheduler_config.get_scheduler_cls().__name__,
        "async": config.scheduler_config.async_scheduling,
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "executor": parallel.distributed_executor_backend,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "fuses": config.compilation_config.pass_config.fuse_allreduce_rms,
        "ranges": config.compilation_config.compile_ranges_endpoints,
        "limits": limits(config),
        "gpus": parallel.world_size_across_dp,
        "energy": vllm_start._energy(SimpleNamespace(world_size=parallel.world_size), sys.exit)._devices,
        "metered": vllm_start._unmetered(config) is None,
        "gpu": name,
        "fingerprint": fingerprint.name_of(machine),
        "machine": machine,
        "price": prices.of(name).per_second,
    }
    server = served(gpus)  # last: this begins CUDA where several GPUs fuse
    found["served"] = {"limits": limits(server), "ranges": server.compilation_config.compile_ranges_endpoints}
    found["after_serve"] = calls()
    print(json.dumps(found))  # noqa: T201


main(sys.argv[1])
