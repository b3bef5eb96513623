"""Pytest plugin: real servers on loopback, and a client that sees bytes, not responses.

uvicorn and hypercorn run in the test's own loop, so that a test and its app share events and can
look at the engine's pool; granian runs in a process of its own.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest

PATIENCE = 30.0
"""Seconds until something that a server should do counts as not done."""

Serve = Callable[..., AbstractAsyncContextManager[int]]


# --------------------------------------------------------------------------------------
# The client
# --------------------------------------------------------------------------------------


class Client:
    """One connection, and what comes over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, method: str, path: str, *, body: bytes = b"") -> None:
        """Send a request; read nothing."""
        head = f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """The response's status and headers, as soon as their first byte is there."""
        async with asyncio.timeout(PATIENCE):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """One chunk of a chunked body; empty at its clean end.

        Raises:
            IncompleteReadError: If the connection ends before the body does.
        """
        async with asyncio.timeout(PATIENCE):
            length = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(length)
            await self.reader.readexactly(2)
        return data

    async def body(self, headers: dict[str, str]) -> bytes:
        """The whole body.

        Raises:
            IncompleteReadError: If the connection ends before the body does.
        """
        if "chunked" not in headers.get("transfer-encoding", ""):
            async with asyncio.timeout(PATIENCE):
                return await self.reader.readexactly(int(headers.get("content-length", 0)))
        chunks = []
        while data := await self.chunk():
            chunks.append(data)
        return b"".join(chunks)

    async def request(self, method: str, path: str) -> tuple[int, bytes]:
        """Send a request; return the status and the body."""
        self.send(method, path)
        status, headers = await self.head()
        return status, await self.body(headers)

    async def ended(self) -> bool:
        """Whether the server closes the connection, with nothing more on it."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read(1) == b""

    def leave(self) -> None:
        """Drop the connection, as a client does that is gone."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[Client]:
    """Connect with buffers that are small, so that a client that doesn't read soon blocks."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    reader, writer = await asyncio.open_connection(sock=connection, limit=65536)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


# --------------------------------------------------------------------------------------
# What the app does, seen from outside of it
# --------------------------------------------------------------------------------------


@dataclass
class Observed:
    """An app, and an event for each request that has come to its end in it.

    Attributes:
        app: The app.

        ended: Set when a request of that path has left the app, whichever way.

        errors: What the app raised, by path.
    """

    app: Any
    ended: dict[str, asyncio.Event] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)

    def end_of(self, path: str) -> asyncio.Event:
        """The event of *path*."""
        return self.ended.setdefault(path, asyncio.Event())

    async def wait_for_end_of(self, path: str) -> None:
        """Wait until a request of *path* has left the app."""
        async with asyncio.timeout(PATIENCE):
            await self.end_of(path).wait()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        try:
            return await self.app(scope, receive, send)
        except BaseException as error:
            self.errors[scope.get("path", "")] = error
            raise
        finally:
            self.end_of(scope.get("path", "")).set()


# --------------------------------------------------------------------------------------
# The servers
# --------------------------------------------------------------------------------------


def _listen() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setblocking(False)
    return listener


@contextlib.asynccontextmanager
async def serve_uvicorn(app: Any, **options: Any) -> AsyncIterator[int]:
    """Serve *app* by uvicorn in this loop; yields the port; leaves by a graceful shutdown."""
    import uvicorn

    class Server(uvicorn.Server):
        is_up = asyncio.Event()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.is_up.set()

        @contextlib.contextmanager
        def capture_signals(self) -> Any:  # Ctrl-C is pytest's.
            yield

    options = {"lifespan": "auto", "log_config": None, "timeout_graceful_shutdown": 10, **options}
    server = Server(uvicorn.Config(app, **options))
    with _listen() as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        up = asyncio.create_task(server.is_up.wait())
        try:
            await asyncio.wait([serving, up], return_when=asyncio.FIRST_COMPLETED)
            yield listener.getsockname()[1]
        finally:
            up.cancel()
            server.should_exit = True
            async with asyncio.timeout(PATIENCE):
                await serving


@contextlib.asynccontextmanager
async def serve_hypercorn(app: Any, **options: Any) -> AsyncIterator[int]:
    """Serve *app* by hypercorn in this loop; yields the port; leaves by a graceful shutdown."""
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config.from_mapping({"graceful_timeout": 5.0, "errorlog": None, **options})
    with _listen() as listener:
        port = listener.getsockname()[1]
        config.bind = [f"fd://{listener.detach()}"]
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
        try:
            yield port
        finally:
            stop.set()
            async with asyncio.timeout(PATIENCE):
                await serving


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile, but who reuses its address, as servers do."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        yield place.getsockname()[1]


@contextlib.asynccontextmanager
async def serve_process(command: list[str], **environment: str) -> AsyncIterator[int]:
    """Serve by a Python module; `{port}` in *command* stands for the port; leaves by SIGTERM."""
    with reserved_port() as port:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *(part.format(port=port) for part in command),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        told = asyncio.create_task(process.stderr.read())
        try:
            async with asyncio.timeout(PATIENCE):
                while not await _answers(port):
                    if process.returncode is not None:
                        raise RuntimeError(f"{command[0]} did not start: {(await told).decode()}")
                    await asyncio.sleep(0.05)
            yield port
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                async with asyncio.timeout(PATIENCE):
                    await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its workers, too
                await process.wait()
                await told


async def _answers(port: int) -> bool:
    try:
        async with connect(port):
            return True
    except OSError:
        return False


@pytest.fixture(params=["h11", "httptools"])
def uvicorn(request: pytest.FixtureRequest) -> Serve:
    """Serve an app by uvicorn, with each of its HTTP implementations."""

    def serve(app: Any, **options: Any) -> AbstractAsyncContextManager[int]:
        return serve_uvicorn(app, http=request.param, **options)

    return serve
