"""The seam to vLLM: what the worker takes from the installed release, and that nothing of it is overlooked."""

from __future__ import annotations

import ast
import importlib
import inspect
from argparse import Namespace
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

from coldsnap.errors import ColdsnapError, EngineDead, InvalidInput, JobError, RouteRefused
from coldsnap.jobs import routes
from coldsnap.vllm import arguments, moved, sampling
from coldsnap.vllm import engine as vllm_engine
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm import start as vllm_start
from coldsnap.vllm.pace import Pace, PacedQueue, PacedRequest

from .worker import MANIFEST, ROOT, SNAPSHOT

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


@pytest.fixture(scope="module")
def parser(offline: None) -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli = importlib.import_module(moved.parser_module())
    return cli.make_arg_parser(FlexibleArgumentParser())


def test_the_names_of_the_engines_givenare_in_the_source_that_is_read_before_the_import(offline: None) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    names = arguments._actions(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())).keys()
    assert names - vllm_release.argument_names() == set()
    assert {"max_model_len", "enforce_eager", "tensor_parallel_size"} <= names


def test_no_address_that_a_job_names_is_fetched_by_default(offline: None) -> None:
    from vllm.multimodal.media.connector import MediaConnector

    connector = MediaConnector(allowed_media_domains=vllm_release.defaults({}, {})["allowed_media_domains"])
    for address in ("http://127.0.0.1:1/a.png", "https://example.com/a.png"):
        with pytest.raises(ValueError, match="none but those in ALLOWED_MEDIA_DOMAINS"):
            connector.fetch_image(address)
    with pytest.raises((ValueError, RuntimeError), match="allowed-local-media-path"):
        connector.fetch_image("file:///etc/passwd")


@pytest.mark.parametrize(("given", "again"), [({}, False), ({"log_level": "DEBUG"}, True)])
def test_logging_is_configured_again_only_where_an_argument_asks_for_it(given: dict[str, str], again: bool) -> None:
    from vllm.config.logging import LoggingConfig

    configured = LoggingConfig(**given)
    vllm_start._leave_logging_alone(SimpleNamespace(logging_config=configured))
    assert configured.configure_logging is again
    vllm_start._leave_logging_alone(SimpleNamespace())  # 0.26 has no such thing


# Exceptions.

EXPECTED: dict[str, tuple[type[ColdsnapError], int]] = {
    "VLLMError": (JobError, 500),
    "VLLMClientError": (InvalidInput, 400),
    "VLLMServerError": (JobError, 500),
    "VLLMValidationError": (InvalidInput, 400),
    "ChatTemplateResolutionError": (InvalidInput, 400),
    "VLLMNotFoundError": (InvalidInput, 404),
    "LoRAAdapterNotFoundError": (InvalidInput, 404),
    "VLLMUnprocessableEntityError": (InvalidInput, 422),
    "GenerationError": (JobError, 500),
    "RetryableRequestError": (JobError, 503),
    "GracefulHTTPError": (JobError, 503),
    "QueueOverflowError": (JobError, 503),
    "MaxQueuedTokensError": (JobError, 503),
    "ProfilerAlreadyActiveError": (JobError, 409),
    "EngineGenerateError": (JobError, 500),
    "EngineDeadError": (EngineDead, 500),
}

NEWER = {"ChatTemplateResolutionError"}
"""Of 0.33.0, which the GPU lock has; the CPU build is older."""


def vllms_exceptions() -> dict[str, type[Exception]]:
    found = {}
    for name in ("vllm.exceptions", "vllm.v1.engine.exceptions"):
        module = importlib.import_module(name)
        for kind in vars(module).values():
            if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == name:
                found[kind.__name__] = kind
    return found


def made(kind: type[Exception]) -> Exception:
    """Make an exception with what its constructor must have."""
    if kind.__init__ is Exception.__init__:
        return kind("what went wrong")
    _, *parameters = inspect.signature(kind.__init__).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return kind(*(HTTPStatus(503) if name == "http_status" else "what went wrong" for name in needed))


def test_every_exception_of_vllm_is_expected_here() -> None:
    assert EXPECTED.keys() - vllms_exceptions().keys() <= NEWER
    assert vllms_exceptions().keys() <= EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_an_exception_of_vllm_becomes_ours_with_the_status_that_vllm_gives_it(name: str) -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    if name in NEWER - vllms_exceptions().keys():
        pytest.skip("this release has no such exception")
    error = made(vllms_exceptions()[name])
    ours = vllm_engine.translate(error)
    kind, status = EXPECTED[name]
    assert isinstance(ours, kind)
    assert ours.survives == (kind is not EngineDead)
    assert (ours.status, ours.body()["error"]["code"]) == (status, status)  # type: ignore[index]
    theirs = create_error_response(error).error
    assert theirs.code == status or name == "VLLMError"
    if kind is not EngineDead:
        assert theirs.message in ours.message
    assert "\n" not in ours.message


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("wrong"), InvalidInput),
        (TypeError("wrong"), InvalidInput),
        (OverflowError("too large"), InvalidInput),
        (jinja2.TemplateError("roles must alternate"), InvalidInput),
        (jinja2.UndefinedError("'x' is undefined"), InvalidInput),
        (NotImplementedError("not here"), JobError),
        (RuntimeError("broken"), JobError),
        (KeyError("broken"), JobError),
    ],
)
def test_pythons_own_exceptions_are_the_clients_fault_where_vllm_says_so(
    error: Exception, kind: type[ColdsnapError]
) -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    ours = vllm_engine.translate(error)
    assert isinstance(ours, kind)
    assert ours.survives
    theirs = create_error_response(error).error.code
    assert ours.status == theirs or (theirs, ours.status) == (501, 500)
    assert str(error.args[0]) in ours.message


def test_what_generation_wraps_is_unwrapped_and_the_field_kept() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    wrapped = EngineGenerateError()
    wrapped.__cause__ = VLLMValidationError("top_p must be in (0, 1]", parameter="top_p", value=7)
    ours = vllm_engine.translate(wrapped)
    assert isinstance(ours, InvalidInput)
    assert (ours.message, ours.param) == ("top_p must be in (0, 1]", "top_p")
    wrapped.__cause__ = EngineDeadError()
    assert isinstance(vllm_engine.translate(wrapped), EngineDead)


# Signatures.


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_engine_is_made_and_asked_as_the_worker_does() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(AsyncLLM.generate)[:3] == ["prompt", "sampling_params", "request_id"]
    assert parameters(AsyncLLM.encode)[:3] == ["prompt", "pooling_params", "request_id"]
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert inspect.isasyncgenfunction(AsyncLLM.encode)
    made = parameters(AsyncLLM.from_vllm_config)
    assert {"vllm_config", "enable_log_requests", "disable_log_stats"} <= set(made)
    for name in ("shutdown", "abort", "get_supported_tasks"):
        assert callable(getattr(AsyncLLM, name))
    assert isinstance(AsyncLLM.errored, property)


def test_the_http_application_is_built_as_the_worker_does() -> None:
    build, init = moved.builders()
    assert parameters(build) == ["args", "supported_tasks", "model_config"]
    assert parameters(init)[:4] == ["engine_client", "state", "args", "supported_tasks"]
    assert inspect.iscoroutinefunction(init)


def test_prompts_are_rendered_as_the_worker_does() -> None:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import ChatParams

    assert parameters(BaseRenderer.render_cmpl_async)[0] == "prompts"
    assert parameters(BaseRenderer.render_chat_async)[:2] == ["conversations", "chat_params"]
    assert {"chat_template", "chat_template_content_format", "chat_template_kwargs"} <= set(parameters(ChatParams))


def test_the_parser_knows_what_the_worker_and_the_manifest_set(parser: Any) -> None:
    options = {option for action in parser._actions for option in action.option_strings}
    needed = ["model", "served_model_name", "enable_log_requests", "disable_log_stats", *MANIFEST.engine_args]
    assert {f"--{name.replace('_', '-')}" for name in needed} <= options
    args = parser.parse_args(["--model", str(SNAPSHOT)])
    for name in ("chat_template", "chat_template_content_format", "use_tqdm_on_load"):
        assert hasattr(args, name)


def test_sampling_parameters_are_each_allowed_or_refused_by_name() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    fields = set(SamplingParams.__struct_fields__)
    assert fields >= sampling.OPENAI_ONLY
    assert {"max_tokens", "output_kind", "temperature", "n", "stop", "seed"} <= fields
    assert RequestOutputKind.DELTA
    allowed = {name for name in fields if not name.startswith("_")} - sampling.INTERNAL
    assert allowed - sampling.OPENAI_ONLY == {
        "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
        "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "skip_special_tokens",
        "spaces_between_special_tokens", "include_stop_str_in_output", "structured_outputs", "logit_bias",
        "allowed_token_ids", "bad_words", "thinking_token_budget", "repetition_detection", "watermarking",
    }  # fmt: skip


def test_an_output_carries_what_the_meter_reads() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.metrics.stats import RequestStateStats

    assert {"prompt_token_ids", "num_cached_tokens", "outputs", "metrics"} <= set(parameters(RequestOutput))
    assert {"index", "text", "token_ids", "finish_reason"} <= set(parameters(CompletionOutput))
    stats = RequestStateStats()
    for name in ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"):
        assert getattr(stats, name) == 0.0


# Routes.

EVERYTHING = ["--enable-scale-out", "--enable-fault-tolerance", "--enable-tokenizer-info-endpoint"]

OPTIONAL = {"/cohere/v2/chat", "/v1/decisions"}
"""Routes that vLLM has only where a package is installed that it does not ask for, or from 0.33 on."""


def applications(parser: Any) -> Iterator[Any]:
    """Build vLLM's application for every kind of model, with all that its arguments and environment can add."""
    from vllm.config import ModelConfig

    build, _ = moved.builders()
    known = {option for action in parser._actions for option in action.option_strings}
    args: Namespace = parser.parse_args(["--model", str(SNAPSHOT), *(flag for flag in EVERYTHING if flag in known)])
    generating = ModelConfig(model=str(SNAPSHOT))
    yield build(args, ("generate", "transcription", "realtime", "render"), generating)
    for task in ("embed", "classify", "token_embed", "token_classify"):
        convert = "classify" if "classify" in task else "embed"
        yield build(args, (task,), ModelConfig(model=str(SNAPSHOT), runner="pooling", convert=convert))


@pytest.fixture
def paths(parser: Any, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    for variable in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.setenv(variable, "1")
    found = set()
    for app in applications(parser):
        for route in app.routes:
            for method in getattr(route, "methods", None) or {"GET"}:
                found.add((route.path, method))
    return found


def test_every_route_of_vllm_is_either_allowed_or_refused_by_name(paths: set[tuple[str, str]]) -> None:
    assert len(paths) > 50
    allowed, refused, overlooked = set(), set(), set()
    for path, method in paths:
        if method in {"HEAD", "OPTIONS"}:
            continue
        try:
            routes.check(path.replace("{response_id}", "resp_1"), method)
        except RouteRefused:
            refused.add(path)
        except ColdsnapError:
            overlooked.add((path, method))
        else:
            allowed.add(path)
    assert overlooked == set()
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/messages", "/tokenize", "/classify"} <= allowed
    assert {"/metrics", "/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/server_info"} <= refused


def test_every_allowed_route_exists_in_vllm_with_its_method(paths: set[tuple[str, str]]) -> None:
    existing = {(path.replace("{response_id}", "{id}"), method) for path, method in paths}
    assert {path for path, method in routes.ALLOWED.items() if (path, method) not in existing} <= OPTIONAL


# Who imports what.


def test_one_module_imports_vllm_and_one_the_sdk() -> None:
    importers: dict[str, set[str]] = {"vllm": set(), "runpod": set(), "boto3": set()}
    package = ROOT / "src" / "coldsnap"
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                importers.get(name.partition(".")[0], set()).add(str(path.relative_to(package)))
    assert importers["vllm"] == {"vllm/engine.py", "vllm/start.py"}
    assert importers["runpod"] == {"worker.py"}
    assert len(importers["boto3"]) <= 1


# The queue of a request.


async def test_a_requests_queue_and_its_state_are_ones_that_the_pace_can_take_over() -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

    class Queue(PacedQueue, RequestOutputCollector):  # type: ignore[misc] # vLLM is not followed
        pass

    class Paced(PacedRequest, RequestState):  # type: ignore[misc] # vLLM is not followed
        pass

    tokenizer = Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json"))
    tokens = tokenizer.encode("Start the process, import the engine.").ids
    processor = OutputProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer), log_stats=False)
    sampling = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA)
    request = EngineCoreRequest("x-1", [1, 2], None, sampling, None, 0.0, None, None, None, external_req_id="x")
    queue: Any = RequestOutputCollector(RequestOutputKind.DELTA, "x-1")
    assert queue.aggregate
    processor.add_request(request, "", None, 0, queue)
    queue.__class__ = Queue
    queue.begin(Pace(3600.0))
    state = processor.request_states["x-1"]
    assert (state.stream_interval, state.sent_tokens_offset, state.streaming_input) == (1, 0, False)
    state.__class__ = Paced

    processor.process_outputs([EngineCoreOutput("x-1", tokens[:1])])
    first = await queue.get()
    for token in tokens[1:-1]:
        processor.process_outputs([EngineCoreOutput("x-1", [token])])
        assert queue.get_nowait() is None
    processor.process_outputs([EngineCoreOutput("x-1", tokens[-1:], finish_reason=FinishReason.LENGTH)])
    last = await queue.get()
    assert (first.finished, last.finished, last.outputs[0].finish_reason) == (False, True, "length")
    assert [*first.outputs[0].token_ids, *last.outputs[0].token_ids] == tokens
    assert first.outputs[0].text + last.outputs[0].text == tokenizer.decode(tokens)
    queue.close()


def test_requests_are_added_and_made_into_outputs_where_they_can_be_paced() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    source = inspect.getsource(AsyncLLM)
    for part in ("q.get_nowait() or await q.get()", "q.close()", "_processor.add_request(", "[self.logger_manager]"):
        assert part in source
    assert "req_state.make_request_output(" in inspect.getsource(OutputProcessor.process_outputs)
