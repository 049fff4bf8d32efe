"""Where a model comes from: a folder here or a repository on the hub, pinned before anything is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from builder import schemes
from builder.checkpoint import Checkpoint
from builder.hub import Pinned, fetch, pin
from builder.stages import Stages, size_of
from coldsnap.errors import BakeError
from coldsnap.snapshot.manifest import MANIFEST, Source, load_manifest

_READ_BYTES = 8 << 20


class Origin(Protocol):
    """A model's place. `license` is what the place says, known once it is pinned."""

    license: str | None

    def pin(self, stages: Stages) -> Source:
        """Say what exactly is baked, and make sure that there is room for it."""

    def checkpoint(self, stages: Stages) -> Checkpoint:
        """Return its files, here."""


@dataclass
class Folder:
    """A checkpoint in a folder. It is pinned by the BLAKE3 digest of the files that are taken from it."""

    folder: Path
    out: Path
    scheme: str | None
    group_size: int
    license: str | None = None
    _hashed: int = field(default=0, init=False)

    def pin(self, stages: Stages) -> Source:
        if (self.folder / MANIFEST).exists():
            load_manifest(self.folder)  # a newer coldsnap's snapshot is refused
        checkpoint = self.checkpoint(stages)
        scheme = schemes.choose(self.scheme, checkpoint)
        schemes.check(scheme, checkpoint, self.group_size)
        room(self.out, schemes.estimate(scheme, checkpoint, self.group_size) - size_of(stages.work))
        report = stages.run(
            "resolve",
            lambda: {"digest": self._digest(checkpoint)},
            total=checkpoint.size,
            done=lambda: self._hashed,
            again=True,  # it may have changed since
        )
        return Source(repo="local", revision=report["digest"])

    def checkpoint(self, stages: Stages) -> Checkpoint:  # noqa: ARG002 (nothing has to be fetched)
        return Checkpoint.read(self.folder)

    def _digest(self, checkpoint: Checkpoint) -> str:
        whole = blake3()
        for name in checkpoint.files:
            hasher = blake3()
            with (self.folder / name).open("rb") as file:
                while data := file.read(_READ_BYTES):
                    hasher.update(data)
                    self._hashed += len(data)
            whole.update(f"{name}\0{hasher.hexdigest()}\n".encode())
        return whole.hexdigest()


@dataclass
class Repository:
    """A model on the hub. It is pinned by its commit."""

    repo: str
    revision: str | None
    out: Path
    license: str | None = None
    _pinned: Pinned | None = field(default=None, init=False)

    def pin(self, stages: Stages) -> Source:
        pinned = Pinned.read(stages.run("resolve", lambda: pin(self.repo, self.revision).report()))
        self._pinned, self.license = pinned, pinned.license
        return Source(repo=pinned.repo, revision=pinned.commit)

    def checkpoint(self, stages: Stages) -> Checkpoint:
        assert self._pinned is not None
        folder = stages.work / "source"
        stages.forget(since="download", unless={"commit": self._pinned.commit})
        if "download" not in stages.seconds:
            _keep_only(folder, (file.name for file in self._pinned.files))
            room(self.out, 2 * self._pinned.size - size_of(folder))  # fetched and, at most as large, the snapshot
        stages.run(
            "download",
            lambda: fetch(self._pinned, folder) or {},
            total=self._pinned.size,
            done=partial(size_of, folder),
        )
        return Checkpoint.read(folder)


def room(out: Path, needed: int) -> None:
    """Raise `BakeError` unless the disk that will hold `out` has `needed` bytes left."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BakeError(
            f"{folder}: the bake needs {needed:,} bytes, {free:,} are free there; name another disk with --out"
        )


def _keep_only(folder: Path, names: Iterable[str]) -> None:
    """Remove what another commit has left."""
    listed = set(names)
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_file() and path.name not in listed:
            path.unlink()
