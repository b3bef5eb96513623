"""The contestants' servers, seen from the measures that need real ones."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

from bench.apps import STATE
from bench.chaos.client import Client

if TYPE_CHECKING:
    from bench.apps import Setup
    from bench.contestant import Contestant

SERVE = Path(__file__).with_name("serve.py")

POOL_SIZE = 5
"""Of each server, which has no overflow."""

PATIENCE = 180.0
"""Seconds until what a server should do counts as not done; a dozen start at the same time."""


class ServerFailedError(Exception):
    """A contestant's server didn't do what it was asked for."""


@dataclass(frozen=True)
class Connection:
    """A client's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def leave(self) -> None:
        """Drop it."""
        self.writer.transport.abort()


class Server:
    """uvicorn with one contestant, in a process of its own.

    Args:
        contestant: Whose app it serves.

        python: The interpreter of the contestant's environment.

        setup: What the app is made with.

        start: Which of several processes of the same it is: `PYTHONHASHSEED`.

    Attributes:
        name: The contestant's.

        port: Where it listens.
    """

    def __init__(self, contestant: Contestant, python: Path, setup: Setup, start: int = 0) -> None:
        self.name = contestant.name
        self.port = 0
        order = {"name": contestant.name, "setup": dataclasses.asdict(setup)}
        self._command: list[str | Path] = [python, "-P", SERVE, json.dumps(order)]
        self._environ = {**os.environ, "PYTHONHASHSEED": str(start)}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
            self.port = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [*self._command, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                env=self._environ,
                stdout=self._log,
                stderr=self._log,
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    async def state(self, **query: str) -> dict[str, Any]:
        """What its page says."""
        client = Client(self.port)
        answer = await client.request("GET", f"{STATE}?{urlencode(query)}", patience=PATIENCE)
        client.leave()
        if not answer.is_complete:
            raise self.failure("it doesn't answer")
        found: dict[str, Any] = json.loads(answer.body)
        return found

    async def idle_state(self, **query: str) -> dict[str, Any]:
        """The same, once no request is under way."""
        async with asyncio.timeout(PATIENCE):
            while (await self.state())["under way"]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.005)
        return await self.state(**query)

    async def warm(self, route: str) -> None:
        """Have its pool connected and its caches filled."""

        async def visit() -> None:
            client = Client(self.port)
            for _ in range(10):
                answer = await client.request("GET", f"/{route}", patience=PATIENCE)
                if answer.status != HTTPStatus.OK:
                    raise self.failure(f"/{route} gave {answer.status}")
            client.leave()

        await asyncio.gather(*(visit() for _ in range(POOL_SIZE)))

    async def open(self, route: str, *, window: int = 65_536) -> Connection:
        """A connection with a GET under way; nothing is read yet.

        Args:
            route: What is asked for.

            window: Bytes that are taken in before anybody reads them.
        """
        place = socket.socket()
        place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        place.settimeout(0)
        await asyncio.get_running_loop().sock_connect(place, ("127.0.0.1", self.port))
        connection = Connection(*await asyncio.open_connection(sock=place, limit=window))
        connection.writer.write(f"GET /{route} HTTP/1.1\r\nhost: bench\r\n\r\n".encode())
        return connection

    async def wrk(self, route: str, *, clients: int, seconds: int) -> str:
        """Load it; what wrk printed.

        Raises:
            ServerFailedError: If an answer was no success.
        """
        program = shutil.which("wrk")
        assert program is not None
        process = await asyncio.create_subprocess_exec(
            *(program, "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "--timeout", "30s"),
            f"http://127.0.0.1:{self.port}/{route}",
            stdout=asyncio.subprocess.PIPE,
        )
        told = (await process.communicate())[0].decode()
        if process.returncode or "Non-2xx" in told:
            raise self.failure(f"/{route}: {told}")
        return told

    def failure(self, what: str) -> ServerFailedError:
        """An error that says so, with the end of the server's log."""
        self._log.seek(0)
        told = self._log.read()[-3000:].decode(errors="replace")
        return ServerFailedError(f"{self.name}: {what}\n{told}")
