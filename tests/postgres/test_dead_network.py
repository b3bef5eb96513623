"""The network is dead: the connection stays open, and no answer comes on it any more."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import CommitInDoubtError, Database, DBSessionMiddleware
from bench.proxy import after_commit, any_answer, before_commit
from tests.fix_asgi import body, start
from tests.fix_database import Item

pytestmark = pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)


@pytest.fixture
async def db(proxy):
    """A database that is reached by the proxy, and that isn't waited for without end."""
    engine = create_async_engine(proxy.url, connect_args={"command_timeout": 1})
    yield Database(engine)
    checked_out = engine.pool.checkedout()  # type: ignore[attr-defined]
    links = set(proxy.links)
    await engine.dispose()
    assert 0 == checked_out
    assert set() == links, "a connection of no use was kept"


@pytest.mark.parametrize(("place", "committed"), [(before_commit, []), (after_commit, [1])])
async def test_commit_that_gets_no_answer_ends_in_doubt(db, proxy, drive, rows, place, committed):
    """G10, G15: Once the driver gives up waiting, the request ends and its connection is closed."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("swallow", place)
        await send(start(200))
        await send(body(b"ok"))

    async with asyncio.timeout(10):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages
    assert committed == await rows()


async def test_statement_that_gets_no_answer_ends_in_a_rollback(db, proxy, drive, rows):
    """G10, G15: The driver's error is the app's own; nothing else has to be waited for."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("swallow", any_answer)
        await db.session.execute(sa.text("SELECT 1"))

    async with asyncio.timeout(10):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TimeoutError)
    assert [] == exchange.messages
    assert [] == await rows()
