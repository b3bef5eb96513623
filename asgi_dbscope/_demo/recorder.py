"""What happened to a request, and when: by SQLAlchemy's events and the messages to the server."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from asgi_dbscope._dialects import is_in_transaction

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from asgi_dbscope._asgi import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Exchange:
    """One request and its response, as the server and the database saw them.

    Attributes:
        label: ``POST /transfers``.

        marks: What happened, in order, with the ``perf_counter`` of it.

        has_sent_commit: Whether a COMMIT is on its way to the database.

        has_body: Set when the app sends the first piece of the body, or will never send one.

        is_over: Set when the app has returned, background work included.
    """

    label: str
    has_sent_commit: bool = False
    marks: list[tuple[str, float]] = field(default_factory=list)
    has_body: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def mark(self, name: str) -> None:
        """Note that *name* happened now."""
        self.marks.append((name, perf_counter()))

    def mark_message(self, message: Message) -> None:
        """Note that *message* is sent."""
        if message["type"] == "http.response.start":
            self.mark(f"head {message['status']}")
            return
        if not message.get("more_body", False):
            self.mark("last byte")
        elif not self.has_body.is_set():
            self.mark("first byte")
        self.has_body.set()

    def has(self, name: str) -> bool:
        """Whether *name* happened."""
        return any(name == each for each, _ in self.marks)

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """What happened, with milliseconds before (negative) or after the response head."""
        head = next((at for name, at in self.marks if name.startswith("head")), 0.0)
        return [(name, (at - head) * 1000) for name, at in self.marks]


_current: ContextVar[Exchange | None] = ContextVar("_current", default=None)
"""The exchange that the code of this moment serves; the database's events belong to it."""


class Recorder:
    """The outermost ASGI app: what it sees sent is what the server is given."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.on_over: Callable[[Exchange], None] | None = None
        self.latest: Exchange | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and note what is sent and when."""
        query = scope["query_string"].decode("latin-1")
        path = f"{scope['path']}?{query}" if query else scope["path"]
        exchange = self.latest = Exchange(f"{scope['method']} {path}")

        async def receive_and_mark() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not exchange.has("last byte"):
                exchange.mark("client gone")
            return message

        async def mark_and_send(message: Message) -> None:
            exchange.mark_message(message)
            await send(message)

        token = _current.set(exchange)
        try:
            await self.app(scope, receive_and_mark, mark_and_send)
        except BaseException as error:
            exchange.mark(f"raised {type(error).__name__}")
            raise
        finally:
            _current.reset(token)
            exchange.has_body.set()
            exchange.is_over.set()
            if self.on_over is not None:
                self.on_over(exchange)


class RecordedSession(Session):
    """A session whose commits are seen when they are answered, not when they are sent."""


def watch(engine: AsyncEngine) -> None:
    """Note what *engine* does for the request that makes it."""

    def listen(name: str, note: Callable[..., None]) -> None:
        def note_of_request(*details: Any) -> None:
            exchange = _current.get()
            if exchange is not None:
                note(exchange, *details)

        event.listen(engine.sync_engine, name, note_of_request)

    listen("checkout", _marking("checkout"))
    listen("begin", _marking("BEGIN"))
    listen("commit", _note_commit_sent)
    listen("rollback", _marking("ROLLBACK"))
    listen("reset", _note_reset)
    listen("checkin", _marking("checkin"))
    listen("handle_error", _note_error)


def _marking(name: str) -> Callable[..., None]:
    def note(exchange: Exchange, *_: object) -> None:
        exchange.mark(name)

    return note


def _note_commit_sent(exchange: Exchange, _: Connection) -> None:
    exchange.has_sent_commit = True


@event.listens_for(RecordedSession, "after_commit")
def _note_commit(_: Session) -> None:
    exchange = _current.get()
    if exchange is not None and exchange.has_sent_commit:
        exchange.has_sent_commit = False
        exchange.mark("COMMIT")


def _note_error(exchange: Exchange, context: ExceptionContext) -> None:
    statement = context.statement or ("COMMIT" if exchange.has_sent_commit else "ROLLBACK")
    exchange.has_sent_commit = False
    exchange.mark(f"error in {statement.split()[0]}")


def _note_reset(exchange: Exchange, connection: DBAPIConnection, *_: object) -> None:
    # After a COMMIT that failed it is the pool that rolls back.
    if is_in_transaction(connection):
        exchange.mark("ROLLBACK")
