"""The engine that keeps time, on a clock that jumps: batches, limits, aborts, books; held to the plan's model."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from coldsnap.desk.plan.batch import Speed
from coldsnap.desk.plan.simulation import Traffic
from coldsnap.engine import Generation, HttpRequest, Meter, Usage
from coldsnap.errors import InvalidInput, NotFound, SettingsError
from coldsnap.settings import Settings
from coldsnap.testing.timed_engine import TimedEngine, Timing, boot
from coldsnap.timeline import Timeline

from .test_plan import run_batch

TIMING = Timing(a=0.010, b=0.0001, c=0.0005, d=1e-6, max_num_seqs=256, max_num_batched_tokens=2048)


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, its tokens, and how many it takes before it is left."""

    at: float
    prompt: int
    output: int
    leave: int | None = None


async def play(timing: Timing, asks: list[Ask], interval: float = 0.0) -> tuple[list[Meter], Usage]:
    """Return what each request's meter says in the end, and the engine's books."""
    loop = asyncio.get_running_loop()
    warnings: list[str] = []
    engine = TimedEngine(timing, interval, warnings.append, loop.time)
    begun = loop.time()

    async def one(number: int, ask: Ask) -> Meter:
        await asyncio.sleep(begun + ask.at - loop.time())
        meter, words = Meter(), 0
        request = Generation(f"job-{number}", prompt="a " * ask.prompt, sampling={"max_tokens": ask.output})
        async with aclosing(engine.generate(request, meter)) as deltas:
            async for delta in deltas:
                words += len(delta.text.split())
                assert words == meter.completion_tokens
                if ask.leave is not None and words >= ask.leave:
                    break
        await meter.settle()
        meter.first_token -= begun
        meter.last_token -= begun
        return meter

    meters = await asyncio.gather(*(one(*each) for each in enumerate(asks)))
    usage = engine.usage()
    engine.close()
    assert warnings == []
    return meters, usage


async def test_a_request_alone_takes_its_prefill_and_its_steps() -> None:
    [meter], usage = await play(TIMING, [Ask(1.0, 64, 4)])
    assert meter.first_token == pytest.approx(1 + 0.010 + 64 * 0.0001 + 1e-6 * (64 * 65 / 2) / 64)
    assert meter.last_token == pytest.approx(meter.first_token + 3 * 0.0105 + 1e-6 * (65 + 66 + 67))
    assert (meter.prompt_tokens, meter.completion_tokens, meter.finish_reason) == (64, 4, "length")
    assert meter.gpu_seconds == pytest.approx(usage.busy) == pytest.approx(meter.last_token - 1)
    assert meter.prefill_seconds == pytest.approx(meter.first_token - 1)
    assert (meter.steps, meter.batch) == (4, 4)


async def test_a_long_prompt_comes_in_parts_beside_those_that_decode() -> None:
    timing = Timing(a=0.010, b=0.0001, c=0.0005, d=0.0, max_num_batched_tokens=100)
    [first, long], _ = await play(timing, [Ask(0.0, 50, 20), Ask(0.001, 250, 2)])
    step = 0.010 + 0.0005 + 0.0001 * 99  # one token of the first, and 99 of the prompt
    assert first.first_token == pytest.approx(0.015)
    assert long.first_token == pytest.approx(0.015 + 2 * step + 0.0105 + 0.0001 * 52)
    assert long.queue_seconds == pytest.approx(0.014)


async def test_a_step_holds_so_many_requests_and_the_next_waits_for_an_end() -> None:
    timing = Timing(a=0.010, b=0.0001, c=0.0005, d=0.0, max_num_seqs=2)
    meters, _ = await play(timing, [Ask(0.0, 10, 30), Ask(0.001, 10, 5), Ask(0.002, 10, 3)])
    assert 0.002 + meters[2].queue_seconds == pytest.approx(meters[1].last_token)
    assert meters[2].first_token == pytest.approx(meters[1].last_token + 0.010 + 0.0005 + 0.001)
    assert max(meter.batch / meter.steps for meter in meters) <= 2


@pytest.mark.parametrize("seed", range(12))
async def test_its_batches_are_those_of_the_plan(seed: int) -> None:
    rng = random.Random(seed)
    sequences, tokens = rng.choice([2, 3, 64]), rng.choice([64, 300, 2048])
    timing = Timing(
        a=0.01, b=1e-4, c=5e-4, d=rng.choice([0.0, 1e-5]), max_num_seqs=sequences, max_num_batched_tokens=tokens
    )
    at, asks = 0.0, []
    for _ in range(40):
        at += rng.expovariate(rng.choice([2.0, 20.0]))
        asks.append(Ask(at, rng.randint(1, 500), rng.randint(1, 60)))
    meters, usage = await play(timing, asks, interval=rng.choice([0.0, 0.05]))
    speed = Speed(timing.a, timing.b, timing.c, timing.d, sequences, tokens)
    traffic = Traffic([each.at for each in asks], [each.prompt for each in asks], [each.output for each in asks])
    first, last = run_batch(speed, traffic)
    assert [meter.first_token for meter in meters] == pytest.approx(first.tolist(), abs=1e-6)
    assert [meter.last_token for meter in meters] == pytest.approx(last.tolist(), abs=1e-6)
    assert sum(meter.gpu_seconds for meter in meters) == pytest.approx(usage.busy)
    assert not any(usage.overhead.values())


async def test_the_ledger_learns_what_a_step_takes() -> None:
    rng = random.Random(1)
    asks = [Ask(rng.uniform(0, 30), rng.randint(50, 1500), rng.randint(2, 100)) for _ in range(200)]
    _, usage = await play(TIMING, asks)
    assert usage.fit is not None
    assert (usage.fit.a, usage.fit.b) == pytest.approx((TIMING.a, TIMING.b), rel=0.05)
    assert usage.fit.residual == pytest.approx(0, abs=0.02)


async def test_whoever_leaves_makes_room_and_pays_for_the_step_that_was_under_way() -> None:
    timing = Timing(a=0.010, b=0.0001, c=0.0005, d=0.0, max_num_seqs=1)
    [gone, next_one], usage = await play(timing, [Ask(0.0, 10, 1000, leave=3), Ask(0.001, 10, 5)])
    assert (gone.completion_tokens, gone.finish_reason) == (3, None)
    assert next_one.first_token == pytest.approx(0.011 + 3 * 0.0105 + 0.011)  # two steps, and the one under way
    assert gone.gpu_seconds == pytest.approx(0.011 + 3 * 0.0105)
    assert next_one.gpu_seconds == pytest.approx(0.011 + 4 * 0.0105)
    assert gone.gpu_seconds + next_one.gpu_seconds == pytest.approx(usage.spent)


async def test_whoever_leaves_while_waiting_was_never_there() -> None:
    loop = asyncio.get_running_loop()
    engine = TimedEngine(Timing(max_num_seqs=1), 0.0, lambda _: None, loop.time)

    async def ask(name: str, meter: Meter) -> None:
        async for _ in engine.generate(Generation(name, prompt="a", sampling={"max_tokens": 50}), meter):
            pass

    served, left = Meter(), Meter()
    task = asyncio.create_task(ask("served", served))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(ask("left", left))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await task
    await left.settle()
    assert (left.gpu_seconds, left.completion_tokens) == (0.0, 0)
    assert served.gpu_seconds == pytest.approx(engine.usage().spent)
    engine.close()


async def test_an_engine_that_was_idle_begins_anew() -> None:
    meters, usage = await play(TIMING, [Ask(0.0, 10, 2), Ask(60.0, 10, 2)])
    assert meters[0].gpu_seconds == pytest.approx(meters[1].gpu_seconds) == pytest.approx(usage.spent / 2)
    assert meters[1].first_token - 60 == pytest.approx(meters[0].first_token)


@pytest.mark.parametrize(
    ("prompt", "asked", "said"),
    [
        ("a " * 32_768, 1, "prompt: 32768 words and 1 to come do not fit into 32768"),
        (" ", 1, "prompt: 0 words"),
        ("a", 0, "sampling_params.max_tokens: expected a whole number of at least 1, found 0"),
        ("a", "many", "sampling_params.max_tokens: .*found 'many'"),
    ],
)
async def test_what_it_cannot_do_is_said(prompt: str, asked: object, said: str) -> None:
    engine = TimedEngine(TIMING, 0.0, lambda _: None, asyncio.get_running_loop().time)
    with pytest.raises(InvalidInput, match=said):
        await anext(engine.generate(Generation("1", prompt=prompt, sampling={"max_tokens": asked}), Meter()))
    with pytest.raises(NotFound, match="/v1/models: a timed engine serves native jobs only"):
        engine.http(HttpRequest("GET", "/v1/models"), Meter())
    assert engine.usage().spent == 0
    engine.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [('{"a": 0}', "TIMED_ENGINE: a: .*greater than 0"), ('{"e": 1}', "TIMED_ENGINE: e: "), ("no", "TIMED_ENGINE: ")],
)
def test_a_wrong_timing_is_named(given: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        boot(Settings.read({}), Timeline(), {"TIMED_ENGINE": given}, beside_engine={})
