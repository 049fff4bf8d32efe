"""`coldsnap bench` without a socket: schedules, prompts, answers, figures, and what is said about wrong options."""

from __future__ import annotations

import argparse
import itertools
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldsnap.desk.bench import page
from coldsnap.desk.bench.answer import Answer, Events, Failed, failure
from coldsnap.desk.bench.command import Plan, configure
from coldsnap.desk.bench.dialect import Dialect
from coldsnap.desk.bench.driver import Outcome, Run
from coldsnap.desk.bench.endpoint import Address
from coldsnap.desk.bench.figures import Spread, summarise
from coldsnap.desk.bench.jobs import Polls
from coldsnap.desk.bench.lengths import Lengths
from coldsnap.desk.bench.prompts import TEXT, WORDS, Prompts
from coldsnap.desk.bench.schedule import Call, drawn, limited, poisson, replayed
from coldsnap.desk.bench.slo import Slo
from coldsnap.desk.bench.terminal import lines
from coldsnap.desk.trace import Arrival
from coldsnap.errors import BenchError

OUTCOME = Outcome(
    number=0, due=1.0, sent=1.01, end=3.0, first=1.5, last=2.9, gap=0.2, text=True,
    wished_prompt_tokens=10, wished_output_tokens=8, prompt_tokens=10, output_tokens=8,
)  # fmt: skip


class TestLengths:
    @pytest.mark.parametrize(
        ("text", "mean", "deviation"),
        [
            ("128", 128, 0),
            ("uniform:50:150", 100, 101 / 12**0.5),
            ("normal:500:40", 500, 40),
            ("lognormal:100:0.5", 100 * np.exp(0.125), 100 * np.exp(0.125) * (np.exp(0.25) - 1) ** 0.5),
        ],
    )
    def test_what_is_drawn_has_the_mean_and_deviation_that_were_asked_for(
        self, text: str, mean: float, deviation: float
    ) -> None:
        lengths, draw = Lengths.parse(text, "--x"), random.Random(7)
        values = [lengths.draw(draw) for _ in range(20_000)]
        assert statistics.mean(values) == pytest.approx(mean, rel=0.01)
        assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.03)
        assert str(lengths) == text

    def test_no_length_is_below_one(self) -> None:
        lengths = Lengths.parse("normal:1:50", "--x")
        draw = random.Random(7)
        assert min(lengths.draw(draw) for _ in range(1000)) == 1

    def test_both_ends_of_a_uniform_length_are_drawn(self) -> None:
        lengths, draw = Lengths.parse("uniform:3:5", "--x"), random.Random(7)
        assert {lengths.draw(draw) for _ in range(100)} == {3, 4, 5}

    @pytest.mark.parametrize(
        "text", ["", "0", "-1", "1.5", "nan", "inf", "x", "uniform:5", "uniform:9:3", "gamma:1:2", "normal:x:2",
                 "normal:5:-1", "normal:0:3", "lognormal:100:40", "uniform:1:2:3", "1e99"],
    )  # fmt: skip
    def test_what_is_no_length_is_an_error_that_names_the_option(self, text: str) -> None:
        with pytest.raises(BenchError, match=r"^--prompt-tokens: "):
            Lengths.parse(text, "--prompt-tokens")


class TestSchedule:
    def test_arrivals_are_poisson_at_the_rate_that_was_asked_for(self) -> None:
        times = list(itertools.islice(poisson(25.0, seed=3), 50_000))
        gaps = np.diff([0.0, *times])
        assert gaps.mean() == pytest.approx(1 / 25, rel=0.02)
        assert gaps.std() == pytest.approx(1 / 25, rel=0.02)  # an exponential's is its mean
        assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.02)
        counts = np.histogram(times, bins=np.arange(0, times[-1], 1.0))[0]
        assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)  # a Poisson count's mean is its variance

    def test_a_seed_repeats_arrivals_lengths_and_prompts_and_another_does_not(self) -> None:
        lengths = Lengths.parse("uniform:1:1000", "--x")

        def draw(seed: int) -> tuple[list[Call], list[Any]]:
            calls = list(limited(drawn(poisson(3.0, seed), lengths, lengths, seed), 20, None))
            prompts = Prompts(seed, range(1000))
            return calls, [prompts.make(call.prompt_tokens) for call in calls]

        assert draw(1) == draw(1)
        assert draw(1)[0] != draw(2)[0]
        assert draw(1)[1] != draw(2)[1]

    def test_a_rate_does_not_change_the_lengths(self) -> None:
        lengths = Lengths.parse("uniform:1:1000", "--x")
        slow, fast = (list(limited(drawn(poisson(rate, 5), lengths, lengths, 5), 9, None)) for rate in (1, 50))
        assert [call.prompt_tokens for call in slow] == [call.prompt_tokens for call in fast]

    def test_a_replay_is_as_much_faster_as_was_asked_for_and_ends_where_it_is_to(self) -> None:
        trace = [Arrival(0.0, 5, 6), Arrival(3.0, 7, 8), Arrival(9.0, 1, 1)]
        assert list(limited(replayed(trace, 2.0), None, 2.0)) == [Call(0, 0.0, 5, 6), Call(1, 1.5, 7, 8)]
        assert len(list(limited(replayed(trace, 2.0), 1, None))) == 1


class TestPrompts:
    def test_token_ids_are_as_many_as_wished_and_all_valid(self) -> None:
        prompts = Prompts(1, [5, 9, 70])
        made = prompts.make(500)
        assert prompts.exact
        assert len(made) == 500
        assert set(made) == {5, 9, 70}

    def test_words_are_as_many_as_the_tokens_need(self) -> None:
        prompts = Prompts(1, fixed=8.0, each=1.5)
        assert not prompts.exact
        made = prompts.make(158)
        assert isinstance(made, str)
        assert len(made.split()) == 100
        assert set(made.split()) <= set(WORDS)
        assert len(str(prompts.make(1)).split()) == 1

    def test_every_word_is_asked_about_once(self) -> None:
        assert len(set(TEXT.split())) == len(WORDS)


class TestDialect:
    def test_completions_ask_for_exact_lengths_and_the_usage(self) -> None:
        assert Dialect("completions", "m", extra={"temperature": 0}).body([1, 2], 7) == {
            "model": "m", "prompt": [1, 2], "max_tokens": 7, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    def test_a_chat_that_may_end_does_not_mention_ignore_eos(self) -> None:
        body = Dialect("chat", None, exact=False).body("hi", 7)
        assert body["messages"] == [{"role": "user", "content": "hi"}]
        assert "ignore_eos" not in body
        assert "model" not in body

    def test_a_native_job_has_its_sampling_parameters_apart(self) -> None:
        dialect = Dialect("native", "m", extra={"top_k": 1})
        body = dialect.body("hi", 7)
        assert body == {
            "prompt": "hi", "stream": True, "model": "m",
            "sampling_params": {"max_tokens": 7, "ignore_eos": True, "top_k": 1},
        }  # fmt: skip
        assert dialect.job(body) is body

    def test_an_openai_request_can_be_a_job(self) -> None:
        body = Dialect("chat").body("hi", 7)
        assert Dialect("chat").job(body) == {"openai_route": "/v1/chat/completions", "openai_input": body}


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "openai", "jobs", "api"),
        [
            ("https://api.runpod.ai/v2/abc", None, "https://api.runpod.ai/v2/abc", "native"),
            ("http://h:1/v2/abc/", None, "http://h:1/v2/abc", "native"),
            ("http://h/v2/abc/openai/v1", "http://h/v2/abc/openai/v1", "http://h/v2/abc", "completions"),
            ("http://h/v2/abc/openai", "http://h/v2/abc/openai/v1", "http://h/v2/abc", "completions"),
            ("http://h:8000", "http://h:8000/v1", None, "completions"),
            ("http://h:8000/x/v1/", "http://h:8000/x/v1", None, "completions"),
            ("http://h:8000/v1/chat/completions", "http://h:8000/v1", None, "chat"),
            ("http://h:8000/v1/completions", "http://h:8000/v1", None, "completions"),
        ],
    )
    def test_its_path_says_what_it_leads_to(self, url: str, openai: str | None, jobs: str | None, api: str) -> None:
        address = Address.parse(url)
        assert (address.openai, address.jobs, address.api) == (openai, jobs, api)

    @pytest.mark.parametrize(
        "url", ["", "localhost:8000", "ftp://h/v1", "http://", "http://h:99999/v1", "http://h/v2/a/run", "http://h/x",
                "http://h/v1?a=b", "http://me:secret@h/v1", "http://[::1/v1"],
    )  # fmt: skip
    def test_another_is_an_error_that_says_what_is_expected(self, url: str) -> None:
        with pytest.raises(BenchError, match=r"^URL: expected ") as found:
            Address.parse(url)
        assert "secret" not in found.value.message


def sse(*events: object) -> bytes:
    return b"".join(b"data: %b\n\n" % (e if isinstance(e, bytes) else orjson.dumps(e)) for e in events)


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": None, **fields}]}


class TestAnswer:
    @given(st.lists(st.integers(0, 200), max_size=8), st.booleans())
    def test_events_are_the_same_however_their_bytes_are_cut(self, cuts: list[int], carriage: bool) -> None:
        data = b": ping\n\n" + sse({"a": "é🙂"}, {"b": 2}, b"[DONE]")
        data = data.replace(b"\n", b"\r\n") if carriage else data
        events = Events()
        places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        found = [event for a, b in itertools.pairwise(places) for event in events.feed(data[a:b])]
        assert found == [{"a": "é🙂"}, {"b": 2}]

    def test_an_event_that_is_no_json_is_a_failure(self) -> None:
        with pytest.raises(Failed, match=r"not understood: \{oops"):
            list(Events().feed(b"data: {oops\n"))

    def test_output_counts_with_or_without_text_and_the_usage_does_not(self) -> None:
        answer = Answer()
        for now, event in enumerate(
            [choice(text=""), choice(text="a"), choice(text="", finish_reason="length"),
             {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}, "cost": {"gpu_seconds": 0.5}}]
        ):  # fmt: skip
            assert not answer.finished or now == 3
            answer.take(event, float(now))
        assert (answer.first, answer.last, answer.gap, answer.outputs) == (0.0, 2.0, 1.0, 3)
        assert answer.text
        assert answer.tokens("completion_tokens") == 3
        assert answer.cost_of("gpu_seconds") == 0.5
        assert answer.cost_of("usd") is None

    def test_an_event_that_names_the_role_is_no_output(self) -> None:
        answer = Answer()
        answer.take(choice(delta={"role": "assistant", "content": ""}), 1.0)
        assert answer.first is None
        answer.take(choice(delta={"content": "a"}), 2.0)
        answer.take(choice(delta={"reasoning_content": "b"}), 3.0)
        answer.take(choice(delta={}, finish_reason="stop"), 4.0)
        assert (answer.first, answer.last, answer.finished) == (2.0, 4.0, True)

    def test_a_native_jobs_last_chunk_is_output_only_if_it_has_text_or_nothing_came_before(self) -> None:
        last = {"text": "", "finish_reason": "length", "usage": {"completion_tokens": 9}}
        answer = Answer()
        answer.take({"text": "a"}, 1.0)
        answer.take(last, 2.0)
        assert (answer.first, answer.last, answer.finished, answer.outputs) == (1.0, 1.0, True, 1)
        silent = Answer()
        silent.take(last, 2.0)
        assert (silent.first, silent.text, silent.finished) == (2.0, False, True)

    @pytest.mark.parametrize("event", [None, 3, [], {"choices": [3]}, {"choices": {"a": 1}}])
    def test_what_is_no_answer_is_a_failure_and_not_a_crash(self, event: Any) -> None:
        with pytest.raises(Failed, match="not understood"):
            Answer().take(event, 0.0)

    @pytest.mark.parametrize(
        ("error", "kind", "detail", "status"),
        [
            ({"message": "m", "type": "T", "code": 404}, "T", "m", 404),
            ('{"error": {"message": "m", "type": "T", "code": 400}}', "T", "m", 400),
            ("it broke", "the endpoint's error", "it broke", None),
            ('"it broke"', "the endpoint's error", "it broke", None),
            (["a"], "the endpoint's error", "['a']", None),
            ({"code": "x"}, "the endpoint's error", "{'code': 'x'}", None),
        ],
    )
    def test_an_error_is_read_in_the_shapes_that_there_are(
        self, error: Any, kind: str, detail: str, status: int | None
    ) -> None:
        found = failure(error)
        assert (found.kind, found.detail, found.status) == (kind, detail, status)
        with pytest.raises(Failed):
            Answer().take({"error": error}, 0.0)


class TestPolls:
    def test_some_are_in_hand_and_the_rest_come_at_the_rate(self) -> None:
        polls = Polls(rate=10.0, burst=5)
        waits = [polls.due(100.0) - 100.0 for _ in range(8)]
        assert waits == pytest.approx([-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3])
        assert polls.due(200.0) == pytest.approx(199.6)  # as many in hand again, not more

    def test_ten_seconds_never_see_more_than_the_platform_allows(self) -> None:
        polls = Polls()
        begun = [max(polls.due(100.0), 100.0) for _ in range(3000)]
        assert max(sum(a <= t < a + 10 for t in begun) for a in (100.0, 101.0, 105.0)) <= 2000


class TestFigures:
    VALUES: ClassVar = [random.Random(4).lognormvariate(-3, 1) for _ in range(501)]

    def test_percentiles_are_numpys_and_the_definitions(self) -> None:
        spread = Spread.of([*self.VALUES, None])
        assert spread is not None
        ordered = sorted(self.VALUES)
        assert spread.count == 501
        assert spread.p50 == ordered[250] == np.percentile(self.VALUES, 50)
        assert (spread.p90, spread.p95) == (ordered[450], ordered[475])
        assert spread.p99 == ordered[495] == np.percentile(self.VALUES, 99)
        assert spread.mean == pytest.approx(statistics.fmean(self.VALUES))
        assert spread.most == ordered[-1]
        assert Spread.of([None]) is None

    def test_times_count_from_when_a_request_was_due(self) -> None:
        assert OUTCOME.ttft == 0.5
        assert OUTCOME.e2e == 2.0
        assert OUTCOME.itl == pytest.approx(1.4 / 7)
        assert replace(OUTCOME, gap=None).itl is None
        assert replace(OUTCOME, output_tokens=None).itl is None

    def test_a_failed_request_is_in_no_percentile_and_no_rate_but_counted(self) -> None:
        failed = replace(OUTCOME, end=30.0, first=None, last=None, error="HTTP 500", detail="oh")
        run = Run([OUTCOME, failed, replace(failed, detail="again")], seconds=30.0, cpu=3.0)
        summary = summarise(run, Slo.parse("e2e=60s"), open_loop=False, exact=True)
        assert (summary.requests, summary.succeeded, summary.failed) == (3, 1, 2)
        assert summary.e2e is not None
        assert summary.e2e.most == 2.0
        assert [(each.kind, each.count, each.example) for each in summary.failures] == [("HTTP 500", 2, "oh")]
        assert summary.output_tokens_per_second == pytest.approx(8 / 30)
        assert summary.good is not None
        assert summary.good.share == pytest.approx(1 / 3)
        assert summary.client.cpu_share == pytest.approx(0.1)
        assert summary.client.late is None

    @pytest.mark.parametrize(
        ("slo", "kept"),
        [("ttft=500ms", 1), ("ttft=499ms", 0), ("itl=201ms,e2e=2s", 1), ("itl=199ms", 0), ("e2e=1.9s,ttft=9s", 0)],
    )
    def test_goodput_counts_what_keeps_to_every_term(self, slo: str, kept: int) -> None:
        summary = summarise(Run([OUTCOME], seconds=3.0), Slo.parse(slo), open_loop=True, exact=True)
        assert summary.good is not None
        assert summary.good.requests == kept
        assert summary.good.per_second == pytest.approx(kept / 3)
        assert summary.client.late is not None
        assert summary.client.late.most == pytest.approx(0.01)

    @pytest.mark.parametrize(
        "text", ["", "ttft", "ttft=200", "ttft=-1ms", "tpot=1s", "ttft=1s,ttft=2s", "ttft=1s;itl=1s"]
    )
    def test_a_wrong_slo_is_an_error(self, text: str) -> None:
        with pytest.raises(BenchError, match=r"^--slo: expected some of ttft, itl and e2e"):
            Slo.parse(text)

    def test_cost_is_that_of_the_answers_that_told_it(self) -> None:
        told = replace(OUTCOME, gpu_seconds=0.4, prefill_gpu_seconds=0.1, decode_gpu_seconds=0.3, usd=0.02)
        summary = summarise(Run([told, told, OUTCOME], seconds=3.0), None, open_loop=False, exact=True)
        cost = summary.cost
        assert cost is not None
        assert (cost.requests, cost.output_tokens) == (2, 16)
        assert cost.usd == pytest.approx(0.04)
        assert cost.usd_of(0.2) == pytest.approx(0.01)
        shown = dict(lines(summary, None))
        assert shown["cost of a request"] == "400 ms of GPU, $0.0200"
        assert shown["cost of 1M output tokens"] == "37,500 s of GPU, $1,875.00"
        unpriced = summarise(Run([told, replace(told, usd=None)], seconds=3.0), None, open_loop=False, exact=True)
        assert unpriced.cost is not None
        assert unpriced.cost.usd is None

    def test_a_reader_is_told_what_the_figures_rest_on(self) -> None:
        odd = replace(OUTCOME, text=False, output_tokens=4, prompt_tokens=20)
        untold = replace(OUTCOME, output_tokens=None)
        run = Run([odd] * 3 + [untold], seconds=3.0, cpu=2.7, unfinished=2)
        notes = "\n".join(summarise(run, None, open_loop=True, exact=True).notes)
        for said in (
            "stopped with 2 requests in flight",
            "p99 of 4 requests",
            "1 answer without usage",
            "The prompts had 60 tokens by the server's count, 30 were wished",
            "The outputs had 12 tokens by the server's count, 24 were wished",
            "3 answers without any text",
            "90% of a core",
        ):
            assert said in notes
        assert "outputs had" not in "\n".join(summarise(run, None, open_loop=True, exact=False).notes)

    def test_nothing_measured_is_a_summary_and_a_page_too(self) -> None:
        summary = summarise(Run(), None, open_loop=True, exact=True)
        assert (summary.requests, summary.ttft, summary.seconds) == (0, None, 0.0)
        assert list(lines(summary, None))


def plan(*arguments: str, **environ: str) -> Plan:
    parser = argparse.ArgumentParser()
    configure(parser)
    return Plan.of(parser.parse_args(arguments), environ)


class TestPlan:
    URL = "http://h/v1"

    def test_the_key_of_the_environment_goes_to_addresses_of_the_platform_only(self) -> None:
        environ = {"RUNPOD_API_KEY": "rpa_secret"}
        assert plan("http://h/v2/abc", "--rate", "1", **environ).key == "rpa_secret"
        assert plan("http://h/v2/abc", "--rate", "1", "--key", "mine", **environ).key == "mine"
        assert plan(self.URL, "--rate", "1", **environ).key is None

    def test_a_load_says_in_words_what_it_is(self, tmp_path: Path) -> None:
        assert (
            plan(self.URL, "--rate", "2").said() == "100 requests at 2 a second, prompts of 128 tokens, answers of 64"
        )
        assert (
            plan(self.URL, "--concurrency", "4", "--duration", "9").said().startswith("requests for 9 s 4 side by side")
        )
        (tmp_path / "t.jsonl").write_text('{"time": 3, "prompt_tokens": 4, "output_tokens": 5}\n')
        replay = plan(self.URL, "--trace", str(tmp_path / "t.jsonl"), "--speed", "2", "--concurrency", "9")
        assert replay.said() == "requests of t.jsonl, 2 times as fast, at most 9 at a time"
        assert list(replay.calls()) == [Call(0, 0.0, 4, 5)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "--rate, --concurrency or --trace: expected one of them"),
            (("--rate", "0"), "--rate: expected a number above 0, found '0'"),
            (("--rate", "x"), "--rate: expected a number above 0, found 'x'"),
            (("--rate", "1", "--trace", "f"), "--rate: a trace has its own times"),
            (("--concurrency", "0"), "--concurrency: expected a whole number of at least 1, found '0'"),
            (("--concurrency", "1.5"), "--concurrency: expected a whole number of at least 1, found '1.5'"),
            (("--rate", "1", "--requests", "no"), "--requests: expected a whole number"),
            (("--rate", "1", "--duration", "inf"), "--duration: expected a number above 0, found 'inf'"),
            (("--rate", "1", "--warmup", "-1"), "--warmup: expected a whole number of at least 0"),
            (("--rate", "1", "--api", "grpc"), "--api: expected one of native, completions, chat, found 'grpc'"),
            (("--rate", "1", "--api", "native"), "--api native: http://h/v1 takes OpenAI requests"),
            (("--rate", "1", "--key", " a"), "--key: expected printable ASCII"),
            (("--rate", "1", "--key", "a\nb"), "--key: expected printable ASCII"),
            (("--rate", "1", "--extra", "{"), "--extra: expected a JSON object: "),
            (("--rate", "1", "--extra", "[]"), "--extra: expected a JSON object, found "),
            (("--rate", "1", "--speed", "0"), "--speed: expected a number above 0"),
            (("--rate", "1", "--timeout", "0"), "--timeout: expected a number above 0"),
            (("--rate", "1", "--seed", "-3"), "--seed: expected a whole number of at least 0"),
            (("--rate", "1", "--output-tokens", "0"), "--output-tokens: expected whole tokens"),
        ],
    )  # fmt: skip
    def test_a_wrong_option_is_an_error_that_names_it(self, arguments: tuple[str, ...], message: str) -> None:
        with pytest.raises(BenchError) as found:
            plan(self.URL, *(f"{a}" for a in arguments))
        assert found.value.message.startswith(message)


def test_a_page_needs_nothing_from_elsewhere_and_escapes_what_a_server_said() -> None:
    outcomes = [
        replace(OUTCOME, number=n, due=n / 10, first=n / 10 + 0.2, last=n / 10 + 1, end=n / 10 + 1) for n in range(40)
    ]
    outcomes.append(replace(OUTCOME, error="HTTP 500", detail="<script>alert(1)</script>", first=None, last=None))
    summary = summarise(Run(outcomes, seconds=6.0), Slo.parse("ttft=1s"), open_loop=True, exact=True)
    about = plan("http://h/v1", "--rate", "2", "--model", "a<b").about("a<b", 1.5, exact=True)
    text = page.render({**about, "slo": {"ttft": 1.0}}, summary, outcomes)
    assert "<script" not in text
    assert "a&lt;b" in text
    assert text.count("<svg") == 3
    assert "http://h/v1" in text
    assert "src=" not in text
    assert "url(http" not in text
    for image in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert re.findall(r"#[0-9a-f]{6}\b", image) == []  # a colour that does not follow light and dark
