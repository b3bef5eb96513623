"""Real servers: uvicorn, in this process, on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from asgi_dbscope._demo.store import DemoError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

HOST = "127.0.0.1"

SHUTDOWN_TIMEOUT = 2
"""Seconds that responses under way may take after the end was asked for."""


class Server(uvicorn.Server):
    """A uvicorn that leaves signals to the command."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Capture none."""
        yield


def bind(port: int) -> socket.socket:
    """Take *port* on loopback; 0 is any free one.

    Raises:
        DemoError: If it is in use, or may not be taken.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise DemoError(
            f"Port {port} on {HOST} can't be had ({os.strerror(error.errno or 0)}); "
            "choose another with --port, or any free one with --port 0."
        ) from None


@asynccontextmanager
async def serve(app: Any, listener: socket.socket) -> AsyncGenerator[str]:
    """Serve *app* on *listener* as long as the block lasts; its base URL."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="critical",
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
    )
    server = Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://{HOST}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
