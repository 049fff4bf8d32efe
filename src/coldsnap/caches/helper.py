"""The process that fetches or stores a cache bundle beside a worker: `python -m coldsnap.caches.helper fetch PLACE`.

A process, not a thread: nothing of it is there when the engine is forked, it takes no turn from the import of vLLM,
it can be stopped while a job runs, and it is simply killed where it would hold up a boot or an exit. It gets its
request as a line of JSON on stdin, once the worker knows which model it is, and answers with lines on stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from coldsnap.caches import bundle, fingerprint
from coldsnap.caches.bundle import Entry, Header
from coldsnap.caches.store import Store, store_at
from coldsnap.errors import CacheError, S3Error
from coldsnap.foundation.plural import plural
from coldsnap.foundation.s3 import Place
from coldsnap.processes import end_with_parent

_KEPT_DAYS = 30
"""How long a bundle that no boot uses is kept."""

Say = Callable[[Mapping[str, Any]], None]


def place_of(text: str) -> Path | Place:
    """Read a place as `str` writes it."""
    return Place.parse(text, "CACHE_URI") if text.startswith("s3://") else Path(text)


def fetch(store: Store, factors: Mapping[str, str], roots: Mapping[str, Path], say: Say) -> dict[str, Any]:
    """Unpack the bundle for `factors` from `store`. `say` is told how much it saves as soon as that is known."""
    name = fingerprint.name_of(factors)
    answer: dict[str, Any] = {"state": "miss", "because": None, "fingerprint": name}
    try:
        content = _read(store, _file(name), say)
        if content is None:
            return answer
        unpacked = bundle.unpack(content, factors, roots)
    except CacheError as error:
        return answer | {"state": "refused", "because": error.message}
    except (S3Error, OSError) as error:
        return answer | {"state": "failed", "because": str(error)}
    header = unpacked.header
    more = {"bytes": len(content), "generation": header.generation, "saves_seconds": header.saves_seconds}
    return answer | {"state": "hit"} | more


def _read(store: Store, file: str, say: Say) -> bytes | None:
    opened = store.open(file)
    if opened is None:
        return None
    size, pieces = opened
    if size > bundle.MOST_BYTES:
        raise CacheError(f"it has {size} bytes, a bundle has at most {bundle.MOST_BYTES}")
    content = bytearray()
    announced = False
    for piece in pieces:
        content += piece
        if not announced and (end := content.find(b"\n") + 1):
            announced = True
            say({"saves_seconds": Header.parse(bytes(content[:end])).saves_seconds})
    return bytes(content)


def store_bundle(
    store: Store,
    factors: Mapping[str, str],
    roots: Mapping[str, Path],
    request: Mapping[str, Any],
    *,
    most_bytes: int = bundle.MOST_BYTES,
) -> dict[str, Any]:
    """Make a bundle of the caches and store it.

    `request` has `replace`, `since`, `saves_seconds` and `generation`. With `since` (s since 1970), after a boot with
    a bundle, one is made only if the caches have files newer than that. The state is `stored`, `there` (another was
    first, or nothing is missing) or `failed`. After `stored`, `also` says what became of bundles that nobody uses.
    """
    name = fingerprint.name_of(factors)
    answer = {"fingerprint": name, "because": None}
    try:
        if request["since"] is None:
            bundle.forget_plans(roots)
        if not request["replace"] and store.has(_file(name)):
            return answer | {"state": "there"}
        since = request["since"]
        any_processor = "gpu" in factors
        there = bundle.entries(roots, any_processor=any_processor)
        if not [entry for entry in there if since is None or entry.mtime_ns > since * 1e9]:
            return answer | {"state": "there"}

        def header(files: tuple[Entry, ...]) -> Header:
            return Header(name, factors, files, request["saves_seconds"], request["generation"])

        content = bundle.pack(roots, header, most_bytes=most_bytes, any_processor=any_processor)
        written = store.write(_file(name), content, replace=request["replace"])
    except (CacheError, S3Error, OSError) as error:
        return answer | {"state": "failed", "because": str(error)}
    if not written:
        return answer | {"state": "there"}
    return answer | {"state": "stored", "bytes": len(content), "also": _pruned(store, _file(name))}


def _pruned(store: Store, newest: str) -> str:
    """Delete what nobody uses; return the end of a sentence about it, empty if nothing was."""
    try:
        count = store.prune(newest, _KEPT_DAYS * 86400)
    except (S3Error, OSError) as error:
        return f"; unused ones cannot be deleted: {error}"
    return f"; {plural(count, 'bundle')} deleted that no boot has used for {_KEPT_DAYS} days" if count else ""


def mark(store: Store, name: str) -> str | None:
    """Note that a bundle is in use; return what was wrong if that could not be written."""
    try:
        store.mark(_file(name))
    except (S3Error, OSError) as error:
        return (
            f"bundle {name} is in use, which could not be noted: it may be deleted {_KEPT_DAYS} days after it was "
            f"last noted: {error}"
        )
    return None


def _file(name: str) -> str:
    return f"{name}.bundle"


def main() -> int:
    """Do one thing and say how it went; return the exit code, 0 also if it failed and said so."""
    end_with_parent()  # also while it is stopped
    action, place, *gpu = sys.argv[1:]
    try:
        store = store_at(place_of(place))  # boto3 takes a moment: before the request is there
        machine = fingerprint.of_machine(gpu=bool(gpu))
    except (CacheError, S3Error) as error:
        _say({"state": "failed", "because": error.message, "seconds": 0.0})
        return 0
    line = sys.stdin.buffer.readline()
    if not line:  # the boot ended before it knew its model
        return 0
    request = orjson.loads(line)
    begun = time.monotonic()
    factors = machine | request["factors"]
    roots = {root: Path(folder) for root, folder in request["folders"].items()}
    answer = fetch(store, factors, roots, _say) if action == "fetch" else store_bundle(store, factors, roots, request)
    _say(answer | {"seconds": time.monotonic() - begun})
    if answer["state"] == "hit" and (wrong := mark(store, answer["fingerprint"])):  # the boot goes on meanwhile
        sys.stderr.write(f"coldsnap: CACHE_URI: {place}: {wrong}\n")
    return 0


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
