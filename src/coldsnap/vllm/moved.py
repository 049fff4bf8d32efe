"""Finds what moves from module to module between vLLM's releases, by the names it has had."""

from __future__ import annotations

import contextlib
import importlib
from importlib.util import find_spec
from typing import Any

from coldsnap import patches
from coldsnap.errors import EngineBootError


def parser_module() -> str:
    """Return where this release keeps `make_arg_parser`: it has moved twice."""
    for place in ("common", "launchers", "openai"):
        name = f"vllm.entrypoints.{place}.cli_args"
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(name):
                return name
    raise EngineBootError(
        f"this vLLM has no make_arg_parser where {', '.join(patches.VLLM)} keep it; see docs/runbooks"
    )


def first(*places: str) -> Any:
    """Return the first of these, `module:name`, that the installed release has."""
    for place in places:
        module, name = place.split(":")
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(module):
                return getattr(importlib.import_module(module), name)
    raise EngineBootError(f"this vLLM has none of {', '.join(places)}")


def builders() -> tuple[Any, Any]:
    """Return `build_app` and `init_app_state` of vLLM's HTTP application."""
    build = first("vllm.entrypoints.launchers.app:build_app", "vllm.entrypoints.openai.api_server:build_app")
    init = first(
        "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
        "vllm.entrypoints.openai.api_server:init_app_state",
    )
    return build, init


def chat_template(given: str | None) -> str | None:
    """Return the chat template that an argument gives: itself, or the content of its file."""
    if given is None:
        return None
    load = first("vllm.renderers.chat_utils:load_chat_template", "vllm.entrypoints.chat_utils:load_chat_template")
    template: str | None = load(given)
    return template
