"""What a ledger says of its workers: how fast they boot, compute and end, and what they cost.

The cost of a step is the one that the workers fitted. It is then checked: each worker's requests run again through
the model, and their decoding has to take as long as it did; what is left over scales the model. Arrivals are those
at the worker, so the platform's own time and the network's are not in it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson

from coldsnap.cost import prices
from coldsnap.desk.plan.batch import Batch, Speed
from coldsnap.desk.plan.simulation import WorkerModel
from coldsnap.errors import PlanError

Record = dict[str, Any]

LEAST_REQUESTS = 20
"""Below that a ledger says too little."""
_MOST_CHECKED = 20_000
"""Requests that are run again, the last ones."""
_FIRST_SEQUENCES = 256
"""vLLM's `max_num_seqs` where the ledger does not say the engine's."""
_FURTHEST, _ROUNDS = 4.0, 16
"""The scale of the model is looked for from a quarter to four times, and halved so often: to less than 0.01%."""
_BENCH = "run `coldsnap bench` against the endpoint first, at the load that you expect"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A worker as its ledger shows it, and from how much."""

    model: str
    gpu: str
    gpu_count: int
    worker: WorkerModel
    concurrency: int | None
    """MAX_CONCURRENCY as it was."""
    requests: int
    correction: float
    """What the fitted cost was multiplied by: recorded over computed decoding time."""
    error: float
    """Median error of a request's decoding time after that, as a part of it."""
    widest: float
    """The fullest batch that a request was in, mean over its steps."""
    limits_known: bool
    flex: float | None
    """US dollars for a second of one GPU."""
    active: float | None
    """The same for a worker that always runs."""
    price_origin: str

    def tokens_per_second(self, batch: int, context: int) -> float:
        """Return what an engine decodes with so many requests of such a context."""
        speed = self.worker.speed
        return batch / (speed.a + batch * (speed.c + speed.d * context))

    def usd(self, flex: float, active: float) -> float | None:
        """Return the price of worker-seconds, None where it is not known."""
        if self.flex is None or self.active is None:
            return None
        return (flex * self.flex + active * self.active) * self.gpu_count


def read(
    lines: Path, *, model: str | None, endpoint: str | None, flex: float | None, active: float | None
) -> Calibration:
    """Calibrate from the clean lines of a ledger (`report.source`). `flex` and `active` are prices that override.

    Raises `PlanError`: what is missing, and how to get it.
    """
    records: dict[str, list[Record]] = {"cold_start": [], "request": [], "worker": []}
    with lines.open("rb") as file:
        for line in file:
            record = orjson.loads(line)
            if endpoint in (None, record["endpoint_id"]):
                records[record["record"]].append(record)
    name = _one_model(records, model)
    useful = (record for record in records["request"] if record["model"] == name and _useful(record))
    requests = sorted(useful, key=_written)  # the uploads of workers come in any order
    fits = [record for record in requests if record.get("fit")]
    if len(requests) < LEAST_REQUESTS or not fits:
        raise PlanError(
            f"the ledger has {len(requests)} completed request(s) of {name} and {len(fits)} with a fitted cost of a "
            f"step; at least {LEAST_REQUESTS} are needed: {_BENCH}"
        )
    ids = {(record["endpoint_id"], record["worker_id"]) for record in requests}
    boots = [
        record for record in records["cold_start"]
        if record.get("boot", "fresh") == "fresh" and record.get("model", name) == name
    ]  # fmt: skip
    if not boots:
        raise PlanError(
            f"the ledger has no cold start of {name}: a boot writes one; keep the whole ledger, or start a worker once"
        )
    speed, limits_known = _limited(_fitted(fits), boots)
    speed, correction, error, front = _checked(speed, requests)
    first = _first_job(requests, front)
    stops = [
        record["drain_gpu_seconds"] / record["gpu_count"] for record in records["worker"]
        if record.get("final") and (record["endpoint_id"], record["worker_id"]) in ids
    ]  # fmt: skip
    worker = WorkerModel(speed, [record["seconds"] + first for record in boots], front, median(stops) if stops else 0.0)
    last = requests[-1]
    gpu, count = last.get("gpu", "unknown"), last["gpu_count"]
    return Calibration(
        model=name,
        gpu=gpu,
        gpu_count=count,
        worker=worker,
        concurrency=next((each for record in reversed(boots) if (each := record.get("max_concurrency"))), None),
        requests=len(requests),
        correction=correction,
        error=error,
        widest=max((record.get("mean_batch") or 1.0 for record in requests), default=1.0),
        limits_known=limits_known,
        **_priced(gpu, last.get("price_per_second"), flex, active),
    )


def _useful(record: Record) -> bool:
    return bool(record.get("ttft_seconds") and record["completion_tokens"] and not record.get("estimated"))


def _written(record: Record) -> float:
    return datetime.fromisoformat(record["time"]).timestamp()


def _one_model(records: dict[str, list[Record]], only: str | None) -> str:
    kinds = Counter((record["model"], record.get("gpu", "unknown")) for record in records["request"])
    kinds = Counter({kind: count for kind, count in kinds.items() if only in (None, kind[0])})
    if not kinds:
        of = f" of {only}" if only else ""
        raise PlanError(f"the ledger has no request{of}: {_BENCH}")
    if len(kinds) > 1:
        listing = ", ".join(f"{model} on {gpu} ({count} requests)" for (model, gpu), count in kinds.most_common())
        raise PlanError(f"the ledger has several kinds of worker: {listing}; choose with --model or --endpoint")
    return str(next(iter(kinds))[0])


def _fitted(fits: Sequence[Record]) -> Speed:
    """Return the mean of what the workers had fitted when their last requests ended, by the steps that it is from."""
    last = {(record["endpoint_id"], record["worker_id"]): record["fit"] for record in fits}
    weights = np.array([fit["steps"] for fit in last.values()], dtype=np.float64)
    values = np.array([[fit[name] for name in "abcd"] for fit in last.values()])
    a, b, c, d = map(float, weights @ values / weights.sum())
    if not a + c > 0:
        raise PlanError(f"the fitted cost of a step is {a:g} s and {c:g} s a token, which cannot be: {_BENCH}")
    return Speed(a, b, c, d)


def _limited(speed: Speed, boots: Sequence[Record]) -> tuple[Speed, bool]:
    limits = next((recorded for record in reversed(boots) if (recorded := record.get("limits"))), None)
    if limits is None:
        return replace(speed, sequences=_FIRST_SEQUENCES), False
    cache = limits["kv_cache_tokens"]
    return replace(
        speed,
        sequences=limits["max_num_seqs"],
        tokens=limits["max_num_batched_tokens"],
        cache=float("inf") if cache is None else float(cache),
    ), True


def _checked(speed: Speed, requests: Sequence[Record]) -> tuple[Speed, float, float, float]:
    """Run the requests again; return the speed, scaled, the scale, the median error, and the time around the steps."""
    requests = requests[-_MOST_CHECKED:]
    recorded = np.array([(record.get("itl_seconds") or 0.0) * (record["completion_tokens"] - 1) for record in requests])
    ttft = np.array([record["ttft_seconds"] for record in requests])
    low, high = 1 / _FURTHEST, _FURTHEST
    # A slower model makes fuller batches, which are slower in turn: to scale by what is left over would overshoot.
    for _ in range(_ROUNDS if recorded.any() else 0):
        correction = math.sqrt(low * high)
        first, last = _again(speed.slower(correction), requests)
        if (last - first).sum() < recorded.sum():
            low = correction
        else:
            high = correction
    correction = math.sqrt(low * high)
    speed = speed.slower(correction)
    first, last = _again(speed, requests)
    decoded = recorded > 0
    error = float(np.median(np.abs((last - first)[decoded] / recorded[decoded] - 1))) if decoded.any() else 0.0
    warm = np.array([record.get("boot", "warm") == "warm" for record in requests])
    front = float(np.median((ttft - first)[warm])) if warm.any() else 0.0
    return speed, correction, error, max(0.0, front)


def _again(speed: Speed, requests: Sequence[Record]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return when each request has its first and last token, in seconds after it came to its worker."""
    prompts = [max(1, record["prompt_tokens"] - record["cached_tokens"]) for record in requests]
    outputs = [record["completion_tokens"] for record in requests]
    came = np.array([_written(record) - record["duration_seconds"] for record in requests])
    first, last = np.zeros(len(requests)), np.zeros(len(requests))
    workers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, record in enumerate(requests):
        workers[record["endpoint_id"], record["worker_id"]].append(number)
    for numbers in workers.values():
        batch = Batch(speed, prompts, outputs)
        for number in sorted(numbers, key=came.__getitem__):
            _run(batch, float(came[number]), first, last)
            batch.add(number, float(came[number]))
        _run(batch, float("inf"), first, last)
    return first - came, last - came


def _run(batch: Batch, until: float, first: np.ndarray[Any, Any], last: np.ndarray[Any, Any]) -> None:
    while batch.end < until:
        at = batch.end
        begun, ended = batch.advance()
        first[begun] = at
        last[ended] = at


def _first_job(requests: Iterable[Record], front: float) -> float:
    """Return how much longer the first job after a boot waits for its first token: what is done once, then."""
    delays = [record["ttft_seconds"] - record["prefill_gpu_seconds"] / record["gpu_count"] - front
             for record in requests if record.get("boot") == "fresh"]  # fmt: skip
    return max(0.0, median(delays)) if delays else 0.0


def _priced(gpu: str, recorded: float | None, flex: float | None, active: float | None) -> dict[str, Any]:
    """Return the two prices and where they are from. A price of the endpoint's own counts for both kinds."""
    listed = prices.flex(gpu)
    if flex is not None or active is not None:
        first, second = flex if flex is not None else active, active if active is not None else flex
        return {"flex": first, "active": second, "price_origin": "as given"}
    if listed is not None and recorded in (None, listed):
        return {"flex": listed, "active": listed, "price_origin": f"table of {prices.DATE}"}
    if recorded is not None:
        return {"flex": recorded, "active": recorded, "price_origin": "GPU_PRICE_PER_SECOND, in the ledger"}
    return {"flex": None, "active": None, "price_origin": prices.of(gpu).origin}
