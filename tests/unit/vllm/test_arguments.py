"""Variables and manifest against vLLM's own parser. Slow for a unit test: the first one imports it (5 s)."""

from __future__ import annotations

import argparse
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from coldsnap.errors import SettingsError
from coldsnap.settings import Settings
from coldsnap.vllm import arguments, moved
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm.arguments import Arguments

ORDINARY = """
PATH HOME HOSTNAME LANG LC_ALL PWD USER SHELL TERM SHLVL LD_LIBRARY_PATH PYTHONPATH PYTHONUNBUFFERED
PYTHONDONTWRITEBYTECODE VIRTUAL_ENV PIP_CERT SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE HTTP_PROXY
HTTPS_PROXY NO_PROXY DEBIAN_FRONTEND TZ PORT HOST MODEL_PATH DATA_DIR LOG_FILE CUDA_HOME CUDA_VERSION
CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NCCL_VERSION
OMP_NUM_THREADS MKL_NUM_THREADS TRITON_CACHE_DIR HF_HOME HF_HUB_OFFLINE HF_HUB_ENABLE_HF_TRANSFER
TRANSFORMERS_OFFLINE TOKENIZERS_PARALLELISM VLLM_LOGGING_LEVEL VLLM_CACHE_ROOT VLLM_NO_USAGE_STATS
VLLM_CPU_KVCACHE_SPACE TORCH_CPP_LOG_LEVEL VLLM_WORKER_MULTIPROC_METHOD VLLM_USE_V1 PYTORCH_ALLOC_CONF
RUNPOD_AI_API_KEY RUNPOD_API_KEY RUNPOD_CPU_COUNT RUNPOD_DC_ID RUNPOD_ENDPOINT_SECRET RUNPOD_GPU_COUNT
RUNPOD_GPU_NAME RUNPOD_GPU_SIZE RUNPOD_MEM_GB RUNPOD_POD_HOSTNAME RUNPOD_PUBLIC_IP RUNPOD_LOG_LEVEL
RUNPOD_SKIP_GPU_CHECK RUNPOD_VOLUME_ID RUNPOD_PING_INTERVAL RUNPOD_INIT_TIMEOUT RUNPOD_WEBHOOK_PING
RUNPOD_WEBHOOK_POST_OUTPUT RUNPOD_WEBHOOK_POST_STREAM RUNPOD_TCP_PORT_22 PUBLIC_KEY JUPYTER_PASSWORD
KUBERNETES_SERVICE_HOST KUBERNETES_PORT BASE_PATH REQUEST_TIMEOUT VLLM_PORT VLLM_STARTUP_TIMEOUT
VLLM_EXTRA_ARGS RAW_OPENAI_OUTPUT DEFAULT_BATCH_SIZE DEFAULT_MIN_BATCH_SIZE TRANSFORMERS_VERSION
"""
"""Variables of a machine, a container, the platform, and of worker-vllm that are nothing here."""
WORKER_VLLM = """
MAX_MODEL_LEN TENSOR_PARALLEL_SIZE GPU_MEMORY_UTILIZATION DTYPE QUANTIZATION KV_CACHE_DTYPE ENFORCE_EAGER
ENABLE_PREFIX_CACHING ENABLE_LORA MAX_LORAS SPECULATIVE_CONFIG TOOL_CALL_PARSER ENABLE_AUTO_TOOL_CHOICE
REASONING_PARSER MAX_NUM_SEQS MAX_NUM_BATCHED_TOKENS TRUST_REMOTE_CODE LORA_MODULES MODEL_REVISION
TOKENIZER_NAME TOKENIZER_REVISION CUSTOM_CHAT_TEMPLATE ATTENTION_BACKEND ENABLE_LOG_REQUESTS
COMPILATION_CONFIG MODEL_NAME OPENAI_SERVED_MODEL_NAME_OVERRIDE SERVED_MODEL_NAME MAX_CONCURRENCY HF_TOKEN
"""
"""Variables that worker-vllm's documentation has and that keep working."""

Parser = argparse.ArgumentParser
FIXED = {"model": "/snapshot"}


@pytest.fixture(scope="module")
def new_parser() -> Callable[[], Parser]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_release.environment(os.environ, {}).items():
            patch.setenv(name, value)
        with warnings.catch_warnings(action="ignore"):  # torch's own
            cli = importlib.import_module(moved.parser_module())
            flexible = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser
    return lambda: cli.make_arg_parser(flexible())


@pytest.fixture
def parse(new_parser: Callable[[], Parser]) -> Callable[..., Arguments]:
    def parse(environ: dict[str, str] | None = None, manifest: dict[str, Any] | None = None, **fixed: Any) -> Arguments:
        return arguments.parse(new_parser(), fixed=FIXED | fixed, manifest=manifest or {}, environ=environ or {})

    return parse


Parse = Callable[..., Arguments]


def complaint(parse: Parse, environ: dict[str, str] | None = None, manifest: dict[str, Any] | None = None) -> str:
    with pytest.raises(SettingsError) as raised:
        parse(environ, manifest)
    assert "\n" not in raised.value.message
    return raised.value.message


def test_nothing_given_is_vllms_defaults(parse: Parse, new_parser: Callable[[], Parser]) -> None:
    defaults = vars(new_parser().parse_args(["--model=/snapshot"]))
    assert vars(parse().namespace) == defaults
    assert parse().origins == {"model": "model"}


class TestValues:
    @pytest.mark.parametrize(
        ("variable", "value", "name", "parsed"),
        [
            ("MAX_MODEL_LEN", "4096", "max_model_len", 4096),
            ("MAX_MODEL_LEN", " 4k\n", "max_model_len", 4000),
            ("TENSOR_PARALLEL_SIZE", "2", "tensor_parallel_size", 2),
            ("GPU_MEMORY_UTILIZATION", "0.85", "gpu_memory_utilization", 0.85),
            ("DTYPE", "bfloat16", "dtype", "bfloat16"),
            ("SEED", "-1", "seed", -1),
            ("ENFORCE_EAGER", "true", "enforce_eager", True),
            ("ENFORCE_EAGER", "1", "enforce_eager", True),
            ("ENFORCE_EAGER", "Off", "enforce_eager", False),
            ("USE_TQDM_ON_LOAD", "no", "use_tqdm_on_load", False),
            ("ENABLE_PREFIX_CACHING", "false", "enable_prefix_caching", False),
            ("DISABLE_LOG_STATS", "yes", "disable_log_stats", True),
            ("DISABLE_LOG_STATS", "0", "disable_log_stats", False),
            ("CUDAGRAPH_CAPTURE_SIZES", "1, 2,4,", "cudagraph_capture_sizes", [1, 2, 4]),
            ("CUDAGRAPH_CAPTURE_SIZES", "[1, 2, 4]", "cudagraph_capture_sizes", [1, 2, 4]),
            ("CUDAGRAPH_CAPTURE_SIZES", "8", "cudagraph_capture_sizes", [8]),
            ("IGNORE_PATTERNS", "[ab]*.bin", "ignore_patterns", ["[ab]*.bin"]),
            ("HF_OVERRIDES", '{"rope_theta": 1.5}', "hf_overrides", {"rope_theta": 1.5}),
            ("LIMIT_MM_PER_PROMPT", '{"image": 2}', "limit_mm_per_prompt", {"image": 2}),
            ("SPECULATIVE_CONFIG", '{"a": "--b.c=d, e"}', "speculative_config", {"a": "--b.c=d, e"}),
            ("CHAT_TEMPLATE", "--a.b {{ x }}\n= 'y' .", "chat_template", "--a.b {{ x }}\n= 'y' ."),
            ("TOOL_CALL_PARSER", "hermes", "tool_call_parser", "hermes"),
            ("DEVICE_MEMORY_UTILIZATION", "0.5", "gpu_memory_utilization", 0.5),
            ("MODEL_REVISION", "abc", "revision", "abc"),
            ("TOKENIZER_NAME", "org/tokenizer", "tokenizer", "org/tokenizer"),
            ("CUSTOM_CHAT_TEMPLATE", "x.jinja", "chat_template", "x.jinja"),
        ],
    )
    def test_a_variable_sets_an_argument(self, parse: Parse, variable: str, value: str, name: str, parsed: Any) -> None:
        result = parse({variable: value})
        assert getattr(result.namespace, name) == parsed
        assert result.origins[name] == variable

    @pytest.mark.parametrize(
        ("name", "value", "parsed"),
        [
            ("max_model_len", 512, 512),
            ("gpu_memory_utilization", 0.5, 0.5),
            ("gpu_memory_utilization", 1e-07, 1e-07),
            ("enforce_eager", True, True),
            ("use_tqdm_on_load", False, False),
            ("cudagraph_capture_sizes", [1, 2], [1, 2]),
            ("hf_overrides", {"a": {"b": ["c", None, True]}}, {"a": {"b": ["c", None, True]}}),
            ("chat_template", 'a "b"\n{{ c }}', 'a "b"\n{{ c }}'),
            ("served_model_name", ["a b", "c,d"], ["a b", "c,d"]),
        ],
    )
    def test_the_manifest_sets_an_argument(self, parse: Parse, name: str, value: Any, parsed: Any) -> None:
        result = parse(manifest={name: value})
        assert getattr(result.namespace, name) == parsed
        assert result.origins[name] == f"coldsnap.json: engine_args.{name}"

    @pytest.mark.parametrize(
        ("value", "adapters"),
        [
            ("a=/a", [("a", "/a")]),
            ("a=/a,b=/b", [("a", "/a"), ("b", "/b")]),
            ('{"name": "a", "path": "/a"}', [("a", "/a")]),
            ('[{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]', [("a", "/a"), ("b", "/b")]),
        ],
    )
    def test_lora_modules_may_have_any_form_that_worker_vllm_documents(
        self, parse: Parse, value: str, adapters: list[tuple[str, str]]
    ) -> None:
        found = parse({"LORA_MODULES": value}).namespace.lora_modules
        assert [(module.name, module.path) for module in found] == adapters

    def test_lora_modules_of_the_manifest_are_objects(self, parse: Parse) -> None:
        (found,) = parse(manifest={"lora_modules": [{"name": "a", "path": "/a"}]}).namespace.lora_modules
        assert (found.name, found.path) == ("a", "/a")

    def test_nested_configuration_is_parsed_by_vllm(self, parse: Parse) -> None:
        assert parse({"COMPILATION_CONFIG": '{"mode": 0}'}).namespace.compilation_config.mode == 0
        assert parse(manifest={"compilation_config": {"mode": 0}}).namespace.compilation_config.mode == 0

    def test_null_in_the_manifest_is_vllms_default(self, parse: Parse) -> None:
        names = ("max_num_seqs", "seed", "dtype", "enforce_eager", "quantization")
        assert vars(parse(manifest=dict.fromkeys(names)).namespace) == vars(parse().namespace)


class TestPrecedence:
    def test_the_environment_comes_before_the_manifest(self, parse: Parse) -> None:
        result = parse({"MAX_MODEL_LEN": "2", "ENFORCE_EAGER": "0"}, {"max_model_len": 1, "enforce_eager": True})
        assert (result.namespace.max_model_len, result.namespace.enforce_eager) == (2, False)
        assert result.origins["max_model_len"] == "MAX_MODEL_LEN"

    def test_so_it_does_under_an_arguments_other_name(self, parse: Parse) -> None:
        result = parse({"DEVICE_MEMORY_UTILIZATION": "0.2"}, {"gpu_memory_utilization": 0.1})
        assert result.namespace.gpu_memory_utilization == 0.2
        result = parse({"GPU_MEMORY_UTILIZATION": "0.2"}, {"device_memory_utilization": 0.1})
        assert result.namespace.gpu_memory_utilization == 0.2

    def test_the_workers_own_choice_comes_before_both(self, parse: Parse) -> None:
        result = parse({"SERVED_MODEL_NAME": "a"}, {"served_model_name": "b"}, served_model_name=("c", "d"))
        assert result.namespace.served_model_name == ["c", "d"]

    @pytest.mark.parametrize("order", [1, -1])
    def test_worker_vllms_name_comes_before_vllms(self, parse: Parse, order: int) -> None:
        environ = dict([("MODEL_REVISION", "theirs"), ("REVISION", "vllms")][::order])
        assert parse(environ).namespace.revision == "theirs"

    @pytest.mark.parametrize("empty", ["", " ", "\n"])
    def test_an_empty_variable_is_not_set(self, parse: Parse, empty: str) -> None:
        result = parse({"MAX_MODEL_LEN": empty, "ENFORCE_EAGER": empty}, {"max_model_len": 1})
        assert (result.namespace.max_model_len, result.namespace.enforce_eager) == (1, False)


class TestIgnored:
    @pytest.mark.parametrize(
        "variable",
        [
            "HOST",
            "PORT",
            "API_KEY",
            "MODEL",
            "CONFIG",
            "HELP",
            "MIDDLEWARE",
            "ROOT_PATH",
            "SSL_KEYFILE",
            "GRPC",
        ],
    )
    def test_what_is_not_the_users_to_set_is_ignored(self, parse: Parse, variable: str) -> None:
        assert vars(parse({variable: "1"}).namespace) == vars(parse().namespace)

    def test_names_in_lower_case_are_not_meant(self, parse: Parse) -> None:
        assert parse({"max_model_len": "1", "Dtype": "x"}).origins == {"model": "model"}


class TestWrongValues:
    @pytest.mark.parametrize(
        ("variable", "value", "right"),
        [
            ("MAX_MODEL_LEN", "four", "expected a whole number such as 8192 or 8k, found 'four'"),
            ("TENSOR_PARALLEL_SIZE", "1.5", "expected a whole number, found '1.5'"),
            ("GPU_MEMORY_UTILIZATION", "90%", "expected a number, found '90%'"),
            ("DEVICE_MEMORY_UTILIZATION", "90%", "expected a number, found '90%'"),
            ("DTYPE", "float17", "choose from 'auto', 'bfloat16'"),
            ("LOG_LEVEL", "silly", "choose from 'CRITICAL'"),
            ("ENFORCE_EAGER", "maybe", "expected true or false, found 'maybe'"),
            ("DISABLE_LOG_STATS", "2", "expected true or false, found '2'"),
            ("CUDAGRAPH_CAPTURE_SIZES", "1,x", "expected a whole number, found 'x'"),
            ("CUDAGRAPH_CAPTURE_SIZES", ",", "expected at least one argument"),
            ("COMPILATION_CONFIG", '{"mode":', "Invalid JSON"),
            ("COMPILATION_CONFIG", '{"no_such_thing": 1}', "no_such_thing"),
            ("SPECULATIVE_CONFIG", "ngram", "ngram"),
            ("LORA_MODULES", "nonsense", "nonsense"),
            ("LORA_MODULES", '[{"nme": "a"}]', "nme"),
            ("LORA_MODULES", "a=/a,--enable-lora", "items that do not begin with '-'"),
        ],
    )
    def test_the_variable_is_named_with_what_would_be_right(
        self, parse: Parse, variable: str, value: str, right: str
    ) -> None:
        message = complaint(parse, {variable: value})
        assert message.startswith(f"{variable}: ")
        assert right in message

    @pytest.mark.filterwarnings("ignore:--log-config-file is deprecated")
    def test_whatever_vllm_refuses_is_named(self, parse: Parse, new_parser: Callable[[], Parser]) -> None:
        refused = {}
        for name in arguments._actions(new_parser()):
            if name in arguments._NOT_FROM_ENVIRONMENT:
                continue
            try:
                parse({name.upper(): '{"wrong'})
            except SettingsError as error:
                refused[name.upper()] = error.message
        assert len(refused) > 150
        assert [message for name, message in refused.items() if not message.startswith(f"{name}: ")] == []

    def test_an_alias_is_named_as_the_user_wrote_it(self, parse: Parse) -> None:
        parsed = parse({"TOKENIZER_NAME": "x"})
        assert arguments.blame(parsed, "tokenizer x was not found").startswith("TOKENIZER_NAME: ")

    @pytest.mark.parametrize(
        ("manifest", "start"),
        [
            ({"max_model_len": "four"}, "coldsnap.json: engine_args.max_model_len: expected"),
            (
                {"enforce_eager": 2},
                "coldsnap.json: engine_args.enforce_eager: expected true or false, found 2",
            ),
            ({"dtype": 16}, "coldsnap.json: engine_args.dtype: invalid choice: '16'"),
            (
                {"cudagraph_capture_sizes": []},
                "coldsnap.json: engine_args.cudagraph_capture_sizes: expected at least",
            ),
            (
                {"max_model_length": 1},
                "coldsnap.json: engine_args.max_model_length: vLLM has no such argument; did you mean 'max_",
            ),
            ({"max-model-len": 1}, "coldsnap.json: engine_args.max-model-len: vLLM has no such argument"),
            ({"help": True}, "coldsnap.json: engine_args.help: vLLM has no such argument"),
            ({"qqqqq": 1}, "coldsnap.json: engine_args.qqqqq: vLLM has no such argument"),
        ],
    )
    def test_the_manifests_key_is_named(self, parse: Parse, manifest: dict[str, Any], start: str) -> None:
        assert complaint(parse, manifest=manifest).startswith(start)


class TestBlame:
    def test_an_argument_in_the_message_leads_to_its_variable(self, parse: Parse) -> None:
        parsed = parse({"MAX_MODEL_LEN": "9"}, {"max_num_seqs": 3})
        for message, origin in (
            ("User-specified max_model_len (9) is too large", "MAX_MODEL_LEN"),
            ("use a smaller --max-model-len", "MAX_MODEL_LEN"),
            ("4 heads cannot be divided by the max model len (9)", "MAX_MODEL_LEN"),
            ("max_num_seqs must be positive", "coldsnap.json: engine_args.max_num_seqs"),
        ):
            assert arguments.blame(parsed, message) == f"{origin}: {message}"

    @pytest.mark.parametrize(
        "message",
        ["the model's max seq len is larger than the cache", "my_max_model_len_x is odd", "no idea"],
    )
    def test_nobody_is_blamed_for_what_was_not_set(self, parse: Parse, message: str) -> None:
        assert arguments.blame(parse({"MAX_MODEL_LEN": "9"}), message) == message


class TestSuspects:
    @pytest.mark.parametrize(
        ("variable", "meant"),
        [
            ("MAX_MODEL_LENGTH", "MAX_MODEL_LEN"),
            ("MAX_MODEL_LE", "MAX_MODEL_LEN"),
            ("TENSOR_PARALLEL_SIZ", "TENSOR_PARALLEL_SIZE"),
            ("GPU_MEMORY_UTILISATION", "GPU_MEMORY_UTILIZATION"),
            ("ENABLE_PREFIX_CACHE", "ENABLE_PREFIX_CACHING"),
            ("TRUST_REMOTECODE", "TRUST_REMOTE_CODE"),
            ("MAX_NUM_SEQ", "MAX_NUM_SEQS"),
            ("DISABLE_LOG_REQUESTS", "ENABLE_LOG_REQUESTS"),
            ("VLLM_ATTENTION_BACKEND", "ATTENTION_BACKEND"),
        ],
    )
    def test_a_misspelt_argument_is_reported_with_the_nearest_name(
        self, parse: Parse, variable: str, meant: str
    ) -> None:
        assert parse({variable: "1"}).suspects == {variable: meant}

    def test_nothing_in_an_ordinary_environment_is_suspect_or_an_argument(self, parse: Parse) -> None:
        parsed = parse(Settings.others(dict.fromkeys(ORDINARY.split(), "1")))
        assert parsed.suspects == {}
        assert parsed.origins == {"model": "model"}

    def test_known_names_and_aliases_are_not_suspect(self, parse: Parse) -> None:
        environ = {"MAX_MODEL_LEN": "1", "CUSTOM_CHAT_TEMPLATE": "x", "MODEL_REVISION": "x", "PORT": "1"}
        assert parse(environ).suspects == {}


@pytest.mark.parametrize(
    "variable",
    WORKER_VLLM.split(),
)
def test_the_names_of_worker_vllms_documentation_are_known(new_parser: Callable[[], Parser], variable: str) -> None:
    name = arguments.ALIASES.get(variable, variable.lower())
    known = set(arguments._actions(new_parser())) - arguments._NOT_FROM_ENVIRONMENT
    assert name in known or variable not in Settings.others({variable: "x"})


class Paired(argparse.BooleanOptionalAction):
    """What vLLM 0.33 makes of a switch: --disable-x beside --enable-x, and a --no-enable-x that it does not list."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.option_strings = [*self.option_strings, "--disable-x"]

    def __call__(self, _parser: Any, namespace: Any, _values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == "--enable-x")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ENABLE_X", "true", True),
        ("ENABLE_X", "false", False),
        ("DISABLE_X", "true", False),
        ("DISABLE_X", "false", True),
    ],
)
def test_a_switch_that_has_two_names_is_thrown_by_either(variable: str, value: str, expected: bool) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    switch = parser.add_argument("--enable-x", action=Paired)
    switch.option_strings = ["--enable-x", "--disable-x"]
    parsed = arguments.parse(parser, fixed=FIXED, manifest={}, environ={variable: value})
    assert parsed.namespace.enable_x is expected
