"""Fetches a boot's compile caches as a bundle while vLLM is imported, and makes a bundle where there was none.

boot -> fingerprint -> its bundle, unpacked before the engine looks for it -> ... -> first idle second -> a new bundle

Whatever goes wrong costs what the caches would have saved and nothing else: the engine computes what it does not find.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from coldsnap import timeline
from coldsnap.caches import fingerprint
from coldsnap.errors import CacheError
from coldsnap.foundation.background import Background
from coldsnap.foundation.s3 import Place
from coldsnap.records.schema import CacheState
from coldsnap.snapshot.sources import Supply

_ANSWER_SECONDS = 0.5
"""How long after the import of vLLM a boot waits for a store that has not begun to answer."""
_MOST_SECONDS = 30.0
"""How long it waits at most for a bundle that is on its way; less where a boot without it takes less."""
_GENERATIONS = 3
"""How often a bundle is made that lacked something: some caches write a new file at every boot."""
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Cached:
    """What became of a boot's bundle.

    `refused` is a bundle that is damaged or another's; `late` a store that was too slow, `failed` one, or a disk, that
    could not be used: `because` says how. `seconds` is what the fetch took, beside the boot.
    """

    state: CacheState = "off"
    because: str | None = None
    fingerprint: str | None = None
    bytes: int | None = None
    seconds: float = 0.0
    generation: int = 0
    saves_seconds: float = 0.0


OFF = Cached()


@dataclass
class Caches:
    """One boot's caches, from `begin` on.

    `place` is where bundles are shared, `gpu` whether this vLLM needs one, `names` are vLLM's arguments.
    """

    place: Path | Place
    folders: Mapping[str, Path]
    names: frozenset[str]
    gpu: bool
    started: float = field(default_factory=lambda: time.time() - timeline.process_age())
    _factors: dict[str, str] = field(default_factory=dict)
    _environ: dict[str, str] = field(default_factory=dict)
    _fetching: Helper | None = None

    def begin(self, environ: Mapping[str, str]) -> None:
        """Start the process that fetches; it waits until `ask` names the model."""
        self._environ = dict(environ)
        self._fetching = self.helper("fetch")

    def ask(self, supply: Supply, model: str) -> None:
        """Tell the fetching process the model, as soon as it is known and the environment is what vLLM will find."""
        manifest = supply.manifest
        self._factors = fingerprint.of_settings(
            digest=manifest.digest if manifest else None,
            model=model,
            manifest=manifest.engine_args if manifest else {},
            environ=self._environ,
            names=self.names,
            folders=self.folders,
        )
        assert self._fetching is not None
        self._fetching.ask(self.request())

    def request(self, **more: Any) -> dict[str, Any]:
        """Return what a helper is asked."""
        folders = {name: str(folder) for name, folder in self.folders.items()}
        return {"factors": self._factors, "folders": folders, **more}

    def helper(self, action: str) -> Helper:
        """Start a helper for this boot's store."""
        return Helper([action, str(self.place), *(["gpu"] if self.gpu else [])], self._environ)

    def result(self) -> Cached:
        """Return what the fetch came to. It is given up where going on would take longer than the bundle saves."""
        assert self._fetching is not None
        begun, patience, cached = time.monotonic(), _ANSWER_SECONDS, OFF
        try:
            while True:
                answer = self._fetching.answer(begun + patience - time.monotonic())
                if answer is None:
                    waited = f"{time.monotonic() - begun:.1f} s after the import of vLLM"
                    return Cached("late", f"it was not there {waited}")
                if "state" in answer:
                    cached = Cached(**answer)
                    return cached
                patience = max(patience, min(_MOST_SECONDS, answer["saves_seconds"]))
        except CacheError as error:
            return Cached("failed", error.message)
        finally:
            if cached.state == "hit":
                self._fetching.leave()  # it notes that the bundle is in use, and ends
            else:
                self._fetching.end()

    def complaint(self, cached: Cached) -> str | None:
        """Return the line for stderr about a fetch, None if there is nothing to say."""
        if cached.state == "refused":
            return f"CACHE_URI: bundle {cached.fingerprint} in {self.place} is refused and made anew: {cached.because}"
        if cached.state in {"late", "failed"}:
            return f"CACHE_URI: {self.place}: no bundle for this boot: {cached.because}"
        return None


def making(cached: Cached, started: float, boot_seconds: float) -> dict[str, Any] | None:
    """Return the request to a helper that stores a bundle after this boot; None if there is nothing to store.

    `started` is when the boot began (s since 1970), `boot_seconds` what its engine took.
    """
    if cached.state in {"off", "failed"} or cached.generation >= _GENERATIONS:
        return None
    if cached.state == "hit":  # made again only if the boot had to compute something that was not in it
        saves = max(cached.saves_seconds, boot_seconds)
        return {"replace": True, "since": started, "saves_seconds": saves, "generation": cached.generation + 1}
    replace = cached.state == "refused"
    return {"replace": replace, "since": None, "saves_seconds": boot_seconds, "generation": 1}


class BundleMaker(Background):
    """Makes the bundle that a boot did not find, in a process of its own, while no job runs.

    It begins after the first second without a job, is stopped as long as one runs, and killed when the worker ends.
    """

    def __init__(
        self,
        caches: Caches,
        bundle_request: Mapping[str, Any],
        *,
        busy: Callable[[], bool],
        served: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        super().__init__("caches", self._look, lambda: not self._done)
        self._caches = caches
        self._asked_for = bundle_request
        self._busy = busy
        self._served = served
        self._say = say
        self._done = False
        self._seen = -1

    def soon(self) -> None:
        """Stop: the worker is about to end."""
        self.stop()

    def _look(self) -> None:
        served = self._served()
        idle = not self._busy() and served == self._seen
        self._seen = served
        if idle and not self.ending and not self._done:
            self._done = True
            self._make()

    def _make(self) -> None:
        place = self._caches.place
        helper = self._caches.helper("store")
        try:
            helper.be_idle()
            helper.ask(self._caches.request(**self._asked_for))
            answer = None
            while answer is None and not self.ending:
                helper.pause(self._busy())
                answer = helper.answer(_LOOK_SECONDS)
        except CacheError as error:
            answer = {"state": "failed", "because": error.message}
        finally:
            helper.end()
        if answer and answer["state"] == "stored":
            size = f"{answer['bytes']} bytes{answer['also']}"
            self._say(f"cache bundle {answer['fingerprint']} stored in {place}, {size}")
        elif answer and answer["state"] == "failed":
            self._say(f"CACHE_URI: {place}: no bundle was stored: {answer['because']}")


class Helper:
    """A process of `coldsnap.caches.helper`."""

    def __init__(self, arguments: list[str], environ: Mapping[str, str]) -> None:
        source = str(Path(__file__).resolve().parents[2])
        path = environ.get("PYTHONPATH")
        self._process = subprocess.Popen(  # noqa: S603 -- our own module
            [sys.executable, "-m", "coldsnap.caches.helper", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environ, "PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source},
        )
        self._heard = b""
        self._paused = False

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send the request. Nothing if the helper has ended: `answer` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))
            self._process.stdin.close()

    def answer(self, within: float) -> dict[str, Any] | None:
        """Return the next line that it says, None if none came in time. Raises `CacheError` if it has ended."""
        assert self._process.stdout is not None
        until = time.monotonic() + within
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            output = os.read(self._process.stdout.fileno(), 1 << 16)
            if not output:
                raise CacheError(f"its process ended with {self._process.wait()}; its message is above")
            self._heard += output
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = orjson.loads(line)
        return answer

    def be_idle(self) -> None:
        """Give the process the lowest priority for processors and disks."""
        try:
            os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # a sandbox without it
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)

    def pause(self, paused: bool) -> None:
        """Stop it, or let it go on."""
        if paused != self._paused:
            self._paused = paused
            self._process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def end(self) -> None:
        """Kill it if it still runs. Not waited for: a dead volume may hold it where no signal reaches it."""
        self._process.kill()
        self.leave()

    def leave(self) -> None:
        """Stop listening to the process; it goes on by itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.poll()
