"""Turns environment variables and the manifest into vLLM's own arguments, checked by vLLM's own parser.

There is no list of vLLM's arguments here: `TENSOR_PARALLEL_SIZE=2` is an argument because the parser that
vLLM made has `--tensor-parallel-size`. Precedence: environment, then manifest, then vLLM's default.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from coldsnap.errors import SettingsError

ALIASES: Mapping[str, str] = {
    "MODEL_REVISION": "revision",
    "TOKENIZER_NAME": "tokenizer",
    "CUSTOM_CHAT_TEMPLATE": "chat_template",
}
"""worker-vllm's names for arguments that vLLM calls otherwise."""

# fmt: off
_NOT_FROM_ENVIRONMENT = frozenset({
    "help", "model", "model_tag", "config", "host", "port", "uds", "api_key", "root_path", "headless",
    "grpc", "grpc_port", "api_server_count", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs",
    "enable_ssl_refresh", "ssl_ciphers", "allow_credentials", "allowed_origins", "allowed_methods",
    "allowed_headers", "uvicorn_log_level", "disable_uvicorn_access_log", "middleware",
})
# fmt: on
"""The model, which is the snapshot, and arguments of vLLM's HTTP server, which this worker does not run."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_LOOKS_MEANT = 0.86
"""difflib ratio from which a variable is taken for a misspelt argument."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A parsed command line and where each of its values came from."""

    namespace: argparse.Namespace
    origins: Mapping[str, str]
    """Argument name -> what to call it in an error: the variable, or the manifest's key."""
    suspects: Mapping[str, str]
    """Unknown variable -> the argument's variable that it resembles."""


def parse(
    parser: argparse.ArgumentParser,
    *,
    fixed: Mapping[str, Any],
    manifest: Mapping[str, Any],
    environ: Mapping[str, str],
) -> Arguments:
    """Parse `fixed` (the worker's own choices), `environ` and `manifest` with vLLM's parser.

    Raises `SettingsError` that names the variable, or the manifest's key, whose value is wrong.
    """
    actions = _actions(parser)
    values: dict[str, tuple[str, Any]] = {}
    origins: dict[str, str] = {}

    def take(name: str, value: Any, origin: str) -> None:
        action = actions[name]
        values[action.dest], origins[action.dest] = (name, value), origin

    for name, value in manifest.items():
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"coldsnap.json: engine_args.{name}: vLLM has no such argument{hint}")
        if value is not None:  # null: vLLM's default
            take(name, value, f"coldsnap.json: engine_args.{name}")
    for name, value, variable in given(environ, actions):
        take(name, value, variable)
    for name, value in fixed.items():
        take(name, value, name)
    argv: list[str] = []
    for dest, (name, value) in values.items():
        argv += _words(parser, name, actions[name], value, origins[dest])

    def fail(message: str) -> NoReturn:
        raise SettingsError(_by_origin(" ".join(message.split()), actions, origins))

    parser.error = fail  # type: ignore[method-assign]
    return Arguments(parser.parse_args(argv), origins, _suspects(environ, actions))


def given(environ: Mapping[str, str], names: Container[str]) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and variable of each argument that `environ` sets; `names` are those that vLLM has."""
    for variable, value in sorted(
        environ.items(), key=lambda item: item[0] in ALIASES
    ):  # an alias comes last, and wins
        name = ALIASES.get(variable) or (variable.lower() if variable.isupper() else "")
        if name in names and name not in _NOT_FROM_ENVIRONMENT and value.strip():
            yield name, value.strip(), variable


def blame(arguments: Arguments, message: str) -> str:
    """Put the variable's name before a complaint of vLLM's configuration that names an argument."""
    return _blame(message, arguments.origins)


def _blame(message: str, origins: Mapping[str, str]) -> str:
    for name, origin in origins.items():
        if origin == name:  # the worker's own choice
            continue
        words = name.replace("_", "[_ ]")  # "by tensor parallel size (9)"
        if re.search(rf"\b{words}\b", message) or f"--{name.replace('_', '-')}" in message:
            return f"{origin}: {message}"
    return message


def is_true(text: str) -> bool:
    """Return whether a variable switches something on."""
    return text.strip().lower() in _TRUE


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        _name(option): action
        for action in parser._actions  # noqa: SLF001 -- argparse has no public way to list its options
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-") and action.dest != "help"
    }


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _words(parser: argparse.ArgumentParser, name: str, action: argparse.Action, value: Any, origin: str) -> list[str]:
    flag = next(option for option in action.option_strings if _name(option) == name)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        text = str(value).strip().lower()
        if text not in _TRUE | _FALSE:
            raise SettingsError(f"{origin}: expected true or false, found {value!r}")
        if text in _TRUE:
            return [flag]
        if not isinstance(action, argparse.BooleanOptionalAction):
            return []
        # From 0.33 on --disable-x is the other side of --enable-x, and --no-enable-x is known but not listed.
        no_flag = f"--no-{flag.removeprefix('--')}"
        known = parser._option_string_actions  # noqa: SLF001 -- argparse has no public way to ask
        return [no_flag if no_flag in known else action.option_strings[0]]
    if action.nargs in {"+", "*"}:
        items = [_word(item) for item in _items(value)]
        if dashed := next((item for item in items if item.startswith("-")), None):
            raise SettingsError(f"{origin}: expected items that do not begin with '-', found {dashed!r}")
        return [flag, *items]
    return [f"{flag}={_word(value)}"]


def _items(value: Any) -> list[Any]:
    """Return a list's items; a variable holds them as JSON or between commas."""
    if isinstance(value, str):
        if value.startswith(("[", "{")):
            with contextlib.suppress(orjson.JSONDecodeError):
                return _items(orjson.loads(value))
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _word(item: Any) -> str:
    return item if isinstance(item, str) else orjson.dumps(item).decode()


def _by_origin(message: str, actions: Mapping[str, argparse.Action], origins: Mapping[str, str]) -> str:
    if match := re.match(r"argument (--[\w-]+)[^:]*: (.*)", message):
        action = actions.get(match[1][2:].replace("-", "_"))
        if action and action.dest in origins:
            complaint = re.sub(
                r"^invalid (\w+) value: (.*)", lambda m: f"expected {_kind(m[1])}, found {m[2]}", match[2]
            )
            return f"{origins[action.dest]}: {complaint}"
    return _blame(message, origins)


def _kind(parser: str) -> str:
    """Return in words what one of argparse's converters takes."""
    known = {"int": "a whole number", "float": "a number"}
    return known.get(parser, "a whole number such as 8192 or 8k" if "human_readable_int" in parser else f"a {parser}")


def _suspects(environ: Mapping[str, str], actions: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in actions if name not in _NOT_FROM_ENVIRONMENT and "_" in name]
    suspects = {}
    for variable in environ:
        name = variable.lower()
        if "_" in name and variable.isupper() and name not in actions and variable not in ALIASES:
            for near in difflib.get_close_matches(name, names, 1, _LOOKS_MEANT):
                suspects[variable] = near.upper()
    return suspects
