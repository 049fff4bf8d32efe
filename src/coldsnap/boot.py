"""A worker's life up to ready, in the order it happens.

environment -> settings -> fitness, snapshot (beside the import) -> import of vLLM -> engine -> warm-up -> ready
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from coldsnap import fitness, patches
from coldsnap.caches import boot_caches as caches
from coldsnap.caches.boot_caches import OFF, Cached, Caches
from coldsnap.engine import Engine
from coldsnap.errors import BootError
from coldsnap.foundation import memory
from coldsnap.image import arrival
from coldsnap.records.schema import ColdStart, origin
from coldsnap.settings import Settings
from coldsnap.snapshot import sources
from coldsnap.snapshot.manifest import Manifest
from coldsnap.snapshot.sources import HUB, Supply
from coldsnap.snapshot.weights import WeightsCheck
from coldsnap.timeline import Timeline
from coldsnap.vllm import release as vllm_release
from coldsnap.vllm import start as vllm_start
from coldsnap.vllm.grammar import Grammars


@dataclass(frozen=True, slots=True)
class Booted:
    """An engine that runs, and what its cold start has cost so far."""

    engine: Engine
    settings: Settings
    timeline: Timeline
    manifest: Manifest | None
    supply: Supply = HUB
    caches: Caches | None = None
    """None where bundles are not shared."""
    cached: Cached = OFF

    def cold_start(self) -> ColdStart:
        """Return the record of this boot; its phases add up to now."""
        info, supply, reading = self.engine.info, self.supply, self.supply.reading
        speed = None
        if supply.fetched_bytes and supply.fetch_seconds:
            speed = round(supply.fetched_bytes / supply.fetch_seconds / 1e9, 6)
        return ColdStart(
            **origin(self.settings, info),
            seconds=round(self.timeline.total, 6),
            phases={name: round(seconds, 6) for name, seconds in self.timeline.phases.items()},
            beside={name: round(seconds, 6) for name, seconds in self.timeline.beside.items()},
            snapshot_bytes=self.manifest.size if self.manifest else None,
            source=supply.source,
            verified=supply.verified,
            fetched_bytes=supply.fetched_bytes,
            fetch_gb_per_second=speed,
            read_gb_per_second=round(reading.bytes / reading.seconds / 1e9, 6) if reading else None,
            disk_read_bytes=reading.disk_bytes if reading else None,
            cache=self.cached.state,
            cache_because=self.cached.because,
            cache_bundle=self.cached.fingerprint,
            cache_bytes=self.cached.bytes,
            model=info.models[0],
            start_method=info.start_method,
            limits=info.limits,
            max_concurrency=self.settings.max_concurrency,
            degraded=patches.degraded(),
            image="restored" if arrival.is_restored() else "plain",
            image_because=self.settings.image_refused,
        )

    def advise(self) -> None:
        """Say what is served here with doubtful results."""
        scheme = self.manifest.quantization.scheme if self.manifest else "none"
        if advice := fitness.cut_off_products(scheme, gpu=not vllm_release.is_cpu_build()):
            _warn(advice)

    def bundle(self) -> dict[str, Any] | None:
        """Return the bundle that should be made of the caches now, None if there is nothing to make; see `caches`."""
        if self.caches is None:
            return None
        seconds = sum(self.timeline.phases[phase] for phase in ("configure", "engine"))
        return caches.making(self.cached, self.caches.started, round(seconds, 3))


def boot(
    settings: Settings,
    timeline: Timeline,
    environ: MutableMapping[str, str],
    *,
    beside_engine: dict[str, Callable[[], object]] | None = None,
) -> Booted:
    """Start the engine that `settings` describe.

    `beside_engine` names work to run in a thread while the engine's process starts up. Raises `BootError`
    with one sentence; then nothing has been served and no process is left.
    """
    others = Settings.others(environ)
    search = prepare(settings, environ)
    manifest = search.manifest
    supply_future: Future[Supply] = Future()
    finding = _beside(lambda: supply_future.set_result(search.finish()), "snapshot")
    needs: dict[str, Any] = {
        "weights": manifest.size if manifest else 0,
        "gpu": not vllm_release.is_cpu_build(),
        "gpus": _gpus(others, manifest.engine_args if manifest else {}),
        "scratch": fitness.scratch(),
        "any_driver": vllm_release.moves_libraries(environ),
    }
    fit = _beside(lambda: fitness.check(**needs), "fitness")
    if needs["gpu"] and (advice := fitness.no_compiler(environ)):
        _warn(advice)
    shared = _caches(settings, environ, search)
    timeline.mark("settings")

    _import(environ)
    timeline.mark("import_vllm")
    timeline.beside["fitness"] = fit.result()
    finding.result()  # raises what went wrong
    supply = supply_future.result()
    timeline.beside |= {name: seconds for name, seconds in supply.beside.items() if seconds}
    timeline.mark("fetch" if supply.source == "s3" else "verify")
    cached = OFF
    if shared is not None:
        cached = shared.result()
        if complaint := shared.complaint(cached):
            _warn(complaint)
        timeline.beside["cache"] = cached.seconds
        timeline.mark("cache")

    grammars = Grammars(
        vllm_start.follow_grammars, most_bytes=settings.grammar_max_bytes, seconds=settings.grammar_seconds
    )
    grammars.start()
    spares = {name: _AfterFork(work, name) for name, work in (beside_engine or {}).items()}
    manifest = supply.manifest
    if supply.weights is not None:
        _AfterFork(supply.weights.engine_starts, "verify_weights")
    name = manifest.served_model_name if manifest else settings.model_name
    names = settings.served_model_name or ((name,) if name else ())
    kills = memory.kills()
    try:
        engine = vllm_start.boot(
            model=str(supply.folder or settings.model_name),
            fixed={"served_model_name": names} if names else {},
            manifest=manifest.engine_args if manifest else {},
            environ=environ,
            engine_environ=others,
            digest=manifest.digest if manifest else None,
            chunk_interval=settings.chunk_interval_ms / 1000,
            stall_seconds=settings.engine_stall_seconds,
            metrics=settings.metrics_push_url is not None,
            grammars=grammars,
            max_n=settings.max_n,
            mark=timeline.mark,
            warn=_warn,
        )
    except BootError as error:
        if "configure" in timeline.phases:  # before that nothing has read the weights
            if supply.weights is not None:
                supply.weights.result()  # a damaged file is the better reason
            fitness.check_kills(kills, error)
        raise
    for name, spare in spares.items():
        timeline.beside[name] = spare.result()
        timeline.mark(name)
    if supply.weights is not None:
        supply = _verified(supply, supply.weights, engine, timeline)
    return Booted(engine, settings, timeline, manifest, supply, shared, cached)


def prepare(settings: Settings, environ: MutableMapping[str, str]) -> sources.Search:
    """Look for what is to be served, and set what vLLM should find in its environment as it is imported.

    A process that was restored with an import in another environment ends here, and begins again plainly.
    """
    search = sources.search(settings, environ, _warn)
    for_vllm = vllm_release.environment(environ, search.manifest.engine_args if search.manifest else {})
    environ.update(for_vllm | _offline(settings, offline=search.offline))
    arrival.settle(environ, required=settings.process_image == "require")
    return search


def _import(environ: Mapping[str, str]) -> None:
    vllm_start.load(environ)
    if arrival.is_restored():
        vllm_start.set_log_level(environ)


def _verified(supply: Supply, weights: WeightsCheck, engine: Engine, timeline: Timeline) -> Supply:
    """Wait for the check of the weights; an engine that has loaded others than the manifest's is stopped."""
    try:
        reading = weights.result()
    except BootError:
        engine.close()
        raise
    timeline.beside["read_snapshot"] = reading.seconds
    timeline.mark("verify_weights")
    return replace(supply, reading=reading, weights=None)


def _caches(settings: Settings, environ: MutableMapping[str, str], search: sources.Search) -> Caches | None:
    """Begin to look for this boot's compile caches, in a process of its own."""
    place = settings.caches()
    if place is None:
        return None
    folders, names = vllm_release.cache_folders(environ), vllm_release.argument_names()
    shared = Caches(place, folders, names, gpu=not vllm_release.is_cpu_build())
    shared.begin(environ)

    def ask(supply_future: Future[Supply]) -> None:
        supply = supply_future.result()
        shared.ask(supply, str(supply.folder or settings.model_name))

    search.announced.add_done_callback(ask)
    return shared


def _gpus(environ: Mapping[str, str], engine_args: Mapping[str, Any]) -> int:
    """Return on how many GPUs the engine is to run; a wrong value counts as 1, vLLM's parser will say it."""
    sizes = [
        str(environ.get(name.upper(), "").strip() or engine_args.get(name) or 1)
        for name in ("tensor_parallel_size", "pipeline_parallel_size")
    ]
    return math.prod(int(size) if size.isdecimal() else 1 for size in sizes)


def _offline(settings: Settings, *, offline: bool) -> dict[str, str]:
    if not offline:
        return {"HF_TOKEN": settings.hf_token} if settings.hf_token else {}
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _beside(work: Callable[[], object], name: str) -> Future[float]:
    """Run `work` in a thread; the future gives the seconds it took, or raises what it raised."""
    future: Future[float] = Future()

    def run() -> None:
        started = time.monotonic()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 -- handed to whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(time.monotonic() - started)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class _AfterFork:
    """Work for a thread that starts once the engine is forked: a fork must see no other thread.

    The engine's process forks its own workers and inherits the hook, hence the comparison of process ids.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._name = name
        self._process = os.getpid()
        self._future: Future[float] | None = None
        os.register_at_fork(after_in_parent=self._start)

    def result(self) -> float:
        """Wait for the work, beginning it now if nothing was forked; return the seconds it took."""
        self._start()
        assert self._future is not None
        return self._future.result()

    def _start(self) -> None:
        if self._future is None and os.getpid() == self._process:
            self._future = _beside(self._work, self._name)


def _warn(message: str) -> None:
    print(f"coldsnap: {message}", file=sys.stderr, flush=True)  # noqa: T201
