"""The hub: a model's id and a branch become a commit, and its files a folder.

Endpoint and token come from where huggingface-hub looks for them: `HF_ENDPOINT`, `HF_TOKEN`, its login.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from builder.checkpoint import wanted
from coldsnap.errors import BakeError

_FILES_AT_ONCE = 4
_READ_BYTES = 8 << 20
_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class File:
    """A file to fetch. `digest` is its SHA-256 if the hub keeps it in LFS, else git's SHA-1 of it as a blob."""

    name: str
    size: int
    digest: str | None
    lfs: bool


@dataclass(frozen=True)
class Pinned:
    """A model at a commit."""

    repo: str
    commit: str
    license: str | None
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(file.size for file in self.files)

    def report(self) -> dict[str, Any]:
        """Return it as JSON; `read` is the way back."""
        return asdict(self)

    @classmethod
    def read(cls, report: dict[str, Any]) -> Pinned:
        files = tuple(File(**file) for file in report["files"])
        return cls(report["repo"], report["commit"], report["license"], files)


def pin(repo: str, revision: str | None) -> Pinned:
    """Ask the hub which commit `revision` is, and which of its files to take."""
    with _translated(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = []
    for name in wanted(siblings, repo):
        lfs = siblings[name].lfs
        digest = lfs.sha256 if lfs else siblings[name].blob_id
        files.append(File(name, siblings[name].size or 0, digest, lfs is not None))
    card = info.card_data
    return Pinned(repo, str(info.sha), card.get("license") if card else None, tuple(files))


def fetch(pinned: Pinned, folder: Path) -> None:
    """Download the files into `folder`, several at a time, going on where an earlier download broke off."""
    disable_progress_bars()
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="fetch") as pool:
        list(pool.map(partial(_fetch, pinned, folder), sorted(pinned.files, key=lambda file: -file.size)))


def _fetch(pinned: Pinned, folder: Path, file: File) -> None:
    with _translated(pinned.repo, pinned.commit):
        hf_hub_download(
            pinned.repo,
            file.name,
            revision=pinned.commit,
            local_dir=folder,
            etag_timeout=_TIMEOUT_SECONDS,
        )
    path = folder / file.name
    if file.digest and (found := _digest(path, lfs=file.lfs)) != file.digest:
        path.unlink()  # so that the next bake fetches it again
        kind = "SHA-256" if file.lfs else "git blob"
        raise BakeError(
            f"{pinned.repo}: {file.name} arrived corrupt: expected {kind} {file.digest}, found {found}; "
            f"run the same command again"
        )


def _digest(path: Path, *, lfs: bool) -> str:
    size = path.stat().st_size
    hasher = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
    return hasher.hexdigest()


@contextmanager
def _translated(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise BakeError(
            f"{repo}: is gated: accept its licence at {constants.ENDPOINT}/{repo} and set HF_TOKEN to a token of "
            f"the account that did"
        ) from error
    except RepositoryNotFoundError as error:
        raise BakeError(
            f"{repo}: {constants.ENDPOINT} has no such model, or it is private: check the id, and HF_TOKEN if it is"
        ) from error
    except RevisionNotFoundError as error:
        raise BakeError(
            f"--revision {revision!r}: {repo} has no such branch, tag or commit{_nearest(repo, revision)}"
        ) from error
    except HFValidationError as error:
        raise BakeError(f"{repo!r}: is neither a folder here nor a model's id on the hub (NAME or ORG/NAME)") from error
    except HfHubHTTPError as error:
        raise BakeError(
            f"{repo}: {constants.ENDPOINT} answered {error.response.status_code}; try again later"
        ) from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BakeError(
            f"{repo}: no folder here, and {constants.ENDPOINT} could not be reached or broke off: {reason}; "
            "run the same command again, it goes on where it was"
        ) from error


def _nearest(repo: str, revision: str | None) -> str:
    try:
        refs = HfApi().list_repo_refs(repo)
    except (httpx.HTTPError, OSError):  # a hint is not worth a second error
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(revision or "", names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(map(repr, names[:5]))}"
