"""`coldsnap compare` between two servers on loopback that do what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coldsnap.cli import main
from tests.loopback.desk.test_bench import Server, status, tokens


@pytest.fixture
def sides() -> Iterator[tuple[Server, Server]]:
    sides = Server(), Server()
    yield sides
    for side in sides:
        side.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Say <aaa>", "answer": "aaa", "max_tokens": 3}\n' * 6, encoding="utf-8")
    return path


def test_two_servers_are_asked_the_same_in_turn_and_what_differs_is_said(
    sides: tuple[Server, Server], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = sides
    b.answers = [tokens(text="b")]
    page = data.with_name("page.html")
    assert main(["compare", a.url, b.url, "--data", str(data), "--rounds", "2", "--html", str(page)]) == 0
    assert a.bodies == b.bodies
    assert len(a.bodies) == 6 * 3  # a round beforehand counts for nothing
    out = capfd.readouterr().out
    assert "B is worse" in next(line for line in out.splitlines() if "answers that match" in line)
    assert "0 of 6 greedy answers are the same text." in out
    text = page.read_text("utf-8")
    assert "Say &lt;aaa&gt;" in text
    assert "<td>aaa</td><td>bbb</td>" in text


def test_native_jobs_are_compared_by_the_platforms_api(
    sides: tuple[Server, Server], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = (side.endpoint for side in sides)
    assert main(["compare", a, b, "--data", str(data), "--rounds", "1"]) == 0
    assert sides[0].bodies[0]["input"]["sampling_params"] == {"max_tokens": 3, "temperature": 0.0}
    out = capfd.readouterr().out
    cost = next(line for line in out.splitlines() if "GPU-seconds" in line)
    assert "no difference seen" in cost
    rate = next(line for line in out.splitlines() if "tokens a second" in line)
    assert "too few pairs to say" in rate
    assert "% to" not in rate  # nor is there an interval of so few
    assert "6 of 6 greedy answers are the same text." in out


def test_a_side_that_fails_is_named_and_ends_the_command_with_an_error(
    sides: tuple[Server, Server], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sides[1].answers = [status(429, "slow down")]
    assert main(["compare", *(side.url for side in sides), "--data", str(data), "--rounds", "1"]) == 1
    out = capfd.readouterr().out
    assert "B: 6 requests failed, the first with HTTP 429 Too Many Requests: slow down" in out


def test_a_key_that_is_wrong_is_said_with_its_side(
    sides: tuple[Server, Server], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *(side.url for side in sides), "--data", str(data), "--key", "sk-wrong"]) == 1
    assert capfd.readouterr().err.startswith(f"coldsnap: A: {sides[0].url.split('/')[2]}: HTTP 401")


def test_a_text_is_read_though_the_job_takes_longer_than_runsync_waits(
    sides: tuple[Server, Server], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data.write_text('{"text": "a b c"}\n' * 5, encoding="utf-8")
    told = {"token_logprobs": [None, -1.0, -1.0, 0.0], "top_logprobs": [None, {"b": -1.0}, {"c": -1.0}, {"d": 0.0}]}
    for side in sides:
        side.output = [{"choices": [{"logprobs": told}], "usage": {"prompt_tokens": 3}}]
    assert main(["compare", *(side.endpoint for side in sides), "--data", str(data)]) == 0
    perplexity = next(line for line in capfd.readouterr().out.splitlines() if "perplexity" in line)
    assert "2.72" in perplexity
    assert "no difference seen" in perplexity
