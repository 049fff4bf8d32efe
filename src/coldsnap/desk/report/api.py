"""What others ask for the same tokens: a dated table of API rates, `--api-prices prices.yaml`."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldsnap.errors import ReportError


class Rate(BaseModel):
    """US dollars for 1M tokens. Cached input costs as much as other input unless it is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    input: float = Field(ge=0, allow_inf_nan=False)
    cached_input: float | None = Field(None, ge=0, allow_inf_nan=False)
    output: float = Field(ge=0, allow_inf_nan=False)
    models: tuple[str, ...] | None = None
    """Which models of the ledger it is compared with; all of them if not given."""
    page: str | None = None
    """Where the rate is published."""


class Rates(BaseModel):
    """A table of rates, when they were looked up, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: date
    source: str = Field(min_length=1)
    prices: tuple[Rate, ...] = Field(min_length=1)


def read(path: Path) -> Rates:
    """Read a table. `ReportError` names the file and the key that is wrong."""
    try:
        table = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ReportError(f"--api-prices: {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"--api-prices: {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ReportError(f"--api-prices: {path}: expected the keys date, source and prices, found {table!r:.60}")
    try:
        return Rates.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        what_is_there = "" if first["type"] == "missing" else f", found {first['input']!r:.60}"
        raise ReportError(f"--api-prices: {path}: {key}: {first['msg'].lower()}{what_is_there}") from error
