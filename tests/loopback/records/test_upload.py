"""The ledger's upload, against a server that speaks S3, through faults of every kind: no line lost, none twice."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import orjson
import pytest
from blake3 import blake3

from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.records.schema import Record
from coldsnap.records.sink import LEDGER, Sink
from coldsnap.records.upload import UNSENT, Upload, name_of
from coldsnap.settings import ROOT, Settings

ORIGIN: dict[str, Any] = {"endpoint_id": "endpoint", "gpu": "g", "gpu_count": 1, "snapshot_digest": None, "vllm": "0"}


class Line(Record):
    """A record that says only which one it is."""

    record: str = "test"
    n: int


class Worker:
    """A sink and its upload, as in a worker; `busy` and what is said are the test's to set and see."""

    def __init__(self, folder: Path, place: Place, name: str = "pod", flush_seconds: float = 60.0) -> None:
        self.said: list[str] = []
        self.busy = True
        self.name = name
        environ = {
            "COLDSNAP_LEDGER_DIR": str(folder),
            "RUNPOD_POD_ID": name,
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "LEDGER_S3_URI": str(place),
            "LEDGER_FLUSH_SECONDS": str(flush_seconds),
        }
        self.sink = Sink(folder, lambda _: None)
        self.upload = Upload(
            self.sink,
            Settings.read(environ),
            place,
            lambda: self.busy,
            self.said.append,
            connect=lambda: Bucket(place, attempts=1, timeout_seconds=2.0),
        )

    def write(self, *numbers: int) -> None:
        for n in numbers:
            self.sink.write(Line(n=n, worker_id=self.name, **ORIGIN))


def objects(place: Place) -> dict[str, list[dict[str, Any]]]:
    bucket = Bucket(place)
    return {
        found.name: [orjson.loads(line) for line in gzip.decompress(bucket.get(found.name)).splitlines()]
        for found in bucket.objects()
    }


def numbers(place: Place) -> list[int]:
    return sorted(line["n"] for lines in objects(place).values() for line in lines)


def unsent(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / UNSENT).glob("*"))


def grow_old(folder: Path) -> None:
    for path in (folder / UNSENT).iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.02)


class Proxy(ThreadingHTTPServer):
    """Between a worker and the bucket; each PUT takes the next of `faults`, none means that it goes through."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.faults: list[str] = []
        self.puts: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_PUT(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else ""
        self.server.puts.append(self.path)
        length = int(self.headers["Content-Length"])
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        headers = {name: value for name, value in self.headers.items() if name not in {"Expect", "Connection"}}
        headers.setdefault("Content-Type", "binary/octet-stream")  # urllib's own would make a form of it
        request = urllib.request.Request(self.server.target + self.path, body, headers, method="PUT")
        with urllib.request.urlopen(request) as answer:
            answer.read()
        if fault == "no acknowledgement":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(s3_place: Place, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(s3_endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        server.shutdown()


@pytest.fixture
def direct(s3_place: Place, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a way past the proxy, for the test's own look into the bucket."""
    return lambda: monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)


def test_an_object_is_the_lines_of_a_flush_under_their_workers_name(tmp_path: Path, s3_place: Place) -> None:
    worker = Worker(tmp_path, s3_place)
    worker.write(1, 2, 3)
    (path,) = (tmp_path / UNSENT).iterdir()
    content = path.read_bytes()
    worker.upload.flush()
    ((name, lines),) = objects(s3_place).items()
    assert [line["n"] for line in lines] == [1, 2, 3]
    assert name == f"endpoint/pod/{lines[0]['time']}-{blake3(content).hexdigest()[:16]}.jsonl.gz"
    assert gzip.decompress(Bucket(s3_place).get(name)) == content
    assert unsent(tmp_path) == []
    assert not (tmp_path / LEDGER).exists()
    assert (worker.sink.tally.unsent, worker.sink.tally.failed_uploads, worker.said) == (0, 0, [])


def test_nothing_new_makes_no_object(tmp_path: Path, s3_place: Place) -> None:
    worker = Worker(tmp_path, s3_place)
    worker.upload.flush()
    worker.write(1)
    worker.upload.flush()
    worker.upload.flush()
    assert len(objects(s3_place)) == 1


def test_a_name_cannot_leave_its_folder() -> None:
    line = b'{"endpoint_id":"../e","worker_id":"a/b","time":"T"}\n'
    assert name_of([line]).startswith("..%2Fe/a%2Fb/T-")


@pytest.mark.parametrize("fault", ["500", "cut", "no acknowledgement"])
def test_what_a_fault_stops_is_kept_counted_and_sent_later(
    fault: str, tmp_path: Path, s3_place: Place, proxy: Proxy, direct: Callable[[], None]
) -> None:
    worker = Worker(tmp_path, s3_place)
    proxy.faults = [fault] * 2
    worker.write(1, 2)
    worker.upload.flush()
    assert (worker.sink.tally.unsent, worker.sink.tally.failed_uploads) == (2, 1)
    worker.write(3)
    worker.upload.flush()
    assert (worker.sink.tally.unsent, worker.sink.tally.failed_uploads) == (3, 2)
    assert len(unsent(tmp_path)) == 2
    worker.upload.flush()
    assert (worker.sink.tally.unsent, worker.sink.tally.failed_uploads) == (0, 2)
    assert unsent(tmp_path) == []
    (said,) = worker.said
    assert said.startswith(f"LEDGER_S3_URI: {s3_place}endpoint/pod/")
    assert said.endswith(f"; records wait in {tmp_path / UNSENT} and are tried again")
    direct()
    assert numbers(s3_place) == [1, 2, 3]
    assert len(set(proxy.puts)) == 2  # the same object, tried three times, and another


def test_a_bucket_that_is_not_there_is_said_once_and_its_lines_stay(tmp_path: Path, s3_place: Place) -> None:
    worker = Worker(tmp_path, Place("no-such-bucket", ""))
    for n in range(3):
        worker.write(n)
        worker.upload.flush()
    assert worker.sink.tally.failed_uploads == worker.sink.tally.unsent == 3
    (said,) = worker.said
    assert "there is no such bucket" in said
    later = Worker(tmp_path, s3_place)
    later.upload.flush()
    assert numbers(s3_place) == [0, 1, 2]


_KILLED = """
import sys
sys.path[:0] = {paths!r}
from tests.loopback.records.test_upload import *
worker = Worker(Path({folder!r}), Place("no-such-bucket", ""))
worker.write(1, 2)
worker.upload.flush()
worker.write(3, 4)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_was_killed_is_read_out_by_its_next_life(tmp_path: Path, s3_place: Place) -> None:
    paths = [str(ROOT / "src"), str(ROOT)]
    code = textwrap.dedent(_KILLED).format(paths=paths, folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [name.rpartition(".")[2] for name in unsent(tmp_path)] == ["jsonl", "open"]
    worker = Worker(tmp_path, s3_place)
    worker.write(5)
    worker.upload.start()
    until(lambda: unsent(tmp_path) == [])
    assert worker.upload.end(60)
    assert numbers(s3_place) == [1, 2, 3, 4, 5]


def test_a_torn_line_is_left_out_and_said(tmp_path: Path, s3_place: Place) -> None:
    (tmp_path / UNSENT).mkdir()
    worker = Worker(tmp_path, s3_place)
    worker.write(1)
    (path,) = (tmp_path / UNSENT).iterdir()
    path.write_bytes(path.read_bytes() + b'{"time":"2026\n[1]\n')
    worker.write(2)
    path.write_bytes(path.read_bytes() + b'{"time": "2026-11-21", "wor')
    worker.upload.flush()
    assert numbers(s3_place) == [1, 2]
    assert worker.said == [f"{path.with_suffix('.jsonl').name}: 3 of 5 lines are torn and were left out"]
    assert unsent(tmp_path) == []


def test_a_living_workers_file_is_left_alone_and_a_dead_ones_taken_over(tmp_path: Path, s3_place: Place) -> None:
    silent, other = Worker(tmp_path, s3_place, "silent"), Worker(tmp_path, s3_place, "other")
    silent.write(1)
    other.write(2)
    other.upload.flush()
    assert numbers(s3_place) == [2]
    grow_old(tmp_path)
    other.upload.flush()
    assert numbers(s3_place) == [1, 2]
    assert [name.split("/")[1] for name in objects(s3_place)] == ["other", "silent"]
    silent.write(3)  # it had only been suspended
    silent.upload.flush()
    silent.write(4)
    silent.upload.flush()
    assert numbers(s3_place) == [1, 2, 3, 4]
    assert silent.said == other.said == []


def test_two_workers_that_send_the_same_file_make_one_object(tmp_path: Path, s3_place: Place, s3_endpoint: str) -> None:
    lost = Worker(tmp_path, Place("no-such-bucket", ""), "lost")
    lost.write(1, 2)
    lost.upload.flush()
    grow_old(tmp_path)
    (path,) = (tmp_path / UNSENT).iterdir()
    content = path.read_bytes()
    for name in ("one", "two"):  # neither saw the other delete it
        path.write_bytes(content)
        os.utime(path, (0, 0))
        Worker(tmp_path, s3_place, name).upload.flush()
    assert [[line["n"] for line in lines] for lines in objects(s3_place).values()] == [[1, 2]]


def test_two_workers_in_one_folder_lose_and_double_nothing(tmp_path: Path, s3_place: Place, proxy: Proxy) -> None:
    proxy.faults = ["", "500", "cut", "no acknowledgement", "", "500"]
    workers = [Worker(tmp_path, s3_place, f"pod{i}") for i in range(2)]
    ended = threading.Event()

    def send(worker: Worker) -> None:
        while not ended.is_set():
            worker.upload.flush()

    senders = [threading.Thread(target=send, args=(worker,)) for worker in workers]
    for sender in senders:
        sender.start()
    for n in range(400):
        workers[n % 2].write(n)
        time.sleep(0.001)
    ended.set()
    for sender, worker in zip(senders, workers, strict=True):
        sender.join()
        worker.upload.flush()
    assert unsent(tmp_path) == []
    client = boto3.client("s3", endpoint_url=proxy.target)
    found = [
        orjson.loads(line)["n"]
        for item in client.list_objects_v2(Bucket=s3_place.bucket)["Contents"]
        for line in gzip.decompress(
            client.get_object(Bucket=s3_place.bucket, Key=item["Key"])["Body"].read()
        ).splitlines()
    ]
    assert sorted(found) == list(range(400))


def test_a_busy_worker_waits_for_the_flush_and_an_idle_one_does_not(tmp_path: Path, s3_place: Place) -> None:
    worker = Worker(tmp_path, s3_place, flush_seconds=3600)
    worker.upload.start()
    worker.write(1)
    time.sleep(2.5)
    assert objects(s3_place) == {}
    worker.busy = False
    until(lambda: numbers(s3_place) == [1])
    worker.busy = True
    worker.write(2)
    worker.upload.soon()
    until(lambda: numbers(s3_place) == [1, 2])
    worker.write(3)
    assert worker.upload.end(60)
    assert numbers(s3_place) == [1, 2, 3]


def test_an_end_without_a_bucket_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_place: Place) -> None:
    reached, leave = threading.Event(), threading.Event()

    def connect() -> Bucket:
        reached.set()
        leave.wait()
        return Bucket(s3_place)

    worker = Worker(tmp_path, s3_place)
    worker.upload._connect = connect
    worker.upload.start()
    worker.write(1)
    worker.upload.soon()
    assert reached.wait(60)
    assert not worker.upload.end(0.5)
    assert len(unsent(tmp_path)) == 1
    leave.set()
    assert worker.upload.end(60)


def test_a_folder_that_cannot_be_written_costs_records_and_nothing_else(
    tmp_path: Path, s3_place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / UNSENT).write_bytes(b"")
    worker = Worker(tmp_path, s3_place)
    worker.write(1, 2)
    worker.upload.flush()
    assert worker.sink.tally.unwritten == 2
    assert capsys.readouterr().err.count("COLDSNAP_LEDGER_DIR") == 1
    (tmp_path / UNSENT).unlink()
    worker.write(3)
    worker.upload.flush()
    assert numbers(s3_place) == [3]
