"""vLLM, embedded: the only module that imports it, and the only one that knows its exceptions.

The surface is kept small, because it is what breaks when vLLM is upgraded: the argument parser,
`AsyncLLM.generate`/`encode`, the renderer, and `build_app`/`init_app_state` of its HTTP application.
`tests/test_vllm_seam.py` holds each of them against the installed release.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import gc
import importlib
import importlib.abc
import importlib.metadata
import logging
import re
import sys
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import orjson

from coldsnap import arguments, asgi, imports, processes, remembered, step_meter
from coldsnap.engine import Delta, EngineInfo, Generation, HttpRequest, HttpResponse, Limits, Meter, Usage
from coldsnap.errors import (
    ColdsnapError,
    EngineBootError,
    EngineDead,
    InvalidInput,
    JobError,
    ModelNotFound,
    SettingsError,
)
from coldsnap.imports import Deferral
from coldsnap.pace import Pace, PacedQueue, PacedRequest

if TYPE_CHECKING:
    from coldsnap.accounts import Accounts
    from coldsnap.energy import EnergyCounters

_METER: ContextVar[Meter | None] = ContextVar("coldsnap_meter", default=None)
_CALLS: ContextVar[list[Any] | None] = ContextVar("coldsnap_calls", default=None)
"""Where an HTTP request's calls of the engine are noted."""

# fmt: off
_SAMPLING_INTERNAL = frozenset({
    "extra_args", "output_kind", "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache", "detokenize",
    "stream_interval", "routed_experts_prompt_start", "trace_decode_token_ids", "prompt_logprob_token_ids",
    "prompt_logprob_start",
})
# fmt: on
"""Fields of `SamplingParams` that are the engine's own business."""
_SAMPLING_OPENAI_ONLY = frozenset({"logprobs", "prompt_logprobs", "logprob_token_ids", "flat_logprobs"})
"""Fields whose result a native chunk has no place for."""


_TEMPLATE_RESERVED = frozenset({
    "chat_template", "conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of `apply_chat_template` that a job may not give: its own template is code, as vLLM's server knows."""


_TESTED = ("0.32.0",)
"""Releases of which it is known what they need while they are imported."""

# fmt: off
_LATER = (
    "aiohttp", "boto3", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "vllm.connections",
    "vllm.entrypoints.mcp.tool_server", "vllm.entrypoints.serve", "vllm.parser", "vllm.parser.engine.adapters",
    "vllm.transformers_utils.processor",
)
"""Modules that the front end needs: imported beside the engine's start."""
_ON_DEMAND = (
    "compressed_tensors.modeling", "compressed_tensors.modeling.attention", "compressed_tensors.modeling.kvcache",
    "compressed_tensors.offload", "torch._dynamo.symbolic_convert", "transformers.activations",
    "transformers.generation.utils", "transformers.image_processing_utils", "transformers.modeling_utils",
)
# fmt: on
"""Modules that only a compiler, a compressor and transformers' own models need, and that import each other."""


def _unchanged(function: Any = None, *_: object, **__: object) -> Any:
    """What each of `torch._dynamo`'s decorators amounts to when TORCHDYNAMO_DISABLE is set."""
    return (lambda decorated: decorated) if function is None else function


_WITHOUT_COMPILER: Mapping[str, Mapping[str, Any]] = {
    "torch._dynamo": {
        "allow_in_graph": _unchanged,
        "assume_constant_result": _unchanged,
        "decorators": SimpleNamespace(mark_unbacked=lambda *_: None),  # at every request for log probabilities
        "disable": _unchanged,
        "optimize": lambda *_, **__: _unchanged,
        "trace_rules": SimpleNamespace(clear_lru_cache=lambda: None),
    },
    "torch._inductor": {},
}
_COMPILERS_PARTS = (
    "torch._dynamo.backends",
    "torch._dynamo.config",
    "torch._dynamo.symbolic_convert",
    "torch._inductor.compiler_bisector",
    "torch._inductor.config",
    "torch._inductor.custom_graph_pass",
    "torch._inductor.runtime",
)
"""Parts of torch's compiler that do without the whole of it."""


class _Unprocessable(InvalidInput):
    status = 422
    type = "UnprocessableEntityError"


class _Unavailable(JobError):
    status = 503
    type = "ServiceUnavailableError"


_CONFLICT = 409


class _Conflict(JobError):
    status = _CONFLICT
    type = "Conflict"


def environment(environ: Mapping[str, str], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that vLLM needs set before it is imported, where the user has not set them.

    `manifest` holds the engine arguments baked into the snapshot.
    """
    wanted = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not is_cpu_build():
        # vLLM keeps the size of the KV cache that it has measured, and skips the measurement where nothing of what
        # that depends on has changed and as much memory is free.
        wanted["VLLM_ENABLE_STARTUP_PLAN"] = "1"
    else:
        # Unset, vLLM takes nearly all memory for the KV cache. One OpenMP thread, unbound, because the
        # engine is forked: libgomp's pool does not survive a fork and decode falls to a third.
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        if not (manifest.get("kv_cache_memory_bytes") or environ.get("KV_CACHE_MEMORY_BYTES")):
            wanted["VLLM_CPU_KVCACHE_SPACE"] = "1"  # it would overrule the argument
        if _eager(environ, manifest):
            # `enforce_eager` leaves some helpers to torch.compile: Inductor is imported for them in the boot, and
            # a C++ compiler is needed at the first request that uses one.
            wanted["TORCHDYNAMO_DISABLE"] = "1"
    return {name: value for name, value in wanted.items() if name not in environ}


def version() -> str:
    """Return vLLM's version, whichever distribution it came in."""
    return importlib.metadata.version("vllm-cpu" if is_cpu_build() else "vllm")


def argument_names() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, out of its source: its parser is not there before the import."""
    source = Path(_package(), "engine", "arg_utils.py").read_text(encoding="utf-8")
    return frozenset(name.replace("-", "_") for name in re.findall(r'"--([a-z][a-z0-9-]*)"', source))


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders in which vLLM and what it stands on keep what they compile, by what `environ` says."""
    home = Path.home()
    found = {
        "vllm": Path(environ.get("VLLM_CACHE_ROOT") or Path(environ.get("XDG_CACHE_HOME") or home / ".cache", "vllm")),
        "triton": Path(environ.get("TRITON_CACHE_DIR") or Path(environ.get("TRITON_HOME") or home, ".triton", "cache")),
        "flashinfer": Path(environ.get("FLASHINFER_WORKSPACE_BASE") or home, ".cache", "flashinfer"),
    }
    if inductor := environ.get("TORCHINDUCTOR_CACHE_DIR"):  # unset: vLLM's own folder, and for the rest a temporary one
        found["inductor"] = Path(inductor)
    return {name: folder.expanduser().absolute() for name, folder in found.items()}


def _package() -> Path:
    """Return vLLM's folder, without an import of it."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        raise EngineBootError("there is no vLLM in this environment: run scripts/setup.sh")
    return Path(found.origin).parent


def load(environ: Mapping[str, str]) -> None:
    """Import vLLM: most of a boot. The collector is off meanwhile; `boot` freezes what is then alive."""
    gc.disable()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # about torch, to vLLM's authors
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # a CPU has no Triton, and needs none
    file = cache_folders(environ)["vllm"].with_name("coldsnap") / "imports"
    found = remembered.Remembered(file, remembered.environment_key())
    tested = version().partition("+")[0] in _TESTED
    Deferral(
        _LATER if tested else (), after={"transformers.utils.import_utils": lambda module: _remember(module, found)}
    ).begin()
    search = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: found.answer("packages_distributions", search)
    if environ.get("TORCHDYNAMO_DISABLE") == "1" and tested:
        Deferral(_ON_DEMAND, _WITHOUT_COMPILER, _COMPILERS_PARTS).begin()
    if environ.get("TORCHDYNAMO_DISABLE") == "1":
        with _absent("torch._inductor.lowering"):
            importlib.import_module("vllm")
    from vllm.v1.engine import async_llm  # noqa: F401

    # It warns of any scheduler_cls. Ours derives from the one that vLLM would pick, so nothing is lost.
    logging.getLogger("vllm.config.scheduler").addFilter(lambda record: record.levelno > logging.WARNING)
    importlib.import_module(_parser_module())
    importlib.metadata.packages_distributions = search
    found.keep()


def _remember(module: Any, found: remembered.Remembered) -> None:
    """Spare transformers its look at the source of its 3,000 files, twice, for which class is where."""
    search = module.create_import_structure_from_path

    def remembering(path: Any) -> Any:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        return found.answer(str(folder), lambda: search(folder)) if folder.name == "models" else search(path)

    module.create_import_structure_from_path = remembering


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


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Let imports of `module` fail.

    vLLM patches Inductor's lowering as it is imported, and goes without where there is none: a tenth of the whole
    import, for a compiler that is switched off.
    """

    class Refusal(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: object, target: object = None) -> None:  # noqa: ARG002
            if name == module:
                raise ModuleNotFoundError(f"{name} is put off", name=name)

    refusal = Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)


def load_http() -> None:
    """Import what the HTTP application needs, so that building it takes a moment only, and all that was put off."""
    imports.settle()
    _builders()


def boot(
    *,
    model: str,
    fixed: Mapping[str, Any],
    manifest: Mapping[str, Any],
    environ: MutableMapping[str, str],
    engine_environ: Mapping[str, str],
    digest: str | None,
    chunk_interval: float,
    metrics: bool,
    mark: Callable[[str], None],
    warn: Callable[[str], None],
) -> VllmEngine:
    """Start the engine on `model` and return it, ready to generate.

    `mark` is called with the name of each phase as it ends: `configure`, `engine`. With `metrics` vLLM
    counts for Prometheus at each step, which a push alone shows to anybody.
    Raises `SettingsError` for a wrong argument and `EngineBootError` for anything else that vLLM refuses.
    """
    import vllm.envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from coldsnap.accounts import Accounts  # numpy is imported by now
    from coldsnap.ledger import Ledger
    from coldsnap.step_model import StepModel

    cli = importlib.import_module(_parser_module())
    parser = cli.make_arg_parser(FlexibleArgumentParser())
    parser.set_defaults(use_tqdm_on_load=False)
    parsed = arguments.parse(parser, fixed={"model": model, **fixed}, manifest=manifest, environ=engine_environ)
    for suspect, near in parsed.suspects.items():
        warn(f"{suspect} is not a setting of this worker or of vLLM; did you mean {near}?")
    args = parsed.namespace
    if is_cpu_build():
        _register_models(Path(model))
    try:
        cli.validate_parsed_serve_args(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (ValueError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        message = arguments.blame(parsed, _first_complaint(error))
        raise (SettingsError if message.startswith(tuple(parsed.origins.values())) else EngineBootError)(
            message
        ) from error
    mark("configure")
    # vLLM's CPU platform asks for `spawn`, which imports everything again in each child. Nothing here has
    # started a thread or a device yet, so a fork is safe; on CUDA it is vLLM's own default.
    environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    energy = _energy(config.parallel_config, warn)
    accounts = Accounts(Ledger(StepModel(*_sizes(config))), _unmetered(config), warn, energy=energy)
    if accounts.reader is not None:
        config.scheduler_config.scheduler_cls = step_meter.FACTORY
        environ[step_meter.VARIABLE] = accounts.reader.path
    environ.pop("VLLM_API_KEY", None)  # would lock the jobs out of the application; the platform checks its own keys
    gc.freeze()
    try:
        llm = _metered_llm(accounts, Pace(chunk_interval), metrics=metrics).from_vllm_config(
            config, enable_log_requests=args.enable_log_requests, disable_log_stats=args.disable_log_stats
        )
    except (ValueError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        raise EngineBootError(arguments.blame(parsed, _first_complaint(error))) from error
    finally:
        gc.enable()
        if accounts.reader is not None:
            accounts.reader.opened()
    if energy is not None:
        energy.start()
    vllm.envs.enable_envs_cache()  # as its other processes do: it asks the environment at each token
    mark("engine")
    parallel = config.parallel_config
    info = EngineInfo(
        version=version(),
        gpu=current_platform.get_device_name() or current_platform.device_type,
        gpu_count=1 if current_platform.is_cpu() else parallel.world_size_across_dp,
        models=tuple(args.served_model_name or [model]),
        max_model_len=config.model_config.max_model_len,
        weights_digest=digest,
        limits=Limits(
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            kv_cache_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size or None,
        ),
    )
    return VllmEngine(llm, args, info, accounts)


class VllmEngine:
    """The `Engine` of `coldsnap.engine`, on an `AsyncLLM` in this process and its core in a forked child."""

    def __init__(self, llm: Any, args: Any, info: EngineInfo, accounts: Accounts) -> None:
        from vllm.renderers.params import ChatParams
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.info = info
        self._llm = llm
        self._args = args
        self._accounts = accounts
        self._app: asyncio.Future[Any] | None = None
        self._delta = RequestOutputKind.DELTA
        self._sampling_params = SamplingParams
        self._chat_params = ChatParams
        self._sampling_defaults = llm.model_config.get_diff_sampling_param()
        self._sampling_fields = sorted(
            name
            for name in SamplingParams.__struct_fields__
            if not name.startswith("_") and name not in _SAMPLING_INTERNAL
        )

    async def generate(self, request: Generation, meter: Meter) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`. `max_tokens` is bounded by the context that the prompt leaves."""
        field = "prompt" if request.messages is None else "messages"
        rendered = f"{field}, chat_template_kwargs" if request.template else field
        with _translated({"input_text": field, "input_tokens": field}, rendered):
            sampling = self._sampling(request.sampling)
            prompt = await self._render(request)
            left = self.info.max_model_len - len(prompt["prompt_token_ids"])
            if left < 1:
                raise InvalidInput(
                    f"{field}: {len(prompt['prompt_token_ids'])} tokens leave no room for a completion in "
                    f"the context of {self.info.max_model_len} tokens; send a shorter one",
                    param=field,
                )
            sampling.max_tokens = min(sampling.max_tokens or left, left)
            sampling.output_kind = self._delta
            _METER.set(meter)
        sampled = "structured_outputs" in request.sampling
        with _translated({}, "sampling_params.structured_outputs" if sampled else "sampling_params"):
            async with contextlib.aclosing(self._llm.generate(prompt, sampling, request.id)) as outputs:
                async for output in outputs:
                    for part in output.outputs:
                        if part.finish_reason == "error":
                            raise _Unavailable("the engine gave this request up; its reason is in the worker's log")
                        if part.text or part.finish_reason:
                            yield Delta(part.text, part.index, part.finish_reason)

    @contextlib.asynccontextmanager
    async def http(self, request: HttpRequest, meter: Meter) -> AsyncIterator[HttpResponse]:
        """See `Engine.http`. The first call builds the application if `warm_up` has not yet."""
        app = await self._application()
        _METER.set(meter)
        calls: list[Any] = []
        _CALLS.set(calls)
        try:
            with _translated():
                async with asgi.request(app, request) as response:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            # An application that is stopped while it sends drops the engine's generator without closing it: the
            # request would run on until the garbage collector comes by.
            for call in calls:
                if not call.ag_running:
                    await call.aclose()
            raise

    async def warm_up(self) -> None:
        """See `Engine.warm_up`: one token, over the chat template if the model has one."""
        sampling = {"max_tokens": 1, "temperature": 0.0}
        if self._args.chat_template or getattr(self._llm.get_tokenizer(), "chat_template", None):
            request = Generation("warm-up", messages=[{"role": "user", "content": "a"}], sampling=sampling)
        else:
            request = Generation("warm-up", prompt="a", sampling=sampling)
        try:
            async for _ in self.generate(request, Meter()):
                pass
        except ColdsnapError as error:
            raise EngineBootError(f"the engine started but cannot answer: {error.message}") from error

    def usage(self) -> Usage:
        """See `Engine.usage`."""
        return self._accounts.usage()

    def check(self) -> None:
        """See `Engine.check`."""
        if self._llm.errored:
            raise EngineDead("the engine process is gone")

    def close(self) -> None:
        """See `Engine.close`: killed, because vLLM would collect garbage for a next engine in two processes, 1.4 s."""
        logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)  # it warns that it has to kill
        with processes.without_leaks():
            self._llm.shutdown(timeout=0.0)
        self._accounts.end()

    async def _application(self) -> Any:
        if self._app is None:
            self._app = asyncio.ensure_future(self._build_application())
        return await asyncio.shield(self._app)

    async def _build_application(self) -> Any:
        build, init = _builders()
        tasks = await self._llm.get_supported_tasks()
        app = build(self._args, tasks, self._llm.model_config)
        await init(self._llm, app.state, self._args, tasks)
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

    def _sampling(self, given: Mapping[str, Any]) -> Any:
        import msgspec

        for name in given:
            if name in _SAMPLING_OPENAI_ONLY:
                raise InvalidInput(
                    f"sampling_params.{name}: not in native jobs; an OpenAI request gets log probabilities",
                    param=f"sampling_params.{name}",
                )
            if name not in self._sampling_fields:
                near = difflib.get_close_matches(name, self._sampling_fields, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self._sampling_fields)}"
                raise InvalidInput(f"sampling_params.{name}: unknown; {hint}", param=f"sampling_params.{name}")
        values = self._sampling_defaults | {"max_tokens": None} | {k: v for k, v in given.items() if v is not None}
        try:
            return msgspec.convert(values, self._sampling_params, str_keys=True)
        except msgspec.ValidationError as error:
            # A wrong type has its path behind the message; a wrong value is vLLM's own error.
            message, _, path = str(error).partition(" - at `")
            cause = translate(error.__cause__) if isinstance(error.__cause__, Exception) else None
            message = cause.message if cause else message
            name = path.rpartition("$.")[2].rstrip("`") or next((n for n in self._sampling_fields if n in message), "")
            where = f"sampling_params.{name}" if name else "sampling_params"
            raise InvalidInput(f"{where}: {message}", param=where) from error


def _metered_llm(accounts: Accounts, pace: Pace, *, metrics: bool) -> Any:
    """Return `AsyncLLM`, its streams paced, and every request, native or not, noted in the job's meter."""
    from vllm.v1.engine.async_llm import AsyncLLM

    processor = _paced(pace)

    async def metered(outputs: AsyncGenerator[Any, None], request_id: str, requests: int) -> AsyncGenerator[Any, None]:
        meter = _METER.get() or Meter()
        account = accounts.open(request_id, requests, meter)
        output, aborted = None, False
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    first = account.first is None
                    if first:
                        accounts.first_output(account)
                    _note(meter, output, first=first)
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            aborted = output is None or not output.finished
            raise
        finally:
            accounts.close(account, aborted=aborted)

    class MeteredLLM(AsyncLLM):  # type: ignore[misc] # vLLM is not followed
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.output_processor.__class__ = processor
            if not metrics:
                self.logger_manager = None

        def generate(
            self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            outputs = super().generate(prompt, sampling_params, request_id, *args, **kwargs)
            call = metered(outputs, request_id, sampling_params.n)
            if (calls := _CALLS.get()) is not None:
                calls.append(call)
            return call

        def encode(
            self, prompt: Any, pooling_params: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            return metered(super().encode(prompt, pooling_params, request_id, *args, **kwargs), request_id, 1)

    return MeteredLLM


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
    return None


def _energy(parallel: Any, warn: Callable[[str], None]) -> EnergyCounters | None:
    """Return the energy counters of the engine's GPUs, None without an NVIDIA GPU."""
    from vllm.platforms import current_platform

    from coldsnap.energy import EnergyCounters

    if not current_platform.is_cuda():
        return None
    devices = [current_platform.device_id_to_physical_device_id(i) for i in range(parallel.world_size)]
    return EnergyCounters(devices, warn)


def _sizes(config: Any) -> tuple[float, float]:
    """Return about how many bytes the weights are and one token's keys and values: where the fit begins."""
    model, parallel = config.model_config, config.parallel_config
    layers, element = model.get_num_layers(parallel), model.dtype.itemsize
    files = Path(model.model).glob("*.safetensors")
    # Not on this disk: four projections of attention and eight of a gated MLP's, each hidden size squared.
    weights = sum(file.stat().st_size for file in files) or 12 * layers * model.get_hidden_size() ** 2 * element
    return weights, 2 * layers * model.get_num_kv_heads(parallel) * model.get_head_size() * element


def _note(meter: Meter, output: Any, *, first: bool) -> None:
    if first:
        meter.prompt_tokens += len(output.prompt_token_ids or ())
        meter.cached_tokens += output.num_cached_tokens or 0
    for part in output.outputs if isinstance(output.outputs, list) else ():  # a pooling output is one object
        meter.completion_tokens += len(part.token_ids)
        if part.finish_reason:
            meter.finish_reason = part.finish_reason
            meter.sequences += 1
    stats = getattr(output, "metrics", None)
    if stats is not None and stats.first_token_ts:
        meter.queue_seconds = max(meter.queue_seconds, stats.scheduled_ts - stats.queued_ts)
        meter.first_token = min(meter.first_token or stats.first_token_ts, stats.first_token_ts)
        meter.last_token = max(meter.last_token, stats.last_token_ts)


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
    """Return our error for one of vLLM's. Whatever it does not know is an internal error of one job."""
    import jinja2
    from vllm import exceptions
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    # Not str(error): some append their parameter and value, and the value may be the prompt.
    text = getattr(error, "message", None) or Exception.__str__(error) or type(error).__name__
    param = getattr(error, "parameter", None)
    if isinstance(error, EngineDeadError):
        return EngineDead("the engine process is gone")
    if isinstance(error, getattr(exceptions, "GracefulHTTPError", ())):
        return (_Conflict if getattr(error, "http_status", None) == _CONFLICT else _Unavailable)(text)
    if isinstance(error, getattr(exceptions, "RetryableRequestError", ())):
        return _Unavailable(text)
    if isinstance(error, getattr(exceptions, "VLLMNotFoundError", ())):
        return ModelNotFound(text, param="model")
    if isinstance(error, getattr(exceptions, "VLLMUnprocessableEntityError", ())):
        return _Unprocessable(text, param=param)
    client_errors = (
        exceptions.VLLMValidationError,
        getattr(exceptions, "VLLMClientError", ()),
        ValueError,
        TypeError,
        OverflowError,
        jinja2.TemplateError,
    )
    if any(isinstance(error, kind) for kind in client_errors):
        return InvalidInput(text, param=param)
    return JobError(f"{type(error).__name__}: {text}")


def _first_complaint(error: Exception) -> str:
    """Return the part of an error that a user can act on, on one line."""
    errors = getattr(error, "errors", None)
    if callable(errors) and (found := errors()):  # pydantic's
        where = ".".join(str(part) for part in found[0]["loc"])
        return f"{where}: {found[0]['msg']}" if where else str(found[0]["msg"])
    return " ".join(str(error).split()) or type(error).__name__


def _eager(environ: Mapping[str, str], manifest: Mapping[str, Any]) -> bool:
    given = environ.get("ENFORCE_EAGER")
    return arguments.is_true(given) if given else manifest.get("enforce_eager") is True


def is_cpu_build() -> bool:
    """Return whether this vLLM is the one for processors, which needs no GPU."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _parser_module() -> str:
    """Return where this release keeps `make_arg_parser`: it has moved twice."""
    for place in ("common", "launchers", "openai"):
        name = f"vllm.entrypoints.{place}.cli_args"
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(name):
                return name
    raise EngineBootError("this vLLM has no make_arg_parser where 0.26 to 0.33 keep it; see docs/runbooks")


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
