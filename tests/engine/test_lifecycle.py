"""A worker's beginning and end: SIGTERM, a dead engine, a damaged snapshot, wrong settings, no network."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldsnap.snapshot.manifest import Quantization, Source, write_manifest
from coldsnap.testing import ControlPlane, Job, JobFailed, JobState

from .conftest import Boot
from .worker import (
    BOOT_SECONDS,
    CORPUS,
    EMOJI_ONLY,
    LONG,
    MANIFEST,
    MODEL,
    PATIENCE,
    ROOT,
    SNAPSHOT,
    STEADY,
    Ended,
    engine,
    environment,
    eventually,
    group,
    kill_group,
    run_handler,
    scratch,
    text,
    user,
    without_vllm,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
DEAD = '"type":"EngineDeadError"'
PATIENT_DRAIN = str(10 * PATIENCE)
"""DRAIN_SECONDS of a worker whose end must not wait for them: a test gives up before."""


async def test_sigterm_lets_running_and_late_jobs_end_and_exits_0_without_ever_asking_the_network(
    new_worker: Boot,
) -> None:
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(200))
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    proxies = {name: address for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())}
    environ = {"HF_ENDPOINT": address, "MAX_MODEL_LENGTH": "64", "VLLM_API_KEY": "k", "DRAIN_SECONDS": PATIENT_DRAIN}
    async with server, new_worker(**proxies, **environ) as worker:
        assert "MAX_MODEL_LENGTH is not a setting" in worker.stderr
        assert "did you mean MAX_MODEL_LEN?" in worker.stderr
        steady = STEADY | {"max_tokens": 1000}
        native = worker.ask(QUESTION, sampling_params=steady)
        chat = worker.openai("/v1/chat/completions", {"messages": [user(QUESTION)], "stream": True, **steady})
        await asyncio.gather(native.started(PATIENCE), chat.started(PATIENCE))
        worker.process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        await asyncio.sleep(0.1)
        late = worker.ask(EMOJI_ONLY)  # the open job-take delivers it
        assert text(await late.result(PATIENCE)) == CORPUS[EMOJI_ONLY]
        chunks = await native.result(PATIENCE)
        assert chunks[-1]["finish_reason"] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == 1000
        assert (await chat.result(PATIENCE))[-1].endswith("data: [DONE]\n\n")
        assert min(native.timestamps.chunks[-1], chat.timestamps.chunks[-1]) > stopped  # they did run on
        assert await worker.ended() == 0  # and long before DRAIN_SECONDS are over
        assert "Traceback" not in worker.stderr + worker.stdout
        assert worker.plane.violations == []
    assert asked == []


async def test_a_job_that_outlasts_drain_seconds_ends_with_an_error_that_names_it_and_exit_code_0(
    new_worker: Boot,
) -> None:
    async with new_worker(DRAIN_SECONDS="1", COLDSNAP_LEDGER_DIR="/proc/nowhere") as worker:
        body = {"prompt": QUESTION, **STEADY}
        shapes = [
            worker.ask(QUESTION, sampling_params=STEADY | {"n": 8, "temperature": 1}),
            worker.ask(QUESTION, stream=False, sampling_params=STEADY | {"n": 8, "temperature": 1}),
            worker.openai("/v1/completions", body | {"n": 8, "temperature": 1, "stream": True}),
        ]
        await asyncio.gather(shapes[0].started(PATIENCE), shapes[2].started(PATIENCE))
        worker.process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        for job in shapes:
            with pytest.raises(JobFailed, match="DRAIN_SECONDS=1") as caught:
                await job.result(PATIENCE)
            assert '"type":"ServiceUnavailableError"' in caught.value.error
            assert '"code":503' in caught.value.error
            assert job.timestamps.done is not None
            assert job.timestamps.done - stopped > 0.9
        assert await worker.ended() == 0
        assert worker.plane.violations == []
        # A ledger that cannot be written is said once; the records are on stdout.
        assert worker.stderr.count("COLDSNAP_LEDGER_DIR: /proc/nowhere/ledger.jsonl cannot be written") == 1
        assert worker.stdout.count('"error":"ServiceUnavailableError"') == 3
        tokens = [
            int(found) for found in re.findall(r'"completion_tokens":(\d+).*ServiceUnavailableError', worker.stdout)
        ]
        assert 0 < max(tokens) < 8 * LONG  # cut short


async def read(job: Job) -> None:
    """Read a first chunk: the job cannot start again unnoticed."""
    async for _ in job.stream():
        return


async def test_a_killed_engine_fails_the_jobs_that_were_read_leaves_the_others_and_ends_the_worker_with_1(
    new_worker: Boot,
) -> None:
    async with new_worker(DRAIN_SECONDS=PATIENT_DRAIN) as worker:
        body = {"prompt": QUESTION, **STEADY}
        jobs = [
            worker.ask(QUESTION, sampling_params=STEADY),
            worker.ask(QUESTION, stream=False, sampling_params=STEADY),
            worker.openai("/v1/completions", body | {"stream": True}),
            worker.openai("/v1/completions", body),
        ]
        streams = jobs[::2]
        await asyncio.gather(*(read(job) for job in streams))
        (core,) = worker.engine("EngineCor")
        os.kill(core, signal.SIGSTOP)
        prompt = worker.ask(QUESTION)  # not computed any more
        await eventually(lambda: prompt.state is JobState.IN_PROGRESS)
        os.kill(core, signal.SIGKILL)
        for job in streams:
            with pytest.raises(JobFailed) as caught:
                await job.result(PATIENCE)
            assert DEAD in caught.value.error, caught.value.error
        assert not any("[DONE]" in chunk for chunk in streams[1].chunks)
        assert await worker.ended() == 1
        worker.plane.lose("worker-1", "it died")  # as `serve` does when the process has ended
        assert [(job.state, job.attempts) for job in (*jobs[1::2], prompt)] == [(JobState.IN_QUEUE, 1)] * 3
        assert worker.stderr.count("coldsnap: the engine process is gone; the worker ends") == 1
        requests = [record for record in worker.records() if record["record"] == "request"]
        assert [record["error"] for record in requests] == ["EngineDeadError"] * 5
        assert worker.plane.violations == []


async def test_a_stopped_engine_fails_its_jobs_as_stalled_and_ends_the_worker_with_1(new_worker: Boot) -> None:
    async with new_worker(ENGINE_STALL_SECONDS="3", DRAIN_SECONDS=PATIENT_DRAIN) as worker:
        assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
        await asyncio.sleep(4)  # an idle engine makes no step either
        jobs = [
            worker.ask(QUESTION, sampling_params=STEADY),
            worker.openai("/v1/completions", {"prompt": QUESTION, **STEADY, "stream": True}),
        ]
        await asyncio.gather(*(read(job) for job in jobs))
        (core,) = worker.engine("EngineCor")
        os.kill(core, signal.SIGSTOP)
        prompt = worker.ask(QUESTION)  # not computed any more
        for job in jobs:
            with pytest.raises(JobFailed, match="no step for ENGINE_STALL_SECONDS=3") as caught:
                await job.result(PATIENCE)
            assert '"type":"EngineStalledError"' in caught.value.error
            assert '"code":503' in caught.value.error
        assert await worker.ended() == 1
        worker.plane.lose("worker-1", "it died")  # as `serve` does when the process has ended
        assert (prompt.state, prompt.attempts) == (JobState.IN_QUEUE, 1)
        assert "ENGINE_STALL_SECONDS=3; this worker ends" in worker.stderr
        assert worker.plane.violations == []


async def test_sigterm_ends_a_worker_whose_engine_is_stopped(new_worker: Boot) -> None:
    async with new_worker(DRAIN_SECONDS="1") as worker:
        job = worker.ask(QUESTION, sampling_params=STEADY)
        await job.started(PATIENCE)
        for child in worker.engine(""):
            os.kill(child, signal.SIGSTOP)
        worker.process.send_signal(signal.SIGTERM)
        with pytest.raises(JobFailed, match="DRAIN_SECONDS=1"):
            await job.result(PATIENCE)
        assert await worker.ended() == 0


async def test_a_worker_that_is_killed_takes_its_engine_with_it(new_worker: Boot) -> None:
    async with new_worker() as worker:
        await worker.ask(QUESTION, sampling_params=STEADY).started(PATIENCE)
        assert len(worker.engine("")) == 2
        os.kill(worker.engine("EngineCor")[0], signal.SIGSTOP)  # nor does it matter what the engine is at
        os.kill(worker.process.pid, signal.SIGKILL)
        await eventually(lambda: not group(worker.process.pid))


async def test_a_worker_whose_engine_dies_while_idle_takes_no_more_jobs_and_ends_with_1(new_worker: Boot) -> None:
    async with new_worker(DRAIN_SECONDS=PATIENT_DRAIN) as worker:
        assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
        (child,) = worker.engine("Worker")
        os.kill(child, signal.SIGKILL)
        assert await worker.ended() == 1
        assert "coldsnap: the engine process is gone; the worker ends" in worker.stderr
        assert worker.plane.violations == []


@pytest.mark.parametrize("sight", ["Starting Serverless Worker", "prompt: "])
async def test_an_engine_that_dies_before_or_during_the_job_of_a_terminal_ends_it_with_1(
    home: Path, tmp_path: Path, sight: str
) -> None:
    job = {"input": {"prompt": QUESTION, "sampling_params": STEADY}}
    stdout = tmp_path / "stdout"
    with scratch() as temporary, stdout.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, ROOT / "handler.py", "--test_input", json.dumps(job), cwd=tmp_path,
            env=environment(home, tmp_path / "ledger", TMPDIR=str(temporary)),
            stdout=out, stderr=out, process_group=0,
        )  # fmt: skip
        try:
            await eventually(lambda: sight in stdout.read_text("utf-8", "replace"), BOOT_SECONDS)
            (core,) = engine(process.pid, "EngineCor")
            os.kill(core, signal.SIGKILL)
            async with asyncio.timeout(BOOT_SECONDS):
                assert await process.wait() == 1
        finally:
            kill_group(process.pid)
    said = stdout.read_text("utf-8", "replace")
    assert "EngineDeadError" in said or "the engine started but cannot answer" in said


# Boots that are cut short, or fail.


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_a_signal_while_the_engine_starts_ends_the_boot_at_once_without_a_word(
    home: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    with scratch() as temporary:
        process = await asyncio.create_subprocess_exec(
            sys.executable, ROOT / "handler.py", "--test_input", '{"input": {"prompt": "hi"}}', cwd=tmp_path,
            env=environment(home, tmp_path / "ledger", TMPDIR=str(temporary)),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, process_group=0,
        )  # fmt: skip
        await eventually(lambda: bool(list(temporary.glob("coldsnap-*"))), BOOT_SECONDS)  # the engine's pipe
        if signum == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, signum)  # as a terminal does
        async with asyncio.timeout(BOOT_SECONDS):
            out, err = await process.communicate()
        assert (process.returncode, out, err) == (-signum if signum == signal.SIGKILL else 128 + signum, b"", b"")
        await eventually(lambda: not group(process.pid))
        if signum == signal.SIGKILL:
            return  # its files are removed by the next boot
        left = [path.name for path in temporary.iterdir() if not path.is_dir()]
        assert [
            name for name in left if not name.startswith("vllm_dist_")
        ] == []  # that one is vLLM's, and unnamed to us


async def refused(plane: ControlPlane, home: Path, cwd: Path, **environ: str) -> Ended:
    """Run a worker that must not come up: exit code 1, one line on stderr, no job asked for."""
    ended = await run_handler(home=home, cwd=cwd, **plane.environment("refused"), **environ)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.stdout + ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.endswith("; booting plainly")]  # `make test-image`
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("coldsnap: ")
    assert '"record"' not in ended.stdout
    assert not (cwd / "ledger").exists()
    assert "refused" not in plane.workers
    return ended


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SNAPSHOT, tmp_path / "snapshot"))


async def test_one_flipped_byte_of_the_weights_ends_the_boot_and_nothing_is_served(
    plane: ControlPlane, home: Path, tmp_path: Path, snapshot: Path
) -> None:
    weights = snapshot / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    ended = await refused(plane, home, tmp_path, SNAPSHOT_DIR=str(snapshot))
    assert "model.safetensors: expected BLAKE3" in ended.stderr
    assert MANIFEST.files["model.safetensors"].blake3 in ended.stderr


async def test_a_flipped_byte_in_weights_that_are_checked_beside_the_engine_ends_the_boot_too(
    plane: ControlPlane, home: Path, tmp_path: Path, snapshot: Path
) -> None:
    index = {"weight_map": {"any": "model.safetensors"}}  # the other file is of the snapshot, and not the engine's
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    large = snapshot / "other.safetensors"
    large.touch()
    os.truncate(large, (2 << 30) + 1)  # takes nothing of the disk
    manifest = write_manifest(
        snapshot,
        source=Source(),
        quantization=Quantization(),
        served_model_name=MODEL,
        engine_args=MANIFEST.engine_args,
        versions={},
    )
    with large.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    ended = await refused(plane, home, tmp_path, SNAPSHOT_DIR=str(snapshot))
    expected = manifest.files["other.safetensors"].blake3
    assert re.search(rf"other\.safetensors: expected BLAKE3 {expected}, found [0-9a-f]{{64}}$", ended.stderr.strip())


async def test_an_engine_that_does_not_start_says_why(plane: ControlPlane, home: Path, tmp_path: Path) -> None:
    ended = await run_handler(home=home, cwd=tmp_path, KV_CACHE_MEMORY_BYTES="1000", **plane.environment("unstarted"))
    assert ended.code == 1
    *_, last = ended.stderr.splitlines()  # before it, vLLM's own report
    assert last.startswith("coldsnap: No available memory for the cache blocks. ")


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = path.read_text("utf-8")
        assert old in content
        path.write_text(content.replace(old, new), "utf-8")

    return edit


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: expected a file"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 100), "model.safetensors: expected"),
    "grown": (lambda folder: (folder / "config.json").open("a").write(" "), "config.json: expected"),
    "extra": (lambda folder: (folder / "extra.py").write_text("import os"), "extra.py: expected no such file"),
    "a link outside": (lambda folder: (folder / "passwd").symlink_to("/etc/passwd"), "passwd: expected no such"),
    "no manifest": (lambda folder: (folder / "coldsnap.json").unlink(), "coldsnap.json cannot be read"),
    "no JSON": (lambda folder: (folder / "coldsnap.json").write_text("{"), "coldsnap.json is not JSON"),
    "newer": (_edit("coldsnap.json", '"schema_version": 1', '"schema_version": 2'), "needs a newer coldsnap"),
    "a wrong name": (_edit("coldsnap.json", '"served_model_name"', '"served_name"'), "served_model_name"),
    "no folder": (shutil.rmtree, "coldsnap.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_damaged_snapshot_ends_the_boot_with_one_line_that_names_the_file(
    plane: ControlPlane, home: Path, tmp_path: Path, snapshot: Path, fault: str
) -> None:
    damage, words = FAULTS[fault]
    damage(snapshot)
    ended = await refused(plane, home, tmp_path, SNAPSHOT_DIR=str(snapshot), **without_vllm(tmp_path))
    assert words in ended.stderr
    assert str(snapshot) in ended.stderr


EARLY = {
    "MAX_CONCURRENCY": ("0", "MAX_CONCURRENCY: .*greater than or equal to 1, found '0'"),
    "CHUNK_INTERVAL_MS": ("soon", "CHUNK_INTERVAL_MS: .*valid number.*'soon'"),
    "DRAIN_SECONDS": ("-1", "DRAIN_SECONDS: .*greater than or equal to 0"),
    "SNAPSHOT_VERIFY": ("maybe", "SNAPSHOT_VERIFY: .*'full' or 'size'.*'maybe'"),
    "MODEL_NAME": ("org/other", "MODEL_NAME: 'org/other' is not a folder here"),
    "SNAPSHOT_S3_URI": ("https://bucket/x", "SNAPSHOT_S3_URI: expected s3://bucket/prefix"),
}


@pytest.mark.parametrize("variable", EARLY)
async def test_a_wrong_setting_ends_the_boot_with_one_line_that_names_the_variable(
    plane: ControlPlane, home: Path, tmp_path: Path, variable: str
) -> None:
    value, words = EARLY[variable]
    ended = await refused(plane, home, tmp_path, **{variable: value}, **without_vllm(tmp_path))
    assert re.search(words, ended.stderr), ended.stderr


async def test_a_wrong_argument_of_vllm_ends_the_boot_with_one_line_that_names_the_variable(
    plane: ControlPlane, home: Path, tmp_path: Path
) -> None:
    wrong = {
        "MAX_MODEL_LEN": ("abc", "MAX_MODEL_LEN: .*abc"),
        "GPU_MEMORY_UTILIZATION": ("7", "GPU_MEMORY_UTILIZATION: .*1"),
        "ENFORCE_EAGER": ("perhaps", "ENFORCE_EAGER: expected true or false, found 'perhaps'"),
        "DTYPE": ("float99", "DTYPE: .*float99.*bfloat16"),
    }
    for pair in (("MAX_MODEL_LEN", "GPU_MEMORY_UTILIZATION"), ("ENFORCE_EAGER", "DTYPE")):  # two cores
        folders = [tmp_path / variable for variable in pair]
        for folder in folders:
            folder.mkdir()
        boots = [
            refused(plane, home, folder, **{variable: wrong[variable][0]})
            for variable, folder in zip(pair, folders, strict=True)
        ]
        for variable, ended in zip(pair, await asyncio.gather(*boots), strict=True):
            assert re.search(wrong[variable][1], ended.stderr), ended.stderr


async def test_a_manifest_with_a_wrong_argument_ends_the_boot_with_its_key(
    plane: ControlPlane, home: Path, tmp_path: Path, snapshot: Path
) -> None:
    manifest = write_manifest(
        snapshot,
        source=Source(),
        quantization=Quantization(),
        served_model_name=MODEL,
        engine_args={"max_model_length": 64},
        versions={},
    )
    assert manifest.files == MANIFEST.files
    ended = await refused(plane, home, tmp_path, SNAPSHOT_DIR=str(snapshot))
    assert "coldsnap.json: engine_args.max_model_length" in ended.stderr
    assert "'max_model_len'" in ended.stderr
