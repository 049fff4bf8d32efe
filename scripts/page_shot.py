"""Photographs the page of `coldsnap serve` under load: two workers, streamed requests all the time, a chat.

    python scripts/page_shot.py [--out docs/serve.png] [--streams 30] [--seconds 20]
    python scripts/page_shot.py --page plan.html --out docs/plan.png     # a page that `coldsnap plan` or `bench` wrote

Needs Chromium (scripts/desk_tools.sh). Beside the picture, in light, it writes `-dark` and `-narrow` with --all.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image
from playwright.async_api import Browser, Page, ViewportSize, async_playwright

ROOT = Path(__file__).resolve().parent.parent
KEY = "rpa_picture"
PRICE = "0.00116"
"""An H100's: a CPU has none."""
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
Views = dict[str, tuple[ViewportSize, str]]
VIEWS: Views = {
    "": ({"width": 1440, "height": 1120}, "light"),
    "-dark": ({"width": 1440, "height": 1120}, "dark"),
    "-narrow": ({"width": 400, "height": 900}, "light"),
}
STILL: Views = {
    "": ({"width": 1000, "height": 800}, "light"),
    "-dark": ({"width": 1000, "height": 800}, "dark"),
    "-narrow": ({"width": 400, "height": 800}, "light"),
}
"""Of a page in a file."""
NICE = "10"
"""Of the endpoint: two engines on two cores leave a browser so little that its screenshot times out."""


def yield_processor(session: int) -> None:
    """Where Linux shares processors out by session first, a process's niceness counts within its own only."""
    group = Path(f"/proc/{session}/autogroup")
    if group.exists():
        group.write_text(NICE)


@asynccontextmanager
async def serving(folder: Path, *options: str) -> AsyncIterator[str]:
    """Run `coldsnap serve`; give the page's address."""
    command = ["nice", "-n", NICE, sys.executable, "-c", "import sys; from coldsnap.cli import main; sys.exit(main())"]
    command += ["serve", "--port", "0", "--key", KEY, "--state", str(folder / "serve.db"), *options]
    environ = {"PYTHONPATH": str(ROOT / "src"), "GPU_PRICE_PER_SECOND": PRICE, "COLDSNAP_LEDGER_DIR": str(folder)}
    with (folder / "serve.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stderr=log, env=os.environ | environ, start_new_session=True
        )
    yield_processor(process.pid)
    try:
        while not (found := re.search(r"page (\S+)", (folder / "serve.log").read_text())):
            assert process.returncode is None, (folder / "serve.log").read_text()
            await asyncio.sleep(0.05)
        yield found[1]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()


async def load(base: str, streams: int) -> None:
    """Ask the demo's questions in turn, so many at a time, until cancelled."""
    lines = (ROOT / "builder" / "demo_corpus.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines if line.isascii() and "\\u" not in line]  # that any font can show
    questions = itertools.cycle(pair["question"] for pair in pairs)

    async def client(http: aiohttp.ClientSession) -> None:
        while True:
            messages = [{"role": "user", "content": next(questions)}]
            async with http.post("chat/completions", json={"messages": messages, "stream": True}) as response:
                async for _ in response.content:
                    pass

    headers = {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"{base}/v2/local/openai/v1/", headers=headers, connector=connector) as http:
        await asyncio.gather(*(client(http) for _ in range(streams)))


async def cut(page: Page, size: ViewportSize) -> dict[str, Any]:
    """Return what a picture is to hold: whole rows of the table; all of a page on which they come last."""
    await page.evaluate("scrollTo(0, 0)")
    ends = await page.locator("#rows tr").evaluate_all("rows => rows.map(row => row.getBoundingClientRect().bottom)")
    whole = [end for end in ends if end <= size["height"]]
    return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": whole[-1]}} if whole else {"full_page": True}


async def still(browser: Browser, address: str, view: tuple[ViewportSize, str], height: int | None) -> bytes:
    """Open a page that does not move and return what it looks like, so much of it or all."""
    size, scheme = view
    page = await browser.new_page(
        viewport={"width": size["width"], "height": height or size["height"]},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    await page.goto(address)
    picture = await page.screenshot(full_page=height is None)
    await page.close()
    return picture


async def photograph(browser: Browser, address: str, view: tuple[ViewportSize, str], seconds: float) -> bytes:
    """Open the page, look on for a while, chat, and return what it looks like."""
    size, scheme = view
    page = await browser.new_page(viewport=size, color_scheme="dark" if scheme == "dark" else "light")
    await page.goto(address)
    await page.wait_for_selector("#rows tr")
    await page.wait_for_timeout(1000 * seconds)
    await page.fill("#message", "What is a cold start?")
    await page.press("#message", "Enter")
    await page.locator("#talk .cost", has_text="GPU-s").wait_for()
    await page.wait_for_timeout(2000)
    picture = await page.screenshot(timeout=60_000, **await cut(page, size))
    await page.close()
    return picture


def write(picture: bytes, path: Path) -> None:
    """Write the PNG as small as its colours let it be: a palette would blur those of the legends."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


@asynccontextmanager
async def under_load(streams: int) -> AsyncIterator[str]:
    """Run an endpoint that is asked all the time; give its page's address."""
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder), "--workers", "2") as address:
            traffic = asyncio.create_task(load(address.partition("/#")[0], streams))
            try:
                yield address
            finally:
                traffic.cancel()
                await asyncio.wait({traffic})


async def main(given: argparse.Namespace) -> None:
    out: Path = given.out
    browser_path = shutil.which("chromium")
    if browser_path is None:
        sys.exit("chromium is missing: scripts/desk_tools.sh")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        try:
            if given.page is not None:
                for name, view in chosen(STILL, every=given.all):
                    address = given.page.resolve(strict=True).as_uri()
                    write(await still(browser, address, view, given.height), out.with_stem(out.stem + name))
                return
            async with under_load(given.streams) as address:
                for name, view in chosen(VIEWS, every=given.all):
                    picture = await photograph(browser, address, view, given.seconds)
                    write(picture, out.with_stem(out.stem + name))
        finally:
            await browser.close()


def chosen(views: Views, *, every: bool) -> list[tuple[str, tuple[ViewportSize, str]]]:
    return list(views.items()) if every else [("", views[""])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, help="one in a file, instead")
    parser.add_argument("--height", type=int, help="of it, from the top (default: all of it)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "serve.png")
    parser.add_argument("--streams", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20.0, help="that a page is open before its picture")
    parser.add_argument("--all", action="store_true", help="also in dark and narrow")
    asyncio.run(main(parser.parse_args()))
