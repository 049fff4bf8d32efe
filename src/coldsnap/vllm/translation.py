"""Turns vLLM's exceptions into ours. Nothing here imports vLLM: its exceptions are handed in by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldsnap.errors import (
    ColdsnapError,
    Conflict,
    EngineDead,
    InvalidInput,
    JobError,
    NotFound,
    Unavailable,
    Unprocessable,
)


def ours(error: Exception, vllms: Mapping[str, Any]) -> ColdsnapError:
    """Return our error for one of vLLM's. Whatever this does not know is an internal error of one job.

    `vllms` has the exceptions of the installed release by name; older ones lack some.
    """
    import jinja2

    def is_a(name: str) -> bool:
        return isinstance(error, vllms.get(name, ()))

    if is_a("EngineGenerateError") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    # Not str(error): some append their parameter and value, and the value may be the prompt.
    text = getattr(error, "message", None) or Exception.__str__(error) or type(error).__name__
    param = getattr(error, "parameter", None)
    if is_a("EngineDeadError"):
        return EngineDead("the engine process is gone")
    if is_a("GracefulHTTPError"):
        return (Conflict if getattr(error, "http_status", None) == Conflict.status else Unavailable)(text)
    if is_a("RetryableRequestError"):
        return Unavailable(text)
    if is_a("VLLMNotFoundError"):
        return NotFound(text, param="model")
    if is_a("VLLMUnprocessableEntityError"):
        return Unprocessable(text, param=param)
    if is_a("VLLMValidationError") or is_a("VLLMClientError"):
        return InvalidInput(text, param=param)
    if isinstance(error, ValueError | TypeError | OverflowError | jinja2.TemplateError):
        return InvalidInput(text, param=param)
    return JobError(f"{type(error).__name__}: {text}")


def first_complaint(error: Exception) -> str:
    """Return the part of an error that a user can act on, on one line."""
    errors = getattr(error, "errors", None)
    if callable(errors) and (found := errors()):  # pydantic's
        where = ".".join(str(part) for part in found[0]["loc"])
        what = str(found[0]["msg"]).removeprefix("Value error, ")
        return f"{where}: {what}" if where else what
    return " ".join(str(error).split()) or type(error).__name__
