"""What a client sends to have a job run, checked: the body of /run and /runsync, and what its policy may ask."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from coldsnap.desk.serve.job import Terms
from coldsnap.errors import Refused

_WEEK = 7 * 86_400_000
_POLICY = {"executionTimeout": (5_001, _WEEK), "ttl": (10_000, _WEEK)}
"""Field of the policy -> least and most milliseconds."""
_DIGITS = 12
_WEBHOOK = re.compile(r"https?://[!-~]{1,2000}")
_TO_WORKER = ("s3Config",)
"""Fields beside `input` that a worker is given."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be: its input, what the worker gets beside it, and its terms."""

    input: Any
    more: Mapping[str, Any]
    terms: Terms

    @classmethod
    def read(cls, body: bytes, terms: Terms) -> Submission:
        """Read a request's body; `terms` are those of its operation."""
        fields = parse(body)
        if not isinstance(fields, dict):
            raise Refused(400, f'the body is a JSON {_kind(fields)}; an object with "input" is expected')
        if "input" not in fields:
            raise Refused(400, "input: missing; the body is an object with the job's input in this field")
        policy = fields.get("policy") or {}
        if not isinstance(policy, dict):
            raise Refused(400, f"policy: a JSON {_kind(policy)}, an object is expected")
        times = {name: _milliseconds(policy, name) for name in _POLICY}
        low = policy.get("lowPriority", False)
        if not isinstance(low, bool):
            raise Refused(400, "policy.lowPriority: true or false is expected")
        webhook = fields.get("webhook")
        if webhook is not None and not (isinstance(webhook, str) and _WEBHOOK.fullmatch(webhook)):
            raise Refused(400, "webhook: an address that begins with http:// or https:// is expected, without spaces")
        terms = replace(
            terms,
            execution_timeout=times["executionTimeout"] or terms.execution_timeout,
            ttl=times["ttl"] or terms.ttl,
            low_priority=low,
            webhook=webhook,
        )
        return cls(fields["input"], {name: fields[name] for name in _TO_WORKER if name in fields}, terms)

    def durable(self, retention: float) -> Submission:
        """Return the job as one that outlives its client's connection, with its result's time."""
        return replace(self, terms=replace(self.terms, durable=True, retention=retention))


def parse(body: bytes) -> Any:
    """Return the JSON of a request's body; say where it is wrong.

    Not by orjson, which refuses lone surrogates and large integers: a worker must meet what a client can send.
    """
    try:
        return json.loads(body, parse_constant=_no_json, parse_float=_finite)
    except RecursionError:
        raise Refused(400, "the body is not JSON that can be read: too deeply nested") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from error


def milliseconds(value: str, name: str, least: int, most: int) -> float:
    """Return the seconds of a query parameter that gives milliseconds."""
    if not (value.isascii() and value.isdigit() and len(value) < _DIGITS and least <= int(value) <= most):
        raise Refused(400, f"{name}: {value!r:.50}; milliseconds from {least} to {most} are expected")
    return int(value) / 1000


def too_large(size: int | None, limit: int) -> Refused:
    """Return the refusal of a body above the limit."""
    length = "more" if size is None else f"{size} bytes"
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have {limit} bytes at most, found {length}")


def _milliseconds(policy: dict[str, Any], name: str) -> float | None:
    least, most = _POLICY[name]
    if (value := policy.get(name)) is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f"policy.{name}: {value!r:.50}; milliseconds from {least} to {most} are expected")
    return value / 1000


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits:.50} is larger than any number that JSON can carry on")
    return number


def _kind(value: Any) -> str:
    kinds = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
