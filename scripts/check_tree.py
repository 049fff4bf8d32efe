"""Holds the list of files in docs/architecture.md to the files that are there."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_BY_ONE = (
    "src/coldsnap/",
    "builder/",
    "scripts/",
)  # and the top level; elsewhere a line for the folder will do


def listed(page: str) -> list[str]:
    """Paths in the fenced blocks between the tree markers: the first word of each line."""
    tree = re.search(r"<!-- tree -->(.*?)<!-- /tree -->", page, re.DOTALL)
    blocks = re.findall(r"```\w*\n(.*?)```", tree[1], re.DOTALL) if tree else []
    return [line.split()[0] for block in blocks for line in block.splitlines() if line.strip()]


def problems(page: str, files: Iterable[str]) -> list[str]:
    paths, files = listed(page), set(files)
    if not paths:
        return ["docs/architecture.md has no list of files between <!-- tree --> and <!-- /tree -->"]
    folders = tuple(path for path in paths if path.endswith("/"))

    def covered(file: str) -> bool:
        alone = "/" not in file or file.startswith(ONE_BY_ONE)
        return file in paths or (not alone and file.startswith(folders))

    def there(path: str) -> bool:
        return path in files or (path in folders and any(file.startswith(path) for file in files))

    return [
        *(f"docs/architecture.md: {path} is listed twice" for path in sorted({p for p in paths if paths.count(p) > 1})),
        *(f"docs/architecture.md: {path} is listed, but not there" for path in dict.fromkeys(paths) if not there(path)),
        *(f"docs/architecture.md: {file} is there, but not listed" for file in sorted(files) if not covered(file)),
    ]


def present() -> list[str]:
    """Tracked files and those about to be: what a clone would hold."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [file for file in output.split("\0") if (ROOT / file).is_file()]


if __name__ == "__main__":
    page = ROOT / "docs" / "architecture.md"
    sys.exit("\n".join(problems(page.read_text(encoding="utf-8") if page.exists() else "", present())) or 0)
