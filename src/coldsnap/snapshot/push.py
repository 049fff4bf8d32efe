"""Sends a snapshot to a bucket: `coldsnap push FOLDER s3://bucket/prefix`.

A file becomes the object `blobs/<its BLAKE3 digest>`, the manifest `coldsnap.json`, last. An object never changes
under its name, so a push to a place that workers boot from disturbs none of them: until the manifest is there they
take the old snapshot, afterwards the new one, and what both have in common is sent and stored once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coldsnap.errors import S3Error, SourceError
from coldsnap.foundation.s3 import Bucket, Place
from coldsnap.snapshot import manifest as snapshot
from coldsnap.snapshot.manifest import MANIFEST, FileEntry, Manifest

_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Pushed:
    """What a push did: bytes that were sent (`manifest.size` less what the bucket had) and the seconds it took."""

    manifest: Manifest
    sent_bytes: int
    seconds: float


def blob(entry: FileEntry) -> str:
    """Return the name of the object that holds a file's content."""
    return f"blobs/{entry.blake3}"


def push(folder: Path, place: Place, *, on_bytes: Callable[[int], None] = lambda _: None) -> Pushed:
    """Send the snapshot in `folder`, which is checked first, to `place`; what is there already is not sent again.

    `on_bytes` is told of bytes sent or found there, from several threads: `manifest.size` in the end. Raises
    `SnapshotError` for a damaged snapshot and `SourceError` if the bucket does not take it.
    """
    begun = time.monotonic()
    manifest = snapshot.load_manifest(folder)
    snapshot.verify(folder, manifest)
    try:
        bucket = Bucket(place)
        sizes_there = {item.name: item.size for item in bucket.objects("blobs/")}
        files = {entry.blake3: (entry, folder / name) for name, entry in manifest.files.items()}
        new = [(entry, path) for entry, path in files.values() if sizes_there.get(blob(entry)) != entry.size]
        new_bytes = sum(entry.size for entry, _ in new)
        on_bytes(manifest.size - new_bytes)
        pool = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="push")
        try:
            for upload in [pool.submit(bucket.upload, blob(entry), path, on_bytes=on_bytes) for entry, path in new]:
                upload.result()
        finally:
            pool.shutdown(cancel_futures=True)
        bucket.put(MANIFEST, (folder / MANIFEST).read_bytes())
    except S3Error as error:
        raise SourceError(f"push to {error.message}") from error
    return Pushed(manifest, new_bytes, time.monotonic() - begun)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coldsnap push`."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the snapshot: a folder with a coldsnap.json")
    parser.add_argument("place", metavar="PLACE", help="s3://bucket/prefix; boto3 finds credentials and endpoint")


def run(options: argparse.Namespace) -> int:
    """Push, and say how much and how fast."""
    print(shown(options.folder, Place.parse(options.place, "PLACE")))  # noqa: T201
    return 0


def shown(folder: Path, place: Place) -> str:
    """Push with a progress bar; return what was done in a line."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(f"push {folder}", total=snapshot.load_manifest(folder).size)
        pushed = push(folder, place, on_bytes=lambda count: progress.advance(task, count))
    digest, size = pushed.manifest.digest, pushed.manifest.size
    return f"{place}: {digest}, {size} bytes, {pushed.sent_bytes} of them sent, {pushed.seconds:.1f} s"
