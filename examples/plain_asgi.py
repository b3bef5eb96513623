"""A visitors' counter without a framework. Run it: uvicorn plain_asgi:app."""

import os
from typing import Any

from sqlalchemy import text

from asgi_dbscope import Database, DBSessionMiddleware

# Made from a URL, the database has an engine of its own, closed at the server's shutdown.
db = Database(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///visits.db"))


async def count(path: str) -> int:
    """Write a visit, and count them."""
    await db.session.execute(text("INSERT INTO visits VALUES (:path)"), {"path": path})
    return int(await db.session.scalar(text("SELECT count(*) FROM visits")))


async def serve(scope: Any, receive: Any, send: Any) -> None:
    """Answer each request with the number of visits."""
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    visits = await count(scope["path"])
    status = 500 if scope["path"] == "/broken" else 200  # a 500 rolls the visit back
    # Here COMMIT is sent and answered, and only then does the head go on.
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"visit %d" % visits})


async def live(receive: Any, send: Any) -> None:
    """Make the table when the server starts."""
    await receive()
    async with db.session_scope() as session:
        await session.execute(text("CREATE TABLE IF NOT EXISTS visits (path TEXT)"))
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


app = DBSessionMiddleware(serve, database=db)
