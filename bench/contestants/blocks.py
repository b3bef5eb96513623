"""Transactional blocks, and the plain SQLAlchemy that they stand for.

A "request" is one block here, inside a transaction that is open on both sides.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from bench.apps import NAME, SELECT, Application
from bench.contestant import Contestant
from bench.frameworks import asgi
from bench.handlers import none

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bench.apps import Handlers, Setup


async def by_hand(engine: AsyncEngine) -> Handlers:
    """What one writes without them; to join is to go on with the same session."""
    session_factory = async_sessionmaker(engine)
    outer: AsyncSession = await session_factory.begin().__aenter__()
    await outer.scalar(SELECT)

    async def read() -> Any:
        return await outer.scalar(SELECT)

    async def nested() -> Any:
        async with outer.begin_nested():
            return await outer.scalar(SELECT)

    async def new() -> Any:
        async with session_factory.begin() as session:
            return await session.scalar(SELECT)

    return {"joined": none, "decorated": none, "read": read, "nested": nested, "new": new}


async def ours(engine: AsyncEngine) -> Handlers:
    from asgi_dbscope import Database

    database = Database(engine)
    outer = await database.session_scope().__aenter__()
    await outer.scalar(SELECT)
    joins = database.transactional()
    nests = database.transactional("NESTED")
    begins = database.transactional("REQUIRES_NEW")

    async def joined() -> Any:
        async with joins:
            return NAME

    async def read() -> Any:
        async with joins as session:
            return await session.scalar(SELECT)

    async def nested() -> Any:
        async with nests as session:
            return await session.scalar(SELECT)

    async def new() -> Any:
        async with begins as session:
            return await session.scalar(SELECT)

    return {
        "joined": joined,
        "decorated": joins(none),
        "read": read,
        "nested": nested,
        "new": new,
    }


def make(begin: Callable[[AsyncEngine], Awaitable[Handlers]], setup: Setup) -> Application:
    engine = setup.async_engine()
    handlers: Handlers = {"none": none}
    answer = asgi.app(handlers)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if len(handlers) == 1 and scope["type"] == "http":
            handlers.update(await begin(engine))
        await answer(scope, receive, send)

    return Application(app, engine)


CONTESTANTS = [
    Contestant("blocks", "asgi", "by hand", partial(make, by_hand), variant="by_hand"),
    Contestant("blocks", "asgi", "asgi-dbscope", partial(make, ours), variant="ours"),
]
