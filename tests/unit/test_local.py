"""One job on the terminal: where its input comes from, and what is shown of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from coldsnap import local
from coldsnap.boot import Booted
from coldsnap.engine import Delta, EngineInfo
from coldsnap.errors import InvalidInput, SettingsError
from coldsnap.jobs.job import Jobs
from coldsnap.records.sink import Sink
from coldsnap.settings import ROOT, Settings
from coldsnap.testing.fake_engine import Answer, FakeEngine
from coldsnap.timeline import Timeline

JOB = '{"input": {"prompt": "Hello → 日本"}}'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*argv: str, on_platform: bool = False) -> str | None:
    return local.test_input(["handler.py", *argv], on_platform=on_platform)


class TestInput:
    @pytest.mark.parametrize("argv", [["--test_input", JOB], [f"--test_input={JOB}"], ["-v", "--test_input", JOB]])
    def test_the_flag_carries_the_job(self, argv: list[str]) -> None:
        assert read(*argv) == JOB

    def test_the_flag_comes_before_the_platform_and_the_file(self, here: Path) -> None:
        (here / "test_input.json").write_text('{"input": 1}')
        assert read("--test_input", JOB, on_platform=True) == JOB

    def test_a_file_here_comes_before_the_one_beside_the_handler(self, here: Path) -> None:
        (here / "test_input.json").write_text(JOB, encoding="utf-8")
        assert read() == JOB

    def test_without_one_here_the_one_beside_the_handler_is_taken(self) -> None:
        assert read() == (ROOT / "test_input.json").read_text(encoding="utf-8")

    def test_on_the_platform_there_is_no_local_job(self, here: Path) -> None:
        (here / "test_input.json").write_text(JOB, encoding="utf-8")
        assert read(on_platform=True) is None

    def test_the_sdks_own_server_gets_its_jobs_elsewhere(self) -> None:
        assert read("--rp_serve_api") is None

    def test_no_file_anywhere_is_said_with_what_to_do(self, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
        monkeypatch.setattr(local, "ROOT", here)
        with pytest.raises(SettingsError, match=r"^test_input\.json: .*--test_input"):
            read()

    def test_a_flag_with_nothing_behind_it_is_refused(self) -> None:
        with pytest.raises(SettingsError, match=r"^--test_input: .*found nothing$"):
            read("--test_input")

    @pytest.mark.parametrize("text", ["", "{", "Hello", "'{}'", '{"input": "\\ud800"}', '{"input": "\udcff"}', "NaN"])
    def test_what_is_not_json_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(SettingsError, match=r'^--test_input: expected JSON such as {"input"'):
            read("--test_input", text)

    @pytest.mark.parametrize("text", ["{}", "[]", "null", '"input"', '["input"]', '{"prompt": "Hello"}', "1"])
    def test_json_without_input_is_refused(self, text: str) -> None:
        with pytest.raises(SettingsError) as raised:
            read("--test_input", text)
        assert raised.value.message == f"--test_input: expected an object with the field input, found {text}"

    @pytest.mark.parametrize("content", [b'{"input": "\xff"}', b"\xff\xfe{\0", b"", b'{"input": {'])
    def test_a_broken_file_is_named(self, here: Path, content: bytes) -> None:
        (here / "test_input.json").write_bytes(content)
        with pytest.raises(SettingsError) as raised:
            read()
        assert raised.value.message.startswith(f"{here / 'test_input.json'}: expected JSON")

    @pytest.mark.parametrize("argv", [["--test-input", JOB], ["--test_imput", JOB], [JOB], ["-v"]])
    def test_an_argument_that_is_none_does_not_run_another_job(self, argv: list[str]) -> None:
        with pytest.raises(SettingsError) as raised:
            read(*argv)
        assert raised.value.message.startswith(f"{argv[0]}: unknown argument; expected --test_input '{{")

    def test_a_file_that_cannot_be_read_is_named(self, here: Path) -> None:
        (here / "test_input.json").symlink_to("/proc/self/mem")  # also root cannot
        with pytest.raises(SettingsError, match=r"test_input\.json: cannot be read \(Input/output error\)$"):
            read()

    def test_what_is_wrong_inside_the_input_is_the_jobs_business(self) -> None:
        assert read("--test_input", '{"input": null}') == '{"input": null}'


async def shown(engine: FakeEngine, content: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a job as `handler.py --test_input` does and return what the terminal shows."""
    settings = Settings.read({"COLDSNAP_LEDGER_DIR": str(here / "ledger")})
    ages = iter([0.5, 2.0, 2.5])
    timeline = Timeline(lambda: next(ages))
    for phase in ("python", "import_vllm", "warm_up"):
        timeline.mark(phase)
    timeline.beside["verify"] = 0.25
    booted = Booted(engine, settings, timeline, None)
    lines: list[str] = []
    sink = Sink(settings.ledger_dir, lines.append)
    cold_start = booted.cold_start()
    sink.write(cold_start)
    view = local.View(booted)
    job = {"id": "local", "input": content}
    view.begin(job)
    jobs = Jobs(engine, settings, sink, lambda _: None)
    chunks = [view.chunk(chunk) async for chunk in jobs.handle(job)]
    view.end(chunks, cold_start, lines)
    return capsys.readouterr().out


async def test_a_stream_is_shown_with_its_result_waterfall_usage_and_records(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = EngineInfo("0.32.0", "fake GPU", 1, ("demo",), 512)
    script = [Delta("Cold "), 0.1, Delta("snap → "), 0.1, Delta("日本", finish_reason="stop")]
    messages = [{"role": "user", "content": "What is it?"}]
    text = await shown(FakeEngine(script, info=info), {"messages": messages, "stream": True}, here, capsys)
    order = [
        "demo on fake GPU, vLLM 0.32.0",
        "user: What is it?",
        "Cold snap → 日本",
        '"finish_reason": "stop"',
        "cold start: 2.50 s",
        "python",
        "import_vllm",
        "warm_up",
        "verify",
        "3 prompt tokens (0 cached), 3 completion tokens",
        "GPU-seconds on 1 x fake GPU",
        "ledger.jsonl",
        '"record":"cold_start"',
        '"record":"request"',
    ]
    positions = [text.find(part) for part in order]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert (here / "ledger" / "ledger.jsonl").read_text().splitlines() == text.splitlines()[-2:]


async def test_the_waterfalls_bars_follow_each_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = await shown(FakeEngine([Delta("x", finish_reason="stop")]), {"prompt": "a"}, here, capsys)
    rows = [line for line in text.splitlines() if "█" in line]
    bars = [(row.index("█"), row.rindex("█") + 1) for row in rows]
    begins, ends = zip(*bars, strict=True)
    assert begins[1:] == ends[:-1]
    width = ends[-1] - begins[0]
    lengths = [end - begin for begin, end in bars]
    assert lengths == pytest.approx([width * 0.2, width * 0.6, width * 0.2], abs=1)
    assert max(map(len, rows)) <= 80


async def test_a_prompt_is_shown_but_not_all_of_a_long_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = await shown(FakeEngine([Delta("x", finish_reason="stop")]), {"prompt": "a" * 10_000}, here, capsys)
    assert "prompt: " + "a" * 500 + "\n" in text


async def test_server_sent_events_are_shown_as_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = Answer((b"data: 1\n\n", 0.1, b"data: [DONE]\n\n"), content_type="text/event-stream")
    content = {"openai_route": "/v1/completions", "openai_input": {"prompt": "a", "stream": True}}
    text = await shown(FakeEngine(answers={"/v1/completions": events}), content, here, capsys)
    assert "data: 1\n\ndata: [DONE]\n\n" in text


@pytest.mark.parametrize("content", [{}, {"messages": "no list"}, {"messages": [1]}, 5, {"prompt": 3}])
async def test_a_refused_job_is_shown_with_its_error(
    content: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = await shown(FakeEngine(), content, here, capsys)
    assert InvalidInput.type in text
    assert '"error":"BadRequestError"' in text.splitlines()[-1]
    assert orjson.loads(text.splitlines()[-1])["completion_tokens"] == 0


async def test_a_reader_that_has_read_enough_ends_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.read({"COLDSNAP_LEDGER_DIR": str(here)})
    info = EngineInfo("0.32.0", "fake GPU", 1, ("demo",), 512)
    view = local.View(Booted(FakeEngine(info=info), settings, Timeline(), None))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        view.begin({"input": {"prompt": "Hello"}})
        assert view.chunk({"text": "more"}) == {"text": "more"}
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))  # noqa: PTH116 -- of a descriptor too
