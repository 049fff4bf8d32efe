"""Cache bundles through their processes: stored, fetched, damaged, raced, refused, too slow; on a folder and in S3."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from coldsnap import cli
from coldsnap.caches import boot_caches as caches
from coldsnap.caches import bundle, fingerprint
from coldsnap.caches import helper as bundle_helper
from coldsnap.caches import store as bundle_store
from coldsnap.caches.boot_caches import BundleMaker, Cached, Caches, Helper
from coldsnap.caches.bundle import Entry, Header
from coldsnap.caches.store import Shared, store_at
from coldsnap.errors import CacheError
from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.settings import ROOT
from coldsnap.snapshot.manifest import load_manifest
from coldsnap.snapshot.sources import Supply
from coldsnap.testing import Exchange, Fault, FaultyProxy

LONG_AGO = 1_700_000_000_123_456_789
FILES = {
    "vllm/modelinfos/qwen3.json": b'{"hash": "1"}',
    "vllm/torch_compile_cache/abc/rank_0_0/model": b"\x80compiled" * 5000,
    "triton/AAAA/kernel.cubin": bytes(range(256)) * 40,
    "flashinfer/0.6/90a/.ninja_log": b"# ninja log v5\n",
}
FACTORS = {"torch": "2.13.0", "gpu": "1 x H200 9.0"}
NAME = fingerprint.name_of(FACTORS)
SNAPSHOT = ROOT / "snapshots" / "demo"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The caches of a worker that has compiled something."""
    found = {root: tmp_path / "caches" / root for root in ("vllm", "triton", "flashinfer")}
    write(found, FILES)
    return found


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Place:
    if request.param == "folder":
        return tmp_path / "volume" / "coldsnap" / "caches"
    found: Place = request.getfixturevalue("s3_place")
    return found


def write(folders: Mapping[str, Path], files: Mapping[str, bytes], mtime_ns: int = LONG_AGO) -> None:
    for name, content in files.items():
        root, _, rest = name.partition("/")
        path = folders[root] / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(mtime_ns, mtime_ns))


def held(folders: Mapping[str, Path]) -> dict[str, bytes]:
    """Return every file of the caches, whatever it is."""
    return {
        f"{root}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for root, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }


def empty(folders: Mapping[str, Path]) -> None:
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


def packed(folders: Mapping[str, Path], factors: Mapping[str, str] = FACTORS, **more: Any) -> bytes:
    return bundle.pack(folders, lambda files: Header(fingerprint.name_of(factors), factors, files), **more)


def crafted(*files: Entry, body: bytes = b"", factors: Mapping[str, str] = FACTORS) -> bytes:
    """Return a bundle with a digest that is right, as somebody might make one by hand."""
    content = Header(fingerprint.name_of(factors), factors, files).line() + bundle._zstd().compress(body)
    return content + blake3(content).digest()


class TestBundle:
    def test_what_is_packed_is_unpacked_as_it_was(self, folders: dict[str, Path]) -> None:
        content = packed(folders)
        empty(folders)
        done = bundle.unpack(content, FACTORS, folders)
        assert (done.new, done.header.fingerprint) == (len(FILES), NAME)
        assert held(folders) == FILES
        assert {entry.mtime_ns for entry in bundle.entries(folders)} == {LONG_AGO}
        assert sorted(path.name for folder in folders.values() for path in folder.iterdir()) == [
            "0.6",
            "AAAA",
            "modelinfos",
            "torch_compile_cache",
        ]

    def test_a_file_that_is_there_is_not_touched(self, folders: dict[str, Path]) -> None:
        content = packed(folders)
        changed = FILES | {"vllm/modelinfos/qwen3.json": b"newer", "triton/BBBB/k": b"more"}
        write(folders, changed)
        (folders["triton"] / "AAAA" / "kernel.cubin").unlink()
        assert bundle.unpack(content, FACTORS, folders).new == 1
        assert held(folders) == changed

    def test_only_files_that_another_worker_can_use_are_packed(self, folders: dict[str, Path]) -> None:
        useless = {
            "vllm/assets/picture": b"x",
            "vllm/gpu_p2p_access_cache_for_0.json": b"x",
            "vllm/torch_compile_cache/abc/locks/a.lock": b"",
            "triton/tmp.pid_1/half": b"x",
        }
        write(folders, useless)
        write(folders, {"vllm/modelinfos/being_written": b"half"}, time.time_ns())
        (folders["triton"] / "link").symlink_to("/etc/passwd")
        (folders["triton"] / "elsewhere").symlink_to("/etc")
        os.mkfifo(folders["triton"] / "pipe")
        assert {entry.name for entry in bundle.entries(folders)} == FILES.keys()

    def test_a_gpus_bundle_has_nothing_that_was_compiled_for_this_processor(self, folders: dict[str, Path]) -> None:
        native = {"vllm/torch_compile_cache/abc/inductor_cache/cm/c.main.so": b"\x7fELF"}
        anywhere = {
            "vllm/torch_compile_cache/abc/inductor_cache/triton/0/X/launcher.so": b"\x7fELF",
            "flashinfer/0.6/90a/decode.so": b"\x7fELF",
        }
        write(folders, native | anywhere)
        assert {entry.name for entry in bundle.entries(folders)} == FILES.keys() | native.keys() | anywhere.keys()
        chosen = bundle.entries(folders, any_processor=True)
        assert {entry.name for entry in chosen} == FILES.keys() | anywhere.keys()

    @pytest.mark.parametrize("where", [0, 20, 300, -1, -20, -33, -200])
    def test_a_flipped_bit_anywhere_is_refused_and_nothing_unpacked(self, folders: dict[str, Path], where: int) -> None:
        content = bytearray(packed(folders))
        content[where] ^= 1
        empty(folders)
        with pytest.raises(CacheError, match="BLAKE3 digest"):
            bundle.unpack(bytes(content), FACTORS, folders)
        assert held(folders) == {}

    @pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 500, -1])
    def test_a_bundle_that_was_cut_off_is_refused(self, folders: dict[str, Path], size: int) -> None:
        with pytest.raises(CacheError):
            bundle.unpack(packed(folders)[:size], FACTORS, folders)

    def test_another_fingerprint_is_refused_by_what_differs(self, folders: dict[str, Path]) -> None:
        content = packed(folders)
        with pytest.raises(CacheError, match=r"it was made for torch 2\.13\.0 instead of 2\.14\.0$"):
            bundle.unpack(content, FACTORS | {"torch": "2.14.0"}, folders)

    @pytest.mark.parametrize(
        "name",
        [
            "vllm/modelinfos/../../../etc/x", "vllm/../x", "/etc/x", "../x", "vllm", "vllm/", "vllm/x",
            "vllm/assets/x", "vllm/modelinfos", "vllm//modelinfos/x", "vllm/./modelinfos/x", "other/x", "triton/..",
            "triton/a/../../x", "triton/a\0b", "",
        ],
    )  # fmt: skip
    def test_a_name_that_leads_anywhere_else_is_refused(self, folders: dict[str, Path], name: str) -> None:
        good = Entry("triton/ok", 1, LONG_AGO)
        before = held(folders)
        with pytest.raises(CacheError, match="which is no file of a cache"):
            bundle.unpack(crafted(good, Entry(name, 1, LONG_AGO), body=b"ab"), FACTORS, folders)
        assert held(folders) == before

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (crafted(Entry("triton/a", 5, 0), body=b"abc"), "ends in the middle of triton/a"),
            (crafted(Entry("triton/a", -1, 0)), "no file of a cache"),
            (crafted(Entry("triton/a", 1 << 40, 0)), "more than"),
            (b"{}\n", "digest"),
        ],
    )
    def test_a_bundle_that_does_not_hold_what_it_says_is_refused(
        self, folders: dict[str, Path], content: bytes, complaint: str
    ) -> None:
        before = held(folders)
        with pytest.raises(CacheError, match=complaint):
            bundle.unpack(content, FACTORS, folders)
        assert held(folders) == before

    @pytest.mark.parametrize("line", [b"[]\n", b'{"coldsnap_bundle": 1}\n', b"\xff\n", b"no line"])
    def test_a_beginning_that_is_none_is_refused(self, folders: dict[str, Path], line: bytes) -> None:
        with pytest.raises(CacheError, match="does not begin as a bundle does"):
            bundle.unpack(line + blake3(line).digest(), FACTORS, folders)

    def test_the_format_of_another_release_is_named(self, folders: dict[str, Path]) -> None:
        line = crafted().partition(b"\n")[0].replace(b'"coldsnap_bundle":1', b'"coldsnap_bundle":2') + b"\n"
        with pytest.raises(CacheError, match="it has format 2, this release reads 1"):
            bundle.unpack(line + blake3(line).digest(), FACTORS, folders)

    def test_caches_that_are_too_large_make_no_bundle(self, folders: dict[str, Path]) -> None:
        with pytest.raises(CacheError, match="more than 4000 bytes"):
            packed(folders, most_bytes=1000)
        write(folders, {"triton/random": os.urandom(30_000)})
        with pytest.raises(CacheError, match="more than 25000 bytes"):
            packed(folders, most_bytes=25_000)


REQUEST = {"replace": False, "since": None, "saves_seconds": 8.0, "generation": 1}


def stored(place: Path | Place, folders: Mapping[str, Path], **more: Any) -> dict[str, Any]:
    return bundle_helper.store_bundle(store_at(place), FACTORS, folders, REQUEST | more)


def fetched(place: Path | Place, folders: Mapping[str, Path], factors: Mapping[str, str] = FACTORS) -> dict[str, Any]:
    return bundle_helper.fetch(store_at(place), factors, folders, lambda _: None)


def content_of(place: Path | Place, name: str = NAME) -> bytes:
    """Return the bundle as it lies there; nothing else may, but for the mark of its use."""
    assert names_in(place) - {f"{name}.bundle.used"} == {f"{name}.bundle"}
    return (place / f"{name}.bundle").read_bytes() if isinstance(place, Path) else Bucket(place).get(f"{name}.bundle")


def names_in(place: Path | Place) -> set[str]:
    if isinstance(place, Path):
        return {path.name for path in place.iterdir()}
    return {found.name for found in Bucket(place).objects()}


def aged(place: Path | Place, file: str, days: float) -> None:
    """Let a file be as old as if it had last been written to so long ago."""
    then = time.time() - days * 86400
    if isinstance(place, Path):
        os.utime(place / file, (then, then))
    else:
        stored = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[place.bucket].keys[f"{place.prefix}{file}"]
        stored.last_modified = datetime.fromtimestamp(then, UTC).replace(tzinfo=None)


def put(place: Path | Place, content: bytes, name: str = NAME) -> None:
    if isinstance(place, Path):
        (place / f"{name}.bundle").write_bytes(content)
    else:
        Bucket(place).put(f"{name}.bundle", content)


class TestStore:
    def test_the_first_boot_misses_and_the_second_hits(self, place: Path | Place, folders: dict[str, Path]) -> None:
        assert fetched(place, folders) == {"state": "miss", "because": None, "fingerprint": NAME}
        made = stored(place, folders)
        assert (made["state"], made["bytes"]) == ("stored", len(content_of(place)))
        empty(folders)
        told: list[Mapping[str, Any]] = []
        found = bundle_helper.fetch(store_at(place), FACTORS, folders, told.append)
        assert (found["state"], found["bytes"], found["generation"]) == ("hit", made["bytes"], 1)
        assert told == [{"saves_seconds": 8.0}]
        assert held(folders) == FILES

    def test_a_damaged_bundle_is_refused_and_made_anew(self, place: Path | Place, folders: dict[str, Path]) -> None:
        stored(place, folders)
        good = content_of(place)
        put(place, good[:500] + bytes([good[500] ^ 1]) + good[501:])
        found = fetched(place, folders)
        assert (found["state"], found["because"]) == (
            "refused",
            f"its BLAKE3 digest is not that of its {len(good)} bytes",
        )
        asked = caches.making(Cached(**found), 0.0, 8.0)
        assert asked is not None
        assert stored(place, folders, **asked)["state"] == "stored"
        assert content_of(place) == good
        assert fetched(place, folders)["state"] == "hit"

    def test_a_bundle_under_another_ones_name_is_refused(self, place: Path | Place, folders: dict[str, Path]) -> None:
        stored(place, folders)
        content, other = content_of(place), FACTORS | {"gpu": "1 x L4 8.9"}
        put(place, content, fingerprint.name_of(other))
        before = held(folders)
        found = fetched(place, folders, other)
        assert found["state"] == "refused"
        assert found["because"] == "it was made for gpu 1 x H200 9.0 instead of 1 x L4 8.9"
        assert held(folders) == before

    def test_of_workers_that_race_one_is_first_and_the_bundle_is_whole(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        racers = 8
        line = threading.Barrier(racers)
        stores = [store_at(place) for _ in range(racers)]

        def race(number: int) -> bool:
            content = packed(folders, FACTORS) if number % 2 else crafted(Entry("triton/a", 3, LONG_AGO), body=b"abc")
            line.wait()
            return stores[number].write(f"{NAME}.bundle", content, replace=False)

        with ThreadPoolExecutor(racers) as pool:
            first = list(pool.map(race, range(racers)))
        assert first.count(True) == 1
        empty(folders)
        done = bundle.unpack(content_of(place), FACTORS, folders)
        assert held(folders) == (FILES if first.index(True) % 2 else {"triton/a": b"abc"})
        assert done.new == len(held(folders))

    def test_who_comes_second_packs_nothing(self, place: Path | Place, folders: dict[str, Path]) -> None:
        stored(place, folders)
        before = content_of(place)
        write(folders, {"triton/more": b"x"})
        assert stored(place, folders)["state"] == "there"
        assert content_of(place) == before

    def test_what_a_boot_with_a_bundle_still_had_to_compute_is_added(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        stored(place, folders)
        started = time.time() - 60
        hit = Cached(**fetched(place, folders))
        asked = caches.making(hit, started, 5.0)
        assert asked == {"replace": True, "since": started, "saves_seconds": 8.0, "generation": 2}
        assert stored(place, folders, **asked)["state"] == "there"
        write(folders, {"triton/new": b"x"}, int((started + 5) * 1e9))
        assert stored(place, folders, **asked)["state"] == "stored"
        empty(folders)
        assert fetched(place, folders)["generation"] == 2
        assert held(folders) == FILES | {"triton/new": b"x"}

    def test_caches_beyond_the_cap_are_said_and_nothing_is_stored(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        answer = bundle_helper.store_bundle(store_at(place), FACTORS, folders, REQUEST, most_bytes=1000)
        assert (answer["state"], answer["because"]) == (
            "failed",
            "the caches hold more than 4000 bytes; a bundle takes no more",
        )
        assert not store_at(place).has(f"{NAME}.bundle")

    def test_a_kv_size_that_was_measured_beside_the_compiler_is_nobodys(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        plan = {"vllm/startup_plan/startup_plan_0123.json": b"{}"}
        write(folders, plan)
        assert stored(place, folders)["state"] == "stored"
        assert held(folders) == FILES  # nor this worker's next boot's
        started = time.time() - 10
        write(folders, plan, int((started + 5) * 1e9))
        later = {"replace": True, "since": started, "generation": 2}
        assert stored(place, folders, **later)["state"] == "stored"
        empty(folders)
        fetched(place, folders)
        assert held(folders) == FILES | plan

    def test_empty_caches_make_no_bundle(self, place: Path | Place, folders: dict[str, Path]) -> None:
        empty(folders)
        assert stored(place, folders)["state"] == "there"
        assert not store_at(place).has(f"{NAME}.bundle")


OTHERS = [FACTORS | {"torch": f"2.{minor}.0"} for minor in range(3)]
OTHER_NAMES = [fingerprint.name_of(factors) for factors in OTHERS]


def with_others(place: Path | Place, folders: Mapping[str, Path]) -> None:
    """Store a bundle of each of three older releases."""
    for factors in OTHERS:
        assert bundle_helper.store_bundle(store_at(place), factors, folders, REQUEST)["state"] == "stored"


def bundles(place: Path | Place) -> list[str]:
    """Return the names of the bundles, the oldest release's first, ours last."""
    there = names_in(place)
    return [name for name in [*OTHER_NAMES, NAME] if f"{name}.bundle" in there]


class TestPruning:
    def test_who_stores_one_deletes_those_that_nobody_has_used_for_a_month_and_nothing_else(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        with_others(place, folders)
        put(place, b"somebody's", "backup")
        put(place, b"somebody's", f"old/{NAME}" if isinstance(place, Place) else f"old-{NAME}")
        others = names_in(place) - {f"{name}.bundle" for name in OTHER_NAMES}
        for name in [*others, f"{OTHER_NAMES[0]}.bundle"]:
            aged(place, name, 365)
        aged(place, f"{OTHER_NAMES[1]}.bundle", 31)
        aged(place, f"{OTHER_NAMES[2]}.bundle", 29)
        answer = stored(place, folders)
        assert answer["also"] == "; 2 bundles deleted that no boot has used for 30 days"
        assert bundles(place) == [OTHER_NAMES[2], NAME]
        assert names_in(place) >= others
        assert stored(place, folders, replace=True)["also"] == ""

    def test_what_a_boot_has_used_stays_however_old_it_is(self, place: Path | Place, folders: dict[str, Path]) -> None:
        with_others(place, folders)
        for name in OTHER_NAMES:
            aged(place, f"{name}.bundle", 365)
        assert bundle_helper.mark(store_at(place), OTHER_NAMES[1]) is None
        assert stored(place, folders)["also"] == "; 2 bundles deleted that no boot has used for 30 days"
        assert bundles(place) == [OTHER_NAMES[1], NAME]
        aged(place, f"{OTHER_NAMES[1]}.bundle{'.used' if isinstance(place, Place) else ''}", 31)
        assert stored(place, folders, replace=True)["also"] == "; 1 bundle deleted that no boot has used for 30 days"
        assert names_in(place) == {f"{NAME}.bundle"}

    def test_a_boots_hit_is_noted_and_its_record_does_not_wait_for_that(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        name = made(place, folders).fingerprint
        aged(place, f"{name}.bundle", 365)
        boot = begun(place, folders)
        assert patient(boot).state == "hit"
        assert boot._fetching is not None
        assert boot._fetching._process.wait(60) == 0
        answer = stored(place, folders)
        assert (answer["state"], answer["also"]) == ("stored", "")
        assert f"{name}.bundle" in names_in(place)

    def test_a_worker_whose_clock_is_wrong_deletes_nothing(
        self, place: Path | Place, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with_others(place, folders)
        clock = time.time
        monkeypatch.setattr(bundle_store.time, "time", lambda: clock() + 365 * 86400)
        assert store_at(place).prune(f"{OTHER_NAMES[0]}.bundle", 86400) == 0
        assert bundles(place) == OTHER_NAMES

    def test_the_mark_of_a_bundle_that_is_gone_goes_too(self, s3_place: Place, folders: dict[str, Path]) -> None:
        store_at(s3_place).mark(f"{OTHER_NAMES[0]}.bundle")
        aged(s3_place, f"{OTHER_NAMES[0]}.bundle.used", 31)
        assert stored(s3_place, folders)["also"] == ""
        assert names_in(s3_place) == {f"{NAME}.bundle"}

    def test_a_bundle_that_vanishes_before_it_is_read_is_a_miss_and_is_not_marked(
        self, place: Path | Place, folders: dict[str, Path]
    ) -> None:
        store_at(place).write(f"{OTHER_NAMES[0]}.bundle", b"", replace=False)
        before = names_in(place)
        assert fetched(place, folders)["state"] == "miss"
        if isinstance(place, Path):
            assert bundle_helper.mark(store_at(place), NAME) is None
        assert names_in(place) == before

    def test_one_that_is_deleted_from_a_volume_while_it_is_read_is_read_to_its_end(
        self, tmp_path: Path, folders: dict[str, Path]
    ) -> None:
        write(folders, {"triton/large": os.urandom(3 << 20)})
        stored(tmp_path / "volume", folders)
        empty(folders)
        store = store_at(tmp_path / "volume")
        found = bundle_helper.fetch(
            store, FACTORS, folders, lambda _: (tmp_path / "volume" / f"{NAME}.bundle").unlink()
        )
        assert found["state"] == "hit"
        assert held(folders).keys() == FILES.keys() | {"triton/large"}

    def test_a_volume_that_cannot_read_on_in_a_deleted_file_costs_the_bundle_and_is_said(
        self, tmp_path: Path, folders: dict[str, Path]
    ) -> None:
        class Stale(Shared):
            """As NFS answers whoever reads what another machine has deleted."""

            def open(self, name: str) -> tuple[int, Iterator[bytes]] | None:
                opened = super().open(name)
                assert opened is not None
                size, pieces = opened

                def first() -> Iterator[bytes]:
                    yield next(pieces)[:100]
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

                return size, first()

        stored(tmp_path / "volume", folders)
        empty(folders)
        found = bundle_helper.fetch(Stale(tmp_path / "volume"), FACTORS, folders, lambda _: None)
        assert (found["state"], found["because"]) == ("failed", "[Errno 116] Stale file handle")
        assert held(folders) == {}

    def test_a_folder_that_refuses_leaves_the_boot_and_the_store_as_they_were(
        self, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        volume = tmp_path / "volume"
        with_others(volume, folders)
        aged(volume, f"{OTHER_NAMES[0]}.bundle", 365)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", "the bundle")

        monkeypatch.setattr(os, "utime", refuse)
        assert bundle_helper.mark(store_at(volume), NAME) == (
            f"bundle {NAME} is in use, which could not be noted: it may be deleted 30 days after it was last noted: "
            "[Errno 1] Operation not permitted: 'the bundle'"
        )
        monkeypatch.setattr(Shared, "prune", refuse)
        answer = stored(volume, folders)
        assert answer["state"] == "stored"
        assert answer["also"] == "; unused ones cannot be deleted: [Errno 1] Operation not permitted: 'the bundle'"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, folders: dict[str, Path]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        answer = stored(tmp_path / "volume", folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert answer["state"] == "failed"
    assert "File too large" in answer["because"]
    assert list((tmp_path / "volume").iterdir()) == []


def test_a_disk_that_fills_up_while_a_bundle_is_unpacked_fails_the_fetch_and_leaves_nothing_behind(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    stored(tmp_path / "volume", folders)
    empty(folders)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        answer = fetched(tmp_path / "volume", folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert answer["state"] == "failed"
    assert held(folders) == {}
    assert fetched(tmp_path / "volume", folders)["state"] == "hit"


def test_a_volume_without_links_takes_a_bundle_all_the_same(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    store = Shared(tmp_path / "volume")
    assert store.write(f"{NAME}.bundle", packed(folders), replace=False)
    assert not store.write(f"{NAME}.bundle", b"second", replace=False)
    assert content_of(tmp_path / "volume") == packed(folders)


def test_what_a_killed_worker_left_on_the_volume_is_removed_after_an_hour(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    left = tmp_path / "volume" / ".x.bundle.host.1.partial"
    young = tmp_path / "volume" / ".y.bundle.host.2.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert stored(tmp_path / "volume", folders)["state"] == "stored"
    assert not left.exists()
    assert young.exists()


# A boot's side: real processes.


def begun(place: Path | Place, folders: dict[str, Path]) -> Caches:
    found = Caches(place, folders, frozenset({"max_model_len"}), gpu=False)
    found.begin(dict(os.environ))
    found.ask(Supply("image", SNAPSHOT, load_manifest(SNAPSHOT)), str(SNAPSHOT))
    return found


def made(place: Path | Place, folders: dict[str, Path]) -> Cached:
    """Boot without a bundle, and store one, as `coldsnap warm` does; return what the boot found."""
    boot = begun(place, folders)
    cached = patient(boot)
    asked = caches.making(cached, boot.started, 8.0)
    assert asked is not None
    helper = boot.helper("store")
    helper.ask(boot.request(**asked))
    answer = helper.answer(60)
    helper.end()
    assert answer is not None
    assert answer["state"] == "stored"
    return cached


def patient(boot: Caches) -> Cached:
    """Wait for a fetch as long as an import of vLLM takes, and more."""
    assert boot._fetching is not None
    ready, _, _ = caches.select.select([boot._fetching._process.stdout], [], [], 60)
    assert ready
    return boot.result()


def test_a_boots_own_processes_miss_store_and_hit(place: Path | Place, folders: dict[str, Path]) -> None:
    cached = made(place, folders)
    assert (cached.state, cached.because) == ("miss", None)
    empty(folders)
    found = patient(begun(place, folders))
    assert (found.state, found.fingerprint, found.generation) == ("hit", cached.fingerprint, 1)
    assert cached.fingerprint is not None
    assert found.bytes == len(content_of(place, cached.fingerprint))
    assert held(folders) == FILES


def test_two_workers_that_store_at_once_leave_one_good_bundle(place: Path | Place, folders: dict[str, Path]) -> None:
    boots = [begun(place, folders) for _ in range(2)]
    name = patient(boots[0]).fingerprint
    assert patient(boots[1]).fingerprint == name
    assert name is not None
    helpers = [boot.helper("store") for boot in boots]
    for boot, helper in zip(boots, helpers, strict=True):
        helper.ask(boot.request(**REQUEST))
    answers = [helper.answer(60) for helper in helpers]
    for helper in helpers:
        helper.end()
    states = [answer["state"] for answer in answers if answer]
    assert sorted(states) in (["stored", "there"], ["there", "stored"])
    content_of(place, name)
    empty(folders)
    assert patient(begun(place, folders)).state == "hit"
    assert held(folders) == FILES


@pytest.fixture
def line(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A line to the bucket; a test tells it how to fail."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], lambda _: None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def slow(exchange: Exchange) -> Fault | None:
    return Fault(bytes_per_second=10) if exchange.method == "GET" else None


def test_a_boot_does_not_wait_for_a_bucket_that_crawls(
    line: FaultyProxy, s3_place: Place, folders: dict[str, Path]
) -> None:
    made(s3_place, folders)
    empty(folders)
    line.faults = slow
    boot = begun(s3_place, folders)
    cached = boot.result()
    assert cached.state == "late"
    assert (boot.complaint(cached) or "").startswith(
        f"CACHE_URI: {s3_place}: no bundle for this boot: it was not there"
    )
    assert held(folders) == {}
    assert caches.making(cached, 0.0, 8.0) == REQUEST


def test_a_boot_waits_for_a_bundle_that_is_on_its_way_as_long_as_that_saves(
    line: FaultyProxy, s3_place: Place, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "_ANSWER_SECONDS", 30.0)  # for the header
    made(s3_place, folders)
    size = len(Bucket(s3_place).get(next(Bucket(s3_place).objects()).name))
    empty(folders)
    line.faults = lambda exchange: Fault(bytes_per_second=size / 2) if exchange.method == "GET" else None
    assert begun(s3_place, folders).result().state == "hit"


def test_a_line_that_breaks_off_is_taken_up_again(line: FaultyProxy, s3_place: Place, folders: dict[str, Path]) -> None:
    made(s3_place, folders)
    empty(folders)
    line.faults = lambda exchange: (
        Fault(cut_after=400) if "Range" not in exchange.path and exchange.number % 2 else None
    )
    assert patient(begun(s3_place, folders)).state == "hit"
    assert held(folders) == FILES


def test_a_bundle_that_vanishes_from_a_bucket_while_it_is_fetched_costs_the_bundle_and_the_record_says_so(
    line: FaultyProxy, s3_place: Place, folders: dict[str, Path]
) -> None:
    name = made(s3_place, folders).fingerprint
    empty(folders)
    gets: list[Exchange] = []

    def vanish(exchange: Exchange) -> Fault | None:
        if exchange.method != "GET":
            return None
        gets.append(exchange)
        if len(gets) == 1:
            return Fault(cut_after=400)
        Bucket(s3_place).delete(f"{name}.bundle")
        return None

    line.faults = vanish
    boot = begun(s3_place, folders)
    assert boot._fetching is not None
    cached = patient(boot)
    assert (cached.state, held(folders)) == ("failed", {})
    assert cached.because == f"{s3_place}{name}.bundle: there is no such object"
    assert boot.complaint(cached) == f"CACHE_URI: {s3_place}: no bundle for this boot: {cached.because}"
    assert patient(begun(s3_place, folders)).state == "miss"


def test_a_bucket_that_is_away_and_a_place_that_is_no_folder_are_said(
    s3_place: Place, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    away = patient(begun(s3_place, folders))
    assert away.state == "failed"
    assert "Could not connect" in (away.because or "")
    (tmp_path / "file").write_bytes(b"")
    boot = begun(tmp_path / "file", folders)
    wrong = patient(boot)
    assert wrong.state == "failed"
    assert boot.complaint(wrong) == (f"CACHE_URI: {tmp_path / 'file'}: no bundle for this boot: {wrong.because}")
    assert "Not a directory" in (wrong.because or "")
    assert caches.making(wrong, 0.0, 8.0) is None


def test_a_volume_that_hangs_is_late(tmp_path: Path, folders: dict[str, Path]) -> None:
    name = patient(begun(tmp_path, folders)).fingerprint
    os.mkfifo(tmp_path / f"{name}.bundle")  # whoever opens it waits for ever
    assert begun(tmp_path, folders).result().state == "late"


def test_a_helper_that_dies_is_no_bundle(tmp_path: Path, folders: dict[str, Path]) -> None:
    boot = begun(tmp_path, folders)
    assert boot._fetching is not None
    boot._fetching._process.kill()
    cached = boot.result()
    assert (cached.state, cached.because) == ("failed", "its process ended with -9; its message is above")


# The worker's side: only while no job runs.


class Jobs:
    """What the worker knows of its jobs."""

    def __init__(self) -> None:
        self.running = True
        self.served = 0
        self.asked = 0

    def busy(self) -> bool:
        self.asked += 1
        return self.running


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def bundle_maker(boot: Caches, jobs: Jobs, said: list[str]) -> BundleMaker:
    asked = caches.making(patient(boot), boot.started, 8.0)
    assert asked is not None
    return BundleMaker(boot, asked, busy=jobs.busy, served=lambda: jobs.served, say=said.append)


def test_the_bundle_is_made_after_the_first_idle_second_and_said_once(
    place: Path | Place, folders: dict[str, Path]
) -> None:
    jobs, said = Jobs(), list[str]()
    work = bundle_maker(begun(place, folders), jobs, said)
    work.start()
    eventually(lambda: jobs.asked > 2)
    assert said == []
    jobs.running, jobs.served = False, 1
    eventually(lambda: said)
    name = said[0].split()[2]
    assert said == [f"cache bundle {name} stored in {place}, {len(content_of(place, name))} bytes"]
    looks = jobs.asked
    eventually(lambda: not work._due())
    assert work.end(10)
    assert said == said[:1]
    assert jobs.asked <= looks + 1


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children() -> list[int]:
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"coldsnap.caches.helper\0store" in path.read_bytes()
    ]
    return [
        pid for pid in found if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    ]


def test_it_stands_still_while_a_job_runs_takes_no_turn_from_anybody_and_dies_with_the_worker(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    boot = begun(tmp_path / "volume", folders)
    name = patient(boot).fingerprint
    (tmp_path / "volume").mkdir()
    helper = boot.helper("store")
    pid = helper._process.pid
    helper.be_idle()
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    helper.pause(True)
    eventually(lambda: state_of(pid) == "T")
    helper.ask(boot.request(**REQUEST))
    assert helper.answer(0.2) is None
    assert not (tmp_path / "volume" / f"{name}.bundle").exists()
    helper.pause(False)
    answer = helper.answer(60)
    assert answer is not None
    assert answer["state"] == "stored"
    helper.end()

    second = boot.helper("store")
    second.pause(True)
    second.end()
    assert second._process.wait() == -signal.SIGKILL
    eventually(lambda: children() == [])  # killed, and not yet gone


def test_a_worker_that_ends_does_not_wait_for_its_bundle(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, said = Jobs(), list[str]()
    boot = begun(tmp_path / "volume", folders)
    work = bundle_maker(boot, jobs, said)
    started = threading.Event()
    idle = Helper.be_idle

    def stuck(helper: Helper) -> None:
        idle(helper)
        os.kill(helper._process.pid, signal.SIGSTOP)  # as a volume that does not answer would hold it
        started.set()

    monkeypatch.setattr(Helper, "be_idle", stuck)
    jobs.running = False
    work.start()
    assert started.wait(60)
    eventually(lambda: len(children()) == 1)
    work.soon()
    assert work.end(60)
    eventually(lambda: children() == [])  # killed, and not yet gone
    assert said == []


def test_a_store_that_fails_is_said_once(tmp_path: Path, folders: dict[str, Path]) -> None:
    jobs, said = Jobs(), list[str]()
    boot = begun(tmp_path / "volume", folders)
    work = bundle_maker(boot, jobs, said)
    jobs.running = False
    (tmp_path / "volume").write_bytes(b"in the way")
    work.start()
    eventually(lambda: said)
    assert work.end(10)
    assert said == [f"CACHE_URI: {tmp_path / 'volume'}: no bundle was stored: {said[0].rpartition('stored: ')[2]}"]
    assert "Not a directory" in said[0] or "File exists" in said[0]


def test_a_helper_dies_with_its_worker(tmp_path: Path, folders: dict[str, Path]) -> None:
    code = (
        "import os, sys; from coldsnap.caches.boot_caches import Helper\n"
        f"helper = Helper(['store', {str(tmp_path)!r}], os.environ)\n"
        "print(helper._process.pid, flush=True); sys.stdin.read()"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    helper = int(worker.stdout.readline())
    eventually(lambda: ready(helper))
    os.kill(helper, signal.SIGSTOP)
    worker.kill()
    worker.wait()
    eventually(lambda: not Path(f"/proc/{helper}").exists() or state_of(helper) == "Z")


def ready(pid: int) -> bool:
    """Return whether a helper waits for its request: in `read` of its stdin."""
    number, *arguments = Path(f"/proc/{pid}/syscall").read_text().split()
    return number in {"0", "63"} and arguments[0] == "0x0"  # x86-64, aarch64


def test_warm_without_a_place_says_what_to_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAPSHOT_VOLUME", str(tmp_path / "none"))
        patch.delenv("CACHE_URI", raising=False)
        assert cli.main(["warm"]) == 1
    assert capsys.readouterr().err == (
        f"coldsnap: PLACE: nowhere to store the bundle: there is no volume at {tmp_path / 'none'}; name a folder or "
        "s3://bucket/prefix, or set CACHE_URI\n"
    )
