"""Shares the GPUs' energy among requests, in proportion to the seconds that each was charged.

NVML counts each GPU's energy, in steps of 20 to 100 ms: far longer than a step, so that no step has joules of its
own. A thread reads the counters ten times a second. Between two readings, dt apart, the GPUs have used dE. Every
second in between has the same price, whoever owns it:

    joules_i = dE * s_i / dt,    s_i = the seconds that request i was charged in between

and what no request was charged, overhead and idle, is the worker's own. A request that ends between two readings
is billed at once, at the power of the interval before; the difference to what is then measured goes to the next
interval's price. So requests and worker together have exactly what the counters say, less one interval at most.

Nothing is guessed: without counters, on a CPU or a GPU that has none, or after one fails, there are no joules.
The counters are of whole GPUs: what another process does on them is counted too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldsnap.cost.shares import Ledger
from coldsnap.foundation.nvml import driver

_READ_EVERY_SECONDS = 0.1


class EnergyShares:
    """Shares measured joules in proportion to the seconds that `ledger` has charged. Pure; times in seconds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spent = ledger.spent
        self._priced = ledger.held
        """Seconds of each request that joules have been shared for already; `_owed` holds those joules."""
        self._owed: NDArray[np.float64] = np.zeros(len(self._priced))
        self._watts = 0.0
        self._pool = 0.0
        """Joules that are measured and not yet shared; below zero if they were shared before they were measured."""
        self._ended = 0.0
        """Seconds, since the last reading, of requests that have ended in between."""
        self._paid = 0.0
        self.total = 0.0
        """Joules measured."""
        self.of_worker = 0.0
        """Joules of overhead and idle time, and of requests that belong to no job."""

    @property
    def of_requests(self) -> float:
        """Joules that were charged to requests."""
        return self._paid + float(self._owed.sum())

    def measured(self, joules: float, seconds: float) -> None:
        """Share the energy of an interval, which has just ended. Both are above zero."""
        self._fit()
        fresh = self._ledger.held - self._priced
        spent = self._ledger.spent - self._spent
        self._spent += spent
        idle = max(0.0, seconds - spent)
        unpaid = max(float(fresh.sum()), spent - self._ended) + idle
        self.total += joules
        self._pool += joules
        self._watts = joules / seconds
        self._ended = 0.0
        if unpaid > 0 and self._pool > 0:
            price = self._pool / unpaid
            self._owed += fresh * price
            self.of_worker += (unpaid - float(fresh.sum())) * price
            self._pool = 0.0
        self._priced += fresh

    def take(self, number: int) -> float:
        """Return the request's joules since they were last taken, before the ledger's seconds are."""
        self._fit()
        if number >= len(self._owed):
            return 0.0
        fresh = float(self._ledger.held[number] - self._priced[number])
        ahead = fresh * self._watts
        joules = float(self._owed[number]) + ahead
        self._owed[number] = self._priced[number] = 0.0
        self._pool -= ahead
        self._ended += fresh
        self._paid += joules
        return joules

    def write_off(self, joules: float) -> None:
        """Make joules that were taken, and have no owner, the worker's own."""
        self._paid -= joules
        self.of_worker += joules

    def _fit(self) -> None:
        if more := len(self._ledger.held) - len(self._owed):
            self._owed = np.concatenate((self._owed, np.zeros(more)))
            self._priced = np.concatenate((self._priced, np.zeros(more)))


@dataclass(frozen=True, slots=True)
class Reading:
    """The joules of all GPUs since their counters began, at `time` of the monotonic clock."""

    time: float
    joules: float


class EnergyCounters:
    """Reads the counters of some GPUs in a thread of its own. `latest` is None before the first and after a failure."""

    def __init__(
        self, devices: Sequence[int], warn: Callable[[str], None], nvml: Callable[[], Any] | None = None
    ) -> None:
        """Take the GPUs by NVML's indices. `nvml` returns the module that speaks to the driver."""
        self._devices = devices
        self._warn = warn
        self._load = nvml or driver
        self.latest: Reading | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)

    def start(self) -> None:
        """Begin to read. Not before the engine is forked."""
        self._thread.start()

    def end(self) -> None:
        """Stop."""
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        nvml = self._load()
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in self._devices]
            while not self._ended.is_set():
                joules = sum(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
                if self.latest is not None and joules < self.latest.joules:
                    self._warn("a GPU's energy counter went back; there are no joules from now on")
                    break
                self.latest = Reading(time.monotonic(), joules)
                self._ended.wait(_READ_EVERY_SECONDS)
            else:
                return
        except nvml.NVMLError as error:
            self._warn(f"no joules in costs and records: {error}")
        self.latest = None
