"""The tree of errors: each says what an OpenAI client gets, and whether the worker lives on."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import orjson
import pytest

import coldsnap
from coldsnap.errors import BootError, CacheError, ColdsnapError, CommandError, EngineDead, InvalidInput, JobError


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
