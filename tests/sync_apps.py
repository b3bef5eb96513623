"""Apps whose work is done in worker threads, and what is committed after it."""

from collections.abc import Callable
from typing import Any

import anyio.to_thread
import sqlalchemy as sa

from tests.fix_asgi import App, body, start
from tests.fix_database import Item

Rows = Callable[[], list[int]]


def committed(engine: sa.Engine) -> list[int]:
    """The ids of the items that *engine*'s database has."""
    other = sa.create_engine(engine.url, poolclass=sa.NullPool)
    with other.connect() as connection:
        return list(connection.scalars(sa.select(Item.id).order_by(Item.id)))


def endpoint(*functions: Callable[[], Any], status: int = 201) -> App:
    """An app that calls each function in a worker thread, one after the other, and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for function in functions:
            await anyio.to_thread.run_sync(function)
        await send(start(status))
        await send(body(b"done"))

    return app
