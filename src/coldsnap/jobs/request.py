"""Checks a job's input and makes a request of it. An error names the field, what was found and what would be right.

Three shapes are understood: native (`prompt` or `messages`), the platform's OpenAI passthrough
(`openai_route`, `openai_input`) and worker-vllm's generic one (`route`, `body`, `method`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from coldsnap.engine import Generation, HttpRequest
from coldsnap.errors import InvalidInput, NotFound
from coldsnap.jobs import routes

NATIVE = ("prompt", "messages", "sampling_params", "stream", "model", "chat_template_kwargs")
OPENAI = ("openai_route", "openai_input")
GENERIC = ("route", "body", "method")

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_OBJECTS = ("structured_outputs", "vllm_xargs")
_TEMPLATE_NAMES = 100
"""Arguments of a chat template: vLLM compares each with the signatures of functions."""
_DEEPEST = 100
"""Levels of nesting in a job's input; orjson stops at 254."""


@dataclass(frozen=True, slots=True)
class Native:
    """A checked native job."""

    generation: Generation
    stream: bool
    model: str


@dataclass(frozen=True, slots=True)
class Http:
    """A checked job for one of vLLM's own routes."""

    request: HttpRequest
    stream: bool
    model: str


def parse(job: Mapping[str, Any], models: tuple[str, ...]) -> Native | Http:
    """Check a job's input and return it as a request. Raises `InvalidInput` that names the field."""
    content = job.get("input")
    if not isinstance(content, dict):
        raise InvalidInput(
            f"input: expected an object with prompt or messages, or openai_route, found {_kind(content)}",
            param="input",
        )
    _check_values(content)
    if any(name in content for name in OPENAI):
        return _parse_http(content, OPENAI, models)
    if "route" in content:
        return _parse_http(content, GENERIC, models)
    return _parse_native(content, str(job.get("id")), models)


def sequences(job: Mapping[str, Any]) -> int:
    """Return how many completions a job asks for, at least 1, before anybody has checked it."""
    content = job.get("input")
    content = content if isinstance(content, dict) else {}
    body = next((content[name] for name in ("openai_input", "body", "sampling_params") if name in content), None)
    body = body if isinstance(body, dict) else {}
    n, prompts = body.get("n"), body.get("prompt", body.get("messages"))
    several = len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list) else 1
    return several * (max(n, 1) if isinstance(n, int) else 1)


def _parse_native(content: dict[str, Any], job_id: str, models: tuple[str, ...]) -> Native:
    _only(content, NATIVE)
    prompt, messages = content.get("prompt"), content.get("messages")
    if (prompt is None) == (messages is None):
        raise InvalidInput(
            "input: expected exactly one of prompt and messages, found " + ("neither" if prompt is None else "both"),
            param="prompt" if messages is None else "messages",
        )
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise InvalidInput(f"prompt: expected a text that is not empty, found {_kind(prompt)}", param="prompt")
    if messages is not None:
        _check_messages(messages)
    sampling = _typed(content, "sampling_params", dict, {})
    model = _typed(content, "model", str, models[0])
    if model not in models:
        raise NotFound(f"model: {model!r:.100} is not served here; served: {', '.join(models)}", param="model")
    template = _typed(content, "chat_template_kwargs", dict, {})
    _check_template(template, "chat_template_kwargs")
    generation = Generation(job_id, prompt, messages, sampling, template)
    return Native(generation, _typed(content, "stream", bool, default=False), model)


def _parse_http(content: dict[str, Any], names: tuple[str, ...], models: tuple[str, ...]) -> Http:
    _only(content, names)
    route_name, body_name = names[:2]
    route = content.get(route_name, "/v1/chat/completions")
    if not isinstance(route, str) or not route.startswith("/"):
        raise InvalidInput(
            f"{route_name}: expected a path such as /v1/chat/completions, found {route!r:.100}",
            param=route_name,
        )
    path, _, query = route.partition("?")
    body = content.get(body_name) or None
    if isinstance(body, str):
        try:
            body = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidInput(f"{body_name}: expected a JSON object: {error}", param=body_name) from error
        _check_values({body_name: body})
    if body is not None and not isinstance(body, dict):
        raise InvalidInput(f"{body_name}: expected an object, found {_kind(body)}", param=body_name)
    default = "POST" if body is not None else routes.method_without_body(path)
    method = _typed(content, "method", str, default).upper()
    routes.check(path, method)
    try:
        data = b"" if body is None else orjson.dumps(body)
    except TypeError as error:  # an integer of more than 64 bits, lists in lists in lists
        raise InvalidInput(f"{body_name}: cannot be written as JSON: {error}", param=body_name) from error
    if path in routes.TOKENIZED and len(data) > routes.TOKENIZED_BYTES:
        raise InvalidInput(
            f"{body_name}: {len(data)} bytes; {path} takes {routes.TOKENIZED_BYTES} at most", param=body_name
        )
    body = body or {}
    _check_objects(body, body_name)
    # Any other name goes to vLLM, which refuses it, but not into the record: it may be anything.
    model = next((name for name in models if name == body.get("model")), models[0])
    return Http(HttpRequest(method, path, query, data), body.get("stream") is True, model)


def _check_objects(body: dict[str, Any], where: str) -> None:
    """Check what vLLM's application takes for objects without looking, and answers with a 500."""
    for name in _OBJECTS:
        if not isinstance(body.get(name), dict | None):
            raise InvalidInput(
                f"{where}.{name}: expected an object, found {_kind(body[name])}", param=f"{where}.{name}"
            )
    _check_template(body.get("chat_template_kwargs"), f"{where}.chat_template_kwargs")
    for name, place in (("kv_transfer_params", body), ("vllm_xargs.kv_transfer_params", body.get("vllm_xargs") or {})):
        if place.get("kv_transfer_params") is not None:
            raise InvalidInput(f"{where}.{name}: not open to jobs", param=f"{where}.{name}")


def _check_template(names: Any, where: str) -> None:
    if isinstance(names, dict) and len(names) > _TEMPLATE_NAMES:
        raise InvalidInput(f"{where}: {len(names)} names; at most {_TEMPLATE_NAMES}", param=where)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidInput(f"messages: expected a list that is not empty, found {_kind(messages)}", param="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidInput(
                f"messages[{i}]: expected an object with role and content, found {_kind(message)}",
                param=f"messages[{i}]",
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise InvalidInput(
                f"messages[{i}].role: expected one of {', '.join(sorted(_ROLES))}, found {role!r:.100}",
                param=f"messages[{i}].role",
            )
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise InvalidInput(
                f"messages[{i}].tool_calls: expected a list of objects, found {_kind(calls)}",
                param=f"messages[{i}].tool_calls",
            )
        if isinstance(message.get("content"), list):
            _check_parts(message["content"], f"messages[{i}].content")
        elif not isinstance(message.get("content"), str) and not calls:
            raise InvalidInput(
                f"messages[{i}].content: expected a text or a list of parts, found {_kind(message.get('content'))}",
                param=f"messages[{i}].content",
            )


def _check_parts(parts: list[Any], where: str) -> None:
    for i, part in enumerate(parts):
        if not isinstance(part, str | dict):
            raise InvalidInput(
                f"{where}[{i}]: expected an object with type, found {_kind(part)}", param=f"{where}[{i}]"
            )
        if isinstance(part, dict) and part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise InvalidInput(
                f"{where}[{i}].text: expected a text, found {_kind(part.get('text'))}", param=f"{where}[{i}].text"
            )


def _check_values(content: dict[str, Any]) -> None:
    """Refuse values that no tokenizer can read or no engine can take, anywhere in a job's input.

    Those are lone surrogates, null characters, numbers that are infinite or beyond 64 bits, and nesting
    without end. A job of ten megabytes must not hold up the others: orjson looks first, in milliseconds, and
    only where it finds something odd is each value looked at.
    """
    with contextlib.suppress(TypeError):
        text = orjson.dumps(content)
        if b"\\u0000" not in text and b"null" not in text:  # NaN and Infinity become null
            return
    if flaw := _flaw(content, 0):
        where, what = flaw
        where = where.removeprefix(".")[:200] if where.startswith(".") else f"input{where}"
        raise InvalidInput(f"{where}: {what}", param=where)


def _flaw(value: Any, depth: int) -> tuple[str, str] | None:
    """Return where in `value` something is wrong, and what; the path is made only for a flaw."""
    if not isinstance(value, dict | list):
        what = _wrong(value)
        return ("", what) if what else None
    if depth == _DEEPEST:
        return "", f"expected at most {_DEEPEST} levels of nesting"
    if isinstance(value, dict):
        for key in value:
            if what := _wrong(key):
                return " (a key)", what
        items = ((f".{key:.100}", item) for key, item in value.items())
    else:
        items = ((f"[{i}]", item) for i, item in enumerate(value))
    for step, item in items:
        if flaw := _flaw(item, depth + 1):
            return step + flaw[0], flaw[1]
    return None


def _wrong(value: Any) -> str | None:
    """Return what is wrong with a text or a number, if anything."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, found {value}"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "expected a number of at most 64 bits"
    if isinstance(value, str):
        if "\0" in value:
            return f"contains a null character at position {value.index(chr(0))}"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"contains a lone surrogate at position {error.start}; expected valid Unicode"
    return None


def _only(content: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in content:
        if name not in names:
            raise InvalidInput(f"{name:.100}: unknown field; expected some of {', '.join(names)}", param=name[:100])


def _typed(content: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise InvalidInput(f"{name}: expected {_NAMES[kind]}, found {_kind(value)}", param=name)
    return value


_NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "nothing",
}


def _kind(value: Any) -> str:
    if value in ("", [], {}):
        return f"an empty {_NAMES[type(value)].split()[-1]}"
    return _NAMES.get(type(value), type(value).__name__)
