"""A request that ends while a task of its own is still at work on its session."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware
from tests.fix_asgi import Exchange, respond
from tests.fix_database import Item


async def end_beside_a_sibling(
    db: Database[Any],
    drive: Callable[..., Awaitable[Exchange]],
    statement: str,
    *,
    ending: str,
) -> tuple[Exchange, list[object]]:
    """Write row 1 and end while a sibling is inside a statement of the session's connection.

    The app raises where *ending* is `"raise"`. Told are what came of it, and of its sibling.
    """
    is_begun = asyncio.Event()
    siblings = []

    async def sibling() -> str:
        connection = await db.session.connection()
        is_begun.set()
        await connection.execute(sa.text(statement))
        return "finished"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        db.session.add(Item(id=1))
        await db.session.flush()
        siblings.append(asyncio.create_task(sibling()))
        await is_begun.wait()
        await asyncio.sleep(0)
        if ending == "raise":
            raise ValueError
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    return exchange, await asyncio.gather(*siblings)
