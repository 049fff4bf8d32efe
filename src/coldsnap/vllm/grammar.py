"""Try a grammar in a process that can be killed, before the engine is given it. Nothing here imports vLLM.

A regular expression of sixty characters can keep the engine's process busy for ever, and with it every other job:
nothing interrupts a grammar that is being compiled, nor the search for the tokens that may come next. So each new
grammar is first compiled and followed for some tokens beside the engine, with a limit on processor time and memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from coldsnap.errors import ColdsnapError, EngineDead, InvalidInput
from coldsnap.processes import end_with_parent

Attempt = Callable[[Any], None]
"""Compiles a constraint as the engine would and follows it; raises if it cannot."""

_AT_ONCE = 2
_NICE = 5
"""A trial takes what the engine and the event loop leave."""
_MEMORY = 1 << 30
"""Bytes that a trial may take on top of what its process has."""
_WAITS = 5
"""How many times its processor time a trial may take by the clock: the machine may be busy."""
_REMEMBERED = 1024
_WALKS, _STEPS = 8, 64


class Grammars:
    """Tries grammars in processes forked from this one; `start` before any thread is.

    `setup` is called in the forked process with what `prepare` was given, and returns what makes one attempt.
    A grammar is tried once: the verdict on the last thousand is remembered.
    """

    def __init__(self, setup: Callable[[Any], Attempt], *, most_bytes: int, seconds: float) -> None:
        self._setup = setup
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._pipes = [multiprocessing.Pipe() for _ in range(_AT_ONCE)]
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._threads = ThreadPoolExecutor(_AT_ONCE, "grammar")
        self._verdicts: dict[bytes, asyncio.Future[str]] = {}
        self._prepared = False
        self._process = multiprocessing.get_context("fork").Process(target=self._serve, name="grammars", daemon=True)

    def start(self) -> None:
        """Fork the process that tries them."""
        self._process.start()
        for _, theirs in self._pipes:
            theirs.close()

    def prepare(self, subject: Any) -> None:
        """Hand over what `setup` needs, once, without waiting for it: the process makes itself ready."""
        if self._prepared:
            return
        self._prepared = True

        def hand_over() -> None:
            self._pipes[0][0].send_bytes(pickle.dumps(subject))
            for ours, _ in self._pipes:
                self._idle.put(ours)

        self._threads.submit(hand_over)

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()

    async def check(self, constraint: Any) -> None:
        """Return if the engine can follow `constraint`; raise `InvalidInput` that says why it cannot."""
        message = pickle.dumps(constraint)
        if len(message) > self._most_bytes:
            raise InvalidInput(
                f"a grammar of {len(message)} bytes; at most GRAMMAR_MAX_BYTES={self._most_bytes} are taken",
                param="structured_outputs",
            )
        key = hashlib.blake2b(message).digest()
        if (verdict := self._verdicts.pop(key, None)) is None:
            verdict = asyncio.get_running_loop().run_in_executor(self._threads, self._ask, message)
        self._verdicts[key] = verdict  # the newest is the last
        if len(self._verdicts) > _REMEMBERED:
            del self._verdicts[next(iter(self._verdicts))]
        if complaint := await asyncio.shield(verdict):
            raise InvalidInput(complaint)  # as vLLM says it, which names no parameter

    def alive(self) -> None:
        """Raise `EngineDead` if grammars cannot be tried any more."""
        if not self._process.is_alive():
            raise EngineDead("the process that tries grammars is gone")

    def _ask(self, message: bytes) -> str:
        connection = self._idle.get()
        try:
            connection.send_bytes(message)
            return connection.recv_bytes().decode()
        except (EOFError, OSError):
            return "the process that tries grammars is gone"
        finally:
            self._idle.put(connection)

    # In the other process.

    def _serve(self) -> None:
        end_with_parent()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # jobs are still running then
        os.nice(_NICE)
        logging.disable(logging.CRITICAL)  # a traceback for each grammar that is none
        gc.freeze()
        for ours, _ in self._pipes:
            ours.close()
        first, *others = (theirs for _, theirs in self._pipes)
        with contextlib.suppress(EOFError):
            attempt = self._setup(pickle.loads(first.recv_bytes()))  # noqa: S301 -- from our own process
            for other in others:
                if os.fork() == 0:
                    end_with_parent()
                    first = other
                    break
            while True:
                self._try(attempt, first)
        os._exit(0)

    def _try(self, attempt: Attempt, connection: Connection) -> None:
        message = connection.recv_bytes()
        child = os.fork()
        if child == 0:
            self._limit()
            complaint = ""
            try:
                attempt(pickle.loads(message))  # noqa: S301 -- from our own process
            except MemoryError:
                complaint = f"the grammar needs more than {_MEMORY >> 20} MiB of memory"
            except ColdsnapError as error:
                complaint = error.message
            except Exception as error:  # noqa: BLE001 -- whatever the compiler raises, the grammar is not followed
                complaint = f"{error}" or type(error).__name__
            connection.send_bytes(complaint.encode(errors="replace")[:1000])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            signum = os.WTERMSIG(status)
            complaint = f"the grammar's compiler fails with signal {signum}"
            if signum in {signal.SIGPROF, signal.SIGALRM}:
                complaint = (
                    f"to compile the grammar and to follow it for {_WALKS * _STEPS} tokens takes more than "
                    f"GRAMMAR_SECONDS={self._seconds:g} of processor time, or {_WAITS} times that by the clock"
                )
            connection.send_bytes(f"{complaint}; send a simpler one".encode())

    def _limit(self) -> None:
        end_with_parent()
        for signum in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(signum, signal.SIG_DFL)  # ends the process, also inside a library
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # a compiler that crashes is one sentence, not our stack
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        signal.setitimer(signal.ITIMER_REAL, _WAITS * self._seconds)


def follow(grammar: Any, bitmask: Any) -> None:
    """Follow a compiled grammar for some tokens, as decoding would. Raises `ValueError` if it cannot begin.

    Some compile at once and take long to say what may come next, the longer the further they are. What was not allowed
    a token ago is taken first, it leads on, and what has ended a walk last; every other walk goes on with the token
    that it has just taken. The first takes the lowest, in most vocabularies a sign rather than a blank: so it comes to
    what lies behind a key of JSON.
    """
    import numpy as np

    size = 8 * bitmask[0].numpy().nbytes
    ends = np.zeros(size, np.uint8)
    for walk in range(_WALKS):
        choose = random.Random(walk).choice if walk else min  # noqa: S311 -- the same each time, to be repeatable
        before, again = np.zeros((2, size), np.uint8)
        token = 0
        for step in range(_STEPS):
            if grammar.is_terminated():
                ends[token] = 1
                break
            grammar.fill_bitmask(bitmask, 0)
            allowed = np.unpackbits(bitmask[0].numpy().view(np.uint8), bitorder="little")
            sets = ((allowed > before) > ends, again & allowed if walk % 2 else before & 0, allowed > ends, allowed)
            tokens = next((each for each in map(np.flatnonzero, sets) if len(each)), None)
            if tokens is None:
                if step == 0:
                    raise ValueError("no token may begin the answer: the grammar leads to no end")
                break
            before, token = allowed, int(choose(tokens))
            again[:] = 0
            again[token] = 1
            if not grammar.accept_tokens("trial", [token]):
                break
        grammar.reset()
