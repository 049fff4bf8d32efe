"""Holds the file tree in the README to the files that are there."""

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


def listed(readme: str) -> list[str]:
    """Paths in the fenced block between the tree markers: the first word of each line."""
    block = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```\s*<!-- /tree -->", readme, re.DOTALL)
    return [line.split()[0] for line in block[1].splitlines() if line.strip()] if block else []


def problems(readme: str, files: Iterable[str]) -> list[str]:
    paths, files = listed(readme), set(files)
    if not paths:
        return ["README.md has no file tree between <!-- tree --> and <!-- /tree -->"]
    folders = tuple(path for path in paths if path.endswith("/"))

    def covered(file: str) -> bool:
        alone = "/" not in file or file.startswith(ONE_BY_ONE)
        return file in paths or (not alone and file.startswith(folders))

    def there(path: str) -> bool:
        return path in files or (path in folders and any(file.startswith(path) for file in files))

    return [
        *(f"README tree: {path} is listed twice" for path in sorted({p for p in paths if paths.count(p) > 1})),
        *(f"README tree: {path} is listed, but not there" for path in dict.fromkeys(paths) if not there(path)),
        *(f"README tree: {file} is there, but not listed" for file in sorted(files) if not covered(file)),
    ]


def present() -> list[str]:
    """Tracked files and those about to be: what a clone would hold."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [file for file in output.split("\0") if (ROOT / file).is_file()]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    sys.exit("\n".join(problems(readme.read_text(encoding="utf-8") if readme.exists() else "", present())) or 0)
