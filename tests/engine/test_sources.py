"""Boots of machines without a snapshot: from a bucket over a line that fails, from the volume, from a plain copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.snapshot.manifest import MANIFEST as NAME
from coldsnap.snapshot.manifest import load_manifest, verify
from coldsnap.snapshot.push import push
from coldsnap.testing import ControlPlane, Exchange, Fault, FaultyProxy

from .conftest import Boot
from .test_lifecycle import refused
from .worker import CORPUS, EMOJI_ONLY, MANIFEST, PATIENCE, SNAPSHOT, Worker, text

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def line(s3_place: Place) -> Iterator[FaultyProxy]:
    """A line to the bucket of which every third answer fails, when it is told to."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], lambda _: None) as proxy:
        yield proxy


@pytest.fixture
def machine(line: FaultyProxy, s3_place: Place, tmp_path: Path) -> dict[str, str]:
    """The variables of a worker on an empty machine."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return aws | {
        "AWS_ENDPOINT_URL": line.url,
        "SNAPSHOT_S3_URI": str(s3_place),
        "SNAPSHOT_DIR": str(tmp_path / "image"),
        "SNAPSHOT_VOLUME": str(tmp_path / "volume"),
        "SNAPSHOT_CACHE": str(tmp_path / "local"),
        "CACHE_URI": "off",
    }


def every_third(exchange: Exchange) -> Fault | None:
    faults = (Fault(status=500), Fault(cut_after=100), Fault(status=503))
    return faults[exchange.number // 3 % 3] if exchange.number % 3 == 0 else None


async def serves(worker: Worker) -> dict[str, Any]:
    """Ask for an answer; return the record of the cold start."""
    assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
    return worker.records()[0]


async def test_an_empty_machine_boots_from_a_bucket_though_every_third_answer_fails_and_the_next_from_its_volume(
    new_worker: Boot, line: FaultyProxy, machine: dict[str, str], s3_place: Place, tmp_path: Path
) -> None:
    push(SNAPSHOT, s3_place)
    (tmp_path / "volume").mkdir()
    line.faults = every_third
    async with new_worker(**machine) as worker:
        cold = await serves(worker)
        assert "SNAPSHOT_DIR: " in worker.stderr
    folder = tmp_path / "volume" / "coldsnap" / MANIFEST.digest
    assert load_manifest(folder) == MANIFEST
    verify(folder, MANIFEST)
    assert [path.name for path in folder.parent.iterdir()] == [MANIFEST.digest]
    assert sum(each.status >= 500 for each in line.exchanges) >= 2
    assert (cold["source"], cold["verified"]) == ("s3", True)
    assert (cold["snapshot_digest"], cold["snapshot_bytes"]) == (MANIFEST.digest, MANIFEST.size)
    assert cold["fetched_bytes"] == MANIFEST.size
    speed = MANIFEST.size / cold["beside"]["fetch_snapshot"] / 1e9
    assert cold["fetch_gb_per_second"] == pytest.approx(speed, rel=0.01, abs=1e-5)
    assert (cold["read_gb_per_second"], cold["disk_read_bytes"]) == (None, None)  # hashed as it came
    assert list(cold["phases"])[:4] == ["python", "settings", "import_vllm", "fetch"]
    assert sum(cold["phases"].values()) == pytest.approx(cold["seconds"], abs=0.001)
    before = line.fetched("/blobs/")
    (tmp_path / "ledger.jsonl").unlink()
    async with new_worker(**machine) as worker:
        cold = await serves(worker)
    assert (cold["source"], cold["verified"], cold["fetched_bytes"]) == ("volume", True, 0)
    assert {"find_snapshot", "read_snapshot"} <= cold["beside"].keys()
    assert cold["read_gb_per_second"] >= MANIFEST.size / (cold["beside"]["read_snapshot"] + 0.001) / 1e9
    assert line.fetched("/blobs/") == before


async def test_a_model_that_the_platform_has_cached_is_served_and_said_to_be_unverified(
    new_worker: Boot, tmp_path: Path
) -> None:
    hub = tmp_path / "volume" / "huggingface-cache" / "hub" / "models--org--model"
    commit = Path(shutil.copytree(SNAPSHOT, hub / "snapshots" / ("a" * 40)))
    (commit / NAME).unlink()
    environ = {"MODEL_NAME": "Org/Model", "SNAPSHOT_VOLUME": str(tmp_path / "volume")}
    async with new_worker(**environ) as worker:
        assert text(await worker.ask(EMOJI_ONLY, model="Org/Model").result(PATIENCE)).startswith(CORPUS[EMOJI_ONLY])
        cold = worker.records()[0]
    assert (cold["source"], cold["verified"], cold["model"]) == ("platform-cache", False, "Org/Model")
    assert (cold["snapshot_digest"], cold["snapshot_bytes"], cold["fetched_bytes"]) == (None, None, 0)


async def test_a_corrupt_object_or_an_empty_bucket_ends_the_boot_with_one_line(
    plane: ControlPlane, home: Path, machine: dict[str, str], s3_place: Place, tmp_path: Path
) -> None:
    del machine["SNAPSHOT_DIR"]
    empty = await refused(plane, home, tmp_path, **machine)
    assert f"SNAPSHOT_S3_URI: {s3_place} holds no coldsnap.json" in empty.stderr
    push(SNAPSHOT, s3_place)
    Bucket(s3_place).put(f"blobs/{MANIFEST.files['model.safetensors'].blake3}", os.urandom(4_000_000))
    corrupt = await refused(plane, home, tmp_path, **machine)
    assert "model.safetensors" in corrupt.stderr or "/blobs/" in corrupt.stderr
    assert not (tmp_path / "local" / MANIFEST.digest).exists()
