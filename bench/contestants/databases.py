"""One to four databases in a request, a SELECT in each of them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from bench.apps import NAME, SELECT, Application
from bench.contestant import Contestant
from bench.frameworks import asgi

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.apps import ASGIApp, Handler, Setup

NUMBERS = (1, 2, 3, 4)


def by_hand(engines: Sequence[AsyncEngine]) -> ASGIApp:
    factories = [async_sessionmaker(each, expire_on_commit=False) for each in engines]

    def handler(number: int) -> Handler:
        async def handle() -> Any:
            async with AsyncExitStack() as stack:
                for factory in factories[:number]:
                    session = await stack.enter_async_context(factory())
                    await session.scalar(SELECT)
            return NAME

        return handle

    return asgi.app({str(number): handler(number) for number in NUMBERS})


def ours(engines: Sequence[AsyncEngine]) -> ASGIApp:
    from asgi_dbscope import Database, DBSessionMiddleware

    databases = [Database(each, name=str(number)) for number, each in enumerate(engines)]

    def handler(number: int) -> Handler:
        async def handle() -> Any:
            for database in databases[:number]:
                await database.session.scalar(SELECT)
            return NAME

        return handle

    app = asgi.app({str(number): handler(number) for number in NUMBERS})
    return DBSessionMiddleware(app, databases=databases)


def make(build: Callable[[Sequence[AsyncEngine]], ASGIApp], setup: Setup) -> Application:
    engines = [setup.async_engine() for _ in NUMBERS]
    return Application(build(engines), engines[0])


CONTESTANTS = [
    Contestant("databases", "asgi", "by hand", partial(make, by_hand), variant="by_hand"),
    Contestant("databases", "asgi", "asgi-dbscope", partial(make, ours), variant="ours"),
]
