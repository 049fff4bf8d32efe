"""POSTs over kept connections, against servers that answer, hang up and talk nonsense: real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from coldsnap.jobs import post
from coldsnap.jobs.post import Poster

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Gives each request what `answer` makes of its number, and hangs up on None. Keeps what came."""

    def __init__(self, answer: Callable[[int], bytes | None]) -> None:
        self._answer = answer
        self.requests: list[bytes] = []
        self.connections = 0
        self.came = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(size))
                self.came.set()
                if (answer := self._answer(len(self.requests))) is None:
                    break
                writer.write(answer)
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Callable[[int], bytes | None]) -> AsyncIterator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/a/b?c=d"
    yield server
    listening.close()


async def test_a_request_is_whole_and_its_connection_is_kept() -> None:
    async with serving(lambda _: OK) as server:
        poster = Poster()
        assert [await poster.post(server.url, "X-One: 1\r\n", body) for body in (b"one", b"", b"x" * 3_000_000)] == [
            200
        ] * 3
        assert server.connections == 1
        host = server.url[7:].partition("/")[0]
        assert server.requests[0] == (
            f"POST /a/b?c=d HTTP/1.1\r\nHost: {host}\r\nX-One: 1\r\nContent-Length: 3\r\n\r\none".encode()
        )
        assert server.requests[2].endswith(b"\r\n\r\n" + b"x" * 3_000_000)


async def test_posts_at_once_have_connections_of_their_own() -> None:
    async with serving(lambda _: OK) as server:
        poster = Poster()
        for _ in range(3):
            assert await asyncio.gather(*(poster.post(server.url, "", b"x") for _ in range(5))) == [200] * 5
        assert server.connections == 5


@pytest.mark.parametrize(
    ("answer", "status", "kept"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", 503, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 200, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, False),
    ],
    ids=["error", "no content", "chunked", "continue", "close", "1.0"],
)
async def test_answers_of_every_kind(answer: bytes, status: int, *, kept: bool) -> None:
    async with serving(lambda _: answer) as server:
        poster = Poster()
        assert [await poster.post(server.url, "", b"x") for _ in range(3)] == [status] * 3
        assert server.connections == (1 if kept else 3)


@pytest.mark.parametrize("answer", [None, b"this is not HTTP\r\n\r\n"], ids=["hangs up", "nonsense"])
async def test_no_answer_is_an_error_and_the_next_post_has_a_new_connection(answer: bytes | None) -> None:
    async with serving(lambda number: answer if number == 2 else OK) as server:
        poster = Poster()
        assert await poster.post(server.url, "", b"1") == 200
        with pytest.raises(OSError, match=r"closed|not HTTP"):
            await poster.post(server.url, "", b"2")
        assert await poster.post(server.url, "", b"3") == 200
        assert server.connections == 2


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    async with serving(lambda _: OK) as server:
        poster = Poster()
        await poster.post(server.url, "", b"1")
        (idle,) = poster._idle.values()
        idle[0].connection_lost(None)
        assert await poster.post(server.url, "", b"2") == 200
        assert server.connections == 2


async def test_silence_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "_SECONDS", 0.05)
    async with serving(lambda _: b"") as server:
        with pytest.raises(TimeoutError, match="no answer"):
            await Poster().post(server.url, "", b"x")


async def test_a_post_that_is_cancelled_leaves_no_answer_for_the_next() -> None:
    async with serving(lambda number: b"" if number == 1 else OK) as server:
        poster = Poster()
        task = asyncio.create_task(poster.post(server.url, "", b"1"))
        await server.came.wait()
        task.cancel()
        await asyncio.wait([task])
        assert await poster.post(server.url, "", b"2") == 200
        assert server.connections == 2


async def test_nobody_there_is_an_error() -> None:
    async with serving(lambda _: OK) as server:
        url = server.url
    with pytest.raises(OSError, match=r"refused|Connect"):
        await Poster().post(url, "", b"x")
