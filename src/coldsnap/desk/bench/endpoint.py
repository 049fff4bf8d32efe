"""An endpoint as a client sees it: its address, what it says about itself, and one request to it.

`Endpoint` is plain OpenAI over HTTP, vLLM's own server or the platform's proxy; `jobs.Jobs` sends jobs. What aiohttp
raises becomes `Failed` in `foreign`, here only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import orjson

from coldsnap.desk.bench.answer import Answer, Events, Failed, failure
from coldsnap.desk.bench.dialect import Api, Dialect, route
from coldsnap.errors import BenchError

_KEEP_SECONDS = 4.0
"""How long an idle connection is used again: uvicorn closes it after 5, and a request must not meet that."""
_CONNECT_SECONDS = 30.0
_STATUS_SECONDS = 1.0
_UNFINISHED = {"IN_QUEUE", "IN_PROGRESS"}
WANTED = "https://api.runpod.ai/v2/<endpoint>, …/v2/<endpoint>/openai/v1 or http://host:port/v1"


@dataclass(frozen=True, slots=True)
class Address:
    """`openai` is the base of OpenAI routes, `jobs` that of the platform's; one of them or both are there."""

    url: str
    openai: str | None
    jobs: str | None
    api: Api
    """What is spoken there unless told otherwise."""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Tell by its path what an address leads to. Raises `BenchError`."""
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise BenchError(f"URL: expected {WANTED}, found {url!r:.200}: {error}") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BenchError(f"URL: expected {WANTED}, found {url!r:.200}")
        if parts.query or parts.fragment or parts.username is not None:
            raise BenchError(f"URL: expected no ?, no # and no user name, found one in an address of {parts.hostname}")

        def base(path: str) -> str:
            return urlunsplit((parts.scheme, parts.netloc, path, "", ""))

        path = parts.path.rstrip("/")
        if match := re.fullmatch(r"(/v2/[^/]+)", path):
            return cls(url, None, base(path), "native")
        api: Api = "chat" if path.endswith("/chat/completions") else "completions"
        path = re.sub(r"(/chat)?/completions$", "", path)
        if match := re.fullmatch(r"(/v2/[^/]+)/openai(/v1)?", path):
            return cls(url, base(f"{match[1]}/openai/v1"), base(match[1]), api)
        if not path or path.endswith("/v1"):
            return cls(url, base(path or "/v1"), None, api)
        raise BenchError(f"URL: expected {WANTED}, found {url!r:.200}")

    @property
    def host(self) -> str:
        """Host and port, for errors."""
        return urlsplit(self.url).netloc


class Endpoint:
    """Asks over HTTP, in an OpenAI format. A context: its connections are closed with it."""

    def __init__(self, address: Address, key: str | None, dialect: Dialect) -> None:
        self.address = address
        self.dialect = dialect
        # not compressed: who compresses a stream may hold it back
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def models(self) -> list[str] | None:
        """Return the names that requests may use, None where the endpoint does not tell. Raises `Failed`."""
        try:
            answer = await self._call("GET", f"{self.address.openai}/models")
        except Failed as failed:
            if failed.status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
                return None
            raise
        listed = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(listed, list) or not all(isinstance(each, dict) and "id" in each for each in listed):
            raise Failed("not understood", "its /models has no list of models")
        return [str(each["id"]) for each in listed]

    async def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, none where there is no such route."""
        body: dict[str, Any] = {"prompt": text, "add_special_tokens": False}
        if self.address.jobs is None and self.dialect.model is not None:
            body["model"] = self.dialect.model
        with contextlib.suppress(Failed):
            answer = await self.call("/tokenize", body)
            tokens = answer.get("tokens") if isinstance(answer, dict) else None
            if isinstance(tokens, list) and all(type(each) is int for each in tokens):
                return tokens
        return []

    async def call(self, path: str, body: dict[str, Any]) -> Any:
        """POST to any route of the server, as a job where the endpoint takes jobs. Raises `Failed`."""
        if self.address.jobs is None:
            return await self._call("POST", f"{(self.address.openai or '').removesuffix('/v1')}{path}", body)
        job = {"input": {"route": path, "method": "POST", "body": body}}
        ended = await self._call("POST", f"{self.address.jobs}/runsync", job)
        while ended.get("status") in _UNFINISHED:  # a worker that boots may take longer than /runsync waits
            await asyncio.sleep(_STATUS_SECONDS)
            ended = await self._call("GET", f"{self.address.jobs}/status/{ended['id']}")
        if ended.get("error"):
            raise failure(ended["error"])
        answer = ended.get("output")
        return answer[0] if isinstance(answer, list) and answer else answer

    async def ask(self, body: dict[str, Any], answer: Answer) -> None:
        """Send a request and read its answer to the end. Raises `Failed`."""
        url = f"{self.address.openai}/{route(body)}"
        with foreign():
            async with self._http.post(url, data=orjson.dumps(body)) as response:
                if response.status != HTTPStatus.OK:
                    raise await refused(response)
                if response.content_type != "text/event-stream":
                    raise Failed("not a stream", f"its answer is {response.content_type}")
                events = Events()
                async for data in response.content.iter_any():
                    now = time.perf_counter()
                    for event in events.feed(data):
                        answer.take(event, now)

    async def _call(self, method: str, url: str, body: Any = None) -> Any:
        with foreign():
            async with self._http.request(method, url, data=None if body is None else orjson.dumps(body)) as response:
                if response.status != HTTPStatus.OK:
                    raise await refused(response)
                try:
                    return orjson.loads(await response.read())
                except orjson.JSONDecodeError as error:
                    raise Failed("not understood", f"{urlsplit(url).path} did not answer with JSON") from error


async def refused(response: aiohttp.ClientResponse) -> Failed:
    """Return the failure that an answer's status tells of."""
    text = (await response.read())[:4000].decode(errors="replace")
    try:
        body = orjson.loads(text)
    except orjson.JSONDecodeError:
        detail = re.sub(r"<[^>]*>|\s+", " ", text).strip()
    else:
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        detail = failure(error).detail
    return Failed(f"HTTP {response.status} {response.reason or ''}".strip(), detail, response.status)


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Turn what aiohttp and the sockets raise into `Failed`."""
    try:
        yield
    except aiohttp.ClientConnectorDNSError as error:
        raise Failed("host unknown", error.os_error.strerror or "") from error
    except (aiohttp.ClientSSLError, ssl.SSLError) as error:
        raise Failed("TLS", str(error)) from error
    except aiohttp.ClientConnectorError as error:
        code = error.os_error.errno  # its text is the loop's own
        raise Failed("no connection", os.strerror(code) if code and code > 0 else str(error.os_error)) from error
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionError) as error:
        raise Failed("connection lost", str(error)) from error
    except aiohttp.ServerTimeoutError as error:
        raise Failed("no connection", str(error)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise Failed("connection", str(error)) from error
