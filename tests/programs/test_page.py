"""The live page in a browser, in front of `coldsnap serve` with real workers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Request, expect
from tests.engine.worker import CORPUS, MODEL, STEADY, environment, user
from tests.loopback.desk.serving import KEY, Serve

from coldsnap.desk.report import notation

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
expect.set_options(timeout=60_000)
WRONG = "rpa_of_another_endpoint"
SEEN = """
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const answers = document.querySelectorAll("#talk div > p:nth-child(2)");
  if (answers.length) seen(answers[answers.length - 1].textContent);
}).observe(document.getElementById("talk"), { subtree: true, childList: true, characterData: true }));
"""
"""Reports every text that an answer of the chat has had."""

Open = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: Browser) -> AsyncIterator[Open]:
    """Open a page as a user does; at the end it must have had no error and have asked nobody but its endpoint."""
    async with AsyncExitStack() as stack:
        asked: list[Request] = []
        errors: list[str] = []
        origins: set[str] = set()

        async def opened(serve: Serve, fragment: str = f"#key={KEY}", *, script: str = "", **context: Any) -> Page:
            origin = serve.base.removesuffix("/v2")
            origins.add(origin)
            own = await browser.new_context(**context)
            stack.push_async_callback(own.close)
            page = await own.new_page()
            page.on("request", lambda request: asked.append(request))  # noqa: PLW0108 -- it takes no built-in
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda said: errors.append(said.text) if "Policy" in said.text else None)
            seen: list[str] = []
            page.seen = seen  # type: ignore[attr-defined]
            if script:
                await page.expose_function("seen", lambda text: seen.append(text))  # noqa: PLW0108 -- as above
                await page.add_init_script(script)
            await page.goto(f"{origin}/{fragment}")
            return page

        yield opened
        assert errors == []
        for request in asked:
            assert request.url.startswith((*origins, "data:")), request.url
            assert KEY not in request.url
            assert "referer" not in request.headers or KEY not in request.headers["referer"]


async def steady(serve: Serve, count: int, characters: int) -> list[str]:
    """Submit jobs that stream one letter for a while."""
    params = STEADY | {"max_tokens": characters}
    job_input = {"messages": [user("Repeat yourself")], "sampling_params": params, "stream": True}
    return [await serve.run(job_input) for _ in range(count)]


async def test_a_worker_its_cold_start_and_what_it_costs_are_on_the_page(serve: Serve, open_page: Open) -> None:
    page = await open_page(serve)
    await expect(page.locator("#said")).to_have_text(re.compile(r"live, up \d+ "))
    await expect(page.locator("#about")).to_have_text(re.compile(rf"{MODEL} on cpu, vLLM \d"))
    worker = page.locator(".worker", has_text="worker-1")
    await expect(worker).to_contain_text("idle for")
    waterfall = worker.locator(".waterfall")
    for phase in ("python", "import_vllm", "engine"):
        await expect(waterfall).to_contain_text(phase)
    record = json.loads(next(line for line in log(serve, 1).splitlines() if '"cold_start"' in line))
    await expect(worker).to_contain_text(f"cold start {notation.digits(record['seconds'])} s")
    await expect(waterfall).to_contain_text(f"{record['phases']['import_vllm']:.2f} s")
    first = await waterfall.locator("div i").first.bounding_box()
    last = await waterfall.locator("div i").last.bounding_box()
    assert first
    assert last
    assert first["x"] + first["width"] <= last["x"] + 1  # one after the other
    await expect(page.locator("#usd")).to_have_text(re.compile(r"^\$0\.\d+$"))
    await expect(page.locator("#price")).to_have_text(re.compile(r"^\d+ s at \$0\.00100$"))
    await expect(page.locator("#legend")).to_have_text(re.compile(r"cold [\d.]+busy [\d.]+overhead .*idle .*drain"))


async def test_a_message_is_answered_as_a_stream(serve: Serve, open_page: Open) -> None:
    page = await open_page(serve, script=SEEN)
    await page.fill("#message", QUESTION)
    await page.press("#message", "Enter")
    await expect(page.locator("#talk .asked")).to_have_text(QUESTION)
    await expect(page.locator("#talk p").nth(1)).to_have_text(CORPUS[QUESTION])
    texts = list(dict.fromkeys(page.seen))  # type: ignore[attr-defined]
    assert len(texts) > 3
    assert all(CORPUS[QUESTION].startswith(each) for each in texts)
    facts = r"first.token.after.* · \d+.tokens.in.* · [\d.]+.GPU-s · \$0\.0"  # they break only between
    await expect(page.locator("#talk .cost")).to_have_text(re.compile(facts))
    row = page.locator("#rows tr").first
    await expect(row).to_contain_text(QUESTION)
    await expect(row.locator("td.itl")).to_have_text(re.compile(r"\d m?s|\d µs"))
    await expect(page.locator("#ttft")).to_have_text(re.compile(r"\d m?s"))


async def test_running_requests_grow_and_a_hundred_of_them_are_a_few_rows(serve: Serve, open_page: Open) -> None:
    page = await open_page(serve)
    jobs = await steady(serve, 100, 1500)
    await expect(page.locator("#running")).to_have_text("100")
    await expect(page.locator("#hidden")).to_have_text(re.compile(r"82 more running"))
    assert await page.locator("#rows tr").count() <= 32
    row = page.locator("#rows tr", has=page.locator(".dot.IN_PROGRESS")).first
    await row.click()
    more = page.locator("#rows tr.more")
    lengths = list[int]()
    while len(set(lengths)) < 4:
        (length,) = re.findall(r"([\d,]+) characters", await more.inner_text())
        lengths.append(int(length.replace(",", "")))
        await asyncio.sleep(0.1)
    assert lengths == sorted(lengths)
    await expect(page.locator("#said")).to_have_text(re.compile(r"live, up"))
    for job in jobs:
        await serve.post(f"cancel/{job}")
    await expect(page.locator("#running")).to_have_text("0")
    await expect(page.locator("#done")).to_contain_text("cancelled")
    await expect(page.locator("#rows .dot.CANCELLED").first).to_be_visible()


async def test_a_model_s_or_a_client_s_text_is_no_markup(serve: Serve, open_page: Open) -> None:
    page = await open_page(serve)
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    await serve.ended(await serve.run({"prompt": hostile, "sampling_params": {"max_tokens": 4}}))
    await expect(page.locator("#rows td.question").first).to_have_text(hostile)
    await page.fill("#message", hostile)
    await page.press("#message", "Enter")
    await expect(page.locator("#talk .asked")).to_have_text(hostile)
    await expect(page.locator("#send")).to_have_text("Send")
    assert await page.locator("#live img, #live script, #live td b").count() == 0


async def test_an_error_of_the_endpoint_is_shown_in_the_chat(serve: Serve, open_page: Open) -> None:
    page = await open_page(serve)
    await page.fill("#message", "long " * 40_000)
    await page.click("#send")
    await expect(page.locator("#talk .bad")).to_contain_text(re.compile(r"4096|too long"))


async def test_the_key_is_asked_for_and_a_wrong_one_is_told(serve: Serve, open_page: Open) -> None:
    page = await open_page(serve, fragment="")
    await expect(page.locator("#why")).to_have_text("This page needs the endpoint’s key")
    await expect(page.locator("#live")).to_be_hidden()
    await page.fill("#given", WRONG)
    await page.press("#given", "Enter")
    await expect(page.locator("#why")).to_have_text("That is not this endpoint’s key")
    await expect(page.locator("#what")).to_contain_text("coldsnap serve prints a line")
    await page.fill("#given", KEY)
    await page.press("#given", "Enter")
    await expect(page.locator("#live")).to_be_visible()
    await page.reload()
    await expect(page.locator("#live")).to_be_visible()
    wrong = await open_page(serve, fragment=f"#key={WRONG}")
    await expect(wrong.locator("#why")).to_have_text("That is not this endpoint’s key")
    await expect(wrong.locator("#said")).to_have_text("wrong key")
    assert WRONG not in wrong.url


async def test_the_link_s_key_leaves_the_address_and_goes_into_one_header(serve: Serve, open_page: Open) -> None:
    address = re.search(r"page http://[^/]+/(\S+)", serve.log)
    assert address
    page = await open_page(serve, fragment=address[1])
    async with page.expect_request("**/live") as request:
        await page.reload()
    assert (await (await request.value).all_headers())["authorization"] == f"Bearer {KEY}"
    await expect(page.locator("#live")).to_be_visible()
    assert KEY not in page.url


@pytest.mark.parametrize(("scheme", "paper"), [("light", (255, 255, 255)), ("dark", (21, 24, 27))])
@pytest.mark.parametrize("width", [1440, 1000, 360])
async def test_it_is_readable_in_both_schemes_and_at_any_width(
    serve: Serve, open_page: Open, scheme: str, paper: tuple[int, int, int], width: int
) -> None:
    page = await open_page(serve, color_scheme=scheme, viewport={"width": width, "height": 900})
    await expect(page.locator(".waterfall")).to_be_visible()
    assert await colour(page, "body", "background-color") == paper
    for selector in ("body", "#about", "#done", "#fleet .facts", "#legend", "#rule"):
        assert contrast(await colour(page, selector, "color"), paper) >= 4.5, selector
    assert await page.locator("html").evaluate("element => element.scrollWidth") <= width
    for box in ("#figures", "#workers", "#chat", "#requests"):
        place = await page.locator(box).bounding_box()
        assert place
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= width


async def colour(page: Page, selector: str, name: str) -> tuple[int, ...]:
    script = "(element, name) => getComputedStyle(element).getPropertyValue(name)"
    found = await page.locator(selector).first.evaluate(script, name)
    return tuple(map(int, re.findall(r"\d+", found)[:3]))


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Return the contrast of two colours as WCAG 2 has it."""

    def luminance(of: tuple[int, ...]) -> float:
        linear = [c / 12.92 if (c := value / 255) <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for value in of]
        return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


async def test_it_stays_up_when_a_worker_dies_and_when_serve_starts_again(
    tmp_path: Path, home: Path, open_page: Open
) -> None:
    environ = environment(home, tmp_path / "ledger")
    async with Serve(tmp_path, environ=environ) as serve:
        page = await open_page(serve)
        await expect(page.locator(".worker")).to_contain_text("initialising")
        await page.fill("#message", QUESTION)
        await page.click("#send")
        await expect(page.locator("#queued")).to_have_text("1")
        await expect(page.locator("#rows .dot.IN_QUEUE")).to_be_visible()
        await expect(page.locator("#send")).to_have_text("Stop")
        await page.click("#send")
        await expect(page.locator("#talk")).to_contain_text("stopped")
        await expect(page.locator("#queued")).to_have_text("0")
        await expect(page.locator("#done")).to_contain_text("1 cancelled")
        await expect(page.locator(".worker .waterfall")).to_contain_text("import_vllm", timeout=180_000)
        await expect(page.locator("#legend")).to_contain_text("set GPU_PRICE_PER_SECOND to have costs in dollars")
        await expect(page.locator("#usd")).to_have_text("–")
        (job,) = await steady(serve, 1, 1500)
        await expect(page.locator(".worker")).to_contain_text("running 1 job")
        os.kill(serve.workers[0], signal.SIGKILL)
        await expect(page.locator(".worker", has_text="was ended by SIGKILL")).to_contain_text("worker-1")
        await expect(page.locator(".worker", has_text="worker-2")).to_contain_text("running 1 job", timeout=180_000)
        await expect(page.locator("#said")).to_have_text(re.compile("live"))
        await serve.post(f"cancel/{job}")
        await serve.end()
        await expect(page.locator("#said")).to_have_text(re.compile("trying again"))
        port = serve.base.split(":")[2].removesuffix("/v2")
        async with Serve(tmp_path, "--port", port, "--workers", "0", "--max-workers", "1", environ=environ):
            await expect(page.locator("#said")).to_have_text(re.compile("live"))
            await expect(page.locator("#news")).to_contain_text("was started again")
            await expect(page.locator(".worker")).to_have_count(0)


def log(serve: Serve, worker: int) -> str:
    return (serve.state.parent / "workers" / f"worker-{worker}.log").read_text("utf-8")
