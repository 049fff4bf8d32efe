"""A worker that is not fit to serve tells the platform so, as the SDK does."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from coldsnap.settings import ROOT
from coldsnap.testing import ControlPlane, WorkerUnhealthy

CODE = "from coldsnap import worker, errors; worker._report_unhealthy(errors.Unfit('disk', 'it is full'))"


UNKNOWN = f"from coldsnap import patches; patches.KNOWN = {{'runpod': ()}}; {CODE}"


async def test_an_unknown_sdk_is_not_reached_into_and_that_is_said() -> None:
    async with ControlPlane() as plane:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")} | plane.environment()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", UNKNOWN, env=environ, stderr=asyncio.subprocess.PIPE
        )
        _, stderr = await process.communicate()
        assert process.returncode == 0
        assert stderr.decode().endswith("the platform learns from the exit code alone that this worker is unfit\n")
        assert [worker.unhealthy for worker in plane.workers.values() if worker.unhealthy] == []


async def test_the_platform_hears_which_check_failed_and_why() -> None:
    async with ControlPlane() as plane:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")} | plane.environment()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", CODE, env=environ)
        assert await process.wait() == 0
        with pytest.raises(WorkerUnhealthy, match=r"^worker-1: disk: it is full$"):
            await plane.wait_for_worker(60)
