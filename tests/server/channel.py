"""The line between a served app and its test: what happens goes out, what may go on comes in."""

import asyncio
import contextvars
import json
import os
import socket
import threading
import time
from collections import defaultdict
from typing import Any

import sqlalchemy as sa

VARIABLE = "DBSCOPE_SERVED_CHANNEL"
"""Of the environment: the path of the test's socket."""

path_served: contextvars.ContextVar[str] = contextvars.ContextVar("path_served", default="")
"""The path of the request that something happens for."""


class Channel:
    """The app's end of the line.

    Attributes:
        allowed: What the test has said may go on, by name.
    """

    def __init__(self) -> None:
        self.allowed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._teller: socket.socket | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Connect to the test, in the process and the loop that serve."""
        if self._teller is None:
            # Two sockets: a loop may make the one that it reads from non-blocking.
            self._teller, hearer = _connect(), _connect()
            asyncio.get_running_loop().add_reader(hearer.fileno(), self._receive, hearer)

    def say(self, what: str, **more: Any) -> None:
        """Tell the test what happens, when, and for which request."""
        if self._teller is None:
            return  # nobody listens yet
        told = {"what": what, "at": time.monotonic(), "path": path_served.get(), **more}
        with self._lock:
            self._teller.sendall(json.dumps(told).encode() + b"\n")

    async def wait(self, name: str) -> None:
        """Wait until the test says that *name* may go on."""
        await self.allowed[name].wait()

    def watch(self, engine: sa.Engine) -> None:
        """Tell of an engine's transactions and connections."""
        for name in ("begin", "commit", "rollback", "checkout", "checkin", "engine_disposed"):
            sa.event.listen(engine, name, self._listener(name))

    def _listener(self, name: str) -> Any:
        return lambda *args, **kwargs: self.say(name)

    def _receive(self, hearer: socket.socket) -> None:
        received = hearer.recv(65536)
        if not received:  # the test is gone
            asyncio.get_running_loop().remove_reader(hearer.fileno())
        for name in received.decode().split():
            self.allowed[name].set()


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[VARIABLE])
    return connection


class Observed:
    """An app, seen from where the server stands."""

    def __init__(self, app: Any, channel: Channel) -> None:
        self.app = app
        self.channel = channel

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        self.channel.open()
        path_served.set(scope.get("path", scope["type"]))
        say = self.channel.say

        async def receive_and_say() -> Any:
            message = await receive()
            if message["type"] != "http.request":
                say("received", message=message["type"])
            return message

        async def say_and_send(message: Any) -> None:
            name = _name(message)
            say(name)
            try:
                await send(message)
            except BaseException as error:
                say("send raised", error=type(error).__name__)
                raise
            say(f"sent {name}")

        error: BaseException | None = None
        say("called", extensions=sorted(scope.get("extensions") or ()))
        try:
            return await self.app(scope, receive_and_say, say_and_send)
        except BaseException as raised:
            error = raised
            raise
        finally:
            say("ended", error=None if error is None else type(error).__name__)
            del error


def _name(message: Any) -> str:
    kind = str(message["type"])
    if kind == "http.response.start":
        return f"head {message['status']}"
    if kind == "http.response.body":
        return "body" if message.get("more_body", False) else "last body"
    return kind.removeprefix("http.response.")
