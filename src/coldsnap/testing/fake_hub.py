"""A fake model hub: the part of Hugging Face's HTTP API that huggingface_hub needs to find and fetch a model.

`FakeHub.environment()` points the unmodified library here. What it does not know: LFS redirects and Xet storage,
write access, search. Repositories live in memory, or as sizes alone (`promised`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from aiohttp import web

_CHUNK = 1 << 16


@dataclass
class Repository:
    """One commit of a model. `branches` point to it; `promised` are files of a size that are never sent.

    `access` is what a client without `token` gets: everything, 401 (`private`), or metadata and then 401 or, with
    another token, 403 (`gated`), as the hub answers. `corrupt` names files that are sent with one byte changed.
    """

    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    license: str | None = None
    access: Literal["open", "private", "gated"] = "open"
    token: str = "hf_right"  # noqa: S105 (no secret: what the tests send)
    promised: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)

    @property
    def commit(self) -> str:
        content = (name.encode() + b"\0" + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(b"\0".join(content), usedforsecurity=False).hexdigest()


class FakeHub:
    """Serves `repositories`, by their ids, on a free port of 127.0.0.1 while the context is open.

    `cut_after` closes the connection after so many bytes of a file, `cuts` times in all. `requests` counts the
    requests by method and path, `ranges` lists the ranges that were asked for.
    """

    def __init__(self, repositories: dict[str, Repository], *, cut_after: int | None = None, cuts: int = 0) -> None:
        self.repositories = repositories
        self.cut_after = cut_after
        self.cuts = cuts
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.endpoint = ""
        app = web.Application()
        app.router.add_get("/api/models/{org}/{name}/refs", self._refs)
        app.router.add_get("/api/models/{org}/{name}", self._info)
        app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._info)
        app.router.add_get("/{org}/{name}/resolve/{revision}/{file:.+}", self._file)  # and HEAD
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)

    def environment(self) -> dict[str, str]:
        """Return the variables that lead huggingface_hub here."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.endpoint = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _refs(self, request: web.Request) -> web.Response:
        repository = self._find(request)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repository.commit}
            for name in repository.branches
        ]
        return web.json_response({"branches": branches, "tags": [], "converts": []})

    async def _info(self, request: web.Request) -> web.Response:
        repository = self._find(request)
        siblings = [_sibling(name, data) for name, data in repository.files.items()]
        siblings += [{"rfilename": name, "size": size} for name, size in repository.promised.items()]
        card = {"license": repository.license} if repository.license else {}
        answer = {
            "id": _repo(request),
            "sha": repository.commit,
            "siblings": siblings,
            "cardData": card,
            "gated": "manual" if repository.access == "gated" else False,
            "private": repository.access == "private",
        }
        return web.json_response(answer)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        repository = self._find(request)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.access == "gated" and token != repository.token:
            raise _refused(403 if token else 401, "GatedRepo")
        name = request.match_info["file"]
        if name not in repository.files:
            raise _refused(404, "EntryNotFound")
        data = repository.files[name]
        etag = hashlib.sha256(data).hexdigest()
        if name in repository.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        begin = 0
        if asked := request.headers.get("Range"):
            self.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").split("-")[0])
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": repository.commit,
            "Content-Length": str(len(data) - begin),
            "Accept-Ranges": "bytes",
        }
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if begin else 200, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        count = 0
        for start in range(begin, len(data), _CHUNK):
            if self.cuts and self.cut_after is not None and count >= self.cut_after:
                self.cuts -= 1
                assert request.transport is not None
                request.transport.close()
                return response
            part = data[start : start + _CHUNK]
            await response.write(part)
            count += len(part)
        await response.write_eof()
        return response

    def _find(self, request: web.Request) -> Repository:
        self.requests[f"{request.method} {request.path}"] += 1
        repository = self.repositories.get(_repo(request))
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.access == "private" and token != repository.token):
            raise _refused(401, "RepoNotFound")
        revision = request.match_info.get("revision", repository.branches[0])
        if revision not in {repository.commit, *repository.branches}:
            raise _refused(404, "RevisionNotFound")
        return repository


def _repo(request: web.Request) -> str:
    return f"{request.match_info['org']}/{request.match_info['name']}"


def _sibling(name: str, data: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _refused(status: int, code: str) -> web.HTTPException:
    error = {401: web.HTTPUnauthorized, 403: web.HTTPForbidden, 404: web.HTTPNotFound}[status]
    return error(headers={"X-Error-Code": code, "X-Error-Message": code}, text="{}", content_type="application/json")
