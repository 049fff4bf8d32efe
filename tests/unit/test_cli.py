"""The `coldsnap` command: which module a command runs, and what its errors look like."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from coldsnap import cli
from coldsnap.errors import ColdsnapError, SnapshotError
from coldsnap.settings import ROOT


class Greeting(ModuleType):
    """A command's module that raises what it is told to."""

    raises: BaseException | None = None

    @staticmethod
    def configure(parser: Any) -> None:
        parser.add_argument("--name", required=True)

    def run(self, options: Any) -> int:
        if self.raises:
            raise self.raises
        return len(options.name)


@pytest.fixture
def greeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Greeting]:
    module = Greeting("greeting")
    monkeypatch.setitem(sys.modules, "greeting", module)
    monkeypatch.setattr(cli, "COMMANDS", {"greet": ("greeting", "says hello"), "other": ("not.there", "is not")})
    return module


def test_a_command_gets_its_arguments_and_gives_the_exit_code(greeting: Greeting) -> None:
    assert cli.main(["greet", "--name", "you"]) == 3


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["greet"], ["greet", "--name", "a", "--loud"]], ids=" ".join)
def test_wrong_usage_is_exit_code_2(
    greeting: Greeting, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: coldsnap" in capsys.readouterr().err


def test_help_lists_the_commands_without_importing_them(greeting: Greeting, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "says hello" in capsys.readouterr().out


@pytest.mark.parametrize("error", [SnapshotError("a: wrong"), ColdsnapError("a: wrong")])
def test_an_error_is_one_line_and_exit_code_1(
    greeting: Greeting, error: ColdsnapError, capsys: pytest.CaptureFixture[str]
) -> None:
    greeting.raises = error
    assert cli.main(["greet", "--name", "a"]) == 1
    assert capsys.readouterr().err == "coldsnap: a: wrong\n"


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (end.value.code, capsys.readouterr().out) == (0, f"coldsnap {project['version']}\n")


def test_an_interrupt_is_exit_code_130(greeting: Greeting) -> None:
    greeting.raises = KeyboardInterrupt()
    assert cli.main(["greet", "--name", "a"]) == 130


def test_every_command_is_there() -> None:
    for module, summary in cli.COMMANDS.values():
        assert summary
        assert callable(__import__(module, fromlist=["run"]).run)
