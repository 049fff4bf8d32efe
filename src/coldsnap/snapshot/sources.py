"""Finds a boot's model in the first of these places that has it:

image -> network volume -> the platform's cached models -> this machine's disk -> bucket -> hub

What is asked for is, where `SNAPSHOT_S3_URI` is set, the snapshot in the bucket, by the digest of its files; else
the model that MODEL_NAME names. Snapshots are kept in one folder for each digest, so versions never mix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from coldsnap.errors import SettingsError, SnapshotError
from coldsnap.foundation.s3 import Place
from coldsnap.records.schema import SourceKind
from coldsnap.settings import Settings
from coldsnap.snapshot import manifest as snapshot
from coldsnap.snapshot import pull
from coldsnap.snapshot.digest import Reading
from coldsnap.snapshot.manifest import MANIFEST, Manifest
from coldsnap.snapshot.weights import WeightsCheck, is_large

_STORE = "coldsnap"
_HUB_CACHE = Path("huggingface-cache", "hub")


@dataclass(frozen=True)
class Supply:
    """The model that a search found. Without a `folder` vLLM downloads it; without a `manifest` it is unverified.

    `verified`: every file's digest has been compared. `fetched_bytes` is None where vLLM does the fetching.
    `reading` is how the files were read to be compared, None where they were not, or while they were fetched.
    `beside` has the seconds of each piece of work.
    """

    source: SourceKind
    folder: Path | None = None
    manifest: Manifest | None = None
    verified: bool = False
    fetched_bytes: int | None = 0
    fetch_seconds: float | None = None
    reading: Reading | None = None
    weights: WeightsCheck | None = None
    """The check of the weights, which goes on beside the engine's start; None if nothing is left to check."""
    beside: Mapping[str, float] = field(default_factory=dict)


HUB = Supply("hub", fetched_bytes=None)


@dataclass(frozen=True)
class Search:
    """What is known at once, and what is left to do beside something else: `finish`, which may raise `BootError`."""

    finish: Callable[[], Supply]
    manifest: Manifest | None = None
    """The snapshot's manifest; None if there is none, or if it is still in a bucket."""
    offline: bool = True
    """Whether vLLM must not ask the hub for anything."""
    announced: Future[Supply] = field(default_factory=Future)
    """What `finish` is going to return but for what it measures: set while it may still fetch, or before."""

    @classmethod
    def ended(cls, supply: Supply, *, offline: bool = True) -> Search:
        """Return a search that has nothing left to do."""
        search = cls(lambda: supply, offline=offline)
        search.announced.set_result(supply)
        return search


def search(settings: Settings, environ: Mapping[str, str], warn: Callable[[str], None]) -> Search:
    """Look where `settings` point to. Raises `BootError` for what is wrong with a snapshot that is here."""
    name, place, folder = settings.model_name, settings.snapshot_s3_uri, settings.snapshot()
    if name is not None and name.startswith("s3://"):
        raise SettingsError(f"MODEL_NAME: {name!r} is no model's name; push a snapshot there and set SNAPSHOT_S3_URI")
    if folder is not None and place is not None and not (folder / MANIFEST).is_file():
        warn(f"SNAPSHOT_DIR: {folder} holds no {MANIFEST}; looking for the snapshot of SNAPSHOT_S3_URI")
        folder = None
    if folder is not None:
        on_volume = folder.resolve().is_relative_to(settings.snapshot_volume.resolve())
        return _here("volume" if on_volume else "image", folder, settings)
    revision = environ.get("MODEL_REVISION") or environ.get("REVISION")
    cached = None if name is None else _cached(settings.snapshot_volume / _HUB_CACHE, name, revision)
    if place is not None:
        announced: Future[Supply] = Future()
        return Search(lambda: _from_bucket(settings, place, cached, warn, announced), announced=announced)
    assert name is not None
    if (stored := _kept(settings.snapshot_volume / _STORE, name, warn)) is not None:
        return _here("volume", stored, settings)
    if cached is not None and (cached / MANIFEST).is_file():
        return _here("platform-cache", cached, settings)
    if cached is not None:
        return Search.ended(Supply("platform-cache", cached))
    if settings.allow_hub:
        return Search.ended(HUB, offline=False)
    raise SettingsError(
        f"MODEL_NAME: {name!r} is not a folder here, nor a snapshot or a cached model on {settings.snapshot_volume}; "
        f"set it to a baked snapshot's folder, or SNAPSHOT_S3_URI, or set ALLOW_HUB=true to download the model at boot"
    )


def _here(source: SourceKind, folder: Path, settings: Settings) -> Search:
    manifest = snapshot.load_manifest(folder)
    _same_model(settings, manifest, folder)
    snapshot.verify(folder, manifest, "size")
    search = Search(lambda: _checked(source, folder, manifest, settings), manifest)
    search.announced.set_result(Supply(source, folder, manifest))
    return search


def _checked(source: SourceKind, folder: Path, manifest: Manifest, settings: Settings, remedy: str = "") -> Supply:
    begun = time.monotonic()
    if settings.snapshot_verify == "full" and is_large(manifest):
        check = WeightsCheck(folder, manifest, remedy)
        return Supply(source, folder, manifest, verified=True, weights=check)
    reading = snapshot.verify(folder, manifest, settings.snapshot_verify)
    beside = {"read_snapshot": time.monotonic() - begun}
    return Supply(source, folder, manifest, verified=reading is not None, reading=reading, beside=beside)


def _from_bucket(
    settings: Settings,
    place: Place,
    cached: Path | None,
    warn: Callable[[str], None],
    announced: Future[Supply],
) -> Supply:
    begun = time.monotonic()
    offered = pull.offer(place, "SNAPSHOT_S3_URI")
    with closing(offered.bucket):  # the engine's processes would inherit its connections
        manifest = offered.manifest
        _same_model(settings, manifest, place)
        beside = {"find_snapshot": time.monotonic() - begun}
        volume, local = settings.snapshot_volume / _STORE, settings.snapshot_cache.absolute()
        place_of_digest = _with_digest(manifest.digest, volume, cached, local)
        if place_of_digest is None:
            source: SourceKind = "volume" if settings.snapshot_volume.is_dir() else "local"
            folder = (volume if source == "volume" else local) / manifest.digest
            setting = "SNAPSHOT_VOLUME" if source == "volume" else "SNAPSHOT_CACHE"
            announced.set_result(Supply(source, folder, manifest))
            pulled = pull.pull(offered, folder, setting, say=warn)
            beside |= {"wait_for_snapshot": pulled.waited_seconds, "fetch_snapshot": pulled.seconds}
            if pulled.whole:
                return Supply("s3", folder, manifest, True, pulled.fetched_bytes, pulled.seconds, beside=beside)
            place_of_digest = source, folder
    source, folder = place_of_digest
    if not announced.done():
        announced.set_result(Supply(source, folder, manifest))
    remedy = f"; delete {folder} and it is fetched again"
    try:
        supply = _checked(source, folder, manifest, settings, remedy)
    except SnapshotError as error:
        raise SnapshotError(f"{error.message}{remedy}") from error
    return replace(supply, beside={**beside, **supply.beside})


def _with_digest(digest: str, volume: Path, cached: Path | None, local: Path) -> tuple[SourceKind, Path] | None:
    if (volume / digest / MANIFEST).is_file():
        return "volume", volume / digest
    if cached is not None and (cached / MANIFEST).is_file() and snapshot.load_manifest(cached).digest == digest:
        return "platform-cache", cached
    if (local / digest / MANIFEST).is_file():
        return "local", local / digest
    return None


def _kept(store: Path, model_name: str, warn: Callable[[str], None]) -> Path | None:
    """Return the newest snapshot of the model on the volume: a folder of any name, put there by hand or by a boot."""
    candidates = []
    for folder in _folders(store):
        if folder.name.startswith(".") or not (folder / MANIFEST).is_file():
            continue
        try:
            manifest = snapshot.load_manifest(folder)
        except SnapshotError as error:
            warn(f"passed over: {error.message}")
            continue
        if model_name in {manifest.source.repo, manifest.served_model_name}:
            candidates.append((manifest.created, folder))
    return max(candidates)[1] if candidates else None


def _cached(hub: Path, model_name: str, revision: str | None) -> Path | None:
    """Return the model's folder among those that the platform has cached: a plain copy of the hub's repository.

    Its commit is `revision`'s; without one that of the branch main, or the one that came last. The platform may
    have written the name in lower case.
    """
    repository_name = f"models--{model_name.replace('/', '--')}".casefold()
    for repository in (folder for folder in _folders(hub) if folder.name.casefold() == repository_name):
        commits = {folder.name: folder for folder in _folders(repository / "snapshots")}
        complete = {name: folder for name, folder in commits.items() if (folder / "config.json").is_file()}
        ref = repository / "refs" / (revision or "main")
        plain = ".." not in PurePosixPath(revision or "").parts
        commit = ref.read_text(encoding="utf-8").strip() if plain and ref.is_file() else revision
        if commit is None and complete:
            return max(complete.values(), key=lambda folder: folder.stat().st_mtime)
        if commit in complete:
            return complete[commit]
    return None


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if path.is_dir())


def _same_model(settings: Settings, manifest: Manifest, where: Path | Place) -> None:
    model_name = settings.model_name
    if (
        model_name is None
        or Path(model_name).is_dir()
        or model_name in {manifest.source.repo, manifest.served_model_name}
    ):
        return
    raise SettingsError(
        f"MODEL_NAME: {model_name!r} is not what the snapshot in {where} holds, which is "
        f"{manifest.source.repo!r}; unset one of the two"
    )
