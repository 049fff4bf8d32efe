"""Reads the frames of `step_meter` out of its FIFO and turns them into steps that can be charged."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from coldsnap.cost.shares import DECODE, Step
from coldsnap.cost.step_meter import BROKEN, EVENT, HEADER
from coldsnap.processes import PIPE

_PIPE_BYTES = 1 << 20
_READ_EVERY_SECONDS = 0.05
"""Frames are read in batches: the first of a read costs several times what the others do."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One step as it arrives. `events`: (id, number) of a request that begins, (None, number) of one gone."""

    step: Step
    metering: float
    lost_steps: int
    lost_seconds: float
    events: tuple[tuple[str | None, int], ...]
    broken: str | None = None
    """Why the metering ended with this frame, None for all others."""


class StepReader:
    """Reads the frames: on demand with `drain`, and every 50 ms while an event loop runs."""

    def __init__(self, on_frame: Callable[[Frame], None]) -> None:
        self._on_frame = on_frame
        self.path = str(Path(tempfile.gettempdir(), f"{PIPE}{uuid4().hex}"))
        """The FIFO's path, handed to the engine by its environment."""
        os.mkfifo(self.path, 0o600)
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)  # a writer too: no end of file between others
        with contextlib.suppress(OSError):  # more than a user may have in all: then what the pipe has
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._raw = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None

    def opened(self) -> None:
        """Remove the path once the engine has it open: nothing is left behind, however the worker ends."""
        Path(self.path).unlink(missing_ok=True)

    def listen(self) -> None:
        """Read in the running event loop from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            loop.add_reader(self._fd, self._readable)

    def drain(self) -> None:
        """Hand over every frame that has been written."""
        try:
            while data := os.read(self._fd, _PIPE_BYTES):
                self._raw += data
                if len(data) < _PIPE_BYTES:
                    break
        except BlockingIOError:
            pass
        at = 0
        while len(self._raw) - at >= HEADER.size:
            size = 4 + int.from_bytes(self._raw[at : at + 4], "little")
            if len(self._raw) - at < size:
                break
            frame = decode(bytes(self._raw[at : at + size]))
            at += size
            self._on_frame(frame)
        del self._raw[:at]

    def _readable(self) -> None:
        """Read, then leave the pipe alone for a moment: a wake-up a step would cost more than the ledger."""
        loop = self._loop
        assert loop is not None
        loop.remove_reader(self._fd)
        self.drain()
        loop.call_later(_READ_EVERY_SECONDS, loop.add_reader, self._fd, self._readable)


def decode(data: bytes) -> Frame:
    """Return the frame that `StepMeter` wrote."""
    _, start, end, own, lost, lost_seconds, size, decodes, others = HEADER.unpack_from(data)
    at = HEADER.size
    if decodes == BROKEN:
        nothing = Step(start, end, np.zeros(0, np.intp), np.zeros((0, 3)), np.zeros(0))
        return Frame(nothing, own, lost, lost_seconds, (), data[at:].decode(errors="replace"))
    events: list[tuple[str | None, int]] = []
    stop = at + size
    while at < stop:
        begins, number, length = EVENT.unpack_from(data, at)
        at += EVENT.size
        events.append((data[at : at + length].decode() if begins else None, number))
        at += length
    words = np.frombuffer(data, "<u4", offset=at)
    if decodes and not others:
        numbers, context = words[::2].astype(np.intp), words[1::2].astype(np.float64)
        step = Step(start, end, numbers, _one_decoded(decodes), context, plain=True)
        return Frame(step, own, lost, lost_seconds, tuple(events))
    plain = words[: 2 * decodes].reshape(decodes, 2)
    other = words[2 * decodes :].reshape(others, 5)
    tokens = np.zeros((decodes + others, 3))
    tokens[:decodes, 1] = 1
    tokens[decodes:] = other[:, 1:4]
    numbers = np.concatenate((plain[:, 0], other[:, 0])).astype(np.intp)
    context = np.concatenate((plain[:, 1], other[:, 4])).astype(np.float64)
    return Frame(Step(start, end, numbers, tokens, context), own, lost, lost_seconds, tuple(events))


@cache
def _one_decoded(requests: int) -> NDArray[np.float64]:
    tokens = np.zeros((requests, 3))
    tokens[:, DECODE] = 1
    tokens.flags.writeable = False
    return tokens
