"""A plain ASGI app whose first attempts at a request lose; also run in a process of its own."""

import os
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import Database, DBSessionMiddleware, Retry, current_scope
from asgi_dbscope.testing import inject_conflicts
from tests.fix_database import Item

LOST = 2
"""How many attempts at each request lose."""


def retrying(db: Database[Any], retry: Retry) -> DBSessionMiddleware:
    """The app: `POST /7` writes row 7, and answers with its body and the attempt that won."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        attempt = current_scope().attempt
        content = b""
        is_more = scope["method"] == "POST"
        while is_more:
            message = await receive()
            content += message["body"]
            is_more = message["more_body"]
        with inject_conflicts(db, at="INSERT", times=1 if attempt <= LOST else 0):
            await db.session.execute(sa.insert(Item).values(id=int(scope["path"][1:])))
        content += f" {attempt}".encode()
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return DBSessionMiddleware(app, database=db, retry=retry)


if "DBSCOPE_SERVED_URL" in os.environ:
    app = retrying(
        Database(create_async_engine(os.environ["DBSCOPE_SERVED_URL"])), Retry(base=0.05)
    )
