"""vLLM, embedded: the only module that imports it.

The surface is kept small, because it is what breaks when vLLM is upgraded: the argument parser,
`AsyncLLM.generate`/`encode`, the renderer, and `build_app`/`init_app_state` of its HTTP application.
`tests/engine/test_vllm_seam.py` holds each of them against the installed release.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import multiprocessing
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import orjson

from coldsnap import patches, processes
from coldsnap.cost import step_meter
from coldsnap.engine import Delta, EngineInfo, Generation, HttpRequest, HttpResponse, Limits, Meter, Usage
from coldsnap.errors import ColdsnapError, EngineBootError, EngineDead, InvalidInput, SettingsError, Unavailable
from coldsnap.vllm import arguments, asgi, calls, grammar, remembered, translation
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm.calls import MeteredLLM
from coldsnap.vllm.cause import FirstCause
from coldsnap.vllm.grammar import Grammars
from coldsnap.vllm.pace import Pace, PacedQueue, PacedRequest
from coldsnap.vllm.sampling import Sampling
from coldsnap.vllm.stall import Watchdog

if TYPE_CHECKING:
    from coldsnap.cost.accounts import Accounts
    from coldsnap.cost.energy import EnergyCounters

_LOOK_SECONDS = 1.0
"""How often the engine is checked for being alive while its first answer is waited for."""
_TEMPLATE_RESERVED = frozenset({
    "chat_template", "conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of `apply_chat_template` that a job may not give: its own template is code, as vLLM's server knows."""
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
        importlib.import_module(_parser_module())


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
    _builders()


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

    cli = importlib.import_module(_parser_module())
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


class VllmEngine:
    """The `Engine` of `coldsnap.engine`, on an `AsyncLLM` in this process and its core in a forked child."""

    def __init__(
        self, llm: Any, args: Any, info: EngineInfo, accounts: Accounts, *, grammars: Grammars, watchdog: Watchdog
    ) -> None:
        from vllm.renderers.params import ChatParams
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.info = info
        self._llm = llm
        self._args = args
        self._accounts = accounts
        self._grammars = grammars
        self._watchdog = watchdog
        self._warm = False
        self._app: asyncio.Future[Any] | None = None
        self._delta = RequestOutputKind.DELTA
        self._sampling = Sampling(SamplingParams, llm.model_config.get_diff_sampling_param(), translate)
        self._chat_params = ChatParams

    async def generate(self, request: Generation, meter: Meter) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`. `max_tokens` is bounded by the context that the prompt leaves."""
        field = "prompt" if request.messages is None else "messages"
        rendered = f"{field}, chat_template_kwargs" if request.template else field
        with _translated({"input_text": field, "input_tokens": field}, rendered):
            sampling = self._sampling.read(request.sampling)
            prompt = await self._render(request)
            left = self.info.max_model_len - len(prompt["prompt_token_ids"])
            if left < 1:
                raise InvalidInput(
                    f"{field}: {len(prompt['prompt_token_ids'])} tokens leave no room for a completion in "
                    f"the context of {self.info.max_model_len} tokens; send a shorter one",
                    param=field,
                )
            if sampling.max_tokens is not None and sampling.max_tokens > left:
                meter.warnings.append(
                    f"sampling_params.max_tokens: {sampling.max_tokens} asked for; the prompt leaves {left} in the "
                    f"context of {self.info.max_model_len} tokens"
                )
            sampling.max_tokens = min(sampling.max_tokens or left, left)
            sampling.output_kind = self._delta
            calls.METER.set(meter)
        constraint = "sampling_params.structured_outputs"
        unnamed = constraint if "structured_outputs" in request.sampling else "sampling_params"
        with _translated({"structured_outputs": constraint}, unnamed):
            async with contextlib.aclosing(self._llm.generate(prompt, sampling, request.id)) as outputs:
                async for output in outputs:
                    for part in output.outputs:
                        if part.finish_reason == "error":
                            raise Unavailable("the engine gave this request up; its reason is in the worker's log")
                        if part.text or part.finish_reason:
                            yield Delta(part.text, part.index, part.finish_reason)

    @contextlib.asynccontextmanager
    async def http(self, request: HttpRequest, meter: Meter) -> AsyncIterator[HttpResponse]:
        """See `Engine.http`. The first call builds the application if `warm_up` has not yet."""
        app = await self._application()
        calls.METER.set(meter)
        made: list[Any] = []
        calls.MADE.set(made)
        try:
            with _translated():
                async with asgi.request(app, request) as response:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            # An application that is stopped while it sends drops the engine's generator without closing it: the
            # request would run on until the garbage collector comes by.
            for call in made:
                if not call.ag_running:
                    await call.aclose()
            raise

    async def warm_up(self) -> None:
        """See `Engine.warm_up`: one token, over the chat template if the model has one.

        vLLM tells nobody of an engine that has died before its first request, which would wait for ever.
        """
        sampling = {"max_tokens": 1, "temperature": 0.0}
        if self._args.chat_template or getattr(self._llm.get_tokenizer(), "chat_template", None):
            request = Generation("warm-up", messages=[{"role": "user", "content": "a"}], sampling=sampling)
        else:
            request = Generation("warm-up", prompt="a", sampling=sampling)

        async def answer() -> None:
            async for _ in self.generate(request, Meter()):
                pass

        answered = asyncio.create_task(answer())
        try:
            while not (await asyncio.wait([answered], timeout=_LOOK_SECONDS))[0]:
                self.check()
            answered.result()
            self._warm = True
        except ColdsnapError as error:
            raise EngineBootError(f"the engine started but cannot answer: {error.message}") from error
        finally:
            answered.cancel()
        self._grammars.prepare(self._llm.vllm_config)

    def usage(self) -> Usage:
        """See `Engine.usage`."""
        return self._accounts.usage()

    def check(self) -> None:
        """See `Engine.check`."""
        if self._llm.errored:
            raise EngineDead("the engine process is gone")
        self._grammars.alive()
        # The first step may compile. What cannot be metered cannot be watched.
        if self._warm and (steps := self._accounts.steps) is not None:
            self._watchdog.look(steps, busy=self._accounts.busy)

    def close(self) -> None:
        """See `Engine.close`: killed, because vLLM would collect garbage for a next engine in two processes, 1.4 s."""
        logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)  # it warns that it has to kill
        with processes.without_leaks():
            self._llm.shutdown(timeout=0.0)
        self._accounts.end()
        self._grammars.close()

    async def _application(self) -> Any:
        if self._app is None:
            self._app = asyncio.ensure_future(self._build_application())
        return await asyncio.shield(self._app)

    async def _build_application(self) -> Any:
        build, init = _builders()
        tasks = await self._llm.get_supported_tasks()
        app = build(self._args, tasks, self._llm.model_config)
        await init(self._llm, app.state, self._args, tasks)
        app.state.server = SimpleNamespace()  # what vLLM's handler of errors tells when its engine is dead
        gc.freeze()  # see `worker`: it stays as long as the worker does
        return app

    async def _render(self, request: Generation) -> Any:
        renderer = self._llm.renderer
        if request.messages is None:
            (prompt,) = await renderer.render_cmpl_async([{"prompt": request.prompt}])
            return prompt
        for name in request.template:
            if name in _TEMPLATE_RESERVED:
                where = f"chat_template_kwargs.{name}"
                raise InvalidInput(f"{where}: not open to jobs", param=where)
        if len(request.messages) > self.info.max_model_len:
            raise InvalidInput(
                f"messages: {len(request.messages)} messages cannot fit into the context of "
                f"{self.info.max_model_len} tokens",
                param="messages",
            )
        chat = self._chat_params(
            chat_template=_chat_template(self._args.chat_template),
            chat_template_content_format=self._args.chat_template_content_format,
            # Not tokenized by the template: only text is measured before it is turned into tokens.
            chat_template_kwargs={"add_generation_prompt": True, **request.template, "tokenize": False},
        )
        _, (prompt,) = await renderer.render_chat_async([request.messages], chat)
        return prompt


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
        wanted = StructuredOutputRequest.from_sampling_params(sampling)
        manager.grammar_init(
            SimpleNamespace(request_id="trial", sampling_params=sampling, structured_output_request=wanted)
        )
        if isinstance(wanted.grammar, Exception):
            raise wanted.grammar
        grammar.follow(wanted.grammar, manager.backend.allocate_token_bitmask(1))

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


@contextlib.contextmanager
def _translated(fields: Mapping[str, str] | None = None, unnamed: str | None = None) -> Iterator[None]:
    """Raise vLLM's exceptions as ours; `fields` names the job's field for a parameter of vLLM's.

    `unnamed` is the job's field where vLLM names none.
    """
    try:
        yield
    except ColdsnapError:
        raise
    except Exception as error:
        ours = translate(error)
        where = (fields or {}).get(ours.param) if ours.param else unnamed
        if where and isinstance(ours, InvalidInput):
            ours.param = where
            ours.message = f"{where}: {ours.message}"
        raise ours from error


def translate(error: Exception) -> ColdsnapError:
    """Return our error for one of vLLM's."""
    from vllm import exceptions
    from vllm.v1.engine import exceptions as of_engine

    return translation.ours(error, {**vars(exceptions), **vars(of_engine)})


def _parser_module() -> str:
    """Return where this release keeps `make_arg_parser`: it has moved twice."""
    for place in ("common", "launchers", "openai"):
        name = f"vllm.entrypoints.{place}.cli_args"
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(name):
                return name
    raise EngineBootError(
        f"this vLLM has no make_arg_parser where {', '.join(patches.VLLM)} keep it; see docs/runbooks"
    )


def _first(*places: str) -> Any:
    for place in places:
        module, name = place.split(":")
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(module):
                return getattr(importlib.import_module(module), name)
    raise EngineBootError(f"this vLLM has none of {', '.join(places)}")


def _builders() -> tuple[Any, Any]:
    build = _first("vllm.entrypoints.launchers.app:build_app", "vllm.entrypoints.openai.api_server:build_app")
    init = _first(
        "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
        "vllm.entrypoints.openai.api_server:init_app_state",
    )
    return build, init


def _chat_template(given: str | None) -> str | None:
    if given is None:
        return None
    load = _first("vllm.renderers.chat_utils:load_chat_template", "vllm.entrypoints.chat_utils:load_chat_template")
    template: str | None = load(given)
    return template
