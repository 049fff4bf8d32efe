"""Summarises a load: percentiles, rates, goodput, errors, cost, and how far the client itself can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coldsnap.desk.bench.driver import Outcome, Run
from coldsnap.desk.bench.slo import Slo
from coldsnap.foundation.plural import plural

_FEW = 100
"""Requests below which a p99 is the worst of them."""
_BUSY = 0.7
"""Share of one core: a client that is busier than this is a part of what it measures."""
_LATE = 0.1
"""Share of the median TTFT: a note says so if requests were sent later than this."""
_OFF = 0.02


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of requests that ended well."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Return the spread of the values that are known, quantiles interpolated; None if there are none."""
        numbers = [value for value in values if value is not None]
        if not numbers:
            return None
        p50, p90, p95, p99 = (float(value) for value in np.quantile(numbers, (0.5, 0.9, 0.95, 0.99)))
        return cls(len(numbers), float(np.mean(numbers)), p50, p90, p95, p99, max(numbers))


@dataclass(frozen=True, slots=True)
class Failure:
    """Requests that failed in one way."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens by the server's `usage`, and what was asked for by the requests that it gave it for."""

    prompt: int
    wished_prompt: int
    output: int
    wished_output: int
    unknown: int
    """Requests that ended well without a usage; their tokens are in no figure."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What answers said that they cost, without cold starts and idle time. Dollars where there is a price."""

    requests: int
    gpu_seconds: float
    prefill_gpu_seconds: float
    decode_gpu_seconds: float
    usd: float | None
    prompt_tokens: int
    output_tokens: int

    def usd_of(self, gpu_seconds: float) -> float | None:
        """Return what some of the GPU-seconds cost."""
        return self.usd * gpu_seconds / self.gpu_seconds if self.usd is not None and self.gpu_seconds else None


@dataclass(frozen=True, slots=True)
class Good:
    """Requests that kept to the SLO, of all that ended, failed ones included."""

    requests: int
    share: float
    per_second: float


@dataclass(frozen=True, slots=True)
class Client:
    """This program: cores it kept busy, and how late it sent what was due at a time of its own (open loop)."""

    cpu_share: float
    late: Spread | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A load in figures. Rates are over `seconds`, from its start to the end of its last answer."""

    requests: int
    succeeded: int
    failed: int
    unfinished: int
    seconds: float
    requests_per_second: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    most_in_flight: int
    ttft: Spread | None
    itl: Spread | None
    gap: Spread | None
    e2e: Spread | None
    tokens: Tokens
    failures: tuple[Failure, ...]
    good: Good | None
    cost: Cost | None
    client: Client
    notes: tuple[str, ...]


def summarise(run: Run, slo: Slo | None, *, open_loop: bool, exact: bool) -> Summary:
    """Return the figures of a load. With `exact`, answers were to have the tokens that were wished."""
    good = [each for each in run.outcomes if each.error is None]
    tokens = _tokens(good)
    # from its start, though the first request was due later: the load's time, not the time of its answers
    seconds = max((each.end for each in run.outcomes), default=0.0) if not run.unfinished else run.seconds
    per = (1 / seconds) if seconds else 0.0
    within_slo = sum(slo.kept(each) for each in run.outcomes) if slo else 0
    client = Client(
        run.cpu / run.seconds if run.seconds else 0.0,
        Spread.of(each.sent - each.due for each in run.outcomes) if open_loop else None,
    )
    spreads = {
        name: Spread.of(getattr(each, name) for each in good) for name in ("ttft", "itl", "gap", "e2e")
    }  # of the same requests
    return Summary(
        requests=len(run.outcomes) + run.unfinished,
        succeeded=len(good),
        failed=len(run.outcomes) - len(good),
        unfinished=run.unfinished,
        seconds=seconds,
        requests_per_second=len(good) * per,
        prompt_tokens_per_second=tokens.prompt * per,
        output_tokens_per_second=tokens.output * per,
        most_in_flight=run.most_running,
        **spreads,
        tokens=tokens,
        failures=_failures(run.outcomes),
        good=Good(within_slo, within_slo / len(run.outcomes), within_slo * per) if slo and run.outcomes else None,
        cost=_cost(good),
        client=client,
        notes=tuple(_notes(good, tokens, spreads["ttft"], client, run, exact=exact)),
    )


def _tokens(good: Sequence[Outcome]) -> Tokens:
    counted = [each for each in good if each.output_tokens is not None and each.prompt_tokens is not None]
    return Tokens(
        sum(each.prompt_tokens or 0 for each in counted),
        sum(each.wished_prompt_tokens for each in counted),
        sum(each.output_tokens or 0 for each in counted),
        sum(each.wished_output_tokens for each in counted),
        len(good) - len(counted),
    )


def _failures(outcomes: Sequence[Outcome]) -> tuple[Failure, ...]:
    kinds = Counter(each.error for each in outcomes if each.error is not None)
    examples = {each.error: each.detail for each in reversed(outcomes)}
    return tuple(Failure(kind, count, examples[kind]) for kind, count in kinds.most_common())


def _cost(good: Sequence[Outcome]) -> Cost | None:
    billed = [each for each in good if each.gpu_seconds is not None]
    if not billed:
        return None
    priced = [each.usd for each in billed if each.usd is not None]
    return Cost(
        len(billed),
        sum(each.gpu_seconds or 0.0 for each in billed),
        sum(each.prefill_gpu_seconds or 0.0 for each in billed),
        sum(each.decode_gpu_seconds or 0.0 for each in billed),
        sum(priced) if len(priced) == len(billed) else None,
        sum(each.prompt_tokens or 0 for each in billed),
        sum(each.output_tokens or 0 for each in billed),
    )


def _notes(
    good: Sequence[Outcome], tokens: Tokens, ttft: Spread | None, client: Client, run: Run, *, exact: bool
) -> Iterable[str]:
    """Say what a reader of the figures must know."""
    if run.unfinished:
        yield f"The load was stopped with {plural(run.unfinished, 'request')} in flight, in no figure."
    if good and len(good) < _FEW:
        yield f"p99 of {plural(len(good), 'request')} is hardly more than the worst of them."
    if tokens.unknown:
        yield f"{plural(tokens.unknown, 'answer')} without usage: the tokens of these are in no figure."
    for name, wished, got in (
        ("prompt", tokens.wished_prompt, tokens.prompt),
        ("output", tokens.wished_output, tokens.output),
    ):
        if wished and abs(got / wished - 1) > _OFF and (exact or name == "prompt"):
            yield f"The {name}s had {got:,} tokens by the server's count, {wished:,} were wished."
    if silent := sum(not each.text for each in good):
        yield f"{plural(silent, 'answer')} without any text: TTFT is the first output, whether it had text or not."
    if client.cpu_share > _BUSY:
        yield f"This client kept {client.cpu_share:.0%} of a core busy: it is a part of what it measured."
    if client.late and ttft and client.late.p90 > _LATE * ttft.p50:
        yield f"A tenth of the requests were sent {client.late.p90 * 1e3:.1f} ms late or more; it counts as their wait."
