"""Pytest plugin: drive an ASGI app by hand, and see its messages in order."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.fix_database import Timeline

Message = dict[str, Any]
App = Callable[..., Awaitable[Any]]


@dataclass
class Exchange:
    """What came of one request.

    Attributes:
        messages: What the server was sent.

        error: What the app raised.

        result: What the app returned.
    """

    messages: list[Message] = field(default_factory=list)
    error: BaseException | None = None
    result: Any = None

    @property
    def status(self) -> int | None:
        """The status of the first head; `None` without one."""
        heads = [each for each in self.messages if each["type"] == "http.response.start"]
        return heads[0]["status"] if heads else None

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(each.get("body", b"") for each in self.messages)

    @property
    def is_complete(self) -> bool:
        """Whether the last body message was sent."""
        return any(
            each["type"] == "http.response.body" and not each.get("more_body", False)
            for each in self.messages
        )


def http_scope(path: str = "/", method: str = "GET", **more: Any) -> Message:
    """An ASGI scope of type `http`."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        **more,
    }


def start(status: int = 200, **more: Any) -> Message:
    """A response head."""
    return {"type": "http.response.start", "status": status, "headers": [], **more}


def body(content: bytes = b"", *, more: bool = False) -> Message:
    """A body message."""
    return {"type": "http.response.body", "body": content, "more_body": more}


async def respond(
    send: App,
    status: int = 200,
    content: bytes = b"ok",
    *,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answer."""
    await send(start(status, headers=list(headers)))
    await send(body(content))


Drive = Callable[..., Awaitable[Exchange]]


@pytest.fixture
def drive(timeline: Timeline) -> Drive:
    """Send one request to an app; return what came of it, never raise.

    `received` are the messages the app may receive. After them `receive()` waits for the end of
    the response, and then says what a server says: the client is gone.
    Each message that the server gets is put on the timeline: `start 200`, `body`, `last body`.
    """

    async def drive(
        app: App,
        scope: Message | None = None,
        *,
        received: Iterable[Message] = ({"type": "http.request", "body": b"", "more_body": False},),
        on_send: Callable[[Message], Awaitable[None]] | None = None,
    ) -> Exchange:
        exchange = Exchange()
        waiting = list(received)
        has_ended = asyncio.Event()

        async def receive() -> Message:
            if waiting:
                return waiting.pop(0)
            await has_ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            timeline.append(_name(message))
            exchange.messages.append(dict(message))
            if on_send is not None:
                await on_send(message)
            if exchange.is_complete:
                has_ended.set()

        try:
            exchange.result = await app(http_scope() if scope is None else scope, receive, send)
        except BaseException as error:
            exchange.error = error
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        return exchange

    return drive


def _name(message: Message) -> str:
    kind = message["type"].rpartition(".")[2]
    if kind == "start":
        return f"start {message.get('status')}"
    if message["type"] == "http.response.body":
        return "body" if message.get("more_body", False) else "last body"
    return str(kind)
