"""The shared worker of these tests, and boots of others. What a failing test's workers wrote is in its report."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from coldsnap.testing import ControlPlane

from .worker import HANDLER, Worker

Boot = Callable[..., Worker]

_workers: list[Worker] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed and item.path.is_relative_to(Path(__file__).parent):
        report.sections += [(f"worker in {worker.folder}", worker.log()) for worker in _workers]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty home folder, as on a fresh machine: the first boot fills vLLM's caches there."""
    return tmp_path_factory.mktemp("home")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_worker(tmp_path_factory: pytest.TempPathFactory, home: Path) -> AsyncIterator[Worker]:
    """Boot the worker that nearly all tests share; it takes fewer jobs at once than some of them submit."""
    environ = {"MAX_CONCURRENCY": "24", "ENABLE_AUTO_TOOL_CHOICE": "true", "TOOL_CALL_PARSER": "hermes"}
    async with Worker(tmp_path_factory.mktemp("worker"), home, **environ) as worker:
        _workers.append(worker)
        yield worker
        _workers.remove(worker)


@pytest.fixture
def worker(shared_worker: Worker) -> Iterator[Worker]:
    """Lend the shared worker to a test, which must leave it alive and the platform's rules unbroken."""
    yield shared_worker
    for job in shared_worker.plane.jobs.values():
        shared_worker.plane.cancel(job.id)  # nothing, where it has ended
    left, shared_worker.plane.violations = shared_worker.plane.violations, []
    assert left == []
    assert shared_worker.process.returncode is None


@pytest.fixture
def plane(worker: Worker) -> ControlPlane:
    return worker.plane


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_client(shared_worker: Worker) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=shared_worker.gateway.base_url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def client(worker: Worker, shared_client: openai.AsyncOpenAI) -> openai.AsyncOpenAI:
    """Return the official OpenAI client, in front of the shared worker."""
    return shared_client


@pytest.fixture
def new_worker(tmp_path: Path, home: Path) -> Iterator[Boot]:
    """Return a way to boot a worker of a test's own: `async with new_worker(DRAIN_SECONDS="1") as worker`."""
    before = len(_workers)

    def boot(plane: ControlPlane | None = None, handler: Path = HANDLER, **environ: str) -> Worker:
        worker = Worker(tmp_path, home, plane=plane, handler=handler, **environ)
        _workers.append(worker)
        return worker

    yield boot
    del _workers[before:]
