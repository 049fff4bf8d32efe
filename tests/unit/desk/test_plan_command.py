"""`coldsnap plan` from a ledger made by a model that is known: what it learns, recommends, writes and refuses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldsnap import cli
from coldsnap.desk.plan import calibration
from coldsnap.desk.plan.batch import Batch, Speed
from coldsnap.desk.plan.calibration import Calibration
from coldsnap.desk.plan.command import seconds
from coldsnap.desk.plan.simulation import Choice, Traffic, WorkerModel, simulate
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.errors import PlanError

Record = dict[str, Any]

START = datetime(2026, 11, 20, 12, tzinfo=UTC)
TRUE = Speed(a=0.008, b=0.00004, c=0.0002, d=3e-8, sequences=64, tokens=4096, cache=100_000)
FRONT, STOP, FIRST_JOB = 0.004, 0.3, 0.5
FIT_OFF = 0.9
"""The fit in the records says this much of what steps take."""


def common(kind: str, at: float, **more: Any) -> Record:
    return {
        "schema_version": 1, "time": (START + timedelta(seconds=at)).isoformat(), "monotonic": 1000 + at,
        "worker_id": "w1", "endpoint_id": "e1", "gpu": "NVIDIA H100 80GB HBM3", "gpu_count": 1,
        "snapshot_digest": None, "vllm": "0.32.0", "record": kind, **more,
    }  # fmt: skip


def boot(at: float, took: float, **more: Any) -> Record:
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "kv_cache_tokens": 100_000}
    fields = {"boot": "fresh", "seconds": took, "phases": {"python": took}, "beside": {}, "model": "m1"}
    return common("cold_start", at, **fields | {"limits": limits, "max_concurrency": 32} | more)


def ledger(count: int = 200) -> list[Record]:
    """Return the records of one worker that ran requests as TRUE says, with a fit that is off."""
    rng = random.Random(1)
    times = np.cumsum([rng.expovariate(6.0) for _ in range(count)]).tolist()
    traffic = Traffic(
        times, [rng.randint(50, 1500) for _ in times], [rng.randint(2, 200) for _ in times]
    )  # fmt: skip
    model = WorkerModel(TRUE, [1.0], FRONT)
    found = simulate(traffic, Choice(Scaling(1, 1), 10_000), model)
    fit = {name: getattr(TRUE, name) * FIT_OFF for name in "abcd"} | {"residual": 0.1, "steps": 5000}
    records = [boot(-50 + i, took) for i, took in enumerate((20.0, 22.0, 27.0))]
    for number, (time, prompt, output) in enumerate(
        zip(traffic.times, traffic.prompts, traffic.outputs, strict=True)
    ):  # fmt: skip
        ttft, total = float(found.ttft[number]), float(found.total[number])
        first = number == 0
        records.append(
            common(
                "request", time + total, job_id=f"j{number}", boot="fresh" if first else "warm", route="native",
                model="m1", stream=True, prompt_tokens=prompt, cached_tokens=0, completion_tokens=output,
                queue_seconds=0.0, ttft_seconds=ttft + FIRST_JOB * first, itl_seconds=(total - ttft) / (output - 1),
                duration_seconds=total, finish_reason="stop", error=None, gpu_seconds=0.1,
                prefill_gpu_seconds=0.008 + 0.00004 * prompt, decode_gpu_seconds=0.08, mean_batch=7.0, joules=None,
                usd=0.1 * 0.00116, price_per_second=0.00116, estimated=False, fit=fit,
            )
        )  # fmt: skip
    parts = dict.fromkeys(("gpu_seconds", "cold_gpu_seconds", "busy_gpu_seconds"), 20.0)
    parts |= dict.fromkeys(("overhead_gpu_seconds", "idle_gpu_seconds"), 1.0)
    records.append(common("worker", 500, final=True, drain_gpu_seconds=STOP, billed_seconds=42, **parts))
    return records


def closed(clients: int, count: int) -> list[Record]:
    """Return the records of `ledger`, but that each request comes when one of so many before it has ended."""
    rng = random.Random(1)
    prompts, outputs = ([rng.randint(*ends) for _ in range(count)] for ends in ((50, 1200), (20, 200)))
    batch, came, first, last = Batch(TRUE, prompts, outputs), np.zeros(count), np.zeros(count), np.zeros(count)
    coming = iter(range(count))
    for number in range(clients):
        batch.add(next(coming), 0.001 * number)
        came[number] = 0.001 * number
    while batch.end < np.inf:
        at = batch.end
        begun, ended = batch.advance()
        first[begun] = at
        last[ended] = at
        for number, _ in zip(coming, ended, strict=False):
            came[number] = at + 0.003
            batch.add(number, at + 0.003)
    [template, *_] = (record for record in ledger(2) if record["record"] == "request")
    found = [
        template | {
            "time": (START + timedelta(seconds=float(last[number]))).isoformat(), "job_id": f"j{number}",
            "boot": "warm", "prompt_tokens": prompts[number], "completion_tokens": outputs[number],
            "duration_seconds": float(last[number] - came[number]),
            "ttft_seconds": float(first[number] - came[number]),
            "itl_seconds": float(last[number] - first[number]) / (outputs[number] - 1),
        } for number in range(count)
    ]  # fmt: skip
    return [boot(-10, 20.0), *found]


def write(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learn(tmp_path: Path, records: list[Record], **more: Any) -> Calibration:
    asked: Record = {"model": None, "endpoint": None, "flex": None, "active": None}
    return calibration.read(write(tmp_path / "clean.jsonl", records), **asked | more)


class TestCalibration:
    def test_a_known_model_is_recovered_from_records_whose_fit_is_off(self, tmp_path: Path) -> None:
        known = learn(tmp_path, ledger())
        assert known.correction == pytest.approx(1 / FIT_OFF, rel=0.01)
        for name in "abcd":
            assert getattr(known.worker.speed, name) == pytest.approx(getattr(TRUE, name), rel=0.01)
        assert known.error < 0.02
        assert known.worker.front == pytest.approx(FRONT, abs=0.001)
        assert known.worker.stop == STOP
        assert (known.worker.speed.sequences, known.worker.speed.tokens, known.worker.speed.cache) == (64, 4096, 1e5)
        assert (known.concurrency, known.requests, known.limits_known) == (32, 200, True)

    def test_a_full_batch_is_no_reason_to_overshoot(self, tmp_path: Path) -> None:
        """Where slots are never empty, a model that is 10% slower decodes 20% longer, and then some."""
        known = learn(tmp_path, closed(32, 200))
        assert known.correction == pytest.approx(1 / FIT_OFF, rel=0.002)
        assert known.error < 0.01
        assert known.worker.front == pytest.approx(0.0, abs=0.001)

    def test_the_order_of_the_lines_does_not_matter(self, tmp_path: Path) -> None:
        records = ledger()
        forward, backward = learn(tmp_path, records), learn(tmp_path, records[::-1])
        assert backward.worker.speed == forward.worker.speed
        assert (backward.correction, backward.widest) == (forward.correction, forward.widest)

    def test_a_boot_is_longer_by_what_the_first_job_waits_for(self, tmp_path: Path) -> None:
        boots = learn(tmp_path, ledger()).worker.boots
        assert boots == pytest.approx([20.0 + FIRST_JOB, 22.0 + FIRST_JOB, 27.0 + FIRST_JOB], abs=0.01)

    def test_a_revived_worker_is_no_boot(self, tmp_path: Path) -> None:
        revived = boot(-1, 0.0, boot="revived", revival="frozen")
        assert len(learn(tmp_path, [*ledger(), revived]).worker.boots) == 3

    def test_a_ledger_without_limits_says_so(self, tmp_path: Path) -> None:
        records = [{key: value for key, value in record.items() if key != "limits"} for record in ledger()]
        known = learn(tmp_path, records)
        assert not known.limits_known
        assert known.worker.speed.sequences == 256

    @pytest.mark.parametrize(
        ("gpu", "recorded", "given", "expected"),
        [
            ("NVIDIA H100 80GB HBM3", 0.00116, {}, (0.00116, 0.00116, "table of 2026-06-08")),
            ("NVIDIA H100 80GB HBM3", None, {}, (0.00116, 0.00116, "table of 2026-06-08")),
            ("NVIDIA H100 80GB HBM3", 0.002, {}, (0.002, 0.002, "GPU_PRICE_PER_SECOND, in the ledger")),
            ("cpu", 0.002, {}, (0.002, 0.002, "GPU_PRICE_PER_SECOND, in the ledger")),
            ("cpu", None, {"flex": 0.5}, (0.5, 0.5, "as given")),
            ("cpu", 0.002, {"flex": 0.5, "active": 0.4}, (0.5, 0.4, "as given")),
        ],
    )
    def test_prices_are_given_recorded_or_the_tables(
        self, tmp_path: Path, gpu: str, recorded: float | None, given: Record, expected: tuple[float, float, str]
    ) -> None:
        records = [record | {"gpu": gpu, "price_per_second": recorded} for record in ledger()]
        known = learn(tmp_path, records, **given)
        assert (known.flex, known.active, known.price_origin) == expected
        assert known.usd(100, 10) == pytest.approx(100 * expected[0] + 10 * expected[1])

    def test_without_a_price_there_are_no_dollars(self, tmp_path: Path) -> None:
        records = [record | {"gpu": "cpu", "price_per_second": None} for record in ledger()]
        known = learn(tmp_path, records)
        assert known.usd(100, 10) is None
        assert "set GPU_PRICE_PER_SECOND" in known.price_origin

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda records: [r for r in records if r["record"] != "cold_start"], "no cold start of m1: a boot writes"),
            (lambda records: [r for r in records if r["record"] != "request"], "no request: run `coldsnap bench`"),
            (
                lambda records: records[:13],
                "10 completed request.s. of m1 and 10 with a fitted cost.*at least 20.*bench",
            ),
            (
                lambda records: [r | {"fit": None} for r in records],
                "200 completed.* and 0 with a fitted cost of a step",
            ),
            (lambda records: [r | {"estimated": True} for r in records], "0 completed request.s. of m1 and 0"),
            (
                lambda records: [*records, records[5] | {"model": "m2"}],
                "several kinds of worker: m1 on NVIDIA H100.*200 requests., m2 on .*choose with --model or --endpoint",
            ),
        ],
    )
    def test_what_is_missing_is_named_and_how_to_get_it(
        self, tmp_path: Path, change: Callable[[list[Record]], list[Record]], said: str
    ) -> None:
        with pytest.raises(PlanError, match=said):
            learn(tmp_path, change(ledger()))

    def test_one_of_several_models_is_chosen(self, tmp_path: Path) -> None:
        records = ledger()
        both = [*records, *({**r, "model": "m2"} for r in records[3:8])]
        assert learn(tmp_path, both, model="m1").model == "m1"
        with pytest.raises(PlanError, match="no request of m3"):
            learn(tmp_path, both, model="m3")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A trace with bursts, and a ledger."""
    rng = random.Random(2)
    times = sorted(60 * rng.randint(0, 30) + rng.expovariate(0.2) for _ in range(150))
    lines = (
        {"time": time, "prompt_tokens": rng.randint(50, 1500), "output_tokens": rng.randint(2, 300)} for time in times
    )
    return write(tmp_path / "trace.jsonl", list(lines)), write(tmp_path / "ledger.jsonl", ledger())


def run(places: tuple[Path, Path], *options: str) -> int:
    return cli.main(["plan", str(places[0]), "--ledger", str(places[1]), *options])


class TestCommand:
    def test_it_recommends_the_cheapest_within_the_target(
        self, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "plan.json"
        assert run(places, "--ttft-p95", "2s", "--json", str(out)) == 0
        found = json.loads(out.read_bytes())
        best = found["recommended"]
        assert best["ttft95"] <= 2.0
        assert not any(point["ttft95"] <= 2.0 and point["usd"] < best["usd"] for point in found["points"])
        assert best in found["frontier"]
        costs = [(point["usd"], point["ttft95"]) for point in found["frontier"]]
        assert costs == sorted(costs)
        assert [ttft for _, ttft in costs] == sorted((ttft for _, ttft in costs), reverse=True)
        current = found["current"]
        assert (current["active"], current["most"], current["idle"], current["concurrency"]) == (0, 3, 5.0, 32)
        said = capsys.readouterr().out
        assert "150 requests in" in said
        assert "Cold start: 22.5 s (20.5 to 27.5), from 3 boots in the ledger" in said
        assert "$0.00116 a second flex, $0.00116 active, for each of 1 NVIDIA H100 80GB HBM3" in said
        assert re.search(r"^\s*→", said, re.MULTILINE)
        assert re.search(r"^\s*defaults", said, re.MULTILINE)
        assert f": {best['active']} active, " in said
        assert f"MAX_CONCURRENCY={best['concurrency']}" in said

    def test_a_point_of_the_plan_is_what_the_simulation_says(self, places: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "plan.json"
        options = ("--active", "1", "--max-workers", "2", "--idle-timeout", "7", "--concurrency", "8")
        assert run(places, *options, "--current", "1,2,7", "--seed", "3", "--json", str(out)) == 0
        found = json.loads(out.read_bytes())
        assert {(p["active"], p["most"], p["idle"]) for p in found["points"]} == {(1, 2, 7.0)}
        assert {p["concurrency"] for p in found["points"]} == {8, 32}
        lines = [json.loads(line) for line in places[0].read_text().splitlines()]
        begin = lines[0]["time"]
        traffic = Traffic(
            [line["time"] - begin for line in lines], [line["prompt_tokens"] for line in lines],
            [line["output_tokens"] for line in lines],
        )  # fmt: skip
        known = learn(tmp_path, ledger())
        outcome = simulate(traffic, Choice(Scaling(1, 2, 7.0), 32), known.worker, 3)
        current = found["current"]
        assert current["ttft95"] == pytest.approx(float(np.percentile(outcome.ttft, 95)))
        assert current["usd"] == pytest.approx(outcome.flex * 0.00116 + outcome.active * 0.00116)
        assert current["boots"] == outcome.boots

    def test_more_active_workers_than_needed_are_cheap_only_where_they_work(
        self, places: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "plan.json"
        assert run(places, "--json", str(out)) == 0
        found = json.loads(out.read_bytes())
        assert {p["active"] for p in found["points"]} >= {0, 1}
        assert found["recommended"] is None
        assert all(p["peak"] <= p["most"] for p in found["points"])

    def test_the_page_needs_nothing_else(self, places: tuple[Path, Path], tmp_path: Path) -> None:
        page = tmp_path / "plan.html"
        assert run(places, "--ttft-p95", "2s", "--html", str(page)) == 0
        text = page.read_text("utf-8")
        assert text.startswith("<!doctype html>")
        assert "target 2.00 s" in text
        assert 'role="img" aria-label="Cost against the time to the first token"' in text
        assert text.count('<tr class="recommended">') == 1
        assert text.count('<tr class="current">') == 1
        assert not re.search(r"<script|https?://|<link|@import|url\((?!#)", text)

    def test_without_a_price_costs_are_gpu_seconds(
        self, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(places[1], [record | {"gpu": "cpu", "price_per_second": None} for record in ledger()])
        assert run(places, "--ttft-p95", "30s", "--html", str(tmp_path / "plan.html")) == 0
        said = capsys.readouterr().out
        assert "Price: none, costs are GPU-seconds" in said
        assert "--flex-price" in said
        assert re.search(r"GPU-s an hour", said)
        assert "GPU-seconds an hour" in (tmp_path / "plan.html").read_text("utf-8")

    def test_a_target_out_of_reach_is_said_with_the_best(
        self, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "plan.json"
        assert run(places, "--ttft-p95", "1ms", "--json", str(out)) == 1
        found = json.loads(out.read_bytes())
        assert found["recommended"] is None
        best = min(point["ttft95"] for point in found["points"])
        said = capsys.readouterr().err
        assert "--ttft-p95 1.00 ms: no setting that was tried gets there; the best is" in said
        assert f"{best * 1e3:.1f} ms with" in said

    def test_emptier_batches_than_planned_are_a_warning(
        self, places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(places[1], [record | {"mean_batch": 1.2} for record in ledger()])
        page = places[0].with_suffix(".html")
        assert run(places, "--html", str(page)) == 0
        assert "<code>coldsnap bench</code> at that load" in page.read_text("utf-8")
        assert re.search(
            r"Batches of up to \d+ requests are foreseen, the ledger's fullest had 1", capsys.readouterr().out
        )

    def test_near_saturation_the_table_says_how_much_hangs_on_the_cost_of_a_step(
        self, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Four slots serve 4.5 requests a second of 0.9 s each: 4 a second fill them, 1 a second does not."""
        out = tmp_path / "plan.json"
        fixed = ("--concurrency", "4", "--current", "1,1,1", "--json", str(out))
        options = ("--max-workers", "1", "--active", "1", *fixed)
        write(places[1], [record | {"max_concurrency": 4} for record in ledger()])
        for rate in (1.0, 4.0):
            rng, at = random.Random(3), 0.0
            times = [at := at + rng.expovariate(rate) for _ in range(600)]
            write(places[0], [{"time": time, "prompt_tokens": 100, "output_tokens": 100} for time in times])
            assert run(places, *options) == 0
            said = capsys.readouterr().out
            [point] = json.loads(out.read_bytes())["points"]
            full = rate > 1
            assert (point["slots"] > 0.8) == full
            assert (point["slower95"] > 1.3 * point["ttft95"]) == full
            assert ("A ! stands where the p95 is far off" in said) == full
            assert (" s !" in said) == full
            assert f"{point['slots']:.0%}" in said
        target = f"{1000 * (point['ttft95'] + point['slower95']) / 2:.0f}ms"
        assert run(places, *options, "--ttft-p95", target) == 0
        assert "no line of the table holds the target then." in re.sub(r"\s+", " ", capsys.readouterr().out)
        assert run(places, *fixed, "--max-workers", "1,2", "--active", "1,2", "--ttft-p95", target) == 0
        said = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert re.search(r"would be [\d.]+ s; 2 active, no more, .* would hold the target then, for \$\d", said)

    def test_what_is_not_shown_is_not_simulated_with_slower_steps(
        self, places: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "plan.json"
        assert run(places, "--json", str(out)) == 0
        found = json.loads(out.read_bytes())
        shown = [*found["frontier"], found["current"]]
        assert all(point["slower95"] is not None for point in shown)
        assert all((point["slower95"] is not None) == (point in shown) for point in found["points"])

    def test_a_ledger_is_a_trace_too(self, places: tuple[Path, Path]) -> None:
        assert run((places[1], places[1])) == 0

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--ttft-p95", "soon"], "--ttft-p95: expected a time above 0 as 2s, 500ms or 1m, found 'soon'"),
            (["--ttft-p95", "0s"], "--ttft-p95: expected a time above 0"),
            (["--max-workers", "2,0"], "--max-workers: expected whole numbers of at least 1, found '0'"),
            (["--active", "x"], "--active: expected whole numbers of at least 0, found 'x'"),
            (["--active", "3", "--max-workers", "2"], "--active 3: more than --max-workers, 2 at most"),
            (["--idle-timeout", "-1"], "--idle-timeout: expected numbers of at least 0, found '-1'"),
            (["--concurrency", "0"], "--concurrency: expected whole numbers of at least 1"),
            (["--scaler", "none"], "--scaler: expected one of queue-delay, request-count, found 'none'"),
            (["--scaler", "request-count", "--scaler-value", "0"], "--scaler-value: expected requests for each worker"),
            (["--current", "1,2"], "--current: expected ACTIVE,MAX,IDLE as 0,3,5, found '1,2'"),
            (["--current", "3,2,5"], "--current 3,2,5: 2 workers at most are fewer than 3 active ones"),
            (["--flex-price", "much"], "--flex-price: expected numbers of at least 0, found 'much'"),
            (
                ["--html", "/nowhere/plan.html"],
                "--html: /nowhere/plan.html cannot be written: there is no folder /nowhere",
            ),
            (["--json", "."], "--json: expected a file, . is a folder"),
        ],
    )
    def test_wrong_options_are_named_before_anything_is_read(
        self, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run((tmp_path / "no-trace", tmp_path / "no-ledger"), *options) == 1
        assert capsys.readouterr().err.startswith(f"coldsnap: {said}")

    def test_a_trace_with_a_field_missing_is_named_with_its_line(
        self, places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = places[0].read_text().splitlines()
        lines[6] = json.dumps({"time": json.loads(lines[6])["time"], "prompt_tokens": 5})
        places[0].write_text("\n".join(lines))
        assert run(places) == 1
        assert re.search(r"trace\.jsonl, line 7: output_tokens: expected", capsys.readouterr().err)

    def test_a_ledger_without_requests_is_named_with_how_to_fill_it(
        self, places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(places[1], [record for record in ledger() if record["record"] != "request"])
        assert run(places) == 1
        said = capsys.readouterr().err
        assert f"{places[1]}: the ledger has no request: run `coldsnap bench` against the endpoint first" in said

    def test_no_ledger_is_said_with_how_to_get_one(
        self, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        assert run((places[0], tmp_path / "nowhere")) == 1
        assert "nowhere: expected a ledger.jsonl" in capsys.readouterr().err
        monkeypatch.setattr("coldsnap.desk.plan.command.ROOT", tmp_path / "clone")
        assert cli.main(["plan", str(places[0])]) == 1
        said = capsys.readouterr().err
        assert "--ledger is not given and" in said
        assert "coldsnap bench" in said


@pytest.mark.parametrize(("text", "value"), [("2s", 2.0), ("500ms", 0.5), ("1m", 60.0), ("1.5", 1.5), (".5s", 0.5)])
def test_times_are_written_as_one_says_them(text: str, value: float) -> None:
    assert seconds("--ttft-p95", text) == value
