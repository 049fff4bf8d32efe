"""The snapshot contract: a folder of model files and `coldsnap.json`, the manifest that describes them.

The builder writes a manifest with `write_manifest`; a boot reads it with `load_manifest` and checks the
folder against it with `verify`. Nothing here knows what the files mean: that is vLLM's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import orjson
from blake3 import blake3
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from coldsnap.errors import SnapshotError
from coldsnap.snapshot.digest import Digests, Reading, digests

MANIFEST = "coldsnap.json"
SCHEMA_VERSION = 1

Verify = Literal["full", "size"]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in {".", MANIFEST} or "\0" in name:
        raise ValueError(f"{name!r} must be a plain relative path inside the snapshot, without '..'")
    return name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """Where the weights came from: a hub repository at a commit, or `local`, then with the digest of its files."""

    repo: str = "local"
    revision: str | None = None

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        local = self.repo == "local" and self.revision is None
        if not local and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.revision or ""):
            raise ValueError(f"revision {self.revision!r} must be a full commit hash, not a branch or tag")
        return self


class Quantization(_Frozen):
    """The scheme of the weights (`none` if they are as the source had them) and the layers left out.

    `method` is config.json's `quant_method`; `calibration` says what the scales were fitted to, if to anything.
    """

    scheme: str = "none"
    ignore: tuple[str, ...] = ()
    method: str | None = None
    group_size: int | None = None
    calibration: str | None = None


class Quality(_Frozen):
    """How far the snapshot is from its original. What could not be measured is None, and `not_measured` says why.

    `mean_kl` is KL(original || snapshot) in nats a token, `top1_agreement` the share of tokens with the same
    best successor, `greedy_identical` how many of `greedy_prompts` continue with the same tokens.
    """

    text: str | None = None
    measured_with: str | None = None
    tokens: int | None = None
    perplexity: float | None = None
    original_perplexity: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    greedy_prompts: int | None = None
    greedy_identical: int | None = None
    not_measured: str | None = None


class Bake(_Frozen):
    """How the snapshot was made. `seconds` are by stage, of the run that completed the stage."""

    seconds: dict[str, float]
    source_bytes: int = Field(ge=0)
    license: str | None = None
    quality: Quality


class FileEntry(_Frozen):
    """One file: its size in bytes and the BLAKE3 digest of its content in hex."""

    size: int = Field(ge=0)
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Frozen):
    """What `coldsnap.json` says. `engine_args` are vLLM arguments by their Python names."""

    schema_version: Literal[1] = 1
    created: AwareDatetime
    served_model_name: str = Field(min_length=1)
    source: Source
    quantization: Quantization
    engine_args: dict[str, JsonValue]
    versions: dict[str, str]
    bake: Bake | None = None
    files: dict[Annotated[str, AfterValidator(_inside)], FileEntry] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """BLAKE3 over the sorted names and digests of the files: the identity of the content."""
        lines = (f"{name}\0{entry.blake3}\n" for name, entry in sorted(self.files.items()))
        return blake3("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes in all files together."""
        return sum(entry.size for entry in self.files.values())


def write_manifest(
    folder: Path,
    *,
    source: Source,
    quantization: Quantization,
    served_model_name: str,
    engine_args: dict[str, Any],
    versions: dict[str, str],
    bake: Callable[[], Bake] | None = None,
) -> Manifest:
    """Hash every file below `folder` and write `coldsnap.json` beside them, last and atomically.

    `bake` is called after the hashing, so that it can tell how long that took.
    """
    temporary = folder / f".{MANIFEST}.partial"
    temporary.unlink(missing_ok=True)  # of a bake that was interrupted
    names = sorted(_listing(folder))
    content = digests(folder, names).of
    files = {name: FileEntry(size=(folder / name).stat().st_size, blake3=content[name]) for name in names}
    manifest = Manifest(
        created=datetime.now(UTC).replace(microsecond=0),
        served_model_name=served_model_name,
        source=source,
        quantization=quantization,
        engine_args=engine_args,
        versions=versions,
        bake=bake() if bake else None,
        files=files,
    )
    text = orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2) + b"\n"
    temporary.write_bytes(text)
    temporary.replace(folder / MANIFEST)
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`; raise `SnapshotError` if there is none or it is not of the contract."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SnapshotError(
            f"snapshot {folder}: {MANIFEST} cannot be read ({error.strerror}); expected a baked snapshot"
        ) from error
    return parse_manifest(content, str(folder))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest that `content` is; `SnapshotError` names `where` it is from."""
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise SnapshotError(f"snapshot {where}: {MANIFEST} is not JSON: {error}") from error
    if isinstance(data, dict) and isinstance(version := data.get("schema_version"), int) and version > SCHEMA_VERSION:
        raise SnapshotError(
            f"snapshot {where}: {MANIFEST}: schema_version: expected {SCHEMA_VERSION} or less, "
            f"found {version}; it needs a newer coldsnap"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise SnapshotError(f"snapshot {where}: {MANIFEST}: {field}: {first['msg']}") from error


def verify(folder: Path, manifest: Manifest, mode: Verify = "full") -> Reading | None:
    """Raise `SnapshotError`, naming the file, unless `folder` holds exactly what `manifest` lists.

    Names and sizes are always checked. With mode `full` each file is read once, several at a time, and its
    digest compared; the read also fills the page cache, from which the engine then loads the weights. How that
    read went is returned.
    """
    check_sizes(folder, manifest)
    if mode == "size":
        return None
    largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
    content = digests(folder, largest_first)
    compare(folder, manifest, content)
    return content.reading


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise `SnapshotError` unless the folder has the files of the manifest, in their sizes, and no others."""
    present = _listing(folder)
    for name, entry in sorted(manifest.files.items()):
        if name not in present or not (folder / name).is_file():  # a link may lead nowhere
            raise SnapshotError(f"snapshot {folder}: {name}: expected a file of {entry.size} bytes, found none")
        size = (folder / name).stat().st_size
        if size != entry.size:
            raise SnapshotError(f"snapshot {folder}: {name}: expected {entry.size} bytes, found {size}")
    if extra := sorted(present - manifest.files.keys()):
        raise SnapshotError(
            f"snapshot {folder}: {extra[0]}: expected no such file, found one that the manifest does not list"
        )


def compare(folder: Path, manifest: Manifest, content: Digests) -> None:
    """Raise `SnapshotError`, naming the file and both digests, if one of these files is not the manifest's."""
    for name, digest in sorted(content.of.items()):
        if digest != (expected := manifest.files[name].blake3):
            raise SnapshotError(f"snapshot {folder}: {name}: expected BLAKE3 {expected}, found {digest}")


def _listing(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise SnapshotError(f"snapshot {folder}: expected a folder, found none")
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()  # a linked folder counts: what it holds is not looked at
    } - {MANIFEST}
