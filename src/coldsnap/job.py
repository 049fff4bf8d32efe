"""One job, from what the platform delivers to what goes back.

job -> request (checked) -> engine stream -> deltas or SSE events -> paced chunks -> record

Three shapes are understood: native (`prompt` or `messages`), the platform's OpenAI passthrough
(`openai_route`, `openai_input`) and worker-vllm's generic one (`route`, `body`, `method`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from coldsnap import bill, prices, routes
from coldsnap.bill import Bill
from coldsnap.engine import Delta, Engine, Generation, HttpRequest, Meter
from coldsnap.errors import ColdsnapError, InvalidInput, JobError, ModelNotFound, RouteNotFound
from coldsnap.records import Request, Sink, origin
from coldsnap.settings import Settings
from coldsnap.stream import Paced

NATIVE = ("prompt", "messages", "sampling_params", "stream", "model", "chat_template_kwargs")
OPENAI = ("openai_route", "openai_input")
GENERIC = ("route", "body", "method")

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_NOT_FOUND = 404
_ERROR_STATUS = 400
_SERVER_ERROR = 500

_DEEPEST = 100
"""Levels of nesting in a job's input; orjson stops at 254."""
_CHUNK_CHARACTERS = 160_000
"""A chunk of the platform is at most 1 MB, and JSON needs at most six bytes for a character."""

_POST_SECONDS = 0.0004
"""Twice what a POST costs the process, in CPU time: chunks of all jobs together take up to half a core."""
_WIDEST_SECONDS = 0.05
"""The pace never gets wider by load than this."""

Chunk = dict[str, Any] | str
"""What one POST carries: a native dict, whole events of an SSE stream, or a whole OpenAI answer."""
Piece = Delta | Chunk


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


class Jobs:
    """Runs jobs on an engine and records each. `handle` is the SDK's handler.

    `on_fatal` is called when a job finds that the worker cannot go on; the job itself ends with its error.
    """

    def __init__(
        self, engine: Engine, settings: Settings, sink: Sink, on_fatal: Callable[[ColdsnapError], None]
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._sink = sink
        self._on_fatal = on_fatal
        self._price = prices.of(engine.info.gpu, settings.gpu_price_per_second)
        self._running: set[Paced[Piece, Chunk]] = set()
        self._reason: ColdsnapError | None = None

    async def handle(self, job: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Yield the job's chunks; a job that fails ends with `{"error": <JSON of an OpenAI error body>}`."""
        paced = Paced(self._run(job), _join, self._interval)
        self._running.add(paced)
        # A cancel may find the SDK inside a POST: then nothing is raised here, but its task ends at once.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._end(paced))
        try:
            async for chunk in paced.chunks():
                yield chunk
        except ColdsnapError as error:
            if not error.survives:
                self._on_fatal(error)
            yield {"error": orjson.dumps(error.body()).decode()}
        finally:
            self._end(paced)

    def stop(self, reason: ColdsnapError) -> None:
        """End every running job with `reason`."""
        self._reason = reason
        for paced in tuple(self._running):
            paced.stop(reason)

    def _interval(self) -> float:
        """Return the pace in seconds: wider while many jobs stream, which bounds the work of POSTs."""
        base = self._settings.chunk_interval_ms / 1000
        return max(base, min(_WIDEST_SECONDS, len(self._running) * _POST_SECONDS))

    def _end(self, paced: Paced[Piece, Chunk]) -> None:
        paced.stop()
        self._running.discard(paced)

    async def _run(self, job: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        arrival = time.monotonic()
        meter = Meter()
        request: Native | Http | None = None
        error: str | None = None
        try:
            request = parse(job, self._engine.info.models)
            stream = self._native(request, meter) if isinstance(request, Native) else self._http(request, meter)
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    yield piece
        except ColdsnapError as failure:
            error = failure.type
            raise
        except (asyncio.CancelledError, GeneratorExit):
            error = self._reason.type if self._reason else "cancelled"
            raise
        except Exception as failure:
            error = type(failure).__name__
            raise JobError(f"{type(failure).__name__}: {failure}") from failure
        finally:
            ended = time.monotonic()
            try:
                await meter.settle()
            finally:
                times = arrival, ended
                self._sink.write(self._record(str(job.get("id")), request, meter, times, error))

    async def _native(self, request: Native, meter: Meter) -> AsyncGenerator[Piece, None]:
        texts: dict[int, list[str]] = {}
        finish: dict[int, str] = {}
        async with contextlib.aclosing(self._engine.generate(request.generation, meter)) as deltas:
            async for delta in deltas:
                if delta.finish_reason:
                    finish[delta.index] = delta.finish_reason
                if request.stream:
                    yield delta
                else:
                    texts.setdefault(delta.index, []).append(delta.text)
        last: dict[str, Any] = {"text": ""} if request.stream else {"text": "".join(texts.get(0, ()))}
        if len(finish) > 1:
            last["choices"] = [
                {"index": i, "finish_reason": reason} | ({} if request.stream else {"text": "".join(texts.get(i, ()))})
                for i, reason in sorted(finish.items())
            ]
        cost = self._bill(meter)
        yield (
            last
            | {
                "finish_reason": finish.get(0),
                "usage": {
                    "prompt_tokens": meter.prompt_tokens,
                    "cached_tokens": meter.cached_tokens,
                    "completion_tokens": meter.completion_tokens,
                    "total_tokens": meter.prompt_tokens + meter.completion_tokens,
                },
                "gpu_seconds": cost.gpu_seconds,
            }
            | ({"cost": cost.fields()} if self._settings.cost_in_response else {})
        )

    async def _http(self, request: Http, meter: Meter) -> AsyncGenerator[Piece, None]:
        async with self._engine.http(request.request, meter) as response:
            if response.status < _ERROR_STATUS and response.content_type.startswith("text/event-stream"):
                stream = _whole_events(response.chunks)
                if self._settings.cost_in_response:
                    stream = bill.in_stream(stream, lambda: self._bill(meter))
                async for events in stream:
                    yield events
                self._engine.check()
                return
            content = b"".join([chunk async for chunk in response.chunks])
            if response.status >= _ERROR_STATUS:
                self._engine.check()
                raise _Answered(response.status, content, request.request.path)
            answer = orjson.loads(content) if content else {"status": response.status}
            if self._settings.cost_in_response:
                answer = bill.in_answer(answer, lambda: self._bill(meter))
            yield answer

    def _bill(self, meter: Meter) -> Bill:
        return Bill.of(meter, self._engine.info, self._price)

    def _record(
        self,
        job_id: str,
        request: Native | Http | None,
        meter: Meter,
        times: tuple[float, float],
        error: str | None,
    ) -> Request:
        arrival, ended = times
        info = self._engine.info
        cost = self._bill(meter)
        sequences = max(meter.sequences, 1)  # one that was cut has not been counted
        between = meter.completion_tokens - sequences
        return Request(
            **origin(self._settings, info),
            job_id=job_id,
            route="native" if not isinstance(request, Http) else request.request.path,
            model=request.model if request else info.models[0],
            stream=request.stream if request else False,
            prompt_tokens=meter.prompt_tokens,
            cached_tokens=meter.cached_tokens,
            completion_tokens=meter.completion_tokens,
            queue_seconds=round(meter.queue_seconds, 6),
            ttft_seconds=round(meter.first_token - arrival, 6) if meter.first_token else None,
            itl_seconds=round((meter.last_token - meter.first_token) * sequences / between, 6) if between > 0 else None,
            duration_seconds=round(ended - arrival, 6),
            finish_reason=None if error else meter.finish_reason,
            error=error,
            gpu_seconds=cost.gpu_seconds,
            prefill_gpu_seconds=cost.prefill_gpu_seconds,
            decode_gpu_seconds=cost.decode_gpu_seconds,
            usd=cost.usd,
            price_per_second=cost.price_per_second,
            estimated=cost.estimated,
            fit=self._engine.usage().fit,
        )


class _Answered(JobError):
    """vLLM's application answered with an error; its own body goes back."""

    def __init__(self, status: int, content: bytes, path: str) -> None:
        super().__init__(f"{path} answered {status}")
        try:
            body = orjson.loads(content)
        except orjson.JSONDecodeError:
            body = {"detail": content[:1000].decode(errors="backslashreplace")}
        if isinstance(body, dict) and body.get("error"):
            self._body = body
            error = body["error"]
            self.type = str(error.get("type", self.type)) if isinstance(error, dict) else self.type
        elif status == _NOT_FOUND:
            missing = RouteNotFound(f"{path}: this model does not serve it", param="route")
            self._body, self.type = missing.body(), missing.type
        else:
            self.type = self.type if status >= _SERVER_ERROR else InvalidInput.type
            self._body = {"error": {"message": str(body), "type": self.type, "param": None, "code": status}}

    def body(self) -> dict[str, object]:
        return self._body


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
        raise ModelNotFound(f"model: {model!r:.100} is not served here; served: {', '.join(models)}", param="model")
    template = _typed(content, "chat_template_kwargs", dict, {})
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
    # Without a body: the platform sends a GET and an empty POST alike.
    method = _typed(content, "method", str, "POST" if body is not None else routes.method(path)).upper()
    routes.check(path, method)
    try:
        data = b"" if body is None else orjson.dumps(body)
    except TypeError as error:  # an integer of more than 64 bits, lists in lists in lists
        raise InvalidInput(f"{body_name}: cannot be written as JSON: {error}", param=body_name) from error
    body = body or {}
    # Any other name goes to vLLM, which refuses it, but not into the record: it may be anything.
    model = next((name for name in models if name == body.get("model")), models[0])
    return Http(HttpRequest(method, path, query, data), body.get("stream") is True, model)


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
    """Refuse what no tokenizer can read and no engine can take, anywhere in a job's input.

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


def _join(pieces: list[Piece]) -> Iterable[Chunk]:
    """Make chunks of what has accumulated: each completion's text, then events, then whole answers."""
    texts: dict[int, list[str]] = {}
    events: list[str] = []
    for piece in pieces:
        if isinstance(piece, Delta):
            texts.setdefault(piece.index, []).append(piece.text)
        elif isinstance(piece, str):
            events.append(piece)
    for index, parts in texts.items():
        text = "".join(parts)
        for start in range(0, len(text), _CHUNK_CHARACTERS):
            part = {"text": text[start : start + _CHUNK_CHARACTERS]}
            yield part if index == 0 else part | {"index": index}
    size = 0
    run: list[str] = []
    for event in events:
        if run and size + len(event) > _CHUNK_CHARACTERS:
            yield "".join(run)
            size, run = 0, []
        size += len(event)
        run.append(event)
    if run:
        yield "".join(run)
    yield from (piece for piece in pieces if not isinstance(piece, Delta | str))


async def _whole_events(body: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Cut a body of server-sent events behind an event's end: neither event nor character is split."""
    rest = b""
    async for chunk in body:
        whole, separator, rest = (rest + chunk).rpartition(b"\n\n")
        if separator:
            yield (whole + separator).decode()
    if rest:
        yield rest.decode()
