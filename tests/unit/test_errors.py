"""The tree of errors: each says what an OpenAI client gets, and whether the worker lives on."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator

import orjson
import pytest

import coldsnap
from coldsnap.errors import BootError, CacheError, ColdsnapError, CommandError, EngineDead, InvalidInput, JobError
from coldsnap.settings import ROOT


def tree(root: type[ColdsnapError] = ColdsnapError) -> Iterator[type[ColdsnapError]]:
    """Every error of the package, also those that a module keeps to itself."""
    for module in pkgutil.walk_packages(coldsnap.__path__, "coldsnap."):
        if not module.name.startswith("coldsnap.testing"):
            importlib.import_module(module.name)
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


ERRORS = sorted(set(tree()), key=lambda error: error.__qualname__)
BY_MESSAGE = [error for error in ERRORS if error.__init__ is ColdsnapError.__init__]
PUBLIC = [error for error in BY_MESSAGE if error.__module__ == "coldsnap.errors"]


def test_the_whole_tree_is_looked_at() -> None:
    names = {error.__name__ for error in ERRORS}
    assert {"SnapshotError", "RouteRefused", "EngineDead", "Draining", "_Answered", "Unavailable"} <= names


def test_what_is_not_in_the_tree_never_leaves_its_module_or_is_what_another_side_said() -> None:
    outside = {
        f"{name}.{kind.__name__}"
        for name, module in list(sys.modules.items())
        if name.startswith("coldsnap.") and not name.startswith("coldsnap.testing")
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, BaseException) and kind.__module__ == name
        if not issubclass(kind, ColdsnapError) and not kind.__name__.startswith("_")
    }
    assert outside == {
        "coldsnap.desk.bench.answer.Failed",
        "coldsnap.desk.serve.control_plane.WorkerUnhealthy",
        "coldsnap.desk.serve.job.JobCancelled",
        "coldsnap.desk.serve.job.JobFailed",
        "coldsnap.jobs.post.Unsent",
    }


def test_a_private_exception_is_named_in_its_own_module_only() -> None:
    text = {path: path.read_text("utf-8") for path in (ROOT / "src" / "coldsnap").rglob("*.py")}
    private = re.findall(r"^class (_\w+)\(\w*(?:Error|Exception)\):", "\n".join(text.values()), re.MULTILINE)
    assert {"_Undelivered", "_JobEnded"} < {*private}
    users = {name: [path.stem for path, code in text.items() if re.search(rf"\b{name}\b", code)] for name in private}
    assert {name: modules for name, modules in users.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_an_http_error_status_and_a_type(error: type[ColdsnapError]) -> None:
    assert 400 <= error.status < 600
    assert error.type
    assert error.type.isprintable()
    assert isinstance(error.survives, bool)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_says_what_it_is_for(error: type[ColdsnapError]) -> None:
    assert error.__name__.startswith("_") or error.__doc__


@pytest.mark.parametrize("error", BY_MESSAGE)
def test_the_body_is_an_openai_error_in_json(error: type[ColdsnapError]) -> None:
    body = orjson.loads(orjson.dumps(error("prompt: wrong → 日本", param="prompt").body()))
    assert body == {
        "error": {
            "message": "prompt: wrong → 日本",
            "type": error.type,
            "param": "prompt",
            "code": error.status,
        }
    }


@pytest.mark.parametrize("error", BY_MESSAGE)
def test_the_message_is_what_the_error_prints(error: type[ColdsnapError]) -> None:
    raised = error("a sentence")
    assert str(raised) == raised.message == "a sentence"
    assert raised.param is None


@pytest.mark.parametrize("error", PUBLIC)
def test_an_error_ends_the_boot_the_job_or_the_worker(error: type[ColdsnapError]) -> None:
    kinds = [kind for kind in (BootError, JobError, EngineDead, CommandError, CacheError) if issubclass(error, kind)]
    assert len(kinds) == (error is not ColdsnapError)
    assert error.survives == (not issubclass(error, BootError | EngineDead))


@pytest.mark.parametrize("error", [error for error in ERRORS if issubclass(error, InvalidInput)])
def test_what_the_caller_did_wrong_is_a_4xx(error: type[ColdsnapError]) -> None:
    assert error.status < 500
