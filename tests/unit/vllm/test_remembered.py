"""Answers that are kept in a file until the environment changes."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from coldsnap.vllm import remembered
from coldsnap.vllm.remembered import Remembered, environment_key


def test_an_answer_is_asked_for_once_and_is_the_askers_own(tmp_path: Path) -> None:
    asked: list[int] = []

    def ask() -> dict[str, frozenset[str]]:
        asked.append(1)
        return {"a": frozenset({"b"})}

    first = Remembered(tmp_path / "new" / "kept", "key")
    answer = first.answer("search", ask)
    answer["spoilt"] = frozenset()
    assert first.answer("search", ask) == {"a": frozenset({"b"})}
    first.keep()
    assert Remembered(tmp_path / "new" / "kept", "key").answer("search", ask) == {"a": frozenset({"b"})}
    assert len(asked) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-3], lambda data: b"x" * len(data)])
def test_a_file_that_is_damaged_or_of_another_environment_is_not_used(tmp_path: Path, spoil: object) -> None:
    file = tmp_path / "kept"
    first = Remembered(file, "key")
    first.answer("search", lambda: 1)
    first.keep()
    assert Remembered(file, "other").answer("search", lambda: 2) == 2
    file.write_bytes(spoil(file.read_bytes()))  # type: ignore[operator]
    assert Remembered(file, "key").answer("search", lambda: 3) == 3


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Remembered(tmp_path / "file" / "kept", "key")
    assert kept.answer("search", lambda: 1) == 1
    kept.keep()


def test_the_key_changes_when_something_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    os.utime(folder, (1_700_000_000, 1_700_000_000))
    before = environment_key()
    assert environment_key() == before
    (folder / "new.dist-info").mkdir()
    assert environment_key() != before


def test_the_key_is_the_same_once_a_registry_has_cut_off_nanoseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    os.utime(folder, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    before = environment_key()
    os.utime(folder, (1_700_000_000, 1_700_000_000))
    assert environment_key() == before


IMPORT_UTILS = """
SEARCHED = []
def create_import_structure_from_path(path):
    SEARCHED.append(str(path))
    return {"llama": {frozenset(): {"LlamaConfig"}}}
"""


def test_two_imports_search_once_and_the_second_is_told_what_the_first_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, models = tmp_path / "searching", tmp_path / "models"
    package.mkdir()
    models.mkdir()
    (package / "__init__.py").touch()
    (package / "import_utils.py").write_text(IMPORT_UTILS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(remembered, "_TRANSFORMERS", "searching.import_utils")
    finders, search = list(sys.meta_path), importlib.metadata.packages_distributions
    searched = []
    for _ in range(2):
        with remembered.searches({"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}):
            module: Any = importlib.import_module("searching.import_utils")
            structure = module.create_import_structure_from_path(models)
            distributions = importlib.metadata.packages_distributions()
        assert structure == {"llama": {frozenset(): {"LlamaConfig"}}}
        assert distributions == search()
        assert module.create_import_structure_from_path(package) == structure
        searched.append(module.SEARCHED)
        del sys.modules["searching.import_utils"]
    assert searched == [[str(models), str(package)], [str(package)]]
    assert (sys.meta_path, importlib.metadata.packages_distributions) == (finders, search)
