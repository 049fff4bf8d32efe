"""The work folder of a bake: what is done, what it gave, how long it took; and the bar on the terminal.

The folder lies beside the snapshot's, hence on the same file system, so that the end is one rename. A bake that
was killed leaves it behind, and the next one goes on from its `state.json`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from coldsnap.errors import BakeError

Report = dict[str, Any]
_LOOK_SECONDS = 0.2


class Stages:
    """Runs stages that are not done yet. Only one process at a time may use a work folder."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._console = Console(stderr=True, highlight=False)
        self._state: dict[str, Any] = {"stages": {}}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the work folder, lock it, and read what an earlier bake has done."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BakeError(
                    f"{self.work}: another bake is at work here; wait for it or name another --out"
                ) from None
            path = self.work / "state.json"
            if path.exists():
                self._state = json.loads(path.read_text())
            yield

    def remove(self) -> None:
        """Remove the work folder, its state first: a bake that is killed meanwhile starts anew."""
        (self.work / "state.json").unlink(missing_ok=True)
        shutil.rmtree(self.work)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, in the order they were done."""
        return {name: stage["seconds"] for name, stage in self._state["stages"].items()}

    def report(self, name: str) -> Report:
        """Return what the stage `name`, which is done, gave."""
        return dict(self._state["stages"][name]["report"])

    def forget(self, *, since: str, unless: Report) -> None:
        """Drop the stage `since` and all later ones if they were done for another thing than `unless`."""
        recipes = self._state.setdefault("recipes", {})
        if recipes.get(since) != unless:
            names = list(self._state["stages"])
            for name in names[names.index(since) :] if since in names else []:
                del self._state["stages"][name]
            recipes[since] = unless
            self._save()

    def run(
        self,
        name: str,
        action: Callable[[], Report],
        *,
        total: int | None = None,
        done: Callable[[], int] | None = None,
        again: bool = False,
    ) -> Report:
        """Return what the stage `name` gives: from an earlier bake, or by doing `action` now.

        `done` tells how many of the `total` bytes there are so far, for the bar. With `again` an earlier result
        does not count.
        """
        if not again and (earlier := self._state["stages"].get(name)):
            self._console.print(f"{name:<10} done before in {earlier['seconds']:.1f} s")
            return dict(earlier["report"])
        if not self._console.is_terminal:
            print(f"{name:<10} …", file=sys.stderr, flush=True)
        started = time.monotonic()
        with self._bar(name, total, done):
            report = action()
        seconds = round(time.monotonic() - started, 3)
        self.note(name, seconds, report)
        self._console.print(f"{name:<10} {seconds:.1f} s")
        return report

    def note(self, name: str, seconds: float, report: Report) -> None:
        """Write down that a stage is done. Stages keep the order in which they were first done."""
        self._state["stages"][name] = {"seconds": seconds, "report": report}
        self._save()

    def _save(self) -> None:
        path = self.work / "state.json"
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(self._state, indent=2) + "\n")
        temporary.replace(path)

    @contextmanager
    def _bar(self, name: str, total: int | None, done: Callable[[], int] | None) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        columns = [TextColumn("{task.description:<10}"), BarColumn()]
        columns += [DownloadColumn()] if total else []
        ended = threading.Event()
        with Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=total)

            def watch() -> None:
                while not ended.wait(_LOOK_SECONDS):
                    if done is not None:
                        progress.update(task, completed=done())

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
            finally:
                ended.set()
                watcher.join()


def size_of(folder: Path) -> int:
    """Return the bytes below a folder that may be written to meanwhile, or not be there yet."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
