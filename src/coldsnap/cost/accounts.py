"""Charges the engine's steps to jobs: the engine's numbered requests are matched with the jobs they run for.

frame -> ledger (shares by number) -> account (one call of the engine's `generate`) -> the job's meter

If the frames stop, or never come, the engine's time is split equally among the requests inside it, from the
last frame on, and every record since says that it is estimated. vLLM's names for requests are known here:
`<id>-<8 hex>` inside for `<id>` outside, `<i>_<id>-<8 hex>` where it samples n > 1 completions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from coldsnap.cost.energy import EnergyCounters, EnergyShares, Reading
from coldsnap.cost.equal_split import EqualSplit
from coldsnap.cost.shares import RECOMPUTED, Ledger, Step
from coldsnap.cost.step_reader import Frame, StepReader
from coldsnap.engine import Meter, Usage

_INSIDE = re.compile(r"(.*?)(-[0-9a-f]{8})?", re.DOTALL)
_CHILD = re.compile(r"\d+_(.*)", re.DOTALL)
_TAIL_SECONDS = 1.0
"""How long an aborted request's account waits for the engine to let go of it."""


@dataclass(slots=True, eq=False)
class Account:
    """What one call of `generate` has cost so far, in seconds of the engine."""

    name: str
    requests: int
    """How many requests the call has become inside the engine: `n`, or one."""
    meter: Meter
    entered: float
    """Virtual time of the equal split when the call began; `first` is the same at its first output."""
    frames: int
    """Frames that had been read, and steps that had been lost, when the call began."""
    lost: int
    first: float | None = None
    key: str | None = None
    """The suffix that the engine gave its requests, once one of them has been seen."""
    live: set[int] = field(default_factory=set)
    gone: int = 0
    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    batch: int = 0
    """Steps that its requests were in, and the sizes of those steps' batches, summed."""
    prompt: int = 0
    decoded: int = 0
    """Tokens that its requests' steps have computed."""
    joules: float = 0.0
    split: tuple[float, float] = (0.0, 0.0)
    """The call's seconds by the equal split since the last frame: before and after its first output."""
    aborted: bool = False
    closed: bool = False
    settled: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Accounts:
    """Opens an account for a call of `generate` and closes it into its job's meter.

    `unmetered` says why the engine's steps cannot be metered, None if they can. `warn` is told, once, when
    costs begin to be estimated. `energy` has the counters of the engine's GPUs, if they have any.
    """

    def __init__(
        self,
        ledger: Ledger,
        unmetered: str | None,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        energy: EnergyCounters | None = None,
    ) -> None:
        self.reader = None if unmetered else StepReader(self._frame)
        self._ledger = ledger
        self._warn = warn
        self._split = EqualSplit(clock)
        self._since = self._split.look()
        """Virtual time and busy seconds of the equal split at the last frame."""
        self._counters = energy
        self._energy = EnergyShares(ledger)
        self._reading: Reading | None = None
        """The latest reading of the energy counters that has been shared, None before the first."""
        self._estimated: str | None = None
        self._frames = 0
        self._payers: dict[int, Account] = {}
        self._met = np.zeros((64, 4), np.int64)
        """For each request's number, summed: the steps it was in, the sizes of their batches, and the tokens of its
        prompt and of its decoding that were computed."""
        self._open: dict[str, list[Account]] = {}
        if unmetered:
            self._estimate(unmetered)

    def open(self, name: str, requests: int, meter: Meter) -> Account:
        """Open an account for the call that the engine knows as `name`: `requests` of them inside."""
        if self.reader is not None:
            self.reader.listen()
        account = Account(name, requests, meter, self._split.enter(), self._frames, self._ledger.lost_steps)
        self._open.setdefault(name, []).append(account)
        meter.calls.append(account.settled)
        meter.asked = meter.asked or time.monotonic()
        return account

    def first_output(self, account: Account) -> None:
        """Note that the call's prefill is over, as far as an equal split can tell."""
        account.first = self._split.look()[0]
        account.meter.begun = True

    @property
    def steps(self) -> int | None:
        """How many steps have been reported, None where steps cannot be metered."""
        return self._frames if self._estimated is None else None

    @property
    def busy(self) -> bool:
        """Whether the engine has calls to work on."""
        return bool(self._open)

    def close(self, account: Account, *, aborted: bool) -> None:
        """Charge the job's meter: at once for a call that has ended, for an aborted one after its last step.

        The latter takes a second at most.
        """
        self._drain()
        if account.first is not None and account.key is None and self._frames == account.frames:
            self._estimate("a request ran and no step was reported")
        begun = max(account.entered, self._since[0])
        share = self._split.leave(begun)
        before = share if account.first is None else min(share, max(0.0, account.first - begun))
        account.split = before, share - before
        account.aborted = aborted
        if aborted and self._estimated is None and account.gone < account.requests:
            asyncio.get_running_loop().call_later(_TAIL_SECONDS, self._settle, account)
        else:
            self._settle(account)

    def end(self) -> None:
        """Stop reading the GPUs' counters; what was read stays."""
        if self._counters is not None:
            self._counters.end()

    def usage(self) -> Usage:
        """Return what the engine's time went into so far."""
        self._drain()
        usage = self._ledger.usage()
        if self._measures:
            usage = dataclasses.replace(usage, joules=self._energy.total, request_joules=self._energy.of_requests)
        if self._estimated is None:
            return usage
        busy = usage.busy + self._split.look()[1] - self._since[1]
        return dataclasses.replace(usage, busy=busy, estimated=self._estimated)

    def _settle(self, account: Account) -> None:
        if account.closed:
            return
        account.closed = True
        same = self._open[account.name]
        same.remove(account)
        if not same:
            del self._open[account.name]
        for number in account.live:
            self._credit(account, number)
        if self._estimated is not None:
            account.prefill += account.split[0]
            account.decode += account.split[1]
        meter = account.meter
        if meter.final:  # a job that was torn down, or a response that goes on in the background
            self._ledger.write_off(account.prefill + account.decode)
            self._energy.write_off(account.joules)
        else:
            meter.estimated |= self._estimated is not None or self._ledger.lost_steps != account.lost
            meter.prefill_seconds += account.prefill
            if self._measures:
                meter.joules = (meter.joules or 0.0) + account.joules
            meter.gpu_seconds += account.prefill + account.decode
            meter.steps += account.steps
            meter.batch += account.batch
            if account.first is None:  # cut before an output came: an answer that is not streamed has one at its end
                meter.prompt_tokens += account.prompt
                meter.completion_tokens += account.decoded
        if not account.settled.done():
            account.settled.set_result(None)

    def _frame(self, frame: Frame) -> None:
        if self._estimated is not None:
            return
        self._frames += 1
        if frame.lost_steps:
            self._ledger.lose(frame.lost_steps, frame.lost_seconds)
        if frame.broken is not None:
            self._estimate(frame.broken)
            return
        for name, number in frame.events:
            if name is None:
                self._let_go(number)
            else:
                self._bind(number, name)
        self._ledger.charge(frame.step, frame.metering)
        self._meet(frame.step)
        self._read_energy()
        self._since = self._split.look()

    def _bind(self, number: int, inside: str) -> None:
        """Match a request inside the engine with the call it belongs to; one without a call is overhead."""
        match = _INSIDE.fullmatch(inside)
        assert match is not None
        outside, key = match[1], match[2] or ""
        child = _CHILD.fullmatch(outside)
        for name in (outside, child[1] if child else None, inside):
            for account in self._open.get(name or "", ()):
                if account.key in (None, key):
                    account.key = key
                    account.live.add(number)
                    self._payers[number] = account
                    account.meter.begun = True
                    return

    def _let_go(self, number: int) -> None:
        account = self._payers.pop(number, None)
        if account is None or account.closed:
            self._energy.write_off(self._take_joules(number))
            self._ledger.write_off(sum(self._ledger.take(number)))
            self._part(number)
            return
        self._credit(account, number)
        account.live.remove(number)
        account.gone += 1
        if account.aborted and account.gone == account.requests:
            self._settle(account)

    def _credit(self, account: Account, number: int) -> None:
        account.joules += self._take_joules(number)
        prefill, decode = self._ledger.take(number)
        account.prefill += prefill
        account.decode += decode
        steps, batch, prompt, decoded = self._part(number)
        account.steps += steps
        account.batch += batch
        account.prompt += prompt
        account.decoded += decoded and decoded + 1  # the prompt's last step gives the first

    def _meet(self, step: Step) -> None:
        """Count a step, its size and its tokens for each request in it."""
        numbers = step.numbers
        if not len(numbers):
            return
        if (highest := int(numbers.max())) >= len(self._met):
            self._met = np.concatenate((self._met, np.zeros((highest + 1, 4), np.int64)))
        self._met[numbers, :2] += (1, len(numbers))
        self._met[numbers, 2:] += (0, 1) if step.plain else step.tokens[:, :RECOMPUTED].astype(np.int64)

    def _part(self, number: int) -> tuple[int, int, int, int]:
        """Return the request's steps, their sizes and its tokens, and forget them: its number may be given again."""
        if number >= len(self._met):
            return 0, 0, 0, 0
        steps, batch, prompt, decoded = self._met[number].tolist()
        self._met[number] = 0
        return steps, batch, prompt, decoded

    def _drain(self) -> None:
        if self.reader is not None:
            self.reader.drain()
        self._read_energy()

    @property
    def _measures(self) -> bool:
        """Whether joules are known: the GPUs report them, and the seconds that they are shared by are measured."""
        readable = self._counters is not None and self._counters.latest is not None
        return readable and self._reading is not None and self._estimated is None

    def _take_joules(self, number: int) -> float:
        return 0.0 if self._reading is None else self._energy.take(number)

    def _read_energy(self) -> None:
        reading = self._counters.latest if self._counters is not None else None
        before, self._reading = self._reading, reading or self._reading
        if reading is None or reading is before:
            return
        if before is None:
            self._energy = EnergyShares(self._ledger)  # what was charged until now was not measured
        else:
            self._energy.measured(reading.joules - before.joules, reading.time - before.time)

    def _estimate(self, reason: str) -> None:
        if self._estimated is not None:
            return
        self._estimated = reason
        self._warn(
            f"the engine's steps are not metered: {reason}; costs are an equal split of its time, and the "
            "records say estimated"
        )
        aborted = [each for calls in self._open.values() for each in calls if each.aborted]
        for account in aborted:
            self._settle(account)
