"""Reads an answer as it streams in: when its output came, its usage and cost, and how it ended.

Output is what carries generated tokens: an event with `choices`, a chunk of a job. It counts with or without text,
since a token may have none (a control token under `ignore_eos`, half a character); an event that only names the
role, the usage or the cost does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

_SHOWN = 300


class Failed(Exception):
    """A request failed. `kind` is what failures are counted by, `detail` what this one said."""

    def __init__(self, kind: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail[:_SHOWN]
        self.status = status


@dataclass(slots=True)
class Answer:
    """One answer. Times are of `time.perf_counter`."""

    first: float | None = None
    last: float | None = None
    gap: float = 0.0
    """The longest wait between two outputs."""
    outputs: int = 0
    text: bool = False
    finished: bool = False
    usage: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None

    def take(self, event: Any, now: float) -> None:
        """Read an event of an OpenAI stream or a chunk of a native job. Raises `Failed` for one that is an error."""
        try:
            self._take(event, now)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise Failed("not understood", repr(event)) from error

    def _take(self, event: Any, now: float) -> None:
        if error := event.get("error"):
            raise failure(error)
        if usage := event.get("usage"):
            self.usage = usage
        if cost := event.get("cost"):
            self.cost = cost
        if choices := event.get("choices"):
            self._choice(choices[0], now)
        elif "text" in event:
            done = event.get("finish_reason") is not None
            if event["text"] or not done or not self.outputs:
                self._output(now, text=bool(event["text"]))
            self.finished |= done

    def _choice(self, choice: Mapping[str, Any], now: float) -> None:
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else any(delta[name] for name in delta if name != "role")
        done = choice.get("finish_reason") is not None
        if text or done or delta is None or "role" not in delta:
            self._output(now, text=bool(text))
        self.finished |= done

    def _output(self, now: float, *, text: bool) -> None:
        if self.last is None:
            self.first = now
        else:
            self.gap = max(self.gap, now - self.last)
        self.last = now
        self.outputs += 1
        self.text |= text

    def tokens(self, name: str) -> int | None:
        """Return a count of the usage, if the server gave it."""
        value = (self.usage or {}).get(name)
        return value if type(value) is int else None

    def cost_of(self, name: str) -> float | None:
        """Return a part of the cost, if the server gave it."""
        value = (self.cost or {}).get(name)
        return float(value) if isinstance(value, int | float) else None


def failure(error: Any) -> Failed:
    """Return the failure that an `error` field tells of: an OpenAI error body, in JSON or not, or a text."""
    if isinstance(error, str):
        try:
            error = orjson.loads(error)
        except orjson.JSONDecodeError:
            return Failed("the endpoint's error", error)
        return failure(error) if isinstance(error, dict) else Failed("the endpoint's error", str(error))
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    if not isinstance(error, dict):
        return Failed("the endpoint's error", str(error))
    status = error.get("code")
    return Failed(
        str(error.get("type") or "the endpoint's error"),
        str(error.get("message") or error),
        status if type(status) is int else None,
    )


class Events:
    """Cuts a stream of server-sent events into their JSON, however its bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield the objects of the lines that are whole by now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                continue
            try:
                yield orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise Failed("not understood", text[:_SHOWN].decode(errors="replace")) from error
