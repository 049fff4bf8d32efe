"""Answers that are kept in a file until the environment changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
