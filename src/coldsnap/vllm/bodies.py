"""Refuses a long request body at its first wrong list item, before vLLM's models look at all of it.

Pydantic reports everything that is wrong with every item, for each kind of item that would do: a list of 10,000 zeros
as the `input` of `/v1/responses` makes 610,000 errors, in whose text the event loop stands still for 14 s.
"""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator

from coldsnap.engine import HttpRequest
from coldsnap.errors import InvalidInput

LONG_BYTES = 2000
"""A shorter body has no list that is long."""
_LISTS = ("list", "tuple", "set", "frozenset")
_SHOWN = 200
"""Characters of an error's place and of its text."""


class Bodies:
    """Checks bodies against the models of an application's routes; each is read at its first long body."""

    def __init__(self, app: Any) -> None:
        fields = {route.path: getattr(route, "body_field", None) for route in app.routes}
        self._models = {path: field.field_info.annotation for path, field in fields.items() if field is not None}
        self._validators: dict[str, SchemaValidator] = {}

    def check(self, request: HttpRequest) -> None:
        """Raise `InvalidInput` that names the first wrong item, if a long body has one."""
        if len(request.body) < LONG_BYTES or request.path not in self._models:
            return
        validator = self._validators.get(request.path)
        if validator is None:
            schema = TypeAdapter(self._models[request.path]).core_schema
            # Otherwise a model inside is validated by its class's own validator, which knows nothing of the change.
            validator = SchemaValidator(_failing_fast(schema), _use_prebuilt=False)
            self._validators[request.path] = validator
        try:
            validator.validate_python(orjson.loads(request.body))
        except ValidationError as error:
            for flaw in error.errors(include_url=False, include_input=False, include_context=False):
                if any(isinstance(step, int) for step in flaw["loc"]):
                    where = ".".join(map(str, flaw["loc"]))[:_SHOWN]
                    raise InvalidInput(f"{where}: {flaw['msg'][:_SHOWN]}", param=where) from None


def _failing_fast(schema: Any) -> Any:
    """Return a copy of a core schema of Pydantic's whose lists stop at the first wrong item."""
    if isinstance(schema, dict):
        copied = {name: _failing_fast(inner) for name, inner in schema.items()}
        return copied | {"fail_fast": True} if copied.get("type") in _LISTS else copied
    if isinstance(schema, list | tuple):
        return type(schema)(map(_failing_fast, schema))
    return schema
