"""Snapshots into a bucket and out of it: over a line that fails, killed, raced, damaged, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import orjson
import pytest
from blake3 import blake3

from coldsnap import cli
from coldsnap.errors import SnapshotError, SourceError
from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.settings import ROOT
from coldsnap.snapshot.lock import Lock
from coldsnap.snapshot.manifest import MANIFEST, Manifest, Quantization, Source, load_manifest, verify, write_manifest
from coldsnap.snapshot.pull import AHEAD, FILES_AT_ONCE, PART_BYTES, Offer, Pulled, offer, pull
from coldsnap.snapshot.push import push
from coldsnap.testing import Exchange, Fault, FaultyProxy

LARGE = AHEAD * PART_BYTES + 5 * PART_BYTES // 2
"""More than what is asked for ahead, and no whole number of parts."""
SMALL = {"config.json": b"{}", "empty": b"", "sub/deeper/tokenizer.json": "ünïcödé".encode(), "same": b"{}"}
Proxy = Callable[[Callable[[Exchange], Fault | None]], FaultyProxy]


def bake(folder: Path, **files: bytes) -> Manifest:
    for name, content in (SMALL | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return write_manifest(
        folder, source=Source(), quantization=Quantization(), served_model_name="m", engine_args={}, versions={}
    )


@pytest.fixture(scope="module")
def weights() -> bytes:
    return os.urandom(LARGE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bake(tmp_path / "snapshot", **{"model.safetensors": os.urandom(10_000)})
    return tmp_path / "snapshot"


@pytest.fixture
def large(folder: Path, weights: bytes) -> Path:
    """A snapshot that comes in parts, and goes in parts."""
    bake(folder, **{"model.safetensors": weights})
    return folder


@pytest.fixture
def proxy(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A way to put a faulty line between boto3 and the server, from now on."""
    open_lines: list[FaultyProxy] = []

    def make(faults: Callable[[Exchange], Fault | None]) -> FaultyProxy:
        line = FaultyProxy(server, faults).__enter__()
        open_lines.append(line)
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.url)
        return line

    server = os.environ["AWS_ENDPOINT_URL"]
    yield make
    for line in open_lines:
        line.__exit__(None, None, None)


def fetch(place: Place, target: Path, **more: Any) -> Pulled:
    return pull(offer(place, "SNAPSHOT_S3_URI"), target, "SNAPSHOT_CACHE", say=lambda _: None, **more)


def objects(place: Place) -> dict[str, int]:
    return {found.name: found.size for found in Bucket(place).objects()}


def nothing_is_there(target: Path) -> bool:
    return not target.exists() and not list(target.parent.glob("*.lock.*"))


def start(place: Place, target: Path) -> subprocess.Popen[str]:
    """Run `coldsnap pull` in a process of its own."""
    code = "import sys; from coldsnap.cli import main; sys.exit(main())"
    environ = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "PATH"))}
    return subprocess.Popen(
        [sys.executable, "-c", code, "pull", str(place), str(target)],
        env=environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def every_third(exchange: Exchange) -> Fault | None:
    faults = (Fault(status=500), Fault(cut_after=1000), Fault(status=503))
    return faults[exchange.number // 3 % 3] if exchange.number % 3 == 0 else None


class TestPush:
    def test_the_manifest_is_the_last_object_and_a_second_push_sends_no_file(
        self, large: Path, s3_place: Place, proxy: Proxy
    ) -> None:
        line = proxy(lambda _: None)
        manifest = load_manifest(large)
        told: list[int] = []
        pushed = push(large, s3_place, on_bytes=told.append)
        assert pushed.manifest == manifest
        assert pushed.sent_bytes == sum({entry.blake3: entry.size for entry in manifest.files.values()}.values())
        assert sum(told) == manifest.size
        assert objects(s3_place) == {
            MANIFEST: (large / MANIFEST).stat().st_size,
            **{f"blobs/{entry.blake3}": entry.size for entry in manifest.files.values()},
        }
        changes = [each.path for each in line.exchanges if each.method in {"PUT", "POST"}]
        assert changes[-1].endswith(MANIFEST)
        assert sum("partNumber" in path for path in changes) == -(-LARGE // (64 << 20))
        before = len(line.exchanges)
        assert push(large, s3_place).sent_bytes == 0
        assert [each.path.rpartition("/")[2] for each in line.exchanges[before:] if each.method != "GET"] == [MANIFEST]

    def test_a_new_version_leaves_the_old_ones_files_until_its_manifest_is_there(
        self, folder: Path, s3_place: Place, tmp_path: Path
    ) -> None:
        push(folder, s3_place)
        old = offer(s3_place, "PLACE")
        bake(folder, **{"config.json": b'{"new": 1}'})
        push(folder, s3_place)
        assert pull(old, tmp_path / "old", "FOLDER", say=lambda _: None).whole
        assert (tmp_path / "old" / "config.json").read_bytes() == b"{}"
        fetch(s3_place, tmp_path / "new")
        verify(tmp_path / "new", load_manifest(folder))

    def test_a_push_over_a_line_that_fails_every_third_time_arrives(
        self, large: Path, s3_place: Place, proxy: Proxy, tmp_path: Path
    ) -> None:
        proxy(lambda exchange: Fault(status=500) if exchange.number % 3 == 0 else None)
        push(large, s3_place)
        fetch(s3_place, tmp_path / "target")
        verify(tmp_path / "target", load_manifest(large))
        assert load_manifest(tmp_path / "target") == load_manifest(large)

    def test_a_damaged_snapshot_is_not_pushed(self, folder: Path, s3_place: Place) -> None:
        (folder / "config.json").write_bytes(b"[]")
        with pytest.raises(SnapshotError, match=r"config\.json: expected BLAKE3"):
            push(folder, s3_place)
        assert objects(s3_place) == {}

    def test_a_push_that_fails_leaves_no_manifest(self, large: Path, s3_place: Place, proxy: Proxy) -> None:
        proxy(lambda exchange: Fault(status=400) if "partNumber" in exchange.path else None)
        with pytest.raises(SourceError, match=r"^push to s3://.*/blobs/"):
            push(large, s3_place)
        assert MANIFEST not in objects(s3_place)


class TestPull:
    def test_with_every_third_answer_failing_everything_arrives_and_nothing_else(
        self, large: Path, s3_place: Place, proxy: Proxy, tmp_path: Path
    ) -> None:
        push(large, s3_place)
        line = proxy(every_third)
        pulled = fetch(s3_place, tmp_path / "store" / "target")
        manifest = load_manifest(tmp_path / "store" / "target")
        assert manifest == load_manifest(large)
        verify(tmp_path / "store" / "target", manifest)
        assert pulled.whole
        assert pulled.fetched_bytes == manifest.size
        assert pulled.seconds > 0
        assert [path.name for path in (tmp_path / "store").iterdir()] == ["target"]
        assert sum(each.status >= 500 for each in line.exchanges) >= 3
        # Where an answer was cut it was continued: what was sent twice is less than what the cuts left over.
        assert manifest.size <= line.fetched("/blobs/") < manifest.size + 100_000

    def test_an_answer_that_crawls_is_given_up_and_continued(self, large: Path, s3_place: Place, proxy: Proxy) -> None:
        manifest = load_manifest(large)
        push(large, s3_place)
        line = proxy(lambda exchange: Fault(bytes_per_second=1 << 20) if exchange.number % 2 else None)
        name = f"blobs/{manifest.files['model.safetensors'].blake3}"
        data = Bucket(s3_place, timeout_seconds=0.5).read(name, 3, PART_BYTES)
        assert data == (large / "model.safetensors").read_bytes()[3 : 3 + PART_BYTES]
        assert len(line.exchanges) == 2

    def test_a_line_that_brings_nothing_any_more_is_an_error_that_names_the_object(
        self, s3_place: Place, proxy: Proxy
    ) -> None:
        Bucket(s3_place).put("blobs/x", b"x" * 1000)
        proxy(lambda _: Fault(cut_after=0))
        bucket = Bucket(s3_place, attempts=2)
        with pytest.raises(Exception, match=r"s3://.*/blobs/x: .*2 times in a row"):
            bucket.read("blobs/x", 0, 1000)

    def test_a_killed_download_goes_on_where_it_was(
        self, large: Path, s3_place: Place, proxy: Proxy, tmp_path: Path
    ) -> None:
        size = push(large, s3_place).manifest.size
        line = proxy(lambda exchange: Fault(bytes_per_second=8 << 20) if "/blobs/" in exchange.path else None)
        target = tmp_path / "target"
        partial = tmp_path / ".target.partial" / "model.safetensors"
        process = start(s3_place, target)
        while not (partial.is_file() and partial.stat().st_size >= 2 * PART_BYTES):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = partial.stat().st_size
        assert not target.exists()
        line.faults = lambda _: None
        pulled = fetch(s3_place, target, stale_seconds=1.0)
        verify(target, load_manifest(large))
        assert pulled.fetched_bytes <= size - kept
        assert pulled.waited_seconds >= 1.0  # the dead one's lock
        assert nothing_is_there(tmp_path / "other")

    def test_a_left_over_that_is_wrong_is_fetched_again(self, folder: Path, s3_place: Place, tmp_path: Path) -> None:
        push(folder, s3_place)
        partial = tmp_path / ".target.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"\0" * 1000)
        (partial / "config.json").write_bytes(b"longer than it should be")
        (partial / "of-another-version").touch()
        fetch(s3_place, tmp_path / "target")
        verify(tmp_path / "target", load_manifest(folder))
        assert not (tmp_path / "target" / "of-another-version").exists()

    def test_a_link_that_leads_out_of_the_folder_is_not_written_through(
        self, folder: Path, s3_place: Place, tmp_path: Path
    ) -> None:
        push(folder, s3_place)
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "config.json").write_bytes(b"mine")
        partial = tmp_path / ".target.partial"
        partial.mkdir()
        (partial / "config.json").symlink_to(outside / "config.json")
        (partial / "sub").symlink_to(outside)
        fetch(s3_place, tmp_path / "target")
        verify(tmp_path / "target", load_manifest(folder))
        assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("config.json", b"mine")]

    def test_two_processes_on_one_volume_fetch_it_once(
        self, large: Path, s3_place: Place, proxy: Proxy, tmp_path: Path
    ) -> None:
        size = push(large, s3_place).manifest.size
        line = proxy(lambda exchange: Fault(bytes_per_second=32 << 20) if "/blobs/" in exchange.path else None)
        target = tmp_path / "volume" / "target"
        processes = [start(s3_place, target) for _ in range(2)]
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        verify(target, load_manifest(large))
        assert line.fetched("/blobs/") == size
        assert [path.name for path in target.parent.iterdir()] == ["target"]


class TestRefusals:
    def test_a_corrupt_object_is_named_and_nothing_appears(self, folder: Path, s3_place: Place, tmp_path: Path) -> None:
        entry = push(folder, s3_place).manifest.files["config.json"]
        Bucket(s3_place).put(f"blobs/{entry.blake3}", b"[]")
        found = blake3(b"[]").hexdigest()
        with pytest.raises(SnapshotError, match=rf"(config\.json|same): expected BLAKE3 {entry.blake3}, found {found}"):
            fetch(s3_place, tmp_path / "target")
        assert nothing_is_there(tmp_path / "target")
        boto3.client("s3").delete_object(Bucket=s3_place.bucket, Key=f"{s3_place.prefix}blobs/{entry.blake3}")
        assert push(folder, s3_place).sent_bytes == entry.size
        fetch(s3_place, tmp_path / "target")
        verify(tmp_path / "target", load_manifest(folder))

    def test_a_shorter_or_missing_object_is_named(self, folder: Path, s3_place: Place, tmp_path: Path) -> None:
        digest = push(folder, s3_place).manifest.files["model.safetensors"].blake3
        Bucket(s3_place).put(f"blobs/{digest}", b"short")
        with pytest.raises(SourceError, match=rf"SNAPSHOT_S3_URI: s3://.*/blobs/{digest}: .*(at least|shorter)"):
            fetch(s3_place, tmp_path / "target")
        boto3.client("s3").delete_object(Bucket=s3_place.bucket, Key=f"{s3_place.prefix}blobs/{digest}")
        with pytest.raises(SourceError, match=rf"SNAPSHOT_S3_URI: s3://.*/blobs/{digest}: there is no such object"):
            fetch(s3_place, tmp_path / "target")
        assert nothing_is_there(tmp_path / "target")

    def test_space_is_looked_at_before_anything_is_fetched(
        self, folder: Path, s3_place: Place, proxy: Proxy, tmp_path: Path
    ) -> None:
        push(folder, s3_place)
        line = proxy(lambda _: None)
        edit_manifest(s3_place, lambda data: data["files"]["config.json"].update(size=10**18))
        with pytest.raises(SourceError, match=rf"^SNAPSHOT_CACHE: {tmp_path}: the snapshot needs 1000000\d+ bytes"):
            fetch(s3_place, tmp_path / "target")
        assert line.fetched("/blobs/") == 0
        assert nothing_is_there(tmp_path / "target")

    @pytest.mark.parametrize("name", ["../outside", "/etc/outside", "sub/../../outside", "a\0b"])
    def test_a_name_that_leads_elsewhere_is_refused(self, folder: Path, s3_place: Place, name: str) -> None:
        push(folder, s3_place)
        edit_manifest(s3_place, lambda data: data["files"].update({name: data["files"]["config.json"]}))
        with pytest.raises(SnapshotError, match=r"^snapshot s3://.*coldsnap\.json: files\..*plain relative path"):
            offer(s3_place, "SNAPSHOT_S3_URI")

    def test_a_newer_manifest_asks_for_a_newer_coldsnap(self, folder: Path, s3_place: Place) -> None:
        push(folder, s3_place)
        edit_manifest(s3_place, lambda data: data.update(schema_version=9))
        with pytest.raises(SnapshotError, match=r"^snapshot s3://.*expected 1 or less, found 9; it needs a newer"):
            offer(s3_place, "SNAPSHOT_S3_URI")

    def test_a_bucket_without_a_manifest_says_how_one_gets_there(self, s3_place: Place) -> None:
        with pytest.raises(SourceError, match=rf"^SNAPSHOT_S3_URI: {s3_place} holds no coldsnap\.json.*coldsnap push"):
            offer(s3_place, "SNAPSHOT_S3_URI")
        with pytest.raises(SourceError, match=r"^SNAPSHOT_S3_URI: s3://no-such-bucket/.*there is no such bucket"):
            offer(Place("no-such-bucket", ""), "SNAPSHOT_S3_URI")

    def test_without_permission_the_setting_and_the_place_are_named(
        self, folder: Path, s3_place: Place, monkeypatch: pytest.MonkeyPatch, s3_endpoint: str
    ) -> None:
        push(folder, s3_place)
        iam = boto3.client("iam", endpoint_url=s3_endpoint)
        name = f"nobody-{os.getpid()}"
        iam.create_user(UserName=name)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        control(s3_endpoint, "0")
        try:
            with pytest.raises(SourceError, match=rf"^SNAPSHOT_S3_URI: {s3_place}coldsnap\.json: access denied"):
                offer(s3_place, "SNAPSHOT_S3_URI")
            with pytest.raises(SourceError, match=rf"^push to {s3_place}blobs/: access denied"):
                push(folder, s3_place)
        finally:
            control(s3_endpoint, "inf")

    def test_a_place_that_cannot_be_written_is_named(self, folder: Path, s3_place: Place, tmp_path: Path) -> None:
        push(folder, s3_place)
        (tmp_path / "file").touch()
        with pytest.raises(SourceError, match=rf"^SNAPSHOT_CACHE: {tmp_path}/file"):
            fetch(s3_place, tmp_path / "file" / "target")


class TestCommands:
    def test_a_snapshot_goes_to_a_bucket_and_comes_back(
        self, folder: Path, s3_place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        manifest = load_manifest(folder)
        target = tmp_path / "target"
        assert cli.main(["push", str(folder), str(s3_place)]) == 0
        assert f"{manifest.digest}, {manifest.size} bytes" in capsys.readouterr().out
        assert cli.main(["pull", str(s3_place), str(target)]) == 0
        assert f"{manifest.size} of them fetched" in capsys.readouterr().out
        assert cli.main(["pull", str(s3_place), str(target)]) == 0
        assert " 0 of them fetched" in capsys.readouterr().out
        bake(target, **{"config.json": b"{ }"})
        assert cli.main(["pull", str(s3_place), str(target)]) == 1
        assert f"FOLDER: {target} holds another snapshot" in capsys.readouterr().err
        assert cli.main(["push", str(folder), "s3:/wrong"]) == 1
        assert "PLACE: expected s3://bucket/prefix" in capsys.readouterr().err


class TestLock:
    def test_who_stops_beating_loses_it_to_one_of_the_waiters_and_knows(self, tmp_path: Path) -> None:
        def beats() -> int:
            while not (said := (tmp_path / "lock.2").read_text()):  # being written
                pass
            return int(said.split()[-1])

        said: list[str] = []
        dead, second = (Lock(tmp_path / "lock", beat_seconds=0.05, stale_seconds=0.4) for _ in range(2))
        third = Lock(tmp_path / "lock", beat_seconds=0.05, stale_seconds=3, clock=beats)  # hears 3 beats and no new one
        assert dead.acquire(lambda: False, said.append)  # never entered: no beat
        assert said == []
        assert second.acquire(lambda: False, said.append)
        assert said == [f"{os.uname().nodename} {os.getpid()} " + said[0].split()[-1]]
        assert dead.lost
        assert not second.lost
        with second:
            assert not third.acquire(lambda: beats() > 20, said.append)
            assert not second.lost
        assert list(tmp_path.iterdir()) == []

    def test_it_is_free_after_the_block_also_when_that_raises(self, tmp_path: Path) -> None:
        first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
        assert first.acquire(lambda: False, print)
        with pytest.raises(KeyError), first:
            raise KeyError
        assert second.acquire(lambda: False, print)

    def test_nobody_waits_for_what_is_done(self, tmp_path: Path) -> None:
        assert not Lock(tmp_path / "lock").acquire(lambda: True, print)


def edit_manifest(place: Place, change: Callable[[Any], object]) -> None:
    bucket = Bucket(place)
    data = orjson.loads(bucket.get(MANIFEST))
    change(data)
    bucket.put(MANIFEST, orjson.dumps(data))


def control(endpoint: str, allowed: str) -> None:
    """Let moto check permissions from the next request but `allowed` on."""
    kind = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=allowed.encode(), headers=kind)
    urllib.request.urlopen(request, timeout=10).close()


def test_memory_is_bounded() -> None:
    assert AHEAD * FILES_AT_ONCE * PART_BYTES <= 256 << 20


def test_an_offer_is_what_a_boot_needs(folder: Path, s3_place: Place) -> None:
    push(folder, s3_place)
    found = offer(s3_place, "SNAPSHOT_S3_URI")
    assert isinstance(found, Offer)
    assert found.manifest == load_manifest(folder)
    assert found.content == (folder / MANIFEST).read_bytes()
