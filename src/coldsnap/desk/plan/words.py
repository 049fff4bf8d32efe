"""What a plan says in words and rows, on the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from coldsnap.desk.plan.calibration import Calibration
from coldsnap.desk.plan.frontier import Plan, Point
from coldsnap.desk.plan.simulation import Choice, Traffic
from coldsnap.desk.report.notation import NONE, count, digits, seconds, usd
from coldsnap.foundation.plural import plural

_SHOWN_CONTEXT = 1000
_EXTRAPOLATED = 2.0
"""Batches so many times as full as the ledger's fullest are worth a warning."""
_SHAKY = 1.3
"""A p95 that changes by more than this factor when steps take `frontier.SLOWER` times as long is mostly waiting."""
_MARK = "!"
_HOUR = 3600.0
_SPANS = (("days", 86_400.0), ("h", _HOUR), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True)
class Inputs:
    """What a plan was asked for."""

    trace: str
    ledger: str
    traffic: Traffic
    current: Choice
    current_name: str
    """`now` if the settings were given, `defaults` if they are the platform's."""
    seed: int


COLUMNS = (
    "", "active", "max", "idle", "jobs", "an hour", "1,000 req.", "p50 TTFT", "p95 TTFT", "at +10%", "p99 TTFT",
    "p95 in all", "boots", "busy", "slots",
)  # fmt: skip
"""`jobs` is MAX_CONCURRENCY."""
KEY = (
    "At +10%: p95 TTFT if the engine's steps took 10% longer. Busy: of the billed seconds, those in which a step ran. "
    "Slots: of those of ready workers, the part that was taken."
)


def rows(plan: Plan, inputs: Inputs) -> Iterator[tuple[str, list[str]]]:
    """Yield (kind, cells) of the frontier's lines, then of the settings that it is compared with."""
    for point in plan.frontier:
        best = point is plan.recommended
        same = point is plan.current
        mark = " ".join(filter(None, ("→" * best, inputs.current_name * same)))
        yield "recommended" if best else "other", [mark, *_cells(plan, inputs, point)]
    if not any(point is plan.current for point in plan.frontier):
        yield "current", [inputs.current_name, *_cells(plan, inputs, plan.current)]


def cost(plan: Plan, inputs: Inputs, point: Point, *, per: str) -> str:
    """Return dollars, or GPU-seconds without a price, `per` hour of the trace or 1,000 requests."""
    share = plan.seconds / _HOUR if per == "hour" else len(inputs.traffic.times) / 1000
    value = point.cost / share if share else None
    return seconds_of_gpu(value) if point.usd is None else usd(value)


def seconds_of_gpu(value: float | None) -> str:
    """Return GPU-seconds with their unit."""
    return f"{digits(value)} GPU-s"


def settings(point: Point) -> str:
    """Return a point's settings in words. Without workers that may end there is no idle timeout."""
    above = f"at most {point.most}, idle timeout {point.idle:g} s" if point.most > point.active else "no more"
    return f"{point.active} active, {above}, MAX_CONCURRENCY={point.concurrency}"


def about(plan: Plan, inputs: Inputs) -> str:
    """Say what the trace is."""
    traffic = inputs.traffic
    number = len(traffic.times)
    return (
        f"{count(number)} requests in {span(plan.seconds)}, on average {digits(sum(traffic.prompts) / number)} prompt "
        f"and {digits(sum(traffic.outputs) / number)} output tokens"
    )


def assumed(calibration: Calibration, inputs: Inputs) -> list[str]:
    """Say what the plan rests on, and where each figure is from."""
    boots, speed = sorted(calibration.worker.boots), calibration.worker.speed
    scaling = inputs.current.scaling
    rule = (
        f"a worker more when a job has waited {scaling.value:g} s" if scaling.rule == "queue-delay"
        else f"a worker for each {scaling.value:g} requests"
    )  # fmt: skip
    wide = max(1, round(calibration.widest))
    alone, full = (digits(calibration.tokens_per_second(batch, _SHOWN_CONTEXT)) for batch in (1, wide))
    limits = (
        "as its boot recorded them" if calibration.limits_known else "vLLM's defaults: the ledger does not say them"
    )
    if calibration.flex is None:
        price = f"none, costs are GPU-seconds: {calibration.price_origin}, or give --flex-price"
    else:
        price = (
            f"${digits(calibration.flex)} a second flex, ${digits(calibration.active)} active, for each of "
            f"{calibration.gpu_count} {calibration.gpu} ({calibration.price_origin})"
        )
    cold = f"{digits(median(boots))} s ({digits(boots[0])} to {digits(boots[-1])})"
    engine = f"{alone} tokens/s alone, {full} in a batch of {wide}, at {_SHOWN_CONTEXT:,} tokens of context"
    checked = (
        f"times {calibration.correction:.2f}: then {count(calibration.requests)} requests of the ledger take as long "
        "as they did"
    )
    return [
        f"Cold start: {cold}, from {plural(len(boots), 'boot')} in the ledger, with what the first job waits longer.",
        f"Engine: {engine}.",
        (
            f"That is the cost of a step as the workers fitted it, {checked} "
            f"(median error of one: {calibration.error:.0%})."
        ),
        f"Limits of a step: {speed.sequences} requests, {count(speed.tokens)} tokens, {limits}.",
        f"Price: {price}.",
        f"Scaler: {scaling.rule}, {rule}.",
        "Not in it: the network, the platform's own delays, the prefix cache, failures, throttled GPUs.",
    ]


def warnings(plan: Plan, calibration: Calibration, inputs: Inputs) -> list[str]:
    """Say where the plan is on thin ice."""
    sentences = []
    lines = [*plan.frontier, plan.current]
    if (widest := max(point.widest for point in lines)) > _EXTRAPOLATED * calibration.widest:
        sentences.append(
            f"Batches of up to {widest} requests are foreseen, the ledger's fullest had {calibration.widest:.0f}: "
            "what such a batch costs is extrapolated. `coldsnap bench` at that load would measure it."
        )
    best = plan.recommended
    if best is not None and _misses(plan, best):
        holds = min((point for point in lines if not _misses(plan, point)), key=lambda point: point.cost, default=None)
        instead = (
            "no line of the table holds the target then" if holds is None
            else f"{settings(holds)} would hold the target then, for {cost(plan, inputs, holds, per='hour')} an hour"
        )  # fmt: skip
        sentences.append(
            f"If the engine's steps took 10% longer than in the ledger, the p95 TTFT of what is recommended would be "
            f"{seconds(best.slower95)}; {instead}."
        )
    if any(map(shaky, lines)):
        sentences.append(
            f"A {_MARK} stands where the p95 is far off if steps take 10% longer: near saturation waiting grows much "
            "faster than steps, and when a worker is added may hang on a single request. Such a p95 is a guess, unless "
            "the ledger is of that very load: run `coldsnap bench` at it, then plan again."
        )
    if not calibration.limits_known:
        sentences.append("The ledger is of an older coldsnap and does not say the engine's limits.")
    return sentences


def shaky(point: Point) -> bool:
    """Return whether the p95 hangs on the cost of a step more than steps alone would have it."""
    return point.slower95 is not None and not 1 / _SHAKY <= point.slower95 / point.ttft95 <= _SHAKY


def _misses(plan: Plan, point: Point) -> bool:
    assert plan.target is not None
    return point.slower95 is None or point.slower95 > plan.target


def verdict(plan: Plan, inputs: Inputs) -> str:
    """Say what to choose, in one sentence."""
    if plan.target is None:
        return "Give --ttft-p95, as in --ttft-p95 2s, to have one of them recommended."
    best = plan.recommended
    if best is None:
        return unreachable(plan)
    saved = 1 - best.cost / plan.current.cost if plan.current.cost else 0.0
    than = f"{inputs.current_name} ({seconds(plan.current.ttft95)})"
    against = f"as {inputs.current_name}" if best is plan.current else f"{_cheaper(saved)} than {than}"
    return (
        f"For p95 TTFT within {seconds(plan.target)}: {settings(best)}. "
        f"{cost(plan, inputs, best, per='hour')} an hour, p95 TTFT {seconds(best.ttft95)}; {against}."
    )


def _cheaper(saved: float) -> str:
    return f"{abs(saved):.0%} {'cheaper' if saved > 0 else 'dearer'}"


def unreachable(plan: Plan) -> str:
    """Say that no setting is within the target, and which comes nearest."""
    assert plan.target is not None
    return (
        f"--ttft-p95 {seconds(plan.target)}: no setting that was tried gets there; the best is "
        f"{seconds(plan.best.ttft95)} with {settings(plan.best)}"
    )


def span(value: float) -> str:
    """Return a length of time in the unit that suits it."""
    name, size = next(((name, size) for name, size in _SPANS if value >= 2 * size), _SPANS[-1])
    return f"{digits(value / size)} {name}"


def _cells(plan: Plan, inputs: Inputs, point: Point) -> list[str]:
    return [
        str(point.active), str(point.most), f"{point.idle:g} s" if point.most > point.active else NONE,
        str(point.concurrency),
        cost(plan, inputs, point, per="hour"), cost(plan, inputs, point, per="requests"),
        seconds(point.ttft50), seconds(point.ttft95), seconds(point.slower95) + f" {_MARK}" * shaky(point),
        seconds(point.ttft99), seconds(point.total95),
        count(point.boots), f"{point.utilisation:.0%}", f"{point.slots:.0%}",
    ]  # fmt: skip
