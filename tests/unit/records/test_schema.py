"""The published JSON Schema is that of the records."""

from __future__ import annotations

from pathlib import Path

from coldsnap.records import schema as records

PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "records.schema.json"


def test_the_published_schema_is_true() -> None:
    assert PUBLISHED.read_text("utf-8") == records.schema(), "run `make schema`"
