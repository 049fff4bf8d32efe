"""Tests with programs that are not Python's, such as a browser. `make desk-check` installs them and runs these."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright
from tests.engine.worker import environment
from tests.loopback.desk.serving import Serve

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty home folder; the first boot fills vLLM's caches there."""
    return tmp_path_factory.mktemp("home")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def serve(tmp_path_factory: pytest.TempPathFactory, home: Path) -> AsyncIterator[Serve]:
    """Run an endpoint with one worker on the real engine, at a price."""
    folder = tmp_path_factory.mktemp("serve")
    environ = environment(home, folder / "ledger", GPU_PRICE_PER_SECOND="0.001")
    async with Serve(folder, environ=environ) as serve:
        await serve.says("worker-1 takes jobs")
        yield serve


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "no chromium: scripts/desk_tools.sh"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()
