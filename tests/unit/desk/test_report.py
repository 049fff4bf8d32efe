"""Reports on ledgers made by hand: every figure by its own sum, every bad input by its one line."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from coldsnap import cli
from coldsnap.cost.books import HEADINGS
from coldsnap.cost.shares import EMPTY, LOST, RECOMPUTE, TAIL
from coldsnap.desk.report import api, figures, notation, source, store
from coldsnap.desk.report.command import when
from coldsnap.desk.report.figures import Figures
from coldsnap.desk.report.page import CAUSES
from coldsnap.desk.report.terminal import snapshot_rates
from coldsnap.errors import ReportError
from coldsnap.settings import ROOT

Record = dict[str, Any]
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
PRICE = 0.001


def record(kind: str, at: float, worker: str = "w1", **more: Any) -> Record:
    common = {
        "schema_version": 1, "time": (START + timedelta(seconds=at)).isoformat(), "monotonic": 1000 + at,
        "worker_id": worker, "endpoint_id": "e1", "gpu": "NVIDIA H100", "gpu_count": 1, "snapshot_digest": None,
        "vllm": "0.32.0", "record": kind,
    }  # fmt: skip
    return common | more


def cold(at: float, seconds: float = 10.0, **more: Any) -> Record:
    phases = {"python": 1.0, "import_vllm": seconds - 3, "engine": 2.0}
    fields = {"boot": "fresh", "seconds": seconds, "phases": phases, "beside": {"verify": 0.5}, "model": "m1"}
    return record("cold_start", at, **fields | more)


def request(at: float, prefill: float, decode: float, **more: Any) -> Record:
    fields = {
        "job_id": f"job-{at}", "route": "native", "model": "m1", "stream": True, "prompt_tokens": 100,
        "cached_tokens": 20, "completion_tokens": 50, "queue_seconds": 0.01, "ttft_seconds": 0.1, "itl_seconds": 0.02,
        "duration_seconds": 1.1, "finish_reason": "stop", "error": None, "gpu_seconds": prefill + decode,
        "prefill_gpu_seconds": prefill, "decode_gpu_seconds": decode, "mean_batch": 2.0,
        "usd": (prefill + decode) * PRICE, "price_per_second": PRICE, "estimated": False, "fit": None,
    }  # fmt: skip
    return record("request", at, **fields | more)


def worker(at: float, parts: tuple[float, ...], *, final: bool, **more: Any) -> Record:
    names = [f"{part}_gpu_seconds" for part in HEADINGS]
    fields = {
        "final": final, "gpu_seconds": sum(parts), **dict(zip(names, parts, strict=True)),
        "overhead_causes": {"empty": parts[2]}, "billed_seconds": -int(-sum(parts) // 1), "price_per_second": PRICE,
        "estimated": False,
    }  # fmt: skip
    return record("worker", at, **fields | more)


LEDGER = [
    cold(0),
    request(5, 1.0, 3.0),
    worker(10, (10, 4, 0.5, 5.5, 0), final=False),
    request(15, 0.5, 1.5, model="m2", error="cancelled", ttft_seconds=None, mean_batch=4.0),
    worker(20, (10, 6, 1, 12.3, 0.7), final=True),
]
"""One worker: 30 s, of which 6 for its two requests."""


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[..., Path]:
    def write(records: Iterable[Record | str], name: str = "ledger.jsonl") -> Path:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        data = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path.parent

    return write


def gathered(place: Path, tmp_path: Path, **more: Any) -> tuple[Figures, source.Intake]:
    options: dict[str, Any] = {"since": None, "loaded": "by-gpu-seconds", "by": "model", "rates": None, "billed": None}
    options |= more
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    intake = source.read(str(place), folder)
    with store.load(intake.lines, since=options["since"], loaded=options["loaded"]) as database:
        return figures.gather(database, options["by"], options["rates"], options["billed"]), intake


class TestFigures:
    def test_every_second_is_under_its_heading(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger(LEDGER), tmp_path)
        assert found.spent == pytest.approx({"cold": 10, "busy": 6, "overhead": 1, "idle": 12.3, "drain": 0.7})
        assert found.spent_usd["idle"] == pytest.approx(12.3 * PRICE)
        assert found.causes == {"empty": 1}
        assert (found.invoice.seconds, found.invoice.rounded) == pytest.approx((30, 30))
        assert found.notes == []

    def test_loaded_costs_add_up_to_everything(self, ledger: Any, tmp_path: Path) -> None:
        for policy, first in (("by-gpu-seconds", 4 + 24 * 4 / 6), ("by-request", 4 + 24 / 2)):
            found, _ = gathered(ledger(LEDGER), tmp_path, loaded=policy)
            assert found.total["loaded_gpu_seconds"] == pytest.approx(30)
            assert found.total["loaded_usd"] == pytest.approx(30 * PRICE)
            assert found.groups[0]["loaded_gpu_seconds"] == pytest.approx(first)
            parts = found.total["loaded_prefill"] + found.total["loaded_decode"]
            assert parts == pytest.approx(30)

    def test_cold_starts_are_paid_by_the_endpoint_they_were_for(self, ledger: Any, tmp_path: Path) -> None:
        other = [each | {"endpoint_id": "e2", "worker_id": "w2"} for each in (*LEDGER[:2], LEDGER[2] | {"final": True})]
        found, _ = gathered(ledger([*LEDGER, *other]), tmp_path, by="endpoint")
        assert {row["name"]: row["loaded_gpu_seconds"] for row in found.groups} == pytest.approx({"e1": 30, "e2": 20})

    def test_what_the_page_cache_delivers_is_told_from_the_disk(self, ledger: Any, tmp_path: Path) -> None:
        boots = [
            cold(0, snapshot_bytes=100, read_gb_per_second=6.0, disk_read_bytes=0),
            cold(50, snapshot_bytes=100, read_gb_per_second=2.0, disk_read_bytes=None),
            cold(100, snapshot_bytes=100, read_gb_per_second=1.0, disk_read_bytes=90),
            cold(150, snapshot_bytes=100, read_gb_per_second=None, disk_read_bytes=None),
        ]
        found, _ = gathered(ledger(boots), tmp_path)
        said = "The snapshot was read and hashed at 2.00 GB/s, the median of 3 boots; 1.00 GB/s in the 1 that had"
        assert snapshot_rates(found.boots).startswith(said)
        assert snapshot_rates(gathered(ledger(LEDGER), tmp_path)[0].boots) == ""

    def test_groups_are_models_endpoints_or_days(self, ledger: Any, tmp_path: Path) -> None:
        place = ledger([*LEDGER, request(86400, 0.1, 0.1)])
        names = {by: [row["name"] for row in gathered(place, tmp_path, by=by)[0].groups] for by in figures.BY}
        assert names == {"model": ["m1", "m2"], "endpoint": ["e1"], "day": ["2026-11-20", "2026-11-21"]}

    def test_prefill_pays_for_input_and_decode_for_output(self, ledger: Any, tmp_path: Path) -> None:
        total = gathered(ledger(LEDGER), tmp_path)[0].total
        assert (total["input_tokens"], total["cached_tokens"], total["output_tokens"]) == (160, 40, 100)
        assert (total["prefill"], total["decode"]) == pytest.approx((1.5, 4.5))
        assert total["prefill_usd"] + total["decode_usd"] == pytest.approx(total["usd"]) == pytest.approx(6 * PRICE)
        assert total["failed"] == 1

    def test_the_curve_puts_batch_size_against_the_cost_of_a_token(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger(LEDGER), tmp_path)
        assert [(row["batch"], row["seconds"][1]) for row in found.batches] == [(2, 0.06), (4, 0.03)]
        assert sorted(found.points) == [(2.0, 0.06), (4.0, 0.03)]

    def test_latency_is_that_of_requests_that_ended_well(self, ledger: Any, tmp_path: Path) -> None:
        records = [cold(0), *(request(i, 1, 1, ttft_seconds=i / 100) for i in range(1, 102))]
        found, _ = gathered(ledger([*records, request(200, 1, 1, ttft_seconds=99, error="EngineDeadError")]), tmp_path)
        (ttft,) = [each for each in found.spreads if "TTFT" in each.name]
        assert (ttft.count, ttft.p50, ttft.p95, ttft.p99) == pytest.approx((101, 0.51, 0.96, 1.0))

    def test_phases_keep_their_order_and_a_missing_one_is_no_zero(self, ledger: Any, tmp_path: Path) -> None:
        second = cold(100, 20)
        del second["phases"]["engine"]
        found, _ = gathered(ledger([cold(0), second, request(101, 1, 1)]), tmp_path)
        assert [(row["phase"], row["count"], row["p50"], row["beside"]) for row in found.phases] == [
            ("python", 2, 1.0, False), ("import_vllm", 2, 12.0, False), ("engine", 1, 2.0, False),
            ("verify", 2, 0.5, True),
        ]  # fmt: skip
        assert (found.boots["count"], found.boots["p50"]) == (2, 15)

    def test_a_boot_that_was_no_fresh_one_is_no_new_life(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger([*LEDGER[:3], cold(12, boot="revived", seconds=0.5), *LEDGER[3:]]), tmp_path)
        assert (found.about["workers"], found.boots["other"], found.boots["p50"]) == (1, 1, 10)
        assert found.spent["cold"] == 10

    def test_a_worker_that_starts_again_under_its_name_has_two_lives(self, ledger: Any, tmp_path: Path) -> None:
        again = [
            each | {"time": (START + timedelta(seconds=100 + i)).isoformat(), "monotonic": 1100.0 + i}
            for i, each in enumerate(LEDGER)
        ]
        found, _ = gathered(ledger([*again, *LEDGER]), tmp_path)
        assert (found.about["workers"], sum(found.spent.values())) == (2, pytest.approx(60))
        without = [each for each in again if each["record"] != "cold_start"]
        found, _ = gathered(ledger([*without, *LEDGER]), tmp_path)
        assert (found.about["workers"], sum(found.spent.values())) == (2, pytest.approx(60))

    def test_a_killed_workers_last_totals_count_and_it_is_said(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger(LEDGER[:4]), tmp_path)
        assert found.spent == pytest.approx({"cold": 10, "busy": 6, "overhead": 0.5, "idle": 5.5, "drain": 0})
        assert "1 of 1 workers wrote no last record" in found.notes[0]

    def test_a_worker_without_totals_has_its_cold_start_and_shares(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger(LEDGER[:2]), tmp_path)
        assert found.spent == pytest.approx({"cold": 10, "busy": 4, "overhead": 0, "idle": 0, "drain": 0})
        assert "left no totals at all" in found.notes[0]

    def test_since_leaves_out_what_was_before(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger(LEDGER), tmp_path, since=START + timedelta(seconds=12))
        assert found.spent == pytest.approx({"cold": 0, "busy": 2, "overhead": 0.5, "idle": 6.8, "drain": 0.7})
        assert (found.total["requests"], found.boots["count"]) == (1, 0)
        assert found.causes == {"empty": 0.5}
        assert found.about["begun"] == "2026-11-20 12:00"

    def test_an_unknown_price_gives_seconds_without_dollars_and_says_so(self, ledger: Any, tmp_path: Path) -> None:
        unpriced = [each | {"price_per_second": None, "usd": None} for each in LEDGER]
        found, _ = gathered(ledger(unpriced), tmp_path)
        assert set(found.spent_usd.values()) == {None}
        assert (found.total["usd"], found.total["loaded_gpu_seconds"]) == (None, pytest.approx(30))
        assert "No price for NVIDIA H100: set GPU_PRICE_PER_SECOND" in found.notes[0]

    def test_energy_is_shown_where_gpus_report_it(self, ledger: Any, tmp_path: Path) -> None:
        assert gathered(ledger(LEDGER), tmp_path)[0].joules is None
        records = [each | {"joules": 900.0, "request_joules": 600.0, "unwritten_records": 3} for each in LEDGER]
        found, _ = gathered(ledger(records), tmp_path)
        assert (found.joules, found.request_joules) == (900, 600)
        assert found.notes == ["3 records did not get onto their workers' disks: they are missing here."]

    def test_several_gpus_are_counted_each(self, ledger: Any, tmp_path: Path) -> None:
        found, _ = gathered(ledger([each | {"gpu_count": 2} for each in LEDGER]), tmp_path)
        assert sum(found.spent.values()) == pytest.approx(30)
        assert found.invoice.seconds == pytest.approx(15)

    def test_a_bill_is_compared_with_what_was_computed(self, ledger: Any, tmp_path: Path) -> None:
        invoice = gathered(ledger(LEDGER), tmp_path, billed=33.0)[0].invoice
        assert (invoice.rounded, invoice.billed, invoice.off) == (30, 33, pytest.approx(0.1))

    def test_the_same_traffic_at_an_apis_rate_and_where_they_break_even(self, ledger: Any, tmp_path: Path) -> None:
        rates = api.Rates(
            date=START.date(), source="here",
            prices=(
                api.Rate(name="A", input=10, cached_input=5, output=100),
                api.Rate(name="B", input=0, output=10, models=("m2",)),
            ),
        )  # fmt: skip
        everything, some = gathered(ledger(LEDGER), tmp_path, rates=rates)[0].api
        usd = (160 * 10 + 40 * 5 + 100 * 100) / 1e6
        assert (everything.requests, everything.usd) == (2, pytest.approx(usd))
        assert everything.own_usd == pytest.approx(30 * PRICE)
        assert everything.requests_per_second == pytest.approx(PRICE / (usd / 2))
        assert everything.utilisation == pytest.approx(PRICE / (usd / 2) * 7 / 2)
        assert (some.requests, some.usd) == (1, pytest.approx(50 * 10 / 1e6))
        assert some.utilisation == pytest.approx(PRICE / some.usd * 2 * 7 / 6)


def test_every_cause_of_overhead_is_said_in_words() -> None:
    assert CAUSES.keys() == {RECOMPUTE, EMPTY, TAIL, LOST}


class TestLines:
    def test_files_below_a_folder_are_read_and_a_line_met_twice_counts_once(self, ledger: Any, tmp_path: Path) -> None:
        ledger(LEDGER)
        ledger(LEDGER[:3], "e1/w1/20261120T120010-0f.jsonl.gz")
        ledger(LEDGER[3:], "e1/w1/20261120T120020-1e.jsonl.gz")
        found, intake = gathered(tmp_path / "in", tmp_path)
        assert (intake.files, intake.records, intake.repeated) == (3, 5, 5)
        assert sum(found.spent.values()) == pytest.approx(30)

    def test_files_that_are_sealed_and_sent_while_a_folder_is_read_count_once_and_none_is_missed(
        self, ledger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5):
            ledger([LEDGER[number]], f"unsent/w1.b.{number}.open")
        unsent = tmp_path / "in" / "unsent"
        lines, read = source._lines, list[str]()

        def moving(name: str, path: Path, torn: list[source.Torn]) -> Iterator[tuple[int, bytes]]:
            """Let the worker do, before the first file is read and after it, what it may do at any time."""
            read.append(path.name)
            if len(read) == 1:
                (unsent / "w1.b.1.open").rename(unsent / "w1.b.1.jsonl")  # sealed before it is read
                (unsent / "w1.b.2.open").unlink()  # sent
            yield from lines(name, path, torn)
            if len(read) == 1:
                with path.open("a") as file:
                    file.write(json.dumps(request(12, 1, 1, model="m3")) + "\n")
                path.rename(unsent / "w1.b.0.jsonl")  # written to, and sealed, after it was read
                ledger([request(13, 1, 1, model="m4")], "unsent/w1.b.5.open")

        monkeypatch.setattr(source, "_lines", moving)
        _, intake = gathered(tmp_path / "in", tmp_path)
        assert read == [
            *(f"w1.b.{number}.open" for number in range(5)), "w1.b.0.jsonl", "w1.b.1.jsonl", "w1.b.5.open",
        ]  # fmt: skip
        assert (intake.files, intake.records, intake.repeated, intake.torn) == (6, 6, 0, ())
        models = {json.loads(line).get("model") for line in intake.lines.read_bytes().splitlines()}
        assert models >= {"m1", "m2", "m3", "m4"}

    def test_a_folder_that_is_read_while_workers_write_seal_and_send_never_fails_or_counts_twice(
        self, ledger: Any, tmp_path: Path
    ) -> None:
        ledger([LEDGER[0]])
        unsent, stop = tmp_path / "in" / "unsent", threading.Event()

        def work() -> None:
            for number in itertools.count():
                if stop.is_set():
                    return
                ledger([request(number % 60, 1, 1, job_id=f"{number}")], f"unsent/w1.b.{number}.open")
                sealed = (unsent / f"w1.b.{number}.open").rename(unsent / f"w1.b.{number}.jsonl")
                kept = sealed.with_name(f"w1.b.{number - 20}.jsonl")
                kept.unlink(missing_ok=True)
                time.sleep(0.001)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(20):
                folder = tmp_path / f"work-{number}"
                folder.mkdir()
                intake = source.read(str(tmp_path / "in"), folder)
                jobs = [json.loads(line).get("job_id") for line in intake.lines.read_bytes().splitlines()]
                assert len(jobs) == len(set(jobs)) == intake.records
                assert (intake.torn, intake.repeated) == ((), 0)
        finally:
            stop.set()
            worker.join()

    def test_a_folder_that_may_not_be_read_is_named(self, ledger: Any, tmp_path: Path) -> None:
        place = ledger(LEDGER)
        error = PermissionError(errno.EACCES, "Permission denied", f"{place}/other")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source.os, "scandir", lambda _: (_ for _ in ()).throw(error))
            with pytest.raises(ReportError, match=rf"^{place}/other: cannot be read \(Permission denied\)$"):
                source.read(str(place), tmp_path)

    def test_torn_lines_are_named_and_the_rest_is_read(self, ledger: Any, tmp_path: Path) -> None:
        wrong = request(6, 1, 1) | {"gpu_seconds": "much"}
        lines = [*LEDGER[:2], '{"record": "requ', *LEDGER[2:], "[1]", wrong, worker(30, (1, 1, 1, 1, 1), final=True)]
        del lines[-1]["time"]  # type: ignore[arg-type]
        place = ledger(lines)
        found, intake = gathered(place, tmp_path)
        file = place / "ledger.jsonl"
        assert [str(torn) for torn in intake.torn] == [
            f"{file}, line 3: not a whole line of JSON",
            f"{file}, line 7: expected a record of the kind cold_start, request, worker",
            f"{file}, line 8: request: gpu_seconds: expected a number, found 'much'",
            f"{file}, line 9: worker: time: expected text, found None",
        ]
        assert sum(found.spent.values()) == pytest.approx(30)

    def test_a_compressed_file_that_breaks_off_is_read_as_far_as_it_goes(self, ledger: Any, tmp_path: Path) -> None:
        place = ledger(LEDGER)
        data = gzip.compress("".join(json.dumps(request(i, 1, 1)) + "\n" for i in range(1000)).encode())
        (place / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
        _, intake = gathered(place, tmp_path)
        (torn,) = intake.torn
        assert torn.why == "the compressed file breaks off here"
        assert intake.records > len(LEDGER)

    def test_unknown_fields_are_passed_over_and_a_newer_schema_is_counted(self, ledger: Any, tmp_path: Path) -> None:
        more = [each | {"joules": 5.0, "rack": {"row": [1]}} for each in LEDGER]
        found, intake = gathered(ledger([*more, request(50, 1, 1, schema_version=99)]), tmp_path)
        assert (intake.newer, intake.records, intake.torn) == (1, 5, ())
        assert sum(found.spent.values()) == pytest.approx(30)

    def test_records_from_before_there_were_batch_sizes_have_no_curve(self, ledger: Any, tmp_path: Path) -> None:
        old = [{name: value for name, value in each.items() if name != "mean_batch"} for each in LEDGER]
        found, _ = gathered(ledger(old), tmp_path)
        assert (found.batches, found.total["requests"]) == ([], 2)


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        code = cli.main(["report", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    def test_the_terminal_and_the_page_say_the_sums(
        self, ledger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = tmp_path / "out.html"
        options = ("--html", page, "--billed-seconds", 33, "--api-prices", ROOT / "docs" / "api-prices.yaml")
        code, out, err = self.run(capsys, ledger(LEDGER), *options)
        assert (code, err) == (0, "")
        html = page.read_text("utf-8")
        for figure in ("10.000", "12.300", "30.000", "$0.0300", "33.3%"):
            assert figure in out
            assert figure in html
        assert "billed: 33, +10.0%" in out
        assert "Billed were 33&nbsp;s: +10.0% against what was computed." in html
        assert "--loaded by-gpu-seconds" in html

    def test_the_page_needs_nothing_from_elsewhere(
        self, ledger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = tmp_path / "out.html"
        place = ledger([*LEDGER, request(16, 0, 0, model="<script>alert(1)</script>", job_id="<b>")])
        self.run(capsys, place, "--html", page, "--api-prices", ROOT / "docs" / "api-prices.yaml")
        html = page.read_text("utf-8")
        assert not re.search(r"https?:|\bsrc=|<script|<link|@import|<iframe|<b>[^\d$]", html)
        assert set(re.findall(r'(?:href="|url\()([^")]?)', html)) <= {"#"}
        ids = re.findall(r'\bid="([^"]*)"', html)
        assert len(ids) == len(set(ids))
        assert {ref for ref in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html) for ref in ref if ref} <= set(ids)
        assert html.count("<svg") == 5
        for image in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
            assert re.findall(r"#[0-9a-f]{6}\b", image) == []  # a colour that does not follow light and dark
        assert "currentColor" in html
        assert "prefers-color-scheme: dark" in html
        assert "&lt;script&gt;" in html

    @pytest.mark.parametrize("records", [LEDGER[:1], LEDGER[1:2], LEDGER[2:3], LEDGER])
    def test_a_ledger_with_little_in_it_has_a_page_too(
        self, records: list[Record], ledger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bare = [each | {"mean_batch": None, "usd": None, "price_per_second": None, "phases": {}} for each in records]
        for which in (records, bare):
            rates = ROOT / "docs" / "api-prices.yaml"
            code, _, err = self.run(capsys, ledger(which), "--html", tmp_path / "out.html", "--api-prices", rates)
            assert (code, err) == (0, "")

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            (["--by", "colour"], "--by: expected one of model, endpoint, day, found 'colour'"),
            (["--loaded", "fairly"], "--loaded: expected one of by-gpu-seconds, by-request, found 'fairly'"),
            (
                ["--since", "yesterday"],
                (
                    "--since: expected a date (2026-11-21), a time (2026-11-21T08:30) or a span (7d, 12h, 30m), "
                    "found 'yesterday'"
                ),
            ),
            (["--since", "9999999d"], "--since: 9999999d is further back than there are dates"),
            (
                ["--billed-seconds", "12,5"],
                "--billed-seconds: expected the invoice's worker-seconds, 0 or more, found '12,5'",
            ),
            (
                ["--api-prices", "/nowhere.yaml"],
                "--api-prices: /nowhere.yaml cannot be read (No such file or directory)",
            ),
            (
                ["--html", "/nowhere/out.html"],
                "--html: /nowhere/out.html cannot be written (there is no folder /nowhere)",
            ),
        ],
    )
    def test_a_wrong_option_is_one_line(
        self, options: list[str], line: str, ledger: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = self.run(capsys, ledger(LEDGER), *options)
        assert (code, err) == (1, f"coldsnap: {line}\n")

    def test_a_wrong_place_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty.jsonl").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "README.md").write_text("# A page\n\nof text\n")
        (tmp_path / "newer.jsonl").write_text('{"schema_version": 99}\n')
        for name, said in {
            "nowhere": "expected a ledger.jsonl, a folder of them or s3://bucket/prefix, found nothing",
            "folder": "expected *.jsonl or *.jsonl.gz in this folder or below it, found none",
            "empty.jsonl": "the ledger is empty: no records in 1 file",
            "README.md": "not a ledger: no line is a record of coldsnap's; "
            f"{tmp_path}/README.md, line 1: not a whole line of JSON",
            "newer.jsonl": "written by a newer coldsnap: 1 record, none that I know",
        }.items():
            code, out, err = self.run(capsys, tmp_path / name)
            assert (code, out, err) == (1, "", f"coldsnap: {tmp_path / name}: {said}\n")
        code, _, err = self.run(capsys, "s3://A_b/c")
        assert (code, err.startswith("coldsnap: PATH: expected s3://bucket/prefix")) == (1, True)

    def test_a_page_that_cannot_be_written_is_said_before_the_work(
        self, ledger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "read", None)  # not called
        nowhere = tmp_path / "no" / "page.html"
        for path, said in {
            tmp_path: f"{tmp_path} is a folder; name a file",
            nowhere: f"{nowhere} cannot be written (there is no folder {nowhere.parent})",
        }.items():
            code, out, err = self.run(capsys, ledger(LEDGER), "--html", str(path))
            assert (code, out) == (1, "")
            assert err.startswith(f"coldsnap: --html: {said}")

    def test_a_reader_that_has_had_enough_ends_it_without_a_word(self, ledger: Any) -> None:
        code = "import sys; from coldsnap.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "report", str(ledger(LEDGER))]
        environ = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert (process.stderr.read(), process.wait()) == (b"", 0)

    def test_what_a_worker_is_writing_for_its_upload_is_read_too(
        self, tmp_path: Path, ledger: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        unsent = tmp_path / "home" / "unsent"
        unsent.mkdir(parents=True)
        (ledger(LEDGER) / "ledger.jsonl").rename(unsent / "w1.boot.1.open")
        code, out, _ = self.run(capsys, tmp_path / "home")
        assert (code, "30.000" in out) == (0, True)

    def test_a_period_without_records_is_one_line(self, ledger: Any, capsys: pytest.CaptureFixture[str]) -> None:
        place = ledger(LEDGER)
        code, _, err = self.run(capsys, place, "--since", "2026-11-21")
        assert (code, err) == (1, f"coldsnap: --since 2026-11-21: {place} has no record since then\n")


class TestRates:
    GOOD = "date: 2026-11-21\nsource: a page\nprices:\n  - {name: A, input: 0.1, output: 0.2}\n"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "expected the keys date, source and prices, found None"),
            ("a: [", "not YAML: while parsing"),
            (GOOD.replace("0.2", "cheap"), "prices[0].output: input should be a valid number, unable to parse"),
            (GOOD.replace("0.2", "-1"), "prices[0].output: input should be greater than or equal to 0, found -1"),
            (GOOD.replace("input", "inptu"), "prices[0].input: field required"),
            (GOOD.replace("2026-11-21", "soon"), "date: input should be a valid date"),
            (GOOD.replace("source: a page\n", ""), "source: field required"),
            (GOOD + "currency: EUR\n", "currency: extra inputs are not permitted, found 'EUR'"),
            ("date: 2026-11-21\nsource: a\nprices: []\n", "prices: tuple should have at least 1 item"),
        ],
    )
    def test_a_wrong_table_is_told_by_its_key(self, text: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "prices.yaml"
        path.write_text(text)
        with pytest.raises(ReportError) as caught:
            api.read(path)
        assert caught.value.message.startswith(f"--api-prices: {path}: {said}")
        assert "\n" not in caught.value.message

    def test_the_example_is_dated_and_names_its_source(self) -> None:
        rates = api.read(ROOT / "docs" / "api-prices.yaml")
        assert rates.source
        assert all(rate.page for rate in rates.prices)


NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-20", START.replace(hour=0)),
        ("2026-11-20T12:00", START),
        ("2026-11-20T13:00+01:00", START),
        ("7d", NOW - timedelta(days=7)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("30m", NOW - timedelta(minutes=30)),
        ("2w", NOW - timedelta(weeks=2)),
    ],
)
def test_since_is_a_date_a_time_or_a_span(text: str, moment: datetime) -> None:
    assert when(text, NOW) == moment


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0, "0"),
        (0.0001034, "0.000103"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
    ],
)
def test_numbers_have_three_digits(value: float | None, said: str) -> None:
    assert notation.digits(value) == said


def test_seconds_and_dollars_are_written_as_one_reads_them() -> None:
    assert [notation.seconds(each) for each in (2.5, 0.025, 0.0000384, 0)] == ["2.50 s", "25.0 ms", "38.4 µs", "0 µs"]
    assert [notation.usd(each) for each in (1234.5, 0.000123, None)] == ["$1,234.50", "$0.000123", "–"]
