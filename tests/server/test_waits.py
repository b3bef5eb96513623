"""Waits under a real uvicorn: their answers over a socket, and connections that live on."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import Item
from tests.fix_server import PATIENCE, Observed, connect

HEADERS = [(b"content-length", b"2")]


class App:
    """`/hold` holds a connection; `/sleep` sleeps in a statement; others write a row."""

    def __init__(self, db: Database[Any]) -> None:
        self.db = db
        self.is_held = asyncio.Event()
        self.may_go = asyncio.Event()
        self.asked: list[str] = []

    async def __call__(self, scope, receive, send):
        """Serve."""
        assert "http" == scope["type"]
        path = scope["path"]
        self.asked.append(path)
        if path == "/sleep":
            self.db.scope.configure(timeout=0.2)
            await self.db.session.execute(sa.text("SELECT pg_sleep(30)"))
        self.db.session.add(Item(id=int("0" + path[1:]) if path[1:].isdigit() else 99))
        await self.db.session.flush()
        if path == "/hold":
            self.is_held.set()
            await self.may_go.wait()
        await send(start(200, headers=HEADERS))
        await send(body(b"ok"))


async def test_exhausted_pool_is_a_503_and_the_connection_lives(make_engine, uvicorn):
    """G14: the client is told when to come back, and comes back on the same connection."""
    engine = make_engine("asyncpg", pool_size=1, max_overflow=0)
    async with engine.connect():
        pass
    app = App(Database(engine, checkout_timeout=0.1))
    async with (
        uvicorn(DBSessionMiddleware(app, database=app.db)) as port,
        connect(port) as holder,
        connect(port) as client,
    ):
        holder.send("POST", "/hold")
        await app.is_held.wait()
        client.send("POST", "/1")
        status, headers = await client.head()
        assert (503, "1") == (status, headers["retry-after"])
        assert b"Service Unavailable" == await client.body(headers)
        app.may_go.set()
        assert 200 == (await holder.head())[0]
        assert (200, b"ok") == await client.request("POST", "/2")
    async with engine.begin() as connection:
        assert [2, 99] == (await connection.scalars(sa.select(Item.id).order_by(Item.id))).all()
        await connection.execute(sa.delete(Item))
    await engine.dispose()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_transaction_out_of_time_is_a_504_and_the_connection_lives(db, uvicorn, rows):
    """A statement that takes too long ends in time; the next request is served."""
    app = App(db)
    timed = DBSessionMiddleware(app, database=db, timeout=PATIENCE)
    async with uvicorn(timed) as port, connect(port) as client:
        assert (504, b"Gateway Timeout") == await client.request("POST", "/sleep")
        assert (200, b"ok") == await client.request("POST", "/1")
    assert [1] == await rows()


async def test_client_that_leaves_leaves_the_queue(engine, db, uvicorn, rows):
    """G14: its request, whose body nobody has read, doesn't run when its turn comes."""
    app = App(db)
    admitted = DBSessionMiddleware(app, database=db, max_concurrent=1, waiting_timeout=PATIENCE)
    observed = Observed(admitted)
    async with uvicorn(observed) as port, connect(port) as holder, connect(port) as last:
        holder.send("POST", "/hold")
        await app.is_held.wait()
        async with connect(port) as leaving:
            leaving.send("POST", "/1", body=b"x" * 1000)
            await until(lambda: "/1" in app.asked)
        last.send("POST", "/2")
        await until(lambda: "/2" in app.asked)
        await observed.wait_for_end_of("/1")
        app.may_go.set()
        assert 200 == (await holder.head())[0]
        assert 200 == (await last.head())[0]
    assert [2, 99] == await rows()
    assert 0 == engine.pool.checkedout()


async def until(condition):
    """Wait until it is so."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)
