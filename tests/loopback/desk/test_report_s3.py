"""A report on what workers uploaded, from a server that speaks S3."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from coldsnap import cli
from coldsnap.desk.report import source
from coldsnap.foundation.s3 import Bucket, Object, Place


def line(number: int) -> bytes:
    record = {
        "schema_version": 1, "time": f"2026-11-20T12:00:{number:02}Z", "monotonic": 100.0 + number, "worker_id": "w1",
        "endpoint_id": "e1", "gpu": "NVIDIA H100", "gpu_count": 1, "vllm": "0.32.0", "record": "request",
        "job_id": f"job-{number}", "model": "m1", "prompt_tokens": 10, "cached_tokens": 0, "completion_tokens": 5,
        "duration_seconds": 1.0, "gpu_seconds": 1.5, "prefill_gpu_seconds": 0.5, "decode_gpu_seconds": 1.0,
    }  # fmt: skip
    return json.dumps(record).encode() + b"\n"


def test_objects_below_the_place_are_read_and_overlapping_ones_count_once(
    s3_place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = Bucket(s3_place)
    bucket.put("e1/w1/20261120T120010-0a.jsonl.gz", gzip.compress(b"".join(map(line, range(10)))))
    bucket.put("e1/w1/20261120T120020-0b.jsonl.gz", gzip.compress(b"".join(map(line, range(5, 20))) + b'{"torn'))
    bucket.put("e1/notes.txt", b"not a ledger")
    page = tmp_path / "page.html"
    assert cli.main(["report", str(s3_place), "--html", str(page)]) == 0
    html, out = page.read_text("utf-8"), capsys.readouterr().out
    for text in (html, out):
        assert "30.000" in text
        assert "Counted once, met in an upload and its local file: 5 lines" in text
        assert f"{s3_place}e1/w1/20261120T120020-0b.jsonl.gz, line 16: not a whole line of JSON" in text
        assert "left no totals at all" in text
    assert "Written by coldsnap report" in html


def test_an_object_that_is_deleted_after_the_listing_is_passed_over(
    s3_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(s3_place)
    for number in range(3):
        bucket.put(f"e1/w1/{number}.jsonl.gz", gzip.compress(line(number)))
    listed = Bucket.objects

    def then_one_less(self: Bucket, prefix: str = "") -> list[Object]:
        found = list(listed(self, prefix))
        bucket.delete("e1/w1/1.jsonl.gz")
        return found

    monkeypatch.setattr(Bucket, "objects", then_one_less)
    assert source.read(str(s3_place), tmp_path).records == 2


def test_a_place_without_ledgers_and_a_missing_bucket_are_one_line(
    s3_place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(s3_place)]) == 1
    said = capsys.readouterr().err
    assert said == f"coldsnap: {s3_place}: expected objects *.jsonl or *.jsonl.gz below it, found none\n"
    assert cli.main(["report", "s3://no-such-bucket/x"]) == 1
    assert "there is no such bucket" in capsys.readouterr().err
