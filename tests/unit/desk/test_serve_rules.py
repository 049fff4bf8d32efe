"""The platform's rules without sockets: scaling, rates, what a submission may say, the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldsnap.desk.serve import throttle
from coldsnap.desk.serve.job import RUN, Job, JobState, Terms
from coldsnap.desk.serve.scaler import Load, Scaling, wanted
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.submission import Submission
from coldsnap.desk.serve.throttle import RATES, Rate, Throttle
from coldsnap.errors import Refused, ServeError

DELAY = Scaling(least=0, most=3, rule="queue-delay", value=4)
COUNT = Scaling(least=1, most=3, rule="request-count", value=4)


def load(queued: int = 0, oldest: float = 0.0, running: int = 0, workers: int = 0, starting: int = 0) -> Load:
    return Load(queued, oldest, running, workers, starting)


@pytest.mark.parametrize(
    ("scaling", "now", "number"),
    [
        (DELAY, load(), 0),
        (DELAY, load(queued=1), 1),  # the first one at once
        (DELAY, load(queued=9, oldest=3.9, workers=1), 1),
        (DELAY, load(queued=9, oldest=4.1, workers=1), 2),
        (DELAY, load(queued=9, oldest=9, workers=2, starting=1), 2),  # help is on its way
        (DELAY, load(queued=9, oldest=99, workers=3), 3),
        (DELAY, load(running=5, workers=2), 0),  # those that run a job are not idle and stay
        (COUNT, load(), 1),
        (COUNT, load(queued=4), 1),
        (COUNT, load(queued=4, running=1), 2),
        (COUNT, load(queued=99), 3),
    ],
)
def test_workers_are_wanted_by_the_platform_s_two_rules(scaling: Scaling, now: Load, number: int) -> None:
    assert wanted(scaling, now) == number


def test_a_rate_holds_in_any_ten_seconds_and_names_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(throttle.time, "monotonic", lambda: now)
    gate = Throttle({"run": Rate(2, None)})
    with gate.admitted("run"):
        now = 104.0
    with gate.admitted("run"):
        now = 105.0
    with pytest.raises(Refused, match="2 requests in 10 seconds") as refused, gate.admitted("run"):
        pass
    assert (refused.value.status, refused.value.retry_after) == (429, 5)
    now = 110.5
    with gate.admitted("run"), gate.admitted("health"):
        pass


def test_requests_at_the_same_time_are_counted_until_they_end() -> None:
    gate = Throttle({"run": Rate(100, 1)})
    with gate.admitted("run"), pytest.raises(Refused, match="1 requests at the same time"), gate.admitted("run"):
        pass
    with gate.admitted("run"):
        pass
    assert RATES["run"] == Rate(1000, 200)


def test_a_submission_s_policy_is_its_terms_and_the_worker_gets_the_rest() -> None:
    body = b"""{"input": {"a": "\\ud800"}, "id": "mine", "s3Config": {"b": 1}, "webhook": "https://here/",
        "policy": {"executionTimeout": 6000, "ttl": 10000, "lowPriority": true}}"""
    submission = Submission.read(body, RUN).durable(7)
    assert submission.input == {"a": "\ud800"}
    assert submission.more == {"s3Config": {"b": 1}}
    assert submission.terms == Terms(
        execution_timeout=6, ttl=10, low_priority=True, webhook="https://here/", durable=True, retention=7
    )
    assert Submission.read(b'{"input": null}', RUN).terms == RUN


def test_a_stored_job_comes_back_as_it_was(tmp_path: Path) -> None:
    said: list[str] = []
    with Store(tmp_path / "db", said.append) as store:
        job = Job("one", 3, b'{"id":"one","input":1}', Terms(ttl=11, durable=True))
        store.add(job)
        job.take("w")
        for text in ("a", "b"):
            job.add_chunk(text)
        job.read = 1
        job.end(JobState.FAILED, output=[0], error="why")
        store.note(job)
        with pytest.raises(Refused, match="could not be written"):
            store.add(job)
        key = store.kept("key", lambda: "made")
    with Store(tmp_path / "db", said.append) as store:
        (same,) = store.jobs()
        assert store.kept("key", lambda: "made again") == key == "made"
        store.forget(same)
        assert store.jobs() == []
    for name in ("id", "number", "payload", "terms", "state", "attempts", "worker_id", "output", "error"):
        assert getattr(same, name) == getattr(job, name), name
    assert same.unread() == ["b"]
    assert same.timestamps.done == pytest.approx(job.timestamps.done, abs=0.1)
    assert said == []


def test_a_change_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with Store(tmp_path / "db", said.append) as store:
        store.add(Job("one", 0, b"{}"))
        store._db.execute("PRAGMA query_only = 1")
        store.note(Job("one", 0, b"{}"))
        store.forget(Job("one", 0, b"{}"))
        store.count("COMPLETED", 1)
        with pytest.raises(ServeError, match=r"--state .*db: cannot be used: attempt to write a readonly database"):
            store.kept("key", lambda: "made")
    assert [line.split(" ")[0] for line in said] == ["one", "one", "COMPLETED:"]
