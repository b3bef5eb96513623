"""What every contestant's app is made of: the tables, what its endpoints do, its setup."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from sqlalchemy import ForeignKey, create_engine, make_url, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[Any]]
Handler = Callable[..., Any]
Handlers = dict[str, Handler]
"""By route; a handler takes what its framework gives it, and returns a text or a response."""


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "bench_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Orphan(Base):
    """A row whose parent is missed by COMMIT, and not before."""

    __tablename__ = "bench_orphan"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(
        ForeignKey(Item.id, deferrable=True, initially="DEFERRED")
    )


STATE = "/-/state"
"""The path of a server's page about its process."""

NAME = "item"
"""What is in the first row, and what most routes answer."""

SELECT = select(Item.name).where(Item.id == 1)
INSERT_AGAIN = text("INSERT INTO bench_item (id, name) VALUES (1, 'again')")


@dataclass(frozen=True)
class Body:
    """A streaming response's body.

    Attributes:
        chunks: How many.

        size: Bytes of each.

        pause: Seconds after each.
    """

    chunks: int
    size: int
    pause: float

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunk = b"x" * self.size
        for _ in range(self.chunks):
            yield chunk
            if self.pause:
                await asyncio.sleep(self.pause)


BODIES = {
    "stream": Body(16, 1024, 0.01),
    "large": Body(256, 65_536, 0),
    "open": Body(1, 1, 3_600),
}
"""By route: it reads a row, and then streams without the database."""

TASKS = {"background": 0.2, "long_background": 2.0}
"""By route: it reads a row, and has a background task of so many seconds, without the database."""


@dataclass(frozen=True)
class Setup:
    """How a contestant's app is made.

    Attributes:
        url: Of PostgreSQL; the driver's name is the contestant's to choose.

        pool: What its engine is made with.
    """

    url: str
    pool: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def async_url(self) -> URL:
        return make_url(self.url).set(drivername="postgresql+asyncpg")

    def async_engine(self) -> AsyncEngine:
        return create_async_engine(self.async_url, **self.pool)

    def sync_engine(self) -> Engine:
        return create_engine(make_url(self.url).set(drivername="postgresql+psycopg"), **self.pool)


@dataclass(frozen=True)
class Application:
    """A contestant's app, and the engine below it."""

    app: ASGIApp
    engine: AsyncEngine | Engine


class Framework(Protocol):
    """A module of `bench.frameworks`: an app of handlers, and what its users answer with."""

    def app(self, handlers: Handlers, /, **options: Any) -> Any: ...
    def stream(self, body: Body, /) -> Any: ...
    def background(self, content: str, task: Handler, seconds: float, /) -> Any: ...
    def server_error(self) -> Exception: ...


def framework(name: str) -> Framework:
    return cast("Framework", import_module(f"bench.frameworks.{name}"))


# What endpoints do, once they have their session. Each is written for both kinds of sessions.

Operations = dict[str, Handler]
WRITES = frozenset({"insert", "commit_fails", "error", "swallow"})
"""The routes after which a session that is opened by hand is committed by hand."""


def operations(framework: Framework) -> Operations:
    async def unused(_: AsyncSession) -> Any:
        return NAME

    async def select_(session: AsyncSession) -> Any:
        return await session.scalar(SELECT)

    async def insert(session: AsyncSession) -> Any:
        session.add(Item(name=NAME))
        return NAME

    async def commit_fails(session: AsyncSession) -> Any:
        session.add(Orphan(parent_id=-1))
        return NAME

    async def error(session: AsyncSession) -> Any:
        session.add(Item(name="of a 500"))
        await session.flush()
        raise framework.server_error()

    async def swallow(session: AsyncSession) -> Any:
        session.add(Item(name="swallowed"))
        await session.flush()
        with suppress(IntegrityError):  # it is there already: fine, or so this app believes
            await session.execute(INSERT_AGAIN)
        return NAME

    return {
        "unused": unused,
        "select": select_,
        "insert": insert,
        "commit_fails": commit_fails,
        "error": error,
        "swallow": swallow,
    } | _idle_operations(framework)


def _idle_operations(framework: Framework) -> Operations:
    """What goes on after it has used the database."""

    def stream(body: Body) -> Handler:
        async def operation(session: AsyncSession) -> Any:
            await session.scalar(SELECT)
            return framework.stream(body)

        return operation

    def background(seconds: float) -> Handler:
        async def operation(session: AsyncSession) -> Any:
            name = await session.scalar(SELECT)
            return framework.background(name or "", asyncio.sleep, seconds)

        return operation

    return {
        **{route: stream(body) for route, body in BODIES.items()},
        **{route: background(seconds) for route, seconds in TASKS.items()},
    }


def sync_operations(framework: Framework) -> Operations:
    def unused(_: Session) -> Any:
        return NAME

    def select_(session: Session) -> Any:
        return session.scalar(SELECT)

    def insert(session: Session) -> Any:
        session.add(Item(name=NAME))
        return NAME

    def commit_fails(session: Session) -> Any:
        session.add(Orphan(parent_id=-1))
        return NAME

    def error(session: Session) -> Any:
        session.add(Item(name="of a 500"))
        session.flush()
        raise framework.server_error()

    def swallow(session: Session) -> Any:
        session.add(Item(name="swallowed"))
        session.flush()
        with suppress(IntegrityError):
            session.execute(INSERT_AGAIN)
        return NAME

    return {
        "unused": unused,
        "select": select_,
        "insert": insert,
        "commit_fails": commit_fails,
        "error": error,
        "swallow": swallow,
    }
