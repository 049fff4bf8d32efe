"""What the live page is given: workers' logs, their books between records, jobs' texts, and the state made of them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.requests import Request as HttpRequest

from coldsnap.cost.books import Headings
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.endpoint import Endpoint
from coldsnap.desk.serve.fleet import Fleet, WorkerProcess
from coldsnap.desk.serve.job import Job, JobState
from coldsnap.desk.serve.page import Page, link
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.desk.serve.split import Account
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.transcript import SHOWN, Transcript
from coldsnap.desk.serve.view import View
from coldsnap.desk.serve.watch import Log
from coldsnap.errors import Refused
from coldsnap.records.schema import ColdStart, Request, Worker
from tests.unit.records.test_records import REQUEST, WORKER

COLD: dict[str, Any] = WORKER | {
    "gpu_count": 2,
    "seconds": 4.0,
    "phases": {"python": 0.5, "import_vllm": 3.5},
    "beside": {},
    "snapshot_bytes": 1000,
    "source": "image",
    "verified": True,
    "fetched_bytes": 0,
    "fetch_gb_per_second": None,
    "model": "demo",
}
TOTALS: dict[str, Any] = WORKER | {
    "final": False,
    "gpu_seconds": 40.0,
    "cold_gpu_seconds": 8.0,
    "busy_gpu_seconds": 20.0,
    "overhead_gpu_seconds": 2.0,
    "idle_gpu_seconds": 10.0,
    "drain_gpu_seconds": 0.0,
    "overhead_causes": {"idle_steps": 2.0},
    "joules": None,
    "request_joules": None,
    "billed_seconds": 20,
    "usd": None,
    "price_per_second": None,
    "requests": 3,
    "prompt_tokens": 1,
    "cached_tokens": 0,
    "completion_tokens": 1,
    "steps": 1,
    "lost_steps": 0,
    "metering_seconds": 0.0,
    "unwritten_records": 0,
    "unsent_records": None,
    "failed_uploads": 0,
    "estimated": False,
    "estimated_because": None,
    "fit": None,
}


def cold(at: float, **more: Any) -> ColdStart:
    return ColdStart(**COLD | {"monotonic": at} | more)


def request(at: float, **more: Any) -> Request:
    return Request(**REQUEST | {"monotonic": at} | more)


def totals(at: float, **more: Any) -> Worker:
    return Worker(**TOTALS | {"monotonic": at} | more)


def line(record: ColdStart | Request | Worker) -> bytes:
    return orjson.dumps(record.model_dump(mode="json")) + b"\n"


class TestLog:
    def test_records_are_found_among_what_else_a_worker_says(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        log = Log(path)
        assert log.read() == []  # not there yet
        path.write_bytes(
            b"loading \xff\n" + line(cold(1)) + b'{"record": "of another kind"}\n{"record"\n' + line(request(2))
        )
        assert [record.record for record in log.read()] == ["cold_start", "request"]
        assert log.said == '{"record"'
        assert log.read() == []

    def test_a_line_that_is_half_written_waits_for_its_end(self, tmp_path: Path) -> None:
        path, whole = tmp_path / "log", line(cold(1))
        log = Log(path)
        path.write_bytes(whole[:50])
        assert log.read() == []
        with path.open("ab") as file:
            file.write(whole[50:] + b"booted")
        assert [record.record for record in log.read()] == ["cold_start"]
        assert log.said == ""
        with path.open("ab") as file:
            file.write(b" at last\n")
        assert (log.read(), log.said) == ([], "booted at last")

    def test_a_long_log_is_read_in_pieces_and_an_endless_line_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_bytes(b"x" * 2_500_000 + b"\n" + line(cold(1)) + (b"y" * 999 + b"\n") * 1500 + line(request(2)))
        log, found, reads = Log(path), list[str](), 0
        while "request" not in found:
            found += [record.record for record in log.read()]
            reads += 1
        assert found == ["cold_start", "request"]
        assert reads == 5

    def test_a_log_that_was_emptied_is_read_from_its_beginning(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_bytes(line(cold(1)) + line(request(2)))
        log = Log(path)
        assert len(log.read()) == 2
        path.write_bytes(line(cold(3)))
        assert [record.monotonic for record in log.read()] == [3]


class TestSplit:
    """Two GPUs, begun at 100, ready at 104."""

    def account(self, *records: ColdStart | Request | Worker) -> Account:
        account = Account()
        for record in (cold(104), *records):
            account.add(record)
        return account

    def test_until_a_worker_is_ready_all_is_cold_start(self) -> None:
        assert Account().split(100, 103, None) == Headings(cold=3)

    def test_an_idle_worker_idles(self) -> None:
        assert self.account().split(100, 110, None) == Headings(cold=8, idle=12)

    def test_what_requests_report_is_busy_and_a_job_that_runs_too(self) -> None:
        account = self.account(request(106, gpu_seconds=3.0))
        assert account.split(100, 110, None) == Headings(cold=8, busy=3, idle=9)
        assert account.split(100, 110, 105) == Headings(cold=8, busy=3 + 8, idle=1)  # none is counted twice
        assert account.split(100, 110, 109) == Headings(cold=8, busy=3 + 2, idle=7)

    def test_the_worker_s_own_books_put_it_right(self) -> None:
        account = self.account(request(106, gpu_seconds=15.0), totals(120))
        assert account.split(100, 120, None) == Headings(8, 20, 2, 10, 0)
        assert account.split(100, 125, None) == Headings(8, 20, 2, 20, 0)
        account.add(request(122, gpu_seconds=7.0))  # of which 5 were in the books already
        assert account.split(100, 125, None) == Headings(8, 22, 2, 18, 0)

    def test_nothing_comes_after_the_last_books_of_a_worker(self) -> None:
        account = self.account(totals(120, final=True, drain_gpu_seconds=4.0, idle_gpu_seconds=6.0))
        assert account.split(100, 120.5, None) == Headings(8, 20, 2, 6, 4)

    def test_a_revived_worker_keeps_its_own_cold_start(self) -> None:
        account = self.account(cold(150, boot="revived", revival="frozen", seconds=0.0, phases={}))
        assert account.cold_start is not None
        assert account.cold_start.seconds == 4

    def test_sums_are_always_the_whole_life(self) -> None:
        account = self.account(request(106, gpu_seconds=3.0), request(108, gpu_seconds=99.0))
        for now in (104.5, 107.0, 130.0):
            for since in (None, 104.2):
                split = account.split(100, now, since)
                assert split.total == pytest.approx(2 * (now - 100))
                assert min(split.cold, split.busy, split.idle) >= 0

    def test_a_life_is_billed_in_whole_seconds_for_each_gpu(self) -> None:
        assert self.account().billed(100, 110.2) == 22


def job(content: Any, *chunks: Any, output: Any = None) -> Job:
    found = Job("id", 0, orjson.dumps({"id": "id", "input": content}))
    found.take("worker-1")
    for chunk in chunks:
        found.add_chunk(chunk)
    if output is not None:
        found.end(JobState.COMPLETED, output=output)
    return found


def read(found: Job) -> Transcript:
    transcript = Transcript(found)
    transcript.follow(found)
    return transcript


def sse(*events: Any) -> str:
    return "".join(f"data: {orjson.dumps(event).decode()}\n\n" for event in events)


def delta(content: str, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": content}}]}


MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What?"}]


class TestTranscript:
    @pytest.mark.parametrize(
        ("content", "chunks", "route", "question", "text"),
        [
            ({"prompt": "What?", "stream": True}, [{"text": "a"}, {"text": "b", "usage": {}}], "native", "What?", "ab"),
            ({"messages": MESSAGES}, [{"text": "ab"}], "native", "What?", "ab"),
            (
                {"openai_route": "/v1/chat/completions", "openai_input": {"messages": MESSAGES}},
                [
                    sse(delta("a"), delta("x", index=1)),
                    sse(delta("b"), {"choices": [], "usage": {}}) + "data: [DONE]\n\n",
                ],
                "/v1/chat/completions",
                "What?",
                "ab",
            ),
            (
                {"openai_route": "/v1/completions", "openai_input": {"prompt": "What?"}},
                [sse({"choices": [{"text": "ab"}]})],
                "/v1/completions",
                "What?",
                "ab",
            ),
            (
                {"openai_route": "/v1/responses", "openai_input": {"input": "What?"}},
                ["event: x\n" + sse({"type": "response.output_text.delta", "delta": "ab"})],
                "/v1/responses",
                "What?",
                "ab",
            ),
            (
                {"route": "/v1/messages", "body": {"messages": [{"content": [{"type": "text", "text": "What?"}]}]}},
                [sse({"type": "content_block_delta", "delta": {"text": "ab"}})],
                "/v1/messages",
                "What?",
                "ab",
            ),
            ({"route": "/tokenize", "body": {"prompt": "What?"}}, [{"tokens": [1]}], "/tokenize", "What?", ""),
            ([1, 2], [[3], 4, None, "plain", "data: {broken"], "", "", ""),
        ],
    )
    def test_every_shape_of_a_job_can_be_read(
        self, content: Any, chunks: list[Any], route: str, question: str, text: str
    ) -> None:
        transcript = read(job(content, *chunks))
        assert (transcript.route, transcript.question, transcript.text) == (route, question, text)

    def test_an_answer_in_one_piece_is_read_from_the_result(self) -> None:
        answer = {"choices": [{"message": {"content": "ab", "reasoning": "hm "}}]}
        assert read(job({}, output=answer)).text == "hm ab"
        assert read(job({}, output=[{"text": "ab"}])).text == "ab"
        assert read(job({}, {"text": "ab"}, output=[{"text": "ab"}])).text == "ab"

    def test_it_reads_on_where_it_stopped_and_keeps_the_end(self) -> None:
        found = job({}, {"text": "a" * 500})
        transcript = read(found)
        found.add_chunk({"text": "b"})
        transcript.follow(found)
        transcript.follow(found)
        assert transcript.characters == 501
        assert transcript.text == "a" * (SHOWN - 1) + "b"

    def test_a_job_that_starts_again_starts_its_text_again(self) -> None:
        found = job({}, {"text": "old"})
        transcript = read(found)
        found.restart()
        found.take("worker-2")
        found.add_chunk({"text": "new"})
        transcript.follow(found)
        assert (transcript.text, transcript.characters) == ("new", 3)

    def test_what_would_take_long_or_cannot_be_sent_is_left_out(self) -> None:
        assert read(job({"prompt": "x" * 200_000})).question == "(0.2 MB)"
        odd = read(Job("id", 0, b'{"input": {"route": "\\ud800", "body": {"prompt": "\\ud800!"}}}'))
        assert (odd.route, odd.question) == ("?", "?!")
        assert read(job({}, sse(delta("x" * 200_000)))).text == ""


@dataclass
class Desk:
    """An endpoint whose workers are told, and a page's view of it."""

    folder: Path
    endpoint: Endpoint
    view: View
    workers: dict[str, WorkerProcess] = field(default_factory=dict)

    def start(self, name: str, *records: ColdStart | Request | Worker, ready: bool = True) -> WorkerProcess:
        process: Any = None  # nobody looks at it
        worker = WorkerProcess(name, process, self.folder / f"{name}.log", begun=time.monotonic() - 10)
        worker.log.write_bytes(b"booting\n" + b"".join(map(line, records)))
        if ready:
            worker.ready = worker.begun + 4
        self.workers[name] = worker
        return worker

    def state(self) -> Any:
        self.view._made = 0.0
        return orjson.loads(self.view.answer())


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    with Store(tmp_path / "db", print) as store:
        endpoint = Endpoint(ControlPlane(), store, Scaling(most=2), print)
        fleet = Fleet(endpoint, tmp_path, {}, tmp_path, print)
        yield Desk(tmp_path, endpoint, View(endpoint, fleet, None), fleet.workers)


def take(desk: Desk, worker: str, number: int) -> list[Job]:
    return desk.endpoint.plane.take(desk.endpoint.plane.see(worker), number)


class TestView:
    async def test_an_endpoint_that_has_done_nothing_has_a_state(self, desk: Desk) -> None:
        state = desk.state()
        assert (state["workers"], state["requests"]["rows"], state["engine"]) == ([], [], None)
        assert state["ttft"] == {"count": 0, "p50": None, "p95": None, "values": []}
        assert (state["usd"], state["price"]) == (None, None)

    async def test_a_worker_is_shown_from_its_boot_to_its_end(self, desk: Desk) -> None:
        worker = desk.start("worker-1", ready=False)
        (shown,) = desk.state()["workers"]
        assert (shown["state"], shown["says"], shown["boot"]) == ("initializing", "booting", None)
        assert shown["spent"]["cold"] == pytest.approx(10, abs=0.5)
        with worker.log.open("ab") as log:
            log.write(line(cold(worker.begun + 4, gpu="cpu", gpu_count=1)))
        worker.ready = worker.begun + 4
        state = desk.state()
        (shown,) = state["workers"]
        assert shown["state"] == "idle"
        assert shown["boot"]["phases"] == [["python", 0.5], ["import_vllm", 3.5]]
        assert shown["spent"]["cold"] == 4
        assert state["spent"]["idle"] == pytest.approx(6, abs=0.5)
        assert state["usd"] is None
        assert "set GPU_PRICE_PER_SECOND" in state["price"]["origin"]
        worker.ended, worker.how = time.monotonic(), "was ended by SIGKILL"
        desk.view._fleet.past.append(desk.workers.pop("worker-1"))
        state = desk.state()
        assert [(each["state"], each["why"]) for each in state["workers"]] == [("ended", "was ended by SIGKILL")]
        assert state["spent"]["idle"] == pytest.approx(6, abs=0.5)

    async def test_of_many_ended_workers_the_last_are_shown_and_all_are_counted(self, desk: Desk) -> None:
        for number in range(9):
            worker = desk.start(f"worker-{number}", cold(0, gpu="NVIDIA L4", gpu_count=1))
            worker.ended = time.monotonic()
            desk.view._fleet.past.append(desk.workers.pop(worker.id))
        state = desk.state()
        assert [each["id"] for each in state["workers"]] == ["worker-8", "worker-7", "worker-6", "worker-5"]
        assert state["workers_before"] == 5
        assert state["spent"]["cold"] == 9 * 4
        assert state["usd"] == pytest.approx(state["billed"] * 0.00019)
        assert state["billed"] == pytest.approx(9 * 10.5, abs=9)

    async def test_a_job_is_followed_from_the_queue_to_its_record(self, desk: Desk) -> None:
        worker = desk.start("worker-1", cold(0))
        submitted = desk.endpoint.plane.submit({"messages": MESSAGES, "stream": True})
        (row,) = desk.state()["requests"]["rows"]
        assert (row["state"], row["question"], row["worker"]) == ("IN_QUEUE", "What?", None)
        take(desk, "worker-1", 1)
        submitted.add_chunk({"text": "one "})
        state = desk.state()
        (row,) = state["requests"]["rows"]
        assert (row["state"], row["text"], row["worker"]) == ("IN_PROGRESS", "one ", "worker-1")
        assert row["ttft"] >= 0
        assert (state["workers"][0]["state"], state["jobs"]["running"]) == ("running", 1)
        desk.endpoint.plane.end(submitted, JobState.COMPLETED, output=[])
        with worker.log.open("ab") as log:
            log.write(line(request(1, job_id=submitted.id, ttft_seconds=0.2)))
        state = desk.state()
        (row,) = state["requests"]["rows"]
        assert (row["state"], row["tokens"], row["ttft"], row["itl"]) == ("COMPLETED", 2, 0.2, 0.01)
        assert (state["ttft"]["p50"], state["itl"]["p95"]) == (0.2, 0.01)
        desk.endpoint.plane.forget(submitted)
        assert [row["state"] for row in desk.state()["requests"]["rows"]] == ["COMPLETED"]

    async def test_of_many_jobs_the_newest_are_rows_and_the_rest_a_number(self, desk: Desk) -> None:
        desk.start("worker-1", cold(0))
        jobs = [desk.endpoint.plane.submit({"prompt": str(number)}) for number in range(300)]
        take(desk, "worker-1", 200)
        found = desk.state()["requests"]
        assert [row["number"] for row in found["rows"]] == [*range(299, 293, -1), *range(199, 181, -1)]
        assert (found["queued_more"], found["running_more"]) == (94, 182)
        for each in jobs:
            desk.endpoint.plane.stop(each, JobState.CANCELLED, "enough")
        desk.state()
        for each in jobs:
            desk.endpoint.plane.forget(each)
        found = desk.state()["requests"]
        assert len(found["rows"]) == 32
        assert found["queued_more"] == found["running_more"] == 0
        assert len(desk.view._rows._rows) <= 256

    async def test_it_is_put_together_only_when_asked_and_once_for_all_pages(self, desk: Desk) -> None:
        desk.start("worker-1", cold(0))
        assert desk.view._workers == {}
        first = desk.view.answer()
        assert desk.view.answer() is first

    async def test_news_are_noticed_without_it(self, desk: Desk) -> None:
        desk.start("worker-1", cold(0))
        quiet = desk.view.stir()
        assert desk.view.stir() == quiet
        desk.endpoint.plane.submit(None)
        assert desk.view.stir() != quiet
        take(desk, "worker-1", 1)
        assert desk.view.stir() != desk.view.stir()  # text may grow at any time


def http_request(key: str | None) -> HttpRequest:
    headers = [] if key is None else [(b"authorization", key.encode())]
    return HttpRequest({"type": "http", "method": "GET", "path": "/live", "headers": headers, "query_string": b""})


class TestPage:
    @pytest.fixture
    def page(self, desk: Desk) -> Page:
        def authorize(request: HttpRequest) -> None:
            if request.headers.get("authorization") != "Bearer key":
                raise Refused(401, "no key")

        return Page(desk.view, authorize)

    async def test_it_may_load_nothing_and_speak_to_nobody_else(self, page: Page) -> None:
        response = await page._show(http_request(None))
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        assert response.headers["referrer-policy"] == "no-referrer"
        text = bytes(response.body).decode()
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in text

    async def test_its_data_need_the_key(self, page: Page) -> None:
        for key in (None, "Bearer other"):
            assert (await page._live(http_request(key))).status_code == 401

    async def test_news_come_at_once_and_silence_is_broken_every_second(self, page: Page, desk: Desk) -> None:
        loop, times = asyncio.get_running_loop(), list[float]()
        loop.call_later(2.1, desk.endpoint.plane.submit, None)
        loop.call_later(4.0, page.close)
        async for event in page._events():
            assert event.startswith(b'data: {"endpoint":"local"')
            assert event.endswith(b"}\n\n")
            times.append(round(loop.time(), 2))
        assert times == [0, 1, 2, 2.25, 3.25]

    def test_the_link_carries_the_key_where_no_request_does(self) -> None:
        assert link("127.0.0.1", 8000, "a b&c") == "http://127.0.0.1:8000/#key=a%20b%26c"
