"""The server process of one round, seen from the runner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.chaos.app import GRACE, STATE
from bench.chaos.client import Client

if TYPE_CHECKING:
    import sqlalchemy as sa

SERVE = Path(__file__).with_name("serve.py")

CALM = 15.0
"""Seconds that the app has to come to rest, or to its end."""


class App:
    """The server process of one round.

    Attributes:
        port: Where it listens.

        versions: Of what it runs on, once it was asked for its state.
    """

    def __init__(
        self, python: str, contestant: str, url: sa.URL, pool_size: int, log: Path
    ) -> None:
        self._command = [python, "-P", str(SERVE), contestant]
        self._command += [url.render_as_string(hide_password=False), str(pool_size)]
        self._log = log
        self.port = 0
        self.versions: dict[str, str] = {}
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
            self.port = listener.getsockname()[1]
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(listener.fileno()),
                    pass_fds=[listener.fileno()],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        return self

    async def state(self) -> dict[str, Any]:
        """What is under way in it."""
        client = Client(self.port)
        answer = await client.request("GET", STATE, patience=30)
        client.leave()
        if not answer.is_complete:
            raise RuntimeError(f"the app doesn't answer: see {self._log}")
        found: dict[str, Any] = json.loads(answer.body)
        self.versions = found.pop("versions")
        return found

    async def end(self, by: signal.Signals) -> bool:
        """Send a signal; whether it ended by itself."""
        assert self._process is not None
        self._process.send_signal(by)
        try:
            async with asyncio.timeout(GRACE + CALM):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def __aexit__(self, *error: object) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
