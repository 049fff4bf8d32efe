"""Works out what a job cost and puts it into the job's answer, as `cost` beside `usage`."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from coldsnap.cost.prices import Price
from coldsnap.engine import EngineInfo, Meter

_DONE = "data: [DONE]"
_UNFINISHED = '"finish_reason":null'
_COMPLETED = "event: response.completed\n"
_MESSAGE = "event: message_delta\n"


@dataclass(frozen=True, slots=True)
class Bill:
    """One job's marginal cost: its share of the engine's steps, without cold start and idle time.

    GPU-seconds are the engine's seconds times its GPUs. `usd` and `price_per_second` are None where the GPU's
    price is not known, `joules` where the GPUs report no energy. `estimated`: an equal split by time, or some
    step's report was lost.
    """

    gpu_seconds: float
    prefill_gpu_seconds: float
    decode_gpu_seconds: float
    usd: float | None
    price_per_second: float | None
    gpu: str
    estimated: bool
    joules: float | None = None

    @classmethod
    def of(cls, meter: Meter, info: EngineInfo, price: Price) -> Bill:
        """Return the bill of what `meter` holds now."""
        total, prefill = (round(each * info.gpu_count, 9) for each in (meter.gpu_seconds, meter.prefill_seconds))
        usd = price.usd(total)
        return cls(
            gpu_seconds=total,
            prefill_gpu_seconds=prefill,
            decode_gpu_seconds=round(total - prefill, 9),
            usd=None if usd is None else round(usd, 12),
            price_per_second=price.per_second,
            gpu=info.gpu,
            estimated=meter.estimated,
            joules=None if meter.joules is None else round(meter.joules, 6),
        )

    def fields(self) -> dict[str, Any]:
        """Return the bill as the `cost` of an answer."""
        fields = dataclasses.asdict(self)
        if self.joules is None:
            del fields["joules"]
        return fields


def in_answer(answer: Any, bill: Callable[[], Bill]) -> Any:
    """Add the bill to an answer of vLLM's that has usage; others, as a list of models, stay as they are."""
    return answer | {"cost": bill().fields()} if isinstance(answer, dict) and "usage" in answer else answer


async def in_stream(stream: AsyncIterator[str], bill: Callable[[], Bill]) -> AsyncIterator[str]:
    """Add the bill where a stream says its usage; all its other events stay byte for byte.

    That is the last chunk before `[DONE]` of a chat or completion, the response in `response.completed`, and the
    `message_delta` of a message. `stream` gives whole events. An OpenAI chunk that could be the last is held
    back until the next: the call of the engine is only over, and its cost known, when `[DONE]` comes. The other
    two come after it.
    """
    pending = ""
    async for more in stream:
        text, pending = pending + more, ""
        if not text.endswith("\n\n"):  # the end of a body that breaks off
            yield text
            continue
        *events, last = text.split("\n\n")[:-1]
        if last == _DONE:
            if events:
                events[-1] = _with_cost(events[-1], bill, final=True)
            events.append(last)
        elif last.startswith("data: {") and _UNFINISHED not in last:
            pending = last + "\n\n"
        else:
            events.append(last)
        if events:
            yield "\n\n".join(_with_cost(event, bill) for event in events) + "\n\n"
    if pending:
        yield pending


def _with_cost(event: str, bill: Callable[[], Bill], *, final: bool = False) -> str:
    """Add the cost to an event that says its usage: by its name, or because it is the `final` one of its stream."""
    name, _, data = event.partition("data: ")
    if not final and name not in {_COMPLETED, _MESSAGE}:
        return event
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:  # a comment, or the beginning of an event
        return event
    answer = body.get("response") if name == _COMPLETED else body
    if not isinstance(answer, dict) or ("error" in answer if final else "usage" not in answer):
        return event
    answer["cost"] = bill().fields()
    return f"{name}data: {orjson.dumps(body).decode()}"
