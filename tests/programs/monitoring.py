"""Programs of Debian's that watch an endpoint: Prometheus and a Pushgateway, on free ports of loopback."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml
from tests.loopback.desk.serving import ROOT

DEPLOY = ROOT / "deploy" / "prometheus"
SCRAPE_SECONDS = 1


class Program:
    """A program that serves HTTP while the context is open; what it says goes to a log in `folder`."""

    def __init__(self, folder: Path, *command: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{found.getsockname()[1]}"
        self.url = f"http://{self.address}"
        self.http: aiohttp.ClientSession
        self._command = [*command, f"--web.listen-address={self.address}"]
        self._log = folder / f"{command[0]}.log"

    async def __aenter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
        self.http = aiohttp.ClientSession()
        async with asyncio.timeout(120):
            while not await self._answers():
                assert self._process.returncode is None, self._log.read_text("utf-8")
                await asyncio.sleep(0.05)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.close()
        self._process.terminate()
        await self._process.wait()

    async def _answers(self) -> bool:
        try:
            async with self.http.get(f"{self.url}/-/ready") as response:
                return response.ok
        except aiohttp.ClientConnectionError:
            return False


class Prometheus(Program):
    """Runs a configuration of `deploy/prometheus`, with other targets and every second."""

    def __init__(self, folder: Path, config: str, target: str) -> None:
        given = yaml.safe_load((DEPLOY / config).read_text("utf-8"))
        given["global"] = dict.fromkeys(given["global"], f"{SCRAPE_SECONDS}s")
        given["rule_files"] = [str(DEPLOY / name) for name in given["rule_files"]]
        (scrape,) = given["scrape_configs"]
        scrape["static_configs"] = [{"targets": [target]}]
        path = folder / config
        path.write_text(yaml.safe_dump(given), "utf-8")
        super().__init__(folder, "prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'prometheus'}")

    async def ask(self, path: str, **query: Any) -> Any:
        """Return the data of an answer of Prometheus's API."""
        async with self.http.get(f"{self.url}/api/v1/{path}", params=query) as response:
            answer = json.loads(await response.read())
        assert answer["status"] == "success", (query, answer)
        return answer["data"]

    async def value(self, expression: str) -> float | None:
        """Return the value of an expression that has one, or None where it has no data."""
        result = (await self.ask("query", query=expression))["result"]
        assert len(result) <= 1, (expression, result)
        return float(result[0]["value"][1]) if result else None
