"""The worker's process: boot, then the SDK's loop until SIGTERM. The only module that imports the SDK."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from coldsnap import fitness, local, patches, processes
from coldsnap.boot import Booted, boot
from coldsnap.caches.boot_caches import BundleMaker
from coldsnap.errors import BootError, ColdsnapError, Draining, Unfit
from coldsnap.foundation.background import Background
from coldsnap.image import later
from coldsnap.image.later import Later
from coldsnap.jobs import dispatch, post
from coldsnap.jobs.egress import Egress
from coldsnap.jobs.job import Jobs
from coldsnap.jobs.request import sequences
from coldsnap.life import TICK_SECONDS, Life
from coldsnap.records.metrics import Metrics, Push
from coldsnap.records.sink import Sink
from coldsnap.records.upload import Upload
from coldsnap.settings import ROOT, Settings
from coldsnap.timeline import Timeline
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm import start as vllm_start

_SDK_ENVIRONMENT: Mapping[str, str] = {
    # The default, DEBUG, prints every chunk with its text, and the job URL with its credentials.
    "RUNPOD_LOG_LEVEL": "WARN",
    # The SDK's own checks initialise CUDA in this process; the engine has just proven that the GPU works.
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
}
_YOUNG = 10_000
"""Allocations between two collections; Python's default is 700."""
_LAST_SENDS_SECONDS = 10.0
"""For the last records of a worker that ends; what is not uploaded by then stays on disk."""


def main(start: Callable[..., Booted] = boot, *, timeline: Timeline | None = None) -> int:
    """Run the worker; return its exit code: 0 after a drain, 1 after an error. `start` boots it.

    A `timeline` comes from a process that was restored and has phases of its own behind it.
    """
    if timeline is None:
        timeline = Timeline()
        timeline.mark("python")
    given = dict(os.environ)
    try:
        settings = Settings.read(os.environ)
        test_input = local.test_input(sys.argv, on_platform=settings.on_platform)
        prepare(os.environ, local=test_input is not None)
        processes.remove_left_behind(fitness.scratch())
        processes.tie_children()
        booted = start(
            settings,
            timeline,
            os.environ,
            beside_engine={"import_sdk": import_sdk, "import_http": vllm_start.load_http},
        )
    except BootError as error:
        _say(error.message)
        if isinstance(error, Unfit) and settings.on_platform:
            _report_unhealthy(error)
        return 1
    try:
        if test_input is None:
            return _Worker(booted, given).serve()
        return _run_local(booted, test_input, given)
    except BootError as error:  # of the warm-up, in the loop that would have run the jobs
        _say(error.message)
        return 1
    finally:
        booted.engine.close()


class _Worker:
    """Serves the platform's jobs on a booted engine. It is the `dispatch.Worker` of the SDK's scaler."""

    def __init__(self, booted: Booted, given: Mapping[str, str] | None = None) -> None:
        self.concurrency = _concurrency(booted)
        self.drain_seconds = booted.settings.drain_seconds
        self._booted = booted
        self._sink = Sink(booted.settings.ledger_dir, lambda line: print(line, flush=True))  # noqa: T201
        self._life = Life(booted, self._sink)
        self._jobs = Jobs(booted.engine, booted.settings, self._sink, self._die)
        self._egress: Egress | None = None
        self._metrics = Metrics(posts=lambda: self._egress.posts if self._egress else 0)
        self._sink.watchers.append(self._metrics.see)
        self._senders = _senders(booted.settings, self._sink, self._jobs)
        self._senders += _bundle_maker(booted, self._sink, self._jobs)
        if given is not None and _wants_image(booted.settings):
            tally, jobs = self._sink.tally, self._jobs
            make = functools.partial(_make_image, given)
            self._senders.append(Later(make, busy=lambda: jobs.running, served=lambda: tally.requests))
        self.handle_job: Callable[[Any, Any, dict[str, Any]], Awaitable[None]]
        self._dead: ColdsnapError | None = None
        self._scaler: Any = None

    def serve(self) -> int:
        """Run the SDK's loop until it ends; return the exit code."""
        import runpod
        import uvloop
        from runpod.serverless.modules import rp_http, rp_scale

        if self._life.price.per_second is None:
            _say(f"costs in GPU-seconds only: {self._life.price.origin}")
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        if patches.allowed("dispatch", unlike=dispatch.differs(rp_scale.JobScaler)):
            urls = rp_http.JOB_STREAM_URL, rp_http.JOB_DONE_URL
            self._egress = Egress(self._jobs.handle, *urls, rp_scale.log.error, lambda: self._dead is not None)
            self.handle_job = self._egress.handle_job
            rp_scale.JobScaler = dispatch.event_driven(rp_scale, self)
        else:
            self._ready()
        concurrency = self.concurrency
        runpod.serverless.start(
            {
                "handler": self._jobs.handle,
                "return_aggregate_stream": True,
                # A value that changes stops intake until every running job is done.
                "concurrency_modifier": lambda _: concurrency,
            }
        )
        self._booted.engine.close()
        self._life.end()
        deadline = time.monotonic() + _LAST_SENDS_SECONDS
        for sender in self._senders:
            sender.stop()
        for sender in self._senders:
            sender.end(deadline - time.monotonic())
        if self._dead is not None:
            _say(f"{self._dead.message}; the worker ends")
            return 1
        return 0

    def attach(self, scaler: Any) -> None:
        """See `dispatch.Worker`."""
        self._scaler = scaler

    async def ready(self) -> None:
        """Warm up in the loop that will run the jobs, and record the cold start."""
        self._booted.timeline.mark("sdk")
        await self._booted.engine.warm_up()
        self._booted.timeline.mark("warm_up")
        self._booted.advise()
        # What is alive by now stays. Looking through it again and again took a tenth of a busy front end, and 60 ms
        # at a time in which no stream moved.
        gc.freeze()
        gc.set_threshold(_YOUNG)
        asyncio.get_running_loop().run_in_executor(None, post.trust)  # before the first POST, after the boot
        self._ready()

    async def watch(self) -> None:
        """End the worker when the engine's process dies, also while no job would notice."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                self._booted.engine.check()
            except ColdsnapError as error:
                self._die(error)
            self._jobs.turn_away()
            self._life.tick()
            if self._booted.settings.metrics_push_url and (totals := self._life.totals()):
                self._metrics.see(totals)  # the record comes every 10 s, every 60 in an idle worker

    def weigh(self, job: dict[str, Any]) -> int:
        """See `dispatch.Worker`: a job of `n` completions counts as `n`."""
        return min(sequences(job), self._booted.settings.max_n)

    def draining(self) -> None:
        """See `dispatch.Worker`."""
        self._life.drain()
        for sender in self._senders:
            sender.soon()

    def stop_jobs(self) -> None:
        """See `dispatch.Worker`."""
        reason = f"the worker was stopped and the job did not end within DRAIN_SECONDS={self.drain_seconds:g}"
        self._jobs.stop(self._dead or Draining(reason))

    def _ready(self) -> None:
        self._life.ready()
        for sender in self._senders:
            sender.start()

    def _die(self, error: ColdsnapError) -> None:
        self._dead = self._dead or error
        self.drain_seconds = 0.0
        if self._scaler is not None:
            self._scaler.kill_worker()


def _concurrency(booted: Booted) -> int:
    """Return how many jobs are taken at once: others are left to other workers, or refused where they are queued."""
    most, queue, limits = booted.settings.max_concurrency, booted.settings.max_queue, booted.engine.info.limits
    return most if queue is None or limits is None else min(most, limits.max_num_seqs + queue)


def _senders(settings: Settings, sink: Sink, jobs: Jobs) -> list[Background]:
    """Return what carries records and metrics out of a worker that nobody can reach."""
    senders: list[Background] = []
    if settings.ledger_s3_uri is not None:
        senders.append(Upload(sink, settings, settings.ledger_s3_uri, lambda: jobs.running, _say))
    if settings.metrics_push_url is not None:
        senders.append(Push(settings, settings.metrics_push_url, _say))
    return senders


def _bundle_maker(booted: Booted, sink: Sink, jobs: Jobs) -> list[Background]:
    """Return what makes the bundle of caches that this boot lacked."""
    bundle_request = booted.bundle()
    if booted.caches is None or bundle_request is None:
        return []
    return [
        BundleMaker(
            booted.caches, bundle_request, busy=lambda: jobs.running, served=lambda: sink.tally.requests, say=_say
        )
    ]


def _wants_image(settings: Settings) -> bool:
    """Whether `coldsnap-start` would have restored this process, had there been an image that fits."""
    return settings.image_refused is not None and settings.process_image == "auto" and vllm_release.is_cpu_build()


def _make_image(given: Mapping[str, str]) -> None:
    """Have the image made that a boot in the environment `given` can use."""
    folder = ROOT / "build" / "image"
    program = "import sys; sys.path.insert(0, sys.argv[1]); from coldsnap import make_image; make_image.command()"
    try:
        later.start([sys.executable, "-P", "-c", program, str(ROOT / "src")], given, folder)
    except OSError as error:
        _say(f"no process image is made: {folder}: {error.strerror}")
    else:
        _say("a process image is being made, some 15 s; later boots are restored from it")


def _run_local(booted: Booted, test_input: str, given: Mapping[str, str]) -> int:
    """Run one job through the SDK's local mode, showing it on the terminal; return the exit code."""
    import runpod

    records: list[str] = []
    sink = Sink(booted.settings.ledger_dir, records.append)
    jobs = Jobs(booted.engine, booted.settings, sink, lambda _: None)
    life = Life(booted, sink)
    view = local.View(booted)
    failed: list[BootError] = []

    async def watched() -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                booted.engine.check()
            except ColdsnapError as error:
                return jobs.stop(error)

    async def drained(job: dict[str, Any]) -> Any:
        # The SDK's local mode never iterates a generator: it prints the object and calls it a success. And it takes
        # SIGINT, for an end with exit code 0 and a traceback.
        processes.end_at_signals()
        booted.timeline.mark("sdk")
        try:
            await booted.engine.warm_up()
        except BootError as error:
            failed.append(error)
            raise SystemExit(1) from error  # an exception would be the job's, with a traceback
        booted.timeline.mark("warm_up")
        booted.advise()
        cold_start = life.ready()
        view.begin(job)
        watch = asyncio.create_task(watched())
        chunks = [view.chunk(chunk) async for chunk in jobs.handle(job)]
        watch.cancel()
        view.end(chunks, cold_start, records, written=not sink.tally.unwritten)
        last = chunks[-1]
        return {"error": last["error"]} if isinstance(last, dict) and "error" in last else {"chunks": chunks}

    sys.argv[1:] = ["--test_input", test_input]
    try:
        runpod.serverless.start({"handler": drained})
    except SystemExit as end:
        if failed:
            raise failed[0] from None
        return end.code if isinstance(end.code, int) else 1
    finally:
        booted.engine.close()
        life.end()
        view.last(records)
        if _wants_image(booted.settings):
            _make_image(given)
    return 0


def prepare(environ: MutableMapping[str, str], *, local: bool) -> None:
    """Set what the SDK, and what vLLM of a `local` job, should find in their environment as they are imported."""
    for name, value in _SDK_ENVIRONMENT.items():
        environ.setdefault(name, value)
    if local:
        environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def import_sdk() -> None:
    """Import the SDK, without its look at the processor, which takes two processes and 0.4 s."""
    cpuinfo: Any = importlib.import_module("cpuinfo")
    ask = cpuinfo.get_cpu_info
    if patches.allowed("processor_name"):
        cpuinfo.get_cpu_info = dict  # for the SDK's debugger, which takes none for an answer
    try:
        importlib.import_module("runpod.serverless.modules.rp_scale")
    finally:
        cpuinfo.get_cpu_info = ask
    importlib.import_module("uvloop")


def _report_unhealthy(error: Unfit) -> None:
    """Tell the platform, with the ping that the SDK sends when a check of its own fails."""
    if not patches.allowed("unhealthy"):
        return
    fitness: Any = importlib.import_module("runpod.serverless.modules.rp_fitness")
    fitness._report_unhealthy(error.check, error.message.removeprefix(f"{error.check}: "))  # noqa: SLF001 -- the SDK has no public name for it


def _say(message: str) -> None:
    print(f"coldsnap: {message}", file=sys.stderr, flush=True)  # noqa: T201
