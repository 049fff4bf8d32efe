"""A cache bundle made on purpose: `coldsnap warm [PLACE]`, on a machine with the workers' GPU, image and settings.

The same boot as a worker's, a few tokens, and the same bundle that a worker would make after its first idle second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

from coldsnap import processes
from coldsnap.boot import Booted, boot
from coldsnap.caches import bundle
from coldsnap.engine import Engine, Generation, Meter
from coldsnap.errors import CommandError
from coldsnap.settings import Settings
from coldsnap.timeline import Timeline

_TOKENS = 2
"""One out of the prompt, one out of a step of decoding."""
_STORE_SECONDS = 600.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coldsnap warm`."""
    parser.description = (
        "Boot the engine with the settings in the environment, as a worker would, generate two tokens and store what "
        "was compiled as a cache bundle. Run it in the workers' image, on their kind of GPU and with their settings: "
        "another fingerprint is another bundle."
    )
    parser.add_argument(
        "place", nargs="?", metavar="PLACE", help="a folder or s3://bucket/prefix (default: CACHE_URI, or the volume)"
    )


def run(options: argparse.Namespace) -> int:
    """Boot, store, and say where it is."""
    place = {"CACHE_URI": _absolute(options.place)} if options.place else {}
    settings = Settings.read({**os.environ, **place})
    if settings.caches() is None:
        raise CommandError(
            f"PLACE: nowhere to store the bundle: there is no volume at {settings.snapshot_volume}; name a folder or "
            "s3://bucket/prefix, or set CACHE_URI"
        )
    timeline = Timeline()
    timeline.mark("python")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    processes.end_at_signals()
    processes.tie_children()
    booted = boot(settings, timeline, os.environ)
    try:
        asyncio.run(_some_tokens(booted.engine))
    finally:
        booted.engine.close()
    print(_stored(booted))  # noqa: T201
    return 0


def _absolute(place: str) -> str:
    return place if place.startswith("s3://") else str(Path(place).absolute())


async def _some_tokens(engine: Engine) -> None:
    await engine.warm_up()
    sampling: dict[str, Any] = {"max_tokens": _TOKENS, "temperature": 0.0, "ignore_eos": True}
    async for _ in engine.generate(Generation("warm", prompt="a", sampling=sampling), Meter()):
        pass


def _stored(booted: Booted) -> str:
    """Store the bundle if one is lacking; return what there is now, in a line."""
    caches, cached, bundle_request = booted.caches, booted.cached, booted.bundle()
    assert caches is not None
    if cached.state == "failed":
        raise CommandError(f"CACHE_URI: {caches.place}: {cached.because}")
    seconds = f"booted in {booted.timeline.total:.1f} s ({cached.state})"
    if bundle_request is None:
        return f"{caches.place}: {cached.fingerprint}, {cached.bytes} bytes, as it was; {seconds}"
    time.sleep(bundle.SETTLED_SECONDS)
    helper = caches.helper("store")
    try:
        helper.ask(caches.request(**bundle_request))
        answer = helper.answer(_STORE_SECONDS)
    finally:
        helper.end()
    if answer is None or answer["state"] == "failed":
        because = answer["because"] if answer else f"it took longer than {_STORE_SECONDS:g} s"
        raise CommandError(f"CACHE_URI: {caches.place}: no bundle was stored: {because}")
    if answer["state"] == "there":
        return f"{caches.place}: {answer['fingerprint']}, as it was: this boot had nothing to add; {seconds}"
    return f"{caches.place}: {answer['fingerprint']}, {answer['bytes']} bytes stored{answer['also']}; {seconds}"
