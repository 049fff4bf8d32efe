"""The ledger as tables of DuckDB: cold starts, requests with their loaded cost, and workers' lives.

Fields that are missing are null, unknown ones are passed over. A life is a process: it begins with a fresh cold
start, or where a worker's running totals fall. Its totals are those of its last `worker` record, less what they
were at the beginning of the period that is reported on.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import duckdb

LOADED = ("by-gpu-seconds", "by-request")
"""Policies: how an endpoint's cold start, overhead, idle and drain are spread over its requests."""

_RECORDS = """
SET TimeZone = 'UTC';
CREATE TABLE period AS SELECT coalesce($since::TIMESTAMPTZ, '-infinity'::TIMESTAMPTZ) AS since, $loaded AS loaded;
CREATE TABLE lines AS SELECT row_number() OVER () AS line, json, json->>'record' AS record
FROM read_ndjson_objects($path, maximum_object_size = 16777216);

CREATE TABLE records AS
SELECT line, record, json, unnest(json_transform(json, '{
    "time": "TIMESTAMPTZ", "monotonic": "DOUBLE", "worker_id": "VARCHAR", "endpoint_id": "VARCHAR", "gpu": "VARCHAR",
    "gpu_count": "INTEGER", "vllm": "VARCHAR", "boot": "VARCHAR", "model": "VARCHAR", "seconds": "DOUBLE",
    "gpu_seconds": "DOUBLE", "price_per_second": "DOUBLE", "final": "BOOLEAN", "estimated": "BOOLEAN"}'))
FROM lines;

CREATE TABLE marked AS
WITH boots AS (
    SELECT *, count(*) FILTER (record = 'cold_start' AND coalesce(boot, 'fresh') = 'fresh') OVER before AS boots
    FROM records
    WINDOW before AS (PARTITION BY endpoint_id, worker_id ORDER BY time, monotonic, line ROWS UNBOUNDED PRECEDING)
), falls AS (
    SELECT *, record = 'worker' AND gpu_seconds < lag(CASE WHEN record = 'worker' THEN gpu_seconds END IGNORE NULLS)
        OVER (PARTITION BY endpoint_id, worker_id, boots ORDER BY time, monotonic, line) AS fell
    FROM boots
)
SELECT *, dense_rank() OVER (ORDER BY endpoint_id, worker_id, boots, falls) AS life
FROM (
    SELECT *, count(*) FILTER (fell)
        OVER (PARTITION BY endpoint_id, worker_id, boots ORDER BY time, monotonic, line ROWS UNBOUNDED PRECEDING)
        AS falls
    FROM falls
);

CREATE TABLE cold_starts AS
SELECT life, endpoint_id, worker_id, time, gpu_count, coalesce(boot, 'fresh') AS boot, seconds,
    (json->>'read_gb_per_second')::DOUBLE AS read_rate,
    (json->>'disk_read_bytes')::DOUBLE > (json->>'snapshot_bytes')::DOUBLE / 2 AS from_disk,
    json->'phases' AS phases, coalesce(json->'beside', '{}') AS beside
FROM marked WHERE record = 'cold_start';

CREATE TABLE every_request AS
SELECT life, time, endpoint_id, worker_id, gpu_count, model, price_per_second, coalesce(estimated, false) AS estimated,
    unnest(json_transform(json, '{
    "job_id": "VARCHAR", "route": "VARCHAR", "prompt_tokens": "BIGINT", "cached_tokens": "BIGINT",
    "completion_tokens": "BIGINT", "queue_seconds": "DOUBLE", "ttft_seconds": "DOUBLE", "itl_seconds": "DOUBLE",
    "duration_seconds": "DOUBLE", "error": "VARCHAR", "gpu_seconds": "DOUBLE", "prefill_gpu_seconds": "DOUBLE",
    "decode_gpu_seconds": "DOUBLE", "mean_batch": "DOUBLE", "usd": "DOUBLE"}'))
FROM marked WHERE record = 'request';

CREATE TABLE totals AS
SELECT life, time, monotonic, gpu_count, price_per_second, coalesce(final, false) AS final,
    unnest(json_transform(json, '{
    "cold_gpu_seconds": "DOUBLE", "busy_gpu_seconds": "DOUBLE", "overhead_gpu_seconds": "DOUBLE",
    "idle_gpu_seconds": "DOUBLE", "drain_gpu_seconds": "DOUBLE", "billed_seconds": "DOUBLE",
    "joules": "DOUBLE", "request_joules": "DOUBLE", "unwritten_records": "BIGINT",
    "overhead_causes": "MAP(VARCHAR, DOUBLE)"}'))
FROM marked WHERE record = 'worker';
"""

_LIVES = """
CREATE TABLE lives AS
WITH last AS (
    SELECT * FROM totals QUALIFY row_number() OVER (PARTITION BY life ORDER BY time DESC, monotonic DESC) = 1
), first AS (
    SELECT totals.* FROM totals, period WHERE time < since
    QUALIFY row_number() OVER (PARTITION BY life ORDER BY time DESC, monotonic DESC) = 1
), booted AS (
    SELECT life, max(seconds * gpu_count) AS booting,
        max(seconds * gpu_count) FILTER (time < (SELECT since FROM period)) AS booting_before
    FROM cold_starts WHERE boot = 'fresh' GROUP BY life
), shares AS (
    SELECT life, sum(gpu_seconds) AS shares, max(price_per_second) AS price FROM every_request GROUP BY life
), known AS (
    SELECT life, any_value(endpoint_id) AS endpoint_id, any_value(worker_id) AS worker_id, any_value(gpu) AS gpu,
        any_value(vllm) AS vllm, max(gpu_count) AS gpu_count,
        min(CASE WHEN record = 'cold_start' THEN time - seconds * INTERVAL 1 SECOND ELSE time END) AS begun,
        max(time) AS ended
    FROM marked GROUP BY life
)
SELECT known.*, CASE WHEN last.life IS NULL THEN 'none' WHEN last.final THEN 'final' ELSE 'running' END AS totals,
    coalesce(last.price_per_second, shares.price) AS price,
    coalesce(last.cold_gpu_seconds, booting, 0) - coalesce(first.cold_gpu_seconds, booting_before, 0) AS cold,
    -- A worker that was killed has requests on record that its last totals do not hold.
    CASE WHEN last.final THEN last.busy_gpu_seconds
        ELSE greatest(coalesce(last.busy_gpu_seconds, 0), coalesce(shares, 0)) END
        - coalesce(first.busy_gpu_seconds, 0) AS busy,
    coalesce(last.overhead_gpu_seconds, 0) - coalesce(first.overhead_gpu_seconds, 0) AS overhead,
    coalesce(last.idle_gpu_seconds, 0) - coalesce(first.idle_gpu_seconds, 0) AS idle,
    coalesce(last.drain_gpu_seconds, 0) - coalesce(first.drain_gpu_seconds, 0) AS drain,
    cold + busy + overhead + idle + drain AS gpu_seconds,
    CASE WHEN last.final THEN last.billed_seconds - coalesce(first.billed_seconds, 0)
        ELSE ceil(gpu_seconds / known.gpu_count) END AS billed_seconds,
    last.joules - coalesce(first.joules, 0) AS joules,
    last.request_joules - coalesce(first.request_joules, 0) AS request_joules,
    last.unwritten_records - coalesce(first.unwritten_records, 0) AS unwritten,
    last.overhead_causes AS causes, first.overhead_causes AS causes_before
FROM known LEFT JOIN last USING (life) LEFT JOIN first USING (life) LEFT JOIN booted USING (life)
    LEFT JOIN shares USING (life), period
WHERE ended >= since;
"""

_REQUESTS = """
CREATE TABLE requests AS
WITH pools AS (
    SELECT endpoint_id, sum(gpu_seconds - busy) AS extra, sum((gpu_seconds - busy) * price) AS extra_usd
    FROM lives GROUP BY endpoint_id
), inside AS (
    SELECT every_request.* FROM every_request, period WHERE time >= since
), weighed AS (
    SELECT inside.*, CASE WHEN period.loaded = 'by-request' OR sum(gpu_seconds) OVER same = 0
        THEN 1 / count(*) OVER same ELSE gpu_seconds / sum(gpu_seconds) OVER same END AS weight
    FROM inside, period WINDOW same AS (PARTITION BY endpoint_id)
)
SELECT weighed.*, greatest(prompt_tokens - cached_tokens, 0) AS input_tokens,
    gpu_seconds + weight * coalesce(extra, 0) AS loaded_gpu_seconds,
    usd + weight * coalesce(extra_usd, 0) AS loaded_usd,
    CASE WHEN gpu_seconds > 0 THEN prefill_gpu_seconds / gpu_seconds ELSE 0 END AS of_prefill,
    CASE WHEN gpu_seconds > 0 THEN decode_gpu_seconds / gpu_seconds ELSE 0 END AS of_decode
FROM weighed LEFT JOIN pools USING (endpoint_id);
"""


def load(lines: Path, *, since: datetime | None, loaded: str) -> duckdb.DuckDBPyConnection:
    """Return a database in memory with the tables `cold_starts`, `requests` and `lives` of the period."""
    database = duckdb.connect()
    database.execute("SET preserve_insertion_order = true")
    values = {"since": since, "loaded": loaded, "path": str(lines)}
    for statement in filter(None, map(str.strip, f"{_RECORDS};{_LIVES};{_REQUESTS}".split(";"))):
        parameters = {name: value for name, value in values.items() if f"${name}" in statement}
        database.execute(statement, parameters)
    return database
