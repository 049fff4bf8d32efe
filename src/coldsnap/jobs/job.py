"""One job, from what the platform delivers to what goes back.

job -> request (checked) -> engine stream -> deltas or SSE events -> chunks -> record

`request.py` says which jobs there are; this file says what becomes of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import orjson

from coldsnap.cost import prices
from coldsnap.engine import Delta, Engine, Meter
from coldsnap.errors import ColdsnapError, InvalidInput, JobError, NotFound, Overloaded
from coldsnap.jobs import bill
from coldsnap.jobs.bill import Bill
from coldsnap.jobs.request import Http, Native, parse
from coldsnap.jobs.stream import Relay
from coldsnap.records.schema import Request, origin
from coldsnap.records.sink import Sink
from coldsnap.settings import Settings

_NOT_FOUND = 404
_ERROR_STATUS = 400
_SERVER_ERROR = 500
_MESSAGE_CHARACTERS = 2000

_CHUNK_CHARACTERS = 160_000
"""A chunk of the platform is at most 1 MB, and JSON needs at most six bytes for a character."""

_LAST_CHARACTERS = _CHUNK_CHARACTERS // 2
"""A native stream's last chunk has usage and cost beside its text."""

Chunk = dict[str, Any] | str
"""What one POST carries: a native dict, whole events of an SSE stream, or a whole OpenAI answer."""
Piece = Delta | Chunk


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
        self._running: dict[Relay[Piece, Chunk], Meter] = {}

    async def handle(self, job: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Yield the job's chunks; a job that fails ends with `{"error": <JSON of an OpenAI error body>}`."""
        meter = Meter()
        relay: Relay[Piece, Chunk] = Relay(self._run(job, meter, lambda: relay.reason), _join)
        self._running[relay] = meter
        # A cancel may find the SDK inside a POST: then nothing is raised here, but its task ends at once.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._end(relay))
        try:
            async for chunk in relay.chunks():
                yield chunk
        except ColdsnapError as error:
            if not error.survives:
                self._on_fatal(error)
            yield {"error": orjson.dumps(error.body()).decode()}
        finally:
            self._end(relay)

    @property
    def running(self) -> bool:
        """Whether there is a job."""
        return bool(self._running)

    def stop(self, reason: ColdsnapError) -> None:
        """End every running job with `reason`."""
        for relay in tuple(self._running):
            relay.stop(reason)

    def turn_away(self) -> None:
        """End every job that has waited for the engine longer than MAX_QUEUE_SECONDS."""
        if (most := self._settings.max_queue_seconds) is None:
            return
        now = time.monotonic()
        for relay, meter in tuple(self._running.items()):
            if meter.asked and not meter.begun and now - meter.asked > most:
                relay.stop(
                    Overloaded(
                        f"the engine did not begin with the job within MAX_QUEUE_SECONDS={most:g}; "
                        f"jobs in this worker: {len(self._running)}; send it again later"
                    )
                )

    def _end(self, relay: Relay[Piece, Chunk]) -> None:
        relay.stop()
        self._running.pop(relay, None)

    async def _run(
        self, job: Mapping[str, Any], meter: Meter, stopped: Callable[[], ColdsnapError | None]
    ) -> AsyncGenerator[Piece, None]:
        arrival = time.monotonic()
        boot = self._sink.next_job()
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
            error = reason.type if (reason := stopped()) else "cancelled"
            raise
        except Exception as failure:
            error = type(failure).__name__
            raise JobError(f"{type(failure).__name__}: {failure}") from failure
        finally:
            try:
                await meter.settle()
            finally:
                times = arrival, time.monotonic()  # of a cancelled job the engine's last steps are in both
                record = self._record(str(job.get("id")), request, meter, times, error)
                self._sink.write(record.model_copy(update={"boot": boot}))

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
            | ({"warnings": meter.warnings} if meter.warnings else {})
        )

    async def _http(self, request: Http, meter: Meter) -> AsyncGenerator[Piece, None]:
        async with self._engine.http(request.request, meter) as response:
            if response.status < _ERROR_STATUS and response.content_type.startswith("text/event-stream"):
                stream = _whole_events(response.chunks)
                if self._settings.cost_in_response:
                    stream = bill.in_stream(stream, lambda: self._bill(meter))
                async for events in stream:
                    self._engine.check()  # vLLM's own words about a dead engine, and [DONE], are not the job's end
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
            mean_batch=round(meter.batch / meter.steps, 3) if meter.steps else None,
            joules=cost.joules,
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
            if isinstance(error, dict):
                error.setdefault("code", status)  # the bodies of Anthropic's routes have none
                if len(message := str(error.get("message"))) > _MESSAGE_CHARACTERS:  # it repeats what the job said
                    error["message"] = f"{message[:_MESSAGE_CHARACTERS]}…"
            self.type = str(error.get("type", self.type)) if isinstance(error, dict) else self.type
        elif status == _NOT_FOUND:
            missing = NotFound(f"{path}: this model does not serve it", param="route")
            self._body, self.type = missing.body(), missing.type
        else:
            self.type = self.type if status >= _SERVER_ERROR else InvalidInput.type
            self._body = {"error": {"message": str(body), "type": self.type, "param": None, "code": status}}

    def body(self) -> dict[str, object]:
        return self._body


def _join(pieces: list[Piece]) -> Iterable[Chunk]:
    """Make chunks of what has accumulated: each completion's text, then events, then the last one or a whole answer.

    The last chunk of a native stream carries what text there still is: one POST less to wait for.
    """
    texts: dict[int, list[str]] = {}
    events: list[str] = []
    whole: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Delta):
            texts.setdefault(piece.index, []).append(piece.text)
        elif isinstance(piece, str):
            events.append(piece)
        else:
            whole.append(piece)
    if 0 in texts and whole and sum(map(len, texts[0])) <= _LAST_CHARACTERS:
        whole[-1] = {**whole[-1], "text": "".join(texts.pop(0))}
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
    yield from whole


async def _whole_events(body: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Cut a body of server-sent events behind an event's end: neither event nor character is split."""
    rest = b""
    async for chunk in body:
        whole, separator, rest = (rest + chunk).rpartition(b"\n\n")
        if separator:
            yield (whole + separator).decode()
    if rest:
        yield rest.decode()
