"""What functions that search the whole environment have found, kept in a file until the environment changes."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.metadata
import marshal
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from coldsnap import patches
from coldsnap.vllm import release

_TRANSFORMERS = "transformers.utils.import_utils"


@contextlib.contextmanager
def searches(environ: Mapping[str, str]) -> Iterator[None]:
    """Answer from memory what an import of vLLM searches the whole environment for."""
    if not patches.allowed("imports"):
        yield
        return
    kept = Remembered(release.cache_folders(environ)["vllm"].with_name("coldsnap") / "imports", environment_key())
    search = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: kept.answer("packages_distributions", search)
    mending = _Mending(_TRANSFORMERS, lambda module: _remember(module, kept))
    sys.meta_path.insert(0, mending)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = search
        sys.meta_path.remove(mending)
    kept.keep()


def environment_key() -> str:
    """Return what changes whenever a package is installed, upgraded or removed: the folders and their times.

    In whole seconds: an image's layers keep no more of a time, so that nanoseconds would change at the first pull.
    """
    folders = [Path(name) for name in sys.path if Path(name).name in {"site-packages", "dist-packages"}]
    return repr([sys.version, *((str(folder), int(folder.stat().st_mtime)) for folder in folders if folder.exists())])


class Remembered:
    """Answers of functions, by the function's name. Files in the environment that are edited in place go unseen."""

    def __init__(self, file: Path, key: str) -> None:
        self._file = file
        self._key = key
        self._answers: dict[str, bytes] = {}
        self._known = 0
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            kept, answers = marshal.loads(file.read_bytes())  # noqa: S302 -- as trusted as the bytecode beside it
            if kept == key:
                self._answers = answers
                self._known = len(answers)

    def answer(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return what `ask` returns, or returned when it was last asked. Plain data only, and its own each time."""
        if name not in self._answers:
            self._answers[name] = marshal.dumps(ask())
        return marshal.loads(self._answers[name])  # noqa: S302

    def keep(self) -> None:
        """Write down what is new. A folder that cannot be written is no error: the next boot asks again."""
        if len(self._answers) == self._known:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}")
            part.write_bytes(marshal.dumps((self._key, self._answers)))
            part.replace(self._file)


def _remember(module: Any, kept: Remembered) -> None:
    """Spare transformers its look at the source of its 3,000 files, twice, for which class is where."""
    search = module.create_import_structure_from_path

    def remembering(path: Any) -> Any:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        return kept.answer(str(folder), lambda: search(folder)) if folder.name == "models" else search(path)

    module.create_import_structure_from_path = remembering


class _Mending(importlib.abc.MetaPathFinder):
    """Calls `mend` with one module as soon as it is imported, before anybody has a name out of it."""

    def __init__(self, module: str, mend: Callable[[ModuleType], None]) -> None:
        self._module = module
        self._mend = mend

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        del target
        spec = PathFinder.find_spec(name, path) if name == self._module else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._mend(module)

            vars(spec.loader)["exec_module"] = exec_module
        return spec
