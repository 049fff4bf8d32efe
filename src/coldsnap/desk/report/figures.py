"""What the tables say: the figures of a report, asked of DuckDB once, for the terminal and the page alike.

Prefill seconds are the price of input tokens that were not cached, decode seconds that of output tokens. Seconds
are GPU-seconds unless they are said to be a worker's. A figure that cannot be known is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from coldsnap.cost.books import HEADINGS
from coldsnap.desk.report.api import Rate, Rates

BY = {"model": "model", "endpoint": "endpoint_id", "day": "strftime(time, '%Y-%m-%d')"}
_POINTS = 1000
"""Requests drawn in a plot, at most."""
_DEAREST = 10

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of something over requests."""

    name: str
    count: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class ApiCost:
    """The same traffic at an API's rate, and the load from which a worker that keeps running is cheaper.

    `requests_per_second` and `utilisation` are one worker's at break-even. A utilisation above 1 means that even a
    worker that never waits costs more, at the batches that were seen.
    """

    rate: Rate
    requests: int
    usd: float
    own_usd: float | None
    requests_per_second: float | None
    utilisation: float | None


@dataclass(frozen=True, slots=True)
class Economy:
    """One worker that keeps running: its price by the second, its load as it was, and the most it could take."""

    usd_per_second: float | None
    requests_per_second: float
    utilisation: float
    most_requests_per_second: float | None


@dataclass(frozen=True, slots=True)
class Invoice:
    """Worker-seconds as the lives give them, rounded up by life, and as they were billed."""

    seconds: float
    rounded: float
    usd: float | None
    billed: float | None

    @property
    def off(self) -> float | None:
        """How far the bill is above the rounded seconds, as a part of them."""
        return None if self.billed is None or not self.rounded else self.billed / self.rounded - 1


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that a report shows."""

    about: Row
    spent: dict[str, float]
    spent_usd: dict[str, float | None]
    causes: dict[str, float]
    joules: float | None
    """What the GPUs report since their workers were ready, and what of it was requests'."""
    request_joules: float | None
    total: Row
    groups: list[Row]
    boots: Row
    phases: list[Row]
    spreads: list[Spread]
    batches: list[Row]
    points: list[tuple[float, float]]
    costs: list[tuple[float, float]]
    dearest: list[Row]
    economy: Economy | None
    api: list[ApiCost]
    invoice: Invoice
    notes: list[str]


def gather(database: duckdb.DuckDBPyConnection, by: str, rates: Rates | None, billed: float | None) -> Figures:
    """Ask for everything. `by` is one of `BY`, `billed` an invoice's worker-seconds."""
    about = _one(database, _ABOUT)
    spent = _one(database, _SPENT)
    economy = _economy(_one(database, _ECONOMY))
    return Figures(
        about=about,
        spent={part: spent[part] for part in HEADINGS},
        spent_usd={part: spent[f"{part}_usd"] if not spent["unpriced"] else None for part in HEADINGS},
        causes={row["cause"]: row["seconds"] for row in _rows(database, _CAUSES)},
        joules=spent["joules"],
        request_joules=spent["request_joules"],
        total=_one(database, _COSTS.replace("{by}", "'all'")),
        groups=_rows(database, _COSTS.replace("{by}", BY[by])),
        boots=_one(database, _BOOTS),
        phases=_rows(database, _PHASES),
        spreads=[
            Spread(name, **row)
            for field, name in _SPREADS.items()
            for row in _rows(database, _SPREAD.replace("{field}", field))
            if row["count"]
        ],
        batches=_rows(database, _BATCHES),
        points=_pairs(database, _SCATTER),
        costs=_pairs(database, _EACH),
        dearest=_rows(database, _DEAREST_REQUESTS),
        economy=economy,
        api=[_priced(database, rate, economy) for rate in (rates.prices if rates else ())],
        invoice=Invoice(spent["worker_seconds"], spent["billed_seconds"], spent["billed_usd"], billed),
        notes=list(_notes(about, spent)),
    )


def _economy(row: Row) -> Economy | None:
    if not row["worker_seconds"]:
        return None
    each = row["seconds_each"]
    return Economy(
        usd_per_second=row["usd_per_second"],
        requests_per_second=row["requests"] / row["worker_seconds"],
        utilisation=row["utilisation"],
        most_requests_per_second=1 / each if each else None,
    )


def _priced(database: duckdb.DuckDBPyConnection, rate: Rate, economy: Economy | None) -> ApiCost:
    values = {
        "models": list(rate.models or ()),
        "input": rate.input,
        "cached": rate.input if rate.cached_input is None else rate.cached_input,
        "output": rate.output,
    }
    row = _one(database, _API, values)
    at, utilisation = None, None
    if economy and economy.usd_per_second and row["usd"]:
        at = economy.usd_per_second / (row["usd"] / row["requests"])
        utilisation = at * row["seconds_each"] if row["seconds_each"] else None
    return ApiCost(rate, row["requests"], row["usd"] or 0.0, row["own_usd"], at, utilisation)


def _notes(about: Row, spent: Row) -> list[str]:
    sentences = []
    if running := about["running"]:
        sentences.append(
            f"{running} of {about['workers']} workers wrote no last record: killed, or running still. Their last "
            "running totals are used, so what came after is missing."
        )
    if unknown := about["unknown"]:
        sentences.append(
            f"{unknown} of {about['workers']} workers left no totals at all: only their cold start and their requests' "
            "shares are counted, not overhead, idle and drain."
        )
    if spent["unpriced"]:
        gpus = ", ".join(about["unpriced_gpus"] or ["the GPU"])
        sentences.append(
            f"No price for {gpus}: set GPU_PRICE_PER_SECOND on the endpoint to have dollars. Records from before stay "
            "without, and with them every sum; --since leaves them out."
        )
    if unwritten := spent["unwritten"]:
        sentences.append(f"{unwritten} records did not get onto their workers' disks: they are missing here.")
    if estimated := about["estimated"]:
        sentences.append(f"{estimated} requests' costs are an equal split by time: the engine's steps were not seen.")
    if spent["busy"] and about["shares"] and abs(about["shares"] / spent["busy"] - 1) > _CLOSED:
        sentences.append(
            f"The requests' shares add up to {about['shares']:.3f} GPU-seconds, the workers' busy time is "
            f"{spent['busy']:.3f}: requests that ran at an edge of the period, or records that are missing."
        )
    return sentences


_CLOSED = 0.001

_ABOUT = """
SELECT strftime(greatest(min(begun), (SELECT since FROM period)), '%Y-%m-%d %H:%M') AS begun,
    strftime(max(ended), '%Y-%m-%d %H:%M') AS ended,
    count(*) AS workers, list(DISTINCT endpoint_id ORDER BY endpoint_id) AS endpoints,
    list(DISTINCT gpu ORDER BY gpu) AS gpus, list(DISTINCT vllm ORDER BY vllm) AS vllms,
    coalesce((SELECT list(DISTINCT model ORDER BY model) FROM requests), []) AS models,
    count(*) FILTER (totals = 'running') AS running, count(*) FILTER (totals = 'none') AS unknown,
    list(DISTINCT gpu) FILTER (price IS NULL) AS unpriced_gpus,
    (SELECT count(*) FROM requests WHERE estimated) AS estimated,
    (SELECT sum(gpu_seconds) FROM requests) AS shares
FROM lives
"""

_SPENT = f"""
SELECT {", ".join(f"coalesce(sum({part}), 0) AS {part}, sum({part} * price) AS {part}_usd" for part in HEADINGS)},
    coalesce(bool_or(price IS NULL), true) AS unpriced,
    coalesce(sum(gpu_seconds / gpu_count), 0) AS worker_seconds, coalesce(sum(billed_seconds), 0) AS billed_seconds,
    CASE WHEN NOT coalesce(bool_or(price IS NULL), true) THEN sum(billed_seconds * gpu_count * price) END AS billed_usd,
    sum(joules) AS joules, sum(request_joules) AS request_joules, coalesce(sum(unwritten), 0)::BIGINT AS unwritten
FROM lives
"""  # noqa: S608 -- the names are ours

_CAUSES = """
SELECT cause, sum(seconds) AS seconds FROM (
    SELECT unnest(map_keys(causes)) AS cause, unnest(map_values(causes)) AS seconds FROM lives
    UNION ALL
    SELECT unnest(map_keys(causes_before)), -unnest(map_values(causes_before)) FROM lives
) GROUP BY cause HAVING sum(seconds) > 0 ORDER BY seconds DESC
"""

_COSTS = """
SELECT {by} AS name, count(*) AS requests, count(error) AS failed, sum(prompt_tokens)::BIGINT AS prompt_tokens,
    sum(cached_tokens)::BIGINT AS cached_tokens, sum(input_tokens)::BIGINT AS input_tokens,
    sum(completion_tokens)::BIGINT AS output_tokens,
    sum(gpu_seconds) AS gpu_seconds, sum(loaded_gpu_seconds) AS loaded_gpu_seconds,
    sum(prefill_gpu_seconds) AS prefill, sum(decode_gpu_seconds) AS decode,
    sum(loaded_gpu_seconds * of_prefill) AS loaded_prefill, sum(loaded_gpu_seconds * of_decode) AS loaded_decode,
    CASE WHEN count(usd) = count(*) THEN sum(usd) END AS usd,
    CASE WHEN count(usd) = count(*) THEN sum(loaded_usd) END AS loaded_usd,
    CASE WHEN count(usd) = count(*) THEN sum(usd * of_prefill) END AS prefill_usd,
    CASE WHEN count(usd) = count(*) THEN sum(usd * of_decode) END AS decode_usd,
    CASE WHEN count(usd) = count(*) THEN sum(loaded_usd * of_prefill) END AS loaded_prefill_usd,
    CASE WHEN count(usd) = count(*) THEN sum(loaded_usd * of_decode) END AS loaded_decode_usd
FROM requests GROUP BY ALL ORDER BY name
"""

_BOOTS = """
SELECT count(*) AS count, count(*) FILTER (boot <> 'fresh') AS other,
    quantile_cont(seconds, 0.5) FILTER (boot = 'fresh') AS p50,
    quantile_cont(seconds, 0.95) FILTER (boot = 'fresh') AS p95,
    count(read_rate) AS reads, quantile_cont(read_rate, 0.5) AS read_rate,
    count(read_rate) FILTER (from_disk) AS disk_reads, quantile_cont(read_rate, 0.5) FILTER (from_disk) AS disk_rate
FROM cold_starts, period WHERE time >= since
"""

_PHASES = """
WITH fresh AS (SELECT * FROM cold_starts, period WHERE time >= since AND boot = 'fresh'), each AS (
    SELECT unnest(json_keys(phases)) AS phase, generate_subscripts(json_keys(phases), 1) AS place, false AS beside,
        phases AS seconds
    FROM fresh
    UNION ALL
    SELECT unnest(json_keys(beside)), generate_subscripts(json_keys(beside), 1), true, beside FROM fresh
)
SELECT phase, beside, count(*) AS count, quantile_cont(value, 0.5) AS p50, quantile_cont(value, 0.95) AS p95
FROM (SELECT *, json_extract_string(seconds, '$."' || phase || '"')::DOUBLE AS value FROM each)
GROUP BY phase, beside ORDER BY beside, avg(place), phase
"""

_SPREADS = {
    "queue_seconds": "in the engine's queue",
    "ttft_seconds": "to the first token (TTFT)",
    "itl_seconds": "between tokens (ITL)",
    "duration_seconds": "to the end (latency)",
}
_SPREAD = """
SELECT count({field}) AS count, quantile_cont({field}, 0.5) AS p50, quantile_cont({field}, 0.95) AS p95,
    quantile_cont({field}, 0.99) AS p99
FROM requests WHERE error IS NULL
"""

_BATCHES = """
SELECT pow(2, round(log2(greatest(mean_batch, 1)))) AS batch, count(*) AS requests,
    quantile_cont(decode_gpu_seconds / completion_tokens, [0.05, 0.5, 0.95]) AS seconds,
    sum(decode_gpu_seconds) AS decode, sum(completion_tokens)::BIGINT AS tokens, avg(mean_batch) AS mean,
    CASE WHEN count(usd) = count(*) THEN sum(usd * of_decode) END AS usd
FROM requests WHERE mean_batch IS NOT NULL AND decode_gpu_seconds > 0 AND completion_tokens > 0
GROUP BY batch ORDER BY batch
"""

_SCATTER = f"""
SELECT mean_batch, decode_gpu_seconds / completion_tokens FROM requests
WHERE mean_batch IS NOT NULL AND decode_gpu_seconds > 0 AND completion_tokens > 0
ORDER BY hash(job_id) LIMIT {_POINTS}
"""  # noqa: S608 -- a constant

_EACH = """SELECT gpu_seconds, loaded_gpu_seconds FROM requests WHERE gpu_seconds > 0"""

_DEAREST_REQUESTS = f"""
SELECT strftime(time, '%Y-%m-%d %H:%M:%S') AS time, job_id, model, route, input_tokens, cached_tokens,
    completion_tokens AS output_tokens, mean_batch, error, gpu_seconds, loaded_gpu_seconds, usd, loaded_usd
FROM requests ORDER BY gpu_seconds DESC, job_id LIMIT {_DEAREST}
"""  # noqa: S608 -- a constant

_ECONOMY = """
WITH all_requests AS (SELECT count(*) AS requests FROM requests)
SELECT any_value(requests) AS requests, sum(gpu_seconds / gpu_count) AS worker_seconds,
    CASE WHEN count(price) = count(*) THEN sum(gpu_seconds * price) / sum(gpu_seconds / gpu_count) END
        AS usd_per_second,
    sum((busy + overhead) / gpu_count) / sum(gpu_seconds / gpu_count) AS utilisation,
    sum((busy + overhead) / gpu_count) / nullif(any_value(requests), 0) AS seconds_each
FROM lives, all_requests
"""

_API = """
WITH served AS (
    SELECT sum((busy + overhead) / gpu_count) / nullif(sum(busy / gpu_count), 0) AS with_overhead FROM lives
)
SELECT count(*) AS requests, sum(input_tokens * $input + least(cached_tokens, prompt_tokens) * $cached
        + completion_tokens * $output) / 1e6 AS usd,
    CASE WHEN count(usd) = count(*) THEN sum(loaded_usd) END AS own_usd,
    sum(gpu_seconds / gpu_count) * any_value(with_overhead) / nullif(count(*), 0) AS seconds_each
FROM requests, served WHERE len($models::VARCHAR[]) = 0 OR list_contains($models::VARCHAR[], model)
"""


def _rows(database: duckdb.DuckDBPyConnection, query: str, values: Mapping[str, Any] | None = None) -> list[Row]:
    result = database.execute(query, values or {})
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _one(database: duckdb.DuckDBPyConnection, query: str, values: Mapping[str, Any] | None = None) -> Row:
    rows = _rows(database, query, values)
    return rows[0] if rows else {}


def _pairs(database: duckdb.DuckDBPyConnection, query: str) -> list[tuple[float, float]]:
    return [(x, y) for x, y in database.execute(query).fetchall() if math.isfinite(x) and math.isfinite(y)]
