"""Workers restored from a process image, and what a boot does whose image does not fit."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .worker import BOOT_SECONDS, CORPUS, Ended, environment, kill_group, scratch
from .worker import ROOT as CLONE

PROGRAMS = CLONE / "build" / "image"
QUESTION = "What is a cold start?"
JOB = json.dumps({"input": {"messages": [{"role": "user", "content": QUESTION}]}})

pytestmark = pytest.mark.skipif(not (PROGRAMS / "restore").exists(), reason="there was no C compiler")


@dataclass(frozen=True)
class Image:
    """An image of the worker for the home of these tests."""

    file: Path
    home: Path

    async def run(self, folder: Path, *, mode: str = "auto", **environ: str) -> tuple[Ended, dict[str, Any] | None]:
        """Run one job on it; return how that ended, and the record of the cold start if there was one."""
        command = [PROGRAMS / "restore", mode, self.file, sys.executable, CLONE / "handler.py", "--test_input", JOB]
        with scratch() as temporary:
            process = await asyncio.create_subprocess_exec(
                *command, env=environment(self.home, folder, TMPDIR=str(temporary), **environ), process_group=0,
                stdin=subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                async with asyncio.timeout(BOOT_SECONDS):
                    out, err = await process.communicate()
            finally:
                kill_group(process.pid)
        assert process.returncode is not None
        ledger = folder / "ledger.jsonl"
        records = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        boots = [record for record in records if record["record"] == "cold_start"]
        return Ended(process.returncode, out.decode(), err.decode()), boots[0] if boots else None


@pytest.fixture(scope="module")
def image(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    file = tmp_path_factory.mktemp("image") / "worker.image"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from coldsnap import make_image;"
        "sys.exit(make_image.command(sys.argv[2:]))"
    )
    environ = environment(home, file.parent, SNAPSHOT_S3_SECRET="secret-of-this-worker", RUNPOD_AI_API_KEY="rpa_secret")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(CLONE / "src"), str(file)],
        env=environ, check=False, capture_output=True, text=True, timeout=BOOT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Image(file, home)


async def test_a_restored_worker_answers_and_says_that_it_was_restored(image: Image, tmp_path: Path) -> None:
    ended, boot = await image.run(tmp_path, mode="require", RUNPOD_POD_ID="pod-of-this-boot")
    assert ended.code == 0, ended.stderr
    assert CORPUS[QUESTION] in ended.stdout
    assert boot is not None
    assert (boot["image"], boot["image_because"]) == ("restored", None)
    assert boot["worker_id"] == "pod-of-this-boot"
    assert [*boot["phases"]][:4] == ["restore", "take_over", "settings", "import_vllm"]
    assert sum(boot["phases"].values()) == pytest.approx(boot["seconds"], abs=1e-3)


def test_no_secret_of_the_worker_that_made_it_is_in_an_image(image: Image) -> None:
    content = image.file.read_bytes()
    assert b"VLLM_NO_USAGE_STATS" in content
    assert b"rpa_secret" not in content
    assert b"secret-of-this-worker" not in content


async def test_a_worker_in_another_environment_boots_plainly(image: Image, tmp_path: Path) -> None:
    because = "TORCHDYNAMO_VERBOSE is '1', the image was made with not set"
    ended, boot = await image.run(tmp_path, TORCHDYNAMO_VERBOSE="1")
    assert ended.code == 0, ended.stderr
    assert CORPUS[QUESTION] in ended.stdout
    assert f"coldsnap: process image: {because}; booting plainly\n" in ended.stderr
    assert boot is not None
    assert (boot["image"], boot["image_because"]) == ("plain", because)


async def test_a_worker_that_must_be_restored_and_cannot_be_ends(image: Image, tmp_path: Path) -> None:
    ended, boot = await image.run(tmp_path, mode="require", PROCESS_IMAGE="require", TORCHDYNAMO_VERBOSE="1")
    assert (ended.code, boot) == (1, None)
    assert ended.stderr == (
        "coldsnap: PROCESS_IMAGE=require: TORCHDYNAMO_VERBOSE is '1', the image was made with not set\n"
    )
