"""Records: one JSON line each, on stdout and in the ledger, whatever becomes of the ledger's disk."""

from __future__ import annotations

import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from coldsnap.boot import Booted
from coldsnap.engine import EngineInfo
from coldsnap.records.schema import ColdStart, Request
from coldsnap.records.sink import LEDGER, Sink
from coldsnap.settings import Settings
from coldsnap.testing.fake_engine import FakeEngine
from coldsnap.timeline import Timeline

WORKER = {
    "worker_id": "pod",
    "endpoint_id": "endpoint",
    "gpu": "NVIDIA H200",
    "gpu_count": 2,
    "snapshot_digest": "0" * 64,
    "vllm": "0.32.0",
}
REQUEST: dict[str, Any] = WORKER | {
    "job_id": "job",
    "route": "native",
    "model": "demo",
    "stream": True,
    "prompt_tokens": 3,
    "cached_tokens": 1,
    "completion_tokens": 2,
    "queue_seconds": 0.1,
    "ttft_seconds": None,
    "itl_seconds": 0.01,
    "duration_seconds": 0.5,
    "finish_reason": "stop",
    "gpu_seconds": 0.25,
    "prefill_gpu_seconds": 0.05,
    "decode_gpu_seconds": 0.2,
    "mean_batch": 3.5,
    "joules": 61.5,
    "usd": 0.0002,
    "price_per_second": 0.0008,
    "estimated": False,
    "fit": None,
}
TEXT_FIELDS = {"prompt", "messages", "text", "output", "input", "body", "content"}


class Echo(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def ledger(folder: Path) -> list[Any]:
    return [orjson.loads(line) for line in (folder / LEDGER).read_bytes().splitlines()]


def test_a_record_is_one_line_of_json_in_both_places(tmp_path: Path) -> None:
    echo = Echo()
    Sink(tmp_path, echo).write(Request(**REQUEST | {"job_id": 'a "job"\nof two lines → 日本'}))
    (line,) = echo
    assert "\n" not in line
    assert (tmp_path / LEDGER).read_bytes() == line.encode() + b"\n"
    assert orjson.loads(line)["job_id"] == 'a "job"\nof two lines → 日本'


def test_a_request_record_says_everything_it_was_given() -> None:
    record = Request(**REQUEST).model_dump(mode="json")
    said_by_itself = {"record": "request", "schema_version": 1, "error": None, "boot": "warm"} | {
        name: record[name] for name in ("time", "monotonic")
    }
    assert record == REQUEST | said_by_itself
    assert datetime.fromisoformat(record["time"]).tzinfo is not None
    assert abs((datetime.now(UTC) - datetime.fromisoformat(record["time"])).total_seconds()) < 60


@pytest.mark.parametrize("field", REQUEST)
def test_every_field_must_be_given(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Request(**{name: value for name, value in REQUEST.items() if name != field})


def test_there_is_no_field_for_text_and_none_can_be_added() -> None:
    assert not TEXT_FIELDS & (Request.model_fields.keys() | ColdStart.model_fields.keys())
    for field in TEXT_FIELDS:
        with pytest.raises(ValidationError, match="Extra inputs"):
            Request(**REQUEST | {field: "secret"})


def test_records_are_appended_to_those_of_earlier_boots(tmp_path: Path) -> None:
    for job in ("one", "two"):
        Sink(tmp_path, Echo()).write(Request(**REQUEST | {"job_id": job}))
    assert [record["job_id"] for record in ledger(tmp_path)] == ["one", "two"]


def test_the_ledgers_folder_is_made_when_the_first_record_comes(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "a" / "b", Echo())
    assert not (tmp_path / "a").exists()
    sink.write(Request(**REQUEST))
    assert len(ledger(tmp_path / "a" / "b")) == 1


class TestUnwritable:
    def folder_is_a_file(self, path: Path) -> str:
        path.write_bytes(b"")
        return "File exists"

    def folder_is_below_a_file(self, path: Path) -> str:
        path.parent.rmdir()
        path.parent.write_bytes(b"")
        return "Not a directory"

    def ledger_is_a_folder(self, path: Path) -> str:
        (path / LEDGER).mkdir(parents=True)
        return "Is a directory"

    def disk_is_full(self, path: Path) -> str:
        path.mkdir()
        (path / LEDGER).symlink_to("/dev/full")
        return "No space left on device"

    @pytest.mark.parametrize("fault", [folder_is_a_file, folder_is_below_a_file, ledger_is_a_folder, disk_is_full])
    def test_it_is_said_once_and_counted_and_the_worker_serves_on(
        self, fault: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "parent" / "ledger"
        folder.parent.mkdir()
        reason = fault(self, folder)
        echo = Echo()
        sink = Sink(folder, echo)
        for _ in range(3):
            sink.write(Request(**REQUEST))
        assert sink.tally.unwritten == 3
        assert len(echo) == 3
        assert capsys.readouterr().err == (
            f"coldsnap: COLDSNAP_LEDGER_DIR: {folder / LEDGER} cannot be written ({reason}); "
            "records go to stdout only\n"
        )

    def test_it_is_written_again_once_it_can_be(self, tmp_path: Path) -> None:
        (tmp_path / LEDGER).mkdir()
        sink = Sink(tmp_path, Echo())
        sink.write(Request(**REQUEST))
        (tmp_path / LEDGER).rmdir()
        sink.write(Request(**REQUEST | {"job_id": "later"}))
        assert sink.tally.unwritten == 1
        assert [record["job_id"] for record in ledger(tmp_path)] == ["later"]

    def test_what_a_disk_took_of_a_line_spoils_no_other_workers(self, tmp_path: Path) -> None:
        one, other = Sink(tmp_path, Echo()), Sink(tmp_path, Echo())
        one.write(Request(**REQUEST))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / LEDGER).stat().st_size + 100, limits[1]))
        try:
            one.write(Request(**REQUEST | {"job_id": "cut off"}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        other.write(Request(**REQUEST | {"job_id": "other"}))
        one.write(Request(**REQUEST | {"job_id": "next"}))
        assert one.tally.unwritten == 1
        assert [record["job_id"] for record in ledger(tmp_path)][1:] == ["other", "next"]


def test_a_cold_starts_phases_add_up_to_its_seconds() -> None:
    ages = iter([0.1234567, 1.7654321, 9.9999999, 10.0000004])
    timeline = Timeline(lambda: next(ages))
    for phase in ("python", "import_vllm", "engine", "warm_up"):
        timeline.mark(phase)
    timeline.beside["verify"] = 0.5
    info = EngineInfo("0.32.0", "NVIDIA H200", 2, ("demo", "alias"), 512, "d" * 64)
    settings = Settings.read({"RUNPOD_POD_ID": "pod", "RUNPOD_ENDPOINT_ID": "endpoint"})
    record = Booted(FakeEngine(info=info), settings, timeline, None).cold_start()
    assert sum(record.phases.values()) == pytest.approx(record.seconds, abs=1e-5)
    assert record.seconds == 10.0
    assert record.beside == {"verify": 0.5}
    said = record.model_dump(mode="json")
    assert said["record"] == "cold_start"
    assert said["model"] == "demo"
    assert said["snapshot_digest"] == "d" * 64
    assert (said["gpu"], said["gpu_count"], said["vllm"]) == ("NVIDIA H200", 2, "0.32.0")
    assert (said["worker_id"], said["endpoint_id"]) == ("pod", "endpoint")


def test_a_ledger_that_is_moved_away_is_begun_again(tmp_path: Path) -> None:
    sink = Sink(tmp_path, Echo())
    sink.write(Request(**REQUEST))
    (tmp_path / LEDGER).rename(tmp_path / "ledger-1.jsonl")
    sink.write(Request(**REQUEST | {"job_id": "next"}))
    assert [record["job_id"] for record in ledger(tmp_path)] == ["next"]
