"""The `coldsnap` command: which module a command runs, and what its errors look like."""

from __future__ import annotations

import errno
import os
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--nme", "unrecognized argument --nme; did you mean --name?"),
        ("--nam3=x", "unrecognized argument --nam3; did you mean --name?"),
        ("--loud", "unrecognized argument --loud"),
    ],
)
def test_an_option_misspelt_is_answered_with_the_nearest(
    greeting: Greeting, option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["greet", "--name", "a", option])
    assert capsys.readouterr().err.endswith(f"coldsnap greet: error: {words}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--calibrate-samples", "0"), "argument --calibrate-samples: expected a whole number above 0, found '0'"),
        (("--gate-tokens", "many"), "argument --gate-tokens: expected a whole number above 0, found 'many'"),
        (("--max-kl", "nan"), "argument --max-kl: expected a number of at least 0, found 'nan'"),
        (("--max-ppl-ratio=-1",), "argument --max-ppl-ratio: expected a number of at least 0, found '-1'"),
    ],
    ids=str,
)
def test_a_number_of_a_bake_that_is_none_is_named(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bake", "org/model", *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


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


def test_a_disk_that_fails_is_one_line(greeting: Greeting, capsys: pytest.CaptureFixture[str]) -> None:
    greeting.raises = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")
    assert cli.main(["greet", "--name", "a"]) == 1
    assert capsys.readouterr().err == "coldsnap: [Errno 28] No space left on device: '/tmp/x'\n"


def test_a_tool_that_is_not_installed_is_named(greeting: Greeting, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["other"]) == 1
    assert capsys.readouterr().err.startswith("coldsnap: coldsnap other needs not, which is not here; scripts/setup.sh")


def test_a_module_of_ours_that_is_missing_is_no_users_error(greeting: Greeting) -> None:
    greeting.raises = ModuleNotFoundError("No module named 'coldsnap.x'", name="coldsnap.x")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["greet", "--name", "a"])


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
