"""Real boots that share compile caches: the second finds what the first made, and a damaged bundle is replaced."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from coldsnap.caches import bundle
from coldsnap.foundation.s3 import Bucket, Place

from .conftest import Boot
from .worker import CORPUS, EMOJI_ONLY, PATIENCE, ROOT, SNAPSHOT, Worker, environment, eventually, text

pytestmark = pytest.mark.asyncio(loop_scope="session")
MODELINFO = Path(".cache/vllm/modelinfos")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Have vLLM fill its caches as an image's build does: an eager engine on a processor computes nothing to keep."""
    home = tmp_path_factory.mktemp("inspected")
    process = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "builder" / "finish_image.py", SNAPSHOT, env=environment(home, home)
    )
    assert await process.wait() == 0
    return home


@pytest.fixture
def home(inspected: Path, tmp_path: Path) -> Path:
    """The home of a worker that has its caches; each test has its own."""
    return Path(shutil.copytree(inspected, tmp_path / "home"))


async def serves(worker: Worker) -> dict[str, Any]:
    """Ask for an answer; return the record of the cold start."""
    assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
    record = worker.records()[0]
    assert sum(record["phases"].values()) == pytest.approx(record["seconds"], abs=0.001)
    return record


async def stored(worker: Worker) -> None:
    """Wait until the worker, which has nothing to do, has stored a bundle."""
    await eventually(lambda: "stored in" in worker.stderr)


async def test_the_next_boot_finds_the_bundle_on_the_volume_and_a_damaged_one_is_refused_and_made_anew(
    home: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()

    def worker(name: str) -> Worker:
        (tmp_path / name).mkdir()
        return Worker(tmp_path / name, home, SNAPSHOT_VOLUME=str(volume))

    async with worker("first") as first:
        cold = await serves(first)
        assert (cold["cache"], cold["cache_because"], cold["cache_bytes"]) == ("miss", None, None)
        await stored(first)
    (path,) = (volume / "coldsnap" / "caches").iterdir()
    assert path.name == f"{cold['cache_bundle']}.bundle"
    good = path.read_bytes()
    (made,) = (home / MODELINFO).iterdir()
    before = made.read_bytes()

    shutil.rmtree(home / ".cache")
    async with worker("second") as second:
        cold = await serves(second)
        assert (cold["cache"], cold["cache_bundle"]) == ("hit", path.stem)
        assert cold["cache_bytes"] == len(good)
        assert list(cold["phases"])[:5] == ["python", "settings", "import_vllm", "verify", "cache"]
        assert "cache" in cold["beside"]
        assert made.read_bytes() == before
        assert made.stat().st_mtime < second.spawned  # unpacked, not computed again
        assert "CACHE_URI" not in second.stderr

    path.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    async with worker("third") as third:
        cold = await serves(third)
        assert cold["cache"] == "refused"
        assert cold["cache_because"] == f"its BLAKE3 digest is not that of its {len(good)} bytes"
        assert f"CACHE_URI: bundle {path.stem} in {path.parent} is refused and made anew" in third.stderr
        await stored(third)
    assert path.read_bytes() != good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]
    header = bundle.Header.parse(path.read_bytes().partition(b"\n")[0])
    assert [entry.name for entry in header.files] == [f"vllm/modelinfos/{made.name}"]
    assert bundle.unpack(path.read_bytes(), header.factors, {"vllm": tmp_path / "anywhere"}).new == 1


async def test_a_bundle_in_a_bucket_serves_the_next_worker_and_what_is_not_to_be_had_none(
    new_worker: Boot, s3_place: Place, tmp_path: Path
) -> None:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    async with new_worker(CACHE_URI=str(s3_place), **aws) as worker:
        cold = await serves(worker)
        assert cold["cache"] == "miss"
        await stored(worker)
    (found,) = Bucket(s3_place).objects()
    assert found.name == f"{cold['cache_bundle']}.bundle"
    (tmp_path / "ledger.jsonl").unlink()
    async with new_worker(CACHE_URI=str(s3_place), **aws) as worker:
        cold = await serves(worker)
        assert (cold["cache"], cold["cache_bytes"]) == ("hit", found.size)
    (tmp_path / "ledger.jsonl").unlink()
    async with new_worker(CACHE_URI=str(s3_place), **aws | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}) as worker:
        cold = await serves(worker)
        assert cold["cache"] in {"failed", "late"}
        assert worker.stderr.count("CACHE_URI") == 1


async def test_warm_makes_the_bundle_that_a_worker_finds(new_worker: Boot, home: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    async def warm() -> str:
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("coldsnap"), "warm", store,
            env=environment(home, tmp_path), stdout=asyncio.subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    said = await warm()
    (path,) = store.iterdir()
    assert said.startswith(f"{store}: {path.stem}, {path.stat().st_size} bytes stored; booted in ")
    content = path.read_bytes()
    assert f"{store}: {path.stem}, as it was: this boot had nothing to add" in await warm()
    assert path.read_bytes() == content
    async with new_worker(CACHE_URI=str(store)) as worker:
        cold = await serves(worker)
        assert (cold["cache"], cold["cache_bundle"]) == ("hit", path.stem)
