"""The rules of the architecture and of the documents, kept true by looking at the files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from scripts.check_tree import listed, present, problems

from coldsnap.settings import ROOT, Settings

PACKAGE = ROOT / "src" / "coldsnap"
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
OURS = {name: tree for name, tree in MODULES.items() if not name.startswith("testing/")}
DESK = {
    name
    for name in OURS
    if name.startswith(("desk/report/", "desk/serve/", "desk/plan/", "desk/bench/", "desk/compare/"))
}
"""Tools of the desk: a database, plots, a server may take time to import, and the worker never waits for them."""
README = (ROOT / "README.md").read_text(encoding="utf-8")
_MODULE_NAME = re.compile(r"([A-Za-z]\w*)(\.\w+)+(:\w+)?")


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the top-level name of everything that is imported, also by `import_module` or a name like it."""
    for node in nodes:
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__", "find_spec"}:
                yield str(node.args[0].value).partition(".")[0]
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Constant) and (match := _MODULE_NAME.fullmatch(str(node.value))):
            yield match[1]


def importers(package: str) -> list[str]:
    return [name for name, tree in OURS.items() if package in set(imports(ast.walk(tree)))]


def test_the_modules_are_found() -> None:
    assert {"vllm/engine", "worker", "jobs/job", "__init__"} < OURS.keys()
    assert "testing/gateway" in MODULES.keys() - OURS.keys()


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        (
            "vllm",
            ["caches/fingerprint", "vllm/engine", "vllm/moved", "vllm/release", "vllm/start"],
        ),  # the others look where it lies
        ("torch", ["vllm/start"]),
        ("runpod", ["worker"]),
        ("boto3", ["foundation/s3"]),
        ("pynvml", ["foundation/nvml"]),
    ],
)
def test_a_foreign_package_has_its_border(package: str, modules: list[str]) -> None:
    assert importers(package) == modules


def test_a_border_that_moves_into_another_module_is_noticed() -> None:
    code = "def f():\n from vllm.v1 import x\nimport_module('runpod.serverless')\nimport a.b, boto3\n"
    tree = ast.parse(f"{code}x.import_module('pynvml')\n__import__('torch')")
    assert set(imports(ast.walk(tree))) == {"vllm", "runpod", "a", "boto3", "pynvml", "torch"}


def test_no_module_is_slow_to_import() -> None:
    after_vllm = {
        f"cost/{name}" for name in ("accounts", "energy", "shares", "step_model", "step_reader")
    }  # when numpy has been imported anyway
    ours = OURS.keys() - after_vllm - DESK
    names = [f"coldsnap.{name.replace('/', '.')}" for name in ours if not name.endswith("__init__")]
    slow = (
        "vllm",
        "torch",
        "transformers",
        "runpod",
        "fastapi",
        "rich",
        "numpy",
        "uvloop",
        "boto3",
        "prometheus_client",
        "pynvml",
    )
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {names}];"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    environ = {"PYTHONPATH": str(ROOT / "src")}
    output = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
    assert output.stdout.strip() == "[]"


def test_the_worker_never_imports_a_tool_of_the_desk() -> None:
    def reaches(name: str) -> set[str]:
        """Return what a module may import, at its top or when it is run, on to the end."""
        found, rest = set[str](), {name}
        while rest:
            module = rest.pop()
            found.add(module)
            rest |= ours_of(MODULES[module]) - found
        return found

    assert {"worker", "boot", "vllm/start", "records/schema"} < reaches("worker")
    assert {name for name in reaches("worker") if name.startswith("desk/")} == set()
    assert {"desk/report/command", "desk/report/plots", "records/schema"} < reaches("desk/report/command")


BORDERS = {"errors", "engine", "settings", "timeline", "processes", "patches"}
"""What every room may import of the ground floor. The rest of it is a worker's life, which no room knows."""
ARROWS: Mapping[str, set[str]] = {
    "foundation": set(),
    "image": {"foundation"},
    "cost": {"foundation"},
    "records": {"foundation", "cost"},
    "snapshot": {"foundation", "records"},
    "vllm": {"cost"},
    "caches": {"foundation", "records", "snapshot", "vllm"},
    "jobs": {"cost", "records"},
    "desk": {"foundation", "cost", "records"},
}
"""Which rooms a room may import. Each stands below those that it names, so there is no circle."""


def room(name: str) -> str | None:
    """Return the room that a module is in, None for one on the ground floor."""
    return name.partition("/")[0] if "/" in name else None


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_what_its_arrows_say_and_nothing_else(name: str) -> None:
    imported = {other for module, tree in OURS.items() if room(module) == name for other in ours_of(tree)}
    rooms = {room(other) for other in imported} - {None, name}
    ground = {other for other in imported if room(other) is None}
    assert rooms <= ARROWS[name]
    assert ground <= BORDERS | {"__init__"}


def test_every_room_has_its_arrows_and_they_make_no_circle() -> None:
    assert {room(module) for module in OURS} - {None} == ARROWS.keys()
    above: dict[str, set[str]] = {name: set(rooms) for name, rooms in ARROWS.items()}
    while free := [name for name, rooms in above.items() if not rooms]:
        for name in free:
            del above[name]
        for rooms in above.values():
            rooms -= {*free}
    assert above == {}


def test_the_borders_of_the_ground_floor_know_no_room_but_the_foundation() -> None:
    for name in BORDERS:
        assert {room(other) for other in ours_of(OURS[name])} <= {None, "foundation"}, name


def ours_of(tree: ast.AST) -> set[str]:
    """Return the modules of ours that a module names in its imports."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coldsnap"):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("coldsnap")}
        elif isinstance(node, ast.Constant) and str(node.value).startswith("coldsnap."):
            names.add(str(node.value).partition(":")[0])
    found = {name.removeprefix("coldsnap.").replace(".", "/") for name in names}
    return {name for each in found for name in (each, f"{each}/__init__") if name in MODULES}


def test_only_the_process_entry_touches_the_environment() -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    found = {
        name
        for name, tree in OURS.items()
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in names
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names})
    }
    # image and make_image write down or replace the environment of the process that they work on
    own = {"image/arrival", "image/noting", "make_image"}
    # worker and warm hand os.environ to Settings.read and to the boot, desk/serve to the workers that it starts;
    # step_meter runs in a process that vLLM starts; desk/bench and desk/compare look for an endpoint's key
    assert found - own == {
        "worker",
        "warm",
        "cost/step_meter",
        "desk/serve/command",
        "desk/bench/command",
        "desk/compare/command",
    }
    assert own < found


def test_nothing_that_serves_depends_on_the_doubles() -> None:
    users = {
        name
        for name, tree in OURS.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coldsnap.testing")
    }
    assert users == set()


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in MODULES.items() if tree.body and not ast.get_docstring(tree)] == []


def test_there_is_no_drawer_for_everything() -> None:
    assert [name for name in MODULES if Path(name).name in {"utils", "util", "helpers", "common", "misc"}] == []


def test_nothing_beside_the_package_can_shadow_another_module() -> None:
    assert not (ROOT / "src" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "src").glob("*.py")] == []


class TestHandler:
    TEXT = (ROOT / "handler.py").read_text(encoding="utf-8")

    def test_it_is_short(self) -> None:
        assert len(self.TEXT.splitlines()) <= 40

    def test_importing_it_boots_nothing(self) -> None:
        tree = ast.parse(self.TEXT)
        assert set(imports(tree.body)) <= {"sys", "pathlib"}
        code = "import sys, handler; print('coldsnap' in sys.modules, sys.path[0])"
        output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        assert output.stdout.split() == ["False", str(ROOT / "src")]

    def test_the_child_processes_of_the_engine_find_the_guard(self) -> None:
        assert 'if __name__ == "__main__":' in self.TEXT


def test_the_locks_name_no_place_that_packages_come_from() -> None:
    for lock in (ROOT / "requirements").glob("*.lock"):
        text = lock.read_text(encoding="utf-8")
        assert "--hash=sha256:" in text
        assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host| @ ", text), lock.name


class TestPages:
    def test_the_table_of_settings_is_the_one_of_the_settings(self) -> None:
        assert table("docs/settings.md") == Settings.table().splitlines()

    def test_the_readmes_few_settings_are_rows_of_that_table(self) -> None:
        rows = table("README.md")
        assert len(rows) == 8
        assert set(rows) < set(Settings.table().splitlines())

    def test_every_file_has_its_line(self) -> None:
        assert problems((ROOT / "docs" / "architecture.md").read_text("utf-8"), present()) == []

    def test_the_readme_has_a_line_for_each_room_and_is_short(self) -> None:
        assert [name for name in {*ARROWS, "testing"} if f"| `{name}/` |" not in README] == []
        assert len(README.splitlines()) <= 220


def table(page: str) -> list[str]:
    """Return the lines between a page's markers for settings."""
    found = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert found
    return found[1].strip().splitlines()


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [name for name in present() if name.endswith(".md")])
def test_a_page_links_to_what_is_there(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link:
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


TREE = """
before
<!-- tree -->
```text
handler.py          the entry point
src/coldsnap/a.py   one
tests/              tests
```
<!-- /tree -->
after.py
"""


class TestTree:
    FILES = ("handler.py", "src/coldsnap/a.py", "tests/unit/test_a.py")

    def test_the_first_word_of_each_line_is_a_path(self) -> None:
        assert listed(TREE) == ["handler.py", "src/coldsnap/a.py", "tests/"]

    def test_a_tree_that_is_right_has_no_problems(self) -> None:
        assert problems(TREE, self.FILES) == []

    @pytest.mark.parametrize(
        ("files", "problem"),
        [
            ((*FILES, "src/coldsnap/b.py"), "src/coldsnap/b.py is there, but not listed"),
            ((*FILES, "LICENSE"), "LICENSE is there, but not listed"),
            ((*FILES, "builder/x.py"), "builder/x.py is there, but not listed"),
            (FILES[1:], "handler.py is listed, but not there"),
            (FILES[:2], "tests/ is listed, but not there"),
        ],
    )
    def test_a_file_more_or_less_is_a_problem(self, files: tuple[str, ...], problem: str) -> None:
        (found,) = problems(TREE, files)
        assert found.endswith(problem)

    def test_a_path_listed_twice_is_a_problem(self) -> None:
        readme = TREE.replace("tests/ ", "handler.py again\ntests/ ")
        (found,) = problems(readme, self.FILES)
        assert found.endswith("handler.py is listed twice")

    def test_a_readme_without_a_tree_is_a_problem(self) -> None:
        assert len(problems("no tree", self.FILES)) == 1


HURRIES = re.compile(
    r"\.(?:timeout|result|started|wait|wait_for_worker|join|communicate)\((?:timeout=)?(?!0\))[1-5]?\d(?:\.\d+)?[,)]"
    r"|assert .*(?:monotonic|perf_counter)\(\) - .*"
)
"""What a slow machine fails: a limit below a minute, and an assertion on how long something took."""


@pytest.mark.parametrize("folder", ["engine", "loopback", "programs"])
def test_no_test_hangs_on_the_machines_speed(folder: str) -> None:
    found = {path.name: HURRIES.findall(path.read_text("utf-8")) for path in (ROOT / "tests" / folder).rglob("*.py")}
    assert {name: hurries for name, hurries in found.items() if hurries} == {}
