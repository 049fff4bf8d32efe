"""Modules that are put off, in packages made for each test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coldsnap.vllm import imports
from coldsnap.vllm.imports import Deferral, StandIn

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules below `shop`; afterwards nothing of them, nor of a deferral, is left."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)

    def write(**sources: str) -> None:
        for name, source in sources.items():
            file = tmp_path / "shop" / (name + ".py").replace("package", "__init__").replace("big_", "big/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        (tmp_path / "shop" / "__init__.py").touch()

    yield write
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def loaded(name: str) -> bool:
    return isinstance(sys.modules.get(name), ModuleType) and "RAN" in vars(sys.modules[name])


LATE = """
RAN = True
class Late:
    size = 3
    def __init__(self, n=1): self.n = n
MAP = {'a': 1}
def make(): return Late(5)
"""
USER = "from shop.late import Late, MAP, make\ndef f(x: Late | None) -> None: ...\n"


def test_a_name_of_a_module_that_is_put_off_is_had_without_it_and_is_the_real_thing_once_it_is_used(
    write: Write,
) -> None:
    write(late=LATE, user=USER)
    Deferral(["shop.late"]).begin()
    user: Any = importlib.import_module("shop.user")
    assert not loaded("shop.late")
    assert isinstance(user.Late, StandIn)
    assert user.make().n == 5
    assert loaded("shop.late")
    late: Any = importlib.import_module("shop.late")
    assert isinstance(late.Late(), user.Late)
    assert issubclass(late.Late, user.Late)
    assert (user.Late.size, user.Late(2).n, user.MAP["a"], "a" in user.MAP, list(user.MAP)) == (3, 2, 1, True, ["a"])
    assert issubclass(importlib.import_module("types").new_class("Child", (user.Late,)), late.Late)


def test_what_is_settled_is_where_the_stand_ins_were(write: Write) -> None:
    write(late=LATE, user=USER)
    Deferral(["shop.late"]).begin()
    user: Any = importlib.import_module("shop.user")
    imports.settle()
    late: Any = importlib.import_module("shop.late")
    assert (user.Late, user.MAP, user.make) == (late.Late, late.MAP, late.make)


def test_what_was_not_asked_for_is_not_imported_by_settling(write: Write) -> None:
    write(late=LATE)
    Deferral(["shop.late"]).begin()
    imports.settle()
    assert not loaded("shop.late")
    importlib.import_module("shop.late")
    assert loaded("shop.late")


def test_a_part_of_a_package_that_is_put_off_is_imported_alone_and_is_the_same_afterwards(write: Write) -> None:
    write(big_part="RAN = True\n")
    write(big_package="RAN = True\nfrom . import part\nfrom .part import RAN as SAME\n")
    Deferral(["shop.big"]).begin()
    part = importlib.import_module("shop.big.part")
    assert not loaded("shop.big")
    imports.settle()
    big: Any = importlib.import_module("shop.big")
    assert loaded("shop.big")
    assert big.part is part is importlib.import_module("shop.big.part")


def test_answers_are_given_without_the_module_and_other_names_by_it(write: Write) -> None:
    write(late=LATE)
    Deferral([], {"shop.late": {"Late": 7}}).begin()
    late: Any = importlib.import_module("shop.late")
    assert late.Late == 7
    assert not loaded("shop.late")
    imports.settle()
    assert not loaded("shop.late")
    assert late.MAP == {"a": 1}
    assert loaded("shop.late")


def test_a_part_that_needs_its_package_gets_it_once(write: Write) -> None:
    write(late="RUNS = []\n", big_part="from shop.late import RUNS\nRUNS.append(1)\n")
    write(big_package="RAN = True\nfrom . import part\n")
    Deferral([], {"shop.big": {}}).begin()
    importlib.import_module("shop.big")
    part: Any = importlib.import_module("shop.big.part")
    assert loaded("shop.big")
    assert part.RUNS == [1]
    assert sys.modules["shop.big"].__dict__["part"] is part is sys.modules["shop.big.part"]
    assert part.__spec__.loader is part.__loader__
    assert part.__spec__.origin == part.__file__


def test_a_module_that_is_not_there_is_not_there(write: Write) -> None:
    write(late=LATE)
    Deferral(["shop.none"]).begin()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shop.none")


def test_a_module_is_mended_once_it_is_imported(write: Write) -> None:
    write(late=LATE)
    Deferral([], after={"shop.late": lambda module: setattr(module, "MAP", "mended")}).begin()
    late: Any = importlib.import_module("shop.late")
    assert late.MAP == "mended"
