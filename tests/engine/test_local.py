"""On a terminal: one job through the SDK's local mode, as the README shows it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from .worker import CORPUS, EMOJI_ONLY, ROOT, run_handler, user, without_vllm

pytestmark = pytest.mark.asyncio(loop_scope="session")

README = (ROOT / "README.md").read_text("utf-8")


def shape(line: str) -> str:
    """Return a line without its figures, bars and rules, which differ from run to run."""
    return " ".join(re.sub(r"[0-9.]+|[█▏─]+", " ", line).split())


async def test_the_command_of_make_demo_prints_what_the_readme_shows_from_any_folder(
    home: Path, tmp_path: Path
) -> None:
    assert 'coldsnap-start --test_input "$job"' in (ROOT / "scripts" / "demo.sh").read_text("utf-8")
    job = (ROOT / "test_input.json").read_text("utf-8")
    (question,) = [message["content"] for message in json.loads(job)["input"]["messages"]]
    ended = await run_handler("--test_input", job.rstrip("\n"), home=home, cwd=tmp_path)
    assert ended.code == 0, ended
    assert ended.stdout.count(CORPUS[question]) == 2  # as it came, and in the result
    shown = README.partition("<!-- demo -->\n```text\n")[2].partition("```\n")[0]
    printed = ended.stdout[ended.stdout.index("── ") :].partition("\n── records")[0]
    rest = iter(map(shape, printed.strip().splitlines()))
    pieces = [piece.strip().splitlines() for piece in shown.split("…\n")]  # the README leaves lines out
    assert [line for piece in pieces for line in map(shape, piece) if line not in rest] == []
    assert "Traceback" not in ended.stdout + ended.stderr
    ledger = (tmp_path / "ledger" / "ledger.jsonl").read_text("utf-8").splitlines()
    assert ended.stdout.rstrip().splitlines()[-3:] == ledger
    cold_start, request, worker = map(json.loads, ledger)
    assert (cold_start["record"], request["record"], worker["record"]) == ("cold_start", "request", "worker")
    assert worker["busy_gpu_seconds"] == pytest.approx(request["gpu_seconds"], abs=1e-5)
    assert sum(cold_start["phases"].values()) == pytest.approx(cold_start["seconds"], abs=0.001)
    assert request["finish_reason"] == "stop"


async def test_the_readmes_other_question_is_answered(home: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"^\$ python handler\.py (.*)$", README, re.MULTILINE)
    arguments = shlex.split(command)
    (question,) = [message["content"] for message in json.loads(arguments[1])["input"]["messages"]]
    ended = await run_handler(*arguments, home=home, cwd=tmp_path)
    assert ended.code == 0, ended
    assert CORPUS[question] in ended.stdout
    assert f"user: {question}" in ended.stdout
    assert "async_generator" not in ended.stdout


async def test_without_the_flag_test_input_json_of_the_folder_is_run(home: Path, tmp_path: Path) -> None:
    job = {"input": {"messages": [user(EMOJI_ONLY)]}}
    (tmp_path / "test_input.json").write_text(json.dumps(job), "utf-8")
    ended = await run_handler(home=home, cwd=tmp_path)
    assert ended.code == 0, ended
    assert CORPUS[EMOJI_ONLY] in ended.stdout


async def test_a_job_that_fails_exits_1_and_says_why(home: Path, tmp_path: Path) -> None:
    job = {"input": {"messages": [{"role": "robot", "content": "hi"}]}}
    ended = await run_handler(f"--test_input={json.dumps(job)}", home=home, cwd=tmp_path)
    assert ended.code == 1
    assert "messages[0].role: expected one of" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


async def test_an_engine_that_cannot_answer_is_a_boot_that_failed_and_one_sentence(home: Path, tmp_path: Path) -> None:
    job = (ROOT / "test_input.json").read_text("utf-8").rstrip("\n")
    ended = await run_handler("--test_input", job, home=home, cwd=tmp_path, MAX_MODEL_LEN="4")
    assert ended.code == 1
    (said,) = [line for line in ended.stderr.splitlines() if line.startswith("coldsnap: ")]
    assert said.startswith("coldsnap: the engine started but cannot answer: ")
    assert "maximum context length is 4 tokens" in said
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not (tmp_path / "ledger").exists()


MALFORMED = {
    "no JSON": (["--test_input", '{"input": '], "--test_input: expected JSON"),
    "no object": (["--test_input", "[1]"], "--test_input: expected an object with the field input"),
    "no input": (["--test_input", '{"prompt": "hi"}'], "--test_input: expected an object with the field input"),
    "nothing behind the flag": (["--test_input"], "--test_input: expected the job's JSON behind it"),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_test_input_exits_1_at_once_with_one_line(home: Path, tmp_path: Path, case: str) -> None:
    arguments, words = MALFORMED[case]
    ended = await run_handler(*arguments, home=home, cwd=tmp_path, **without_vllm(tmp_path))
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"coldsnap: {words}")
    assert len(ended.stderr.splitlines()) == 1


async def test_a_malformed_test_input_json_exits_1_at_once_with_its_path(home: Path, tmp_path: Path) -> None:
    (tmp_path / "test_input.json").write_text("{'input': 1}")
    ended = await run_handler(home=home, cwd=tmp_path, **without_vllm(tmp_path))
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"coldsnap: {tmp_path}/test_input.json: expected JSON")
