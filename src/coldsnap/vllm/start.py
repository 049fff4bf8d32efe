"""Starts the engine: vLLM is imported, configured by its own parser, patched where its release is known, and forked.

What it uses of vLLM is kept small, because it is what breaks when vLLM is upgraded: the argument parser, the engine's
configuration, `AsyncLLM`, and the classes that pace a stream. `tests/engine/test_vllm_seam.py` holds each of them
against the installed release.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import orjson

from coldsnap import patches
from coldsnap.cost import step_meter
from coldsnap.engine import EngineInfo, Limits
from coldsnap.errors import EngineBootError, InvalidInput, SettingsError
from coldsnap.vllm import arguments, grammar, moved, remembered, translation
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm.calls import MeteredLLM
from coldsnap.vllm.cause import FirstCause
from coldsnap.vllm.engine import VllmEngine
from coldsnap.vllm.grammar import Grammars
from coldsnap.vllm.pace import Pace, PacedQueue, PacedRequest
from coldsnap.vllm.stall import Watchdog

if TYPE_CHECKING:
    from coldsnap.cost.accounts import Accounts
    from coldsnap.cost.energy import EnergyCounters

_STARTING = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
"""vLLM's loggers that say why a core or a worker has not started."""


def load(environ: Mapping[str, str]) -> None:
    """Import vLLM: most of a boot. The collector is off meanwhile; `boot` freezes what is then alive."""
    gc.disable()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # about torch, to vLLM's authors
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # a CPU has no Triton, and needs none
    with remembered.searches(environ):
        from vllm.v1.engine import async_llm  # noqa: F401

        # It warns of any scheduler_cls. Ours derives from the one that vLLM would pick, so nothing is lost.
        logging.getLogger("vllm.config.scheduler").addFilter(lambda record: record.levelno > logging.WARNING)
        importlib.import_module(moved.parser_module())


def set_log_level(environ: Mapping[str, str]) -> None:
    """Give vLLM's logger the level that an import in `environ` would have given it."""
    if level := environ.get("VLLM_LOGGING_LEVEL"):
        logger = logging.getLogger("vllm")
        for each in (logger.setLevel, *(handler.setLevel for handler in logger.handlers)):
            each(level.upper())


def inspect_models(architectures: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Have vLLM look at these classes and cache what it finds, as the first boot would; return those it knows."""
    load(environ)
    from vllm.model_executor.models.registry import ModelRegistry

    known = [name for name in architectures if name in ModelRegistry.models]
    for name in known:
        ModelRegistry.models[name].inspect_model_cls()
    return known


def _register_models(folder: Path) -> None:
    """Import the classes that a checkpoint names, and give them to vLLM.

    It would start a process that looks at them, eight seconds, so as not to touch a GPU in this one; where there is
    none there is nothing to touch, and the engine's process needs them anyway.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    config = folder / "config.json"
    for name in orjson.loads(config.read_bytes()).get("architectures") or () if config.is_file() else ():
        with contextlib.suppress(ImportError, AttributeError):  # vLLM's own way says what is wrong with it
            if name in ModelRegistry.models:
                ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def load_http() -> None:
    """Import what the HTTP application needs, so that building it takes a moment only."""
    moved.builders()


def configure(
    *,
    model: str,
    fixed: Mapping[str, Any],
    manifest: Mapping[str, Any],
    environ: Mapping[str, str],
    warn: Callable[[str], None],
) -> tuple[arguments.Arguments, Any]:
    """Return what the settings say to vLLM, and the configuration that it makes of it. Starts nothing, CUDA least.

    Raises as `boot` does.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli = importlib.import_module(moved.parser_module())
    parser = cli.make_arg_parser(FlexibleArgumentParser())
    parser.set_defaults(use_tqdm_on_load=False, **vllm_release.defaults(environ, manifest))
    parsed = arguments.parse(parser, fixed={"model": model, **fixed}, manifest=manifest, environ=environ)
    for suspect, near in parsed.suspects.items():
        warn(f"{suspect} is not a setting of this worker or of vLLM; did you mean {near}?")
    if vllm_release.is_cpu_build() and patches.allowed("model_class"):
        _register_models(Path(model))
    try:
        cli.validate_parsed_serve_args(parsed.namespace)
        engine_args = AsyncEngineArgs.from_cli_args(parsed.namespace)
        _leave_cuda_alone(engine_args)
        # The batch's default size goes by who asks; `vllm serve` asks so.
        return parsed, engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        message = arguments.blame(parsed, translation.first_complaint(error))
        raise (SettingsError if message.startswith(tuple(parsed.origins.values())) else EngineBootError)(
            message
        ) from error


def boot(
    *,
    model: str,
    fixed: Mapping[str, Any],
    manifest: Mapping[str, Any],
    environ: MutableMapping[str, str],
    engine_environ: Mapping[str, str],
    digest: str | None,
    chunk_interval: float,
    stall_seconds: float,
    metrics: bool,
    grammars: Grammars,
    max_n: int,
    mark: Callable[[str], None],
    warn: Callable[[str], None],
) -> VllmEngine:
    """Start the engine on `model` and return it, ready to generate.

    `mark` is called with the name of each phase as it ends: `configure`, `engine`. With `metrics` vLLM
    counts for Prometheus at each step, which a push alone shows to anybody.
    Raises `SettingsError` for a wrong argument and `EngineBootError` for anything else that vLLM refuses.
    """
    import vllm.envs

    from coldsnap.cost.accounts import Accounts  # numpy is imported by now
    from coldsnap.cost.shares import Ledger
    from coldsnap.cost.step_model import StepModel

    parsed, config = configure(model=model, fixed=fixed, manifest=manifest, environ=engine_environ, warn=warn)
    args = parsed.namespace
    _leave_logging_alone(config)
    mark("configure")
    # vLLM's CPU platform asks for `spawn`, which imports everything again in each child. Nothing here has
    # started a thread or a device yet, so a fork is safe; on CUDA it is vLLM's own default.
    environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn" if vllm_release.moves_libraries(environ) else "fork"
    energy = _energy(config.parallel_config, warn)
    accounts = Accounts(Ledger(StepModel(*_sizes(config))), _unmetered(config), warn, energy=energy)
    if accounts.reader is not None:
        config.scheduler_config.scheduler_cls = step_meter.FACTORY
        environ[step_meter.VARIABLE] = accounts.reader.path
    environ.pop("VLLM_API_KEY", None)  # would lock the jobs out of the application; the platform checks its own keys
    gc.freeze()
    first_cause = FirstCause(_STARTING)
    try:
        llm = _metered_llm(accounts, grammars, Pace(chunk_interval), max_n=max_n, metrics=metrics).from_vllm_config(
            config, enable_log_requests=args.enable_log_requests, disable_log_stats=args.disable_log_stats
        )
    except (ValueError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        cause = first_cause.end() or translation.first_complaint(error)
        raise EngineBootError(arguments.blame(parsed, cause)) from error
    finally:
        gc.enable()
        if accounts.reader is not None:
            accounts.reader.opened()
    first_cause.end()
    if energy is not None:
        energy.start()
    start_method = _start_method(environ, warn)
    vllm.envs.enable_envs_cache()  # as its other processes do: it asks the environment at each token
    mark("engine")
    info = _info(config, tuple(args.served_model_name or [model]), digest, start_method)
    return VllmEngine(llm, args, info, accounts, grammars=grammars, watchdog=Watchdog(stall_seconds))


def _info(
    config: Any, models: tuple[str, ...], digest: str | None, start_method: Literal["fork", "spawn"]
) -> EngineInfo:
    from vllm.platforms import current_platform

    return EngineInfo(
        version=vllm_release.version(),
        gpu=current_platform.get_device_name() or current_platform.device_type,
        gpu_count=1 if current_platform.is_cpu() else config.parallel_config.world_size_across_dp,
        models=models,
        max_model_len=config.model_config.max_model_len,
        weights_digest=digest,
        limits=Limits(
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            kv_cache_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size or None,
        ),
        start_method=start_method,
    )


def follow_grammars(config: Any) -> Callable[[Any], None]:
    """Return what compiles a job's `structured_outputs` as the engine's process would, and follows it."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.request import StructuredOutputRequest

    manager = StructuredOutputManager(config)
    manager._use_async_grammar_compilation = False  # noqa: SLF001 -- it has no public name
    tokenizer = cached_tokenizer_from_config(config.model_config)

    def attempt(constraint: Any) -> None:
        sampling = SamplingParams(structured_outputs=constraint)
        sampling.verify(config.model_config, None, config.structured_outputs_config, tokenizer)
        backend, needed = structured._backend, sampling.structured_outputs._backend  # noqa: SLF001 -- the same
        if needed != backend:  # the engine keeps the first for ever, and would not follow all that is asked
            raise InvalidInput(
                f"a grammar of this kind needs the {needed} backend and the engine has {backend}; send a simpler one, "
                f"""or set STRUCTURED_OUTPUTS_CONFIG='{{"backend": "{needed}"}}' for this worker"""
            )
        wanted = StructuredOutputRequest.from_sampling_params(sampling)
        manager.grammar_init(
            SimpleNamespace(request_id="trial", sampling_params=sampling, structured_output_request=wanted)
        )
        if isinstance(wanted.grammar, Exception):
            raise wanted.grammar
        grammar.follow(wanted.grammar, manager.backend.allocate_token_bitmask(1))

    structured = StructuredOutputsParams(regex="a")
    SamplingParams(structured_outputs=structured).verify(
        config.model_config, None, config.structured_outputs_config, tokenizer
    )  # chooses the backend
    attempt(StructuredOutputsParams(regex="a"))  # makes the tables of the tokenizer, for all that follow
    return attempt


def _metered_llm(accounts: Accounts, grammars: Grammars, pace: Pace, *, max_n: int, metrics: bool) -> Any:
    """Return `AsyncLLM`, its streams paced, and every request, native or not, noted in the job's meter."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    paced = _paced(pace) if patches.allowed("pace") else None

    class LLM(MeteredLLM, AsyncLLM):  # type: ignore[misc] # vLLM is not followed
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accounts = accounts
            self.grammars = grammars
            self.max_n = max_n
            self.refusal = VLLMValidationError
            if paced is not None:
                self.output_processor.__class__ = paced
                if not metrics:
                    self.logger_manager = None

    return LLM


def _paced(pace: Pace) -> type:
    """Return vLLM's `OutputProcessor`, with every stream of deltas paced."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

    class Queue(PacedQueue, RequestOutputCollector):  # type: ignore[misc] # vLLM is not followed
        """A request's outputs."""

    class Paced(PacedRequest, RequestState):  # type: ignore[misc] # vLLM is not followed
        """A request's tokens."""

    class Processor(OutputProcessor):  # type: ignore[misc] # vLLM is not followed
        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            super().add_request(request, *args, **kwargs)
            state = self.request_states[request.request_id]
            # A stream of deltas; not one of an input that is a stream itself.
            if state.__class__ is RequestState and state.queue and state.queue.aggregate and not state.streaming_input:
                if not isinstance(state.queue, Queue):  # with `n` above 1 there are several requests to it
                    state.queue.__class__ = Queue
                    state.queue.begin(pace)
                state.__class__ = Paced

    return Processor


def _unmetered(config: Any) -> str | None:
    """Return why the steps of this engine cannot be metered, None if they can."""
    if config.scheduler_config.scheduler_cls is not None:
        return f"it runs a scheduler of its own, {config.scheduler_config.scheduler_cls}"
    if config.parallel_config.data_parallel_size > 1:
        return "it has several cores, whose steps overlap"
    return None if patches.allowed("step_meter") else "vLLM is of a release that the step meter was not tried with"


def _energy(parallel: Any, warn: Callable[[str], None]) -> EnergyCounters | None:
    """Return the energy counters of the engine's GPUs, None without an NVIDIA GPU."""
    from vllm.platforms import current_platform

    from coldsnap.cost.energy import EnergyCounters

    if not current_platform.is_cuda():
        return None
    devices = [current_platform.device_id_to_physical_device_id(i) for i in range(parallel.world_size)]
    return EnergyCounters(devices, warn)


def _leave_cuda_alone(engine_args: Any) -> None:
    """Say how large an all-reduce is fused at most, as vLLM would: its own look at that begins CUDA in this process.

    After that nothing can be forked. Only several Hopper or Blackwell GPUs fuse any.
    """
    from vllm.platforms import current_platform

    passes, gpus = engine_args.compilation_config.pass_config, engine_args.tensor_parallel_size
    if gpus == 1 or not current_platform.is_cuda() or passes.fi_allreduce_fusion_max_size_mb is not None:
        return
    capability = current_platform.get_device_capability()
    sizes = vllm_release.fused_allreduce_sizes().get(capability.to_int(), {}) if capability else {}
    passes.fi_allreduce_fusion_max_size_mb = sizes.get(gpus)


def _leave_logging_alone(config: Any) -> None:
    """Have logging configured once, by vLLM's import, unless an argument asks for something else.

    vLLM does it again in this process and in each that it forks, and each time Python resets every logger of vLLM's,
    at each the memory of all others: millions of writes to pages that a forked process has to copy.
    """
    configured = getattr(config, "logging_config", None)
    if configured is not None and configured == type(configured)():
        configured.configure_logging = False


def _start_method(environ: Mapping[str, str], warn: Callable[[str], None]) -> Literal["fork", "spawn"]:
    """Return how the engine's process was started: vLLM spawns where CUDA has begun, whatever it was asked for."""
    import torch

    kinds = {type(child) for child in multiprocessing.active_children()}
    if multiprocessing.get_context("spawn").Process not in kinds:
        return "fork"
    if vllm_release.moves_libraries(environ):
        because = "VLLM_ENABLE_CUDA_COMPATIBILITY changes LD_LIBRARY_PATH, which only a new program reads"
    else:
        because = "CUDA had begun in this process" if torch.cuda.is_initialized() else "vLLM's log says why"
    warn(f"the engine's process was spawned, which imports all of vLLM again, and not forked: {because}")
    return "spawn"


def _sizes(config: Any) -> tuple[float, float]:
    """Return the bytes of the weights and of one token's keys and values, roughly: the step model's first guess."""
    model, parallel = config.model_config, config.parallel_config
    layers, element = model.get_num_layers(parallel), model.dtype.itemsize
    files = Path(model.model).glob("*.safetensors")
    # Not on this disk: four projections of attention and eight of a gated MLP's, each hidden size squared.
    weights = sum(file.stat().st_size for file in files) or 12 * layers * model.get_hidden_size() ** 2 * element
    return weights, 2 * layers * model.get_num_kv_heads(parallel) * model.get_head_size() * element
