"""Prints those entries of a lock whose packages this interpreter does not have, in any version.

For an image whose base brings vLLM: the versions there are the ones vLLM was released with, so they stay.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path


def entries(lock: str) -> Iterator[tuple[str, str]]:
    """Yield each pinned package's name and its lines, hashes and all."""
    for entry in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]:
        yield normal(entry.partition("==")[0]), entry


def missing(lock: str, present: Iterable[str]) -> str:
    have = {normal(name) for name in present}
    return "".join(entry for name, entry in entries(lock) if name not in have)


def normal(name: str) -> str:
    """Spell a name as the package index does (PEP 503), without extras."""
    return re.sub(r"[-_.]+", "-", name.partition("[")[0].strip()).lower()


if __name__ == "__main__":
    sys.stdout.write(missing(Path(sys.argv[1]).read_text(encoding="utf-8"), (d.name for d in distributions())))
