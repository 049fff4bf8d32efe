"""Checks the weights of a large snapshot while the engine already loads them; the worker is ready only afterwards.

What decides how the engine behaves (configuration, tokenizer, chat template) is checked before it starts. Weights are
safetensors, which hold numbers and no code: a wrong one can make wrong answers, and none is given before this ends.
"""

from __future__ import annotations

from pathlib import Path

from coldsnap.errors import SnapshotError
from coldsnap.foundation.memory import available_memory
from coldsnap.snapshot.digest import FILES_AT_ONCE, Hashing, Reading, digests
from coldsnap.snapshot.manifest import Manifest, check_sizes, compare

_LATE_BYTES = 2 << 30
"""Weights that a boot reads before its import of vLLM is over are checked by then."""
_SUFFIX = ".safetensors"


def is_large(manifest: Manifest) -> bool:
    """Return whether waiting for all digests before the engine starts would hold the boot up."""
    return sum(entry.size for name, entry in manifest.files.items() if name.endswith(_SUFFIX)) > _LATE_BYTES


class WeightsCheck:
    """Compares a snapshot's files with its manifest: all but the weights at once, those until `result`.

    Where memory cannot hold the snapshot, what was read for its digest would be gone when the engine loads it, and be
    read twice: there the weights are read from `engine_starts` on, one file after the other as the engine does, so that
    one of the two readers finds in the page cache what the other has fetched. `remedy` is added to errors.
    """

    def __init__(self, folder: Path, manifest: Manifest, remedy: str = "") -> None:
        self._folder = folder
        self._manifest = manifest
        self._remedy = remedy
        check_sizes(folder, manifest)
        weights = sorted(name for name in manifest.files if name.endswith(_SUFFIX))
        fits = manifest.size <= available_memory()
        self._hashing = Hashing(folder, weights, FILES_AT_ONCE if fits else 1)
        try:
            if fits:
                self._hashing.begin()
            self._others = digests(folder, manifest.files.keys() - set(weights))
            compare(folder, manifest, self._others)
        except SnapshotError:
            self.end()
            raise

    def engine_starts(self) -> None:
        """Read the weights from now on, if they are not being read already."""
        self._hashing.begin()

    def result(self) -> Reading:
        """Wait until every file is compared. Raises `SnapshotError` that names the one that is not the manifest's."""
        try:
            weights = self._hashing.result()
            compare(self._folder, self._manifest, weights)
        except SnapshotError as error:
            raise SnapshotError(f"{error.message}{self._remedy}") from error
        return self._others.reading + weights.reading

    def end(self) -> None:
        """Give the check up: the boot has failed."""
        self._hashing.end()
