"""A contestant's app in this process, called without a server."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from bench.apps import Application, Message


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def discard(_: Message) -> None:
    """What was sent is of no interest."""


@dataclass(frozen=True)
class Answer:
    """What came of a request; without a status the app raised before it had sent one."""

    status: int | None
    body: bytes
    error: str | None


class Served:
    """A contestant's app, and who calls it."""

    def __init__(self, application: Application) -> None:
        self.app = application.app
        self.engine = application.engine
        self.state: dict[str, Any] = {}
        """What the lifespan left for requests."""
        self.beside: dict[str, Served] = {}
        """By name, the others in this process."""

    def scope(self, route: str) -> dict[str, Any]:
        path = f"/{route}"
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"bench")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": self.state.copy(),
        }

    async def serve(self, route: str, requests: int) -> None:
        """One request after the other."""
        for _ in range(requests):
            await self.app(self.scope(route), receive, discard)

    async def ask(self, route: str) -> Answer:
        """One request, and what came of it."""
        messages: list[Message] = []
        error = None

        async def send(message: Message) -> None:
            messages.append({**message})

        try:
            await self.app(self.scope(route), receive, send)
        except Exception as raised:  # noqa: BLE001 - what a server would log
            error = repr(raised)
        status = next((each["status"] for each in messages if "status" in each), None)
        return Answer(status, b"".join(each.get("body", b"") for each in messages), error)

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncGenerator[None]:
        """Start the app, and end it."""
        told: asyncio.Queue[Message] = asyncio.Queue()
        answers: asyncio.Queue[Message] = asyncio.Queue()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self.state}
        task = asyncio.ensure_future(self.app(scope, told.get, answers.put))
        await told.put({"type": "lifespan.startup"})
        answer = asyncio.ensure_future(answers.get())
        await asyncio.wait([task, answer], return_when=asyncio.FIRST_COMPLETED)
        if answer.done() and answer.result()["type"] != "lifespan.startup.complete":
            raise RuntimeError(f"the app didn't start: {answer.result()}")
        has_lifespan = answer.done()  # an app without one raises: servers take that for "none"
        answer.cancel()
        try:
            yield
        finally:
            if has_lifespan:
                await told.put({"type": "lifespan.shutdown"})
            await asyncio.wait([task])
            task.exception()
