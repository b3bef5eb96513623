"""The connection to PostgreSQL is lost: before COMMIT, and while COMMIT is on its way."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import (
    CommitInDoubtError,
    Database,
    DBSessionMiddleware,
    Outcome,
    current_scope,
)
from bench.proxy import Proxy, after_commit, before_commit
from tests.fix_asgi import body, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Item

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)

CUTS = [(before_commit, []), (after_commit, [1])]
"""Where the connection is lost, and what is committed then."""


@pytest.fixture
async def db(proxy: Proxy) -> AsyncIterator[Database[Any]]:
    """A database that is reached by the proxy."""
    engine = create_async_engine(proxy.url)
    yield Database(engine)
    assert 0 == engine.pool.checkedout()  # type: ignore[attr-defined]
    await engine.dispose()


def assert_is_in_doubt(error):
    """It says so, and why: the database's own error is its cause."""
    assert isinstance(error, CommitInDoubtError)
    assert "may or may not have been committed" in str(error)
    assert error.transaction_id is None  # nobody asked for it
    assert isinstance(error.__cause__, sa.exc.DBAPIError)
    assert error.__cause__.connection_invalidated
    assert not hasattr(error, "__notes__")


async def test_connection_lost_before_commit_is_no_success(db, engine, drive, rows):
    """G15, G19: where the server ended the connection after a write, no head claims the write."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        pid = await db.session.scalar(sa.select(sa.func.pg_backend_pid()))
        async with engine.connect() as other:
            await other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5000)))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert_is_in_doubt(exchange.error)
    assert [] == exchange.messages
    assert Outcome.IN_DOUBT is scopes[0].outcome  # who sends COMMIT can't know that it is too late
    assert [] == await rows()


@pytest.mark.parametrize(("cut", "committed"), CUTS)
async def test_connection_lost_during_commit_is_in_doubt(db, proxy, drive, rows, cut, committed):
    """G15: COMMIT without an answer is in doubt, whether it got through or not, and says so."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("cut", cut)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert_is_in_doubt(exchange.error)
    assert [] == exchange.messages
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert committed == await rows()


async def test_next_request_after_a_lost_connection_is_served(db, proxy, drive, rows):
    """G15, G19: the lost connection has left the pool, and the next request gets another."""

    async def app(scope, receive, send):
        db.session.add(Item(id=int(scope["path"][1:])))
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    proxy.arm("cut", before_commit)
    first = await drive(wrapped, {"type": "http", "path": "/1", "method": "GET"})
    second = await drive(wrapped, {"type": "http", "path": "/2", "method": "GET"})

    assert first.error is not None
    assert second.error is None
    assert 200 == second.status
    assert [2] == await rows()


@pytest.mark.parametrize(("cut", "committed"), CUTS)
async def test_body_whose_commit_is_in_doubt_ends_torn(db, proxy, drive, rows, cut, committed):
    """G15, G7: without an answer to the body's COMMIT its last message is not sent."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("cut", cut)
        await send(body(b"chunk", more=True))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert_is_in_doubt(exchange.error)
    assert not exchange.is_complete
    assert committed == await rows()


@pytest.mark.parametrize(("cut", "committed"), CUTS)
async def test_job_whose_commit_is_in_doubt_says_so(db, proxy, rows, cut, committed):
    """G15: a session scope outside a request raises, and its outcome is IN_DOUBT."""
    scopes = []

    async def job():
        async with db.session_scope() as session:
            scopes.append(db.scope)
            session.add(Item(id=1))
            await session.flush()
            proxy.arm("cut", cut)

    with pytest.raises(CommitInDoubtError) as raised:
        await job()

    assert_is_in_doubt(raised.value)
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert committed == await rows()


async def test_commit_by_hand_that_is_in_doubt_is_not_the_last_word(db, proxy, drive, rows):
    """G15: the scope goes on after `session.rollback()`, and tells of its latest transaction."""
    outcomes = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("cut", after_commit)
        with pytest.raises(CommitInDoubtError):
            await db.session.commit()
        outcomes.append(current_scope().outcome)
        await db.session.rollback()
        db.session.add(Item(id=2))
        await respond(send)
        outcomes.append(current_scope().outcome)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [Outcome.IN_DOUBT, Outcome.COMMITTED] == outcomes
    assert [1, 2] == await rows()


async def test_connection_lost_in_a_read_is_the_apps_own_error(db, engine, drive, rows):
    """G15: lost in mid-query, the query raises; where that is swallowed no success is claimed."""
    swallowed = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        pid = await db.session.scalar(sa.select(sa.func.pg_backend_pid()))
        async with engine.connect() as other:
            await other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5000)))
        try:
            await db.session.scalar(sa.select(1))
        except sa.exc.DBAPIError as error:
            swallowed.append(error)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 1 == len(swallowed)
    assert exchange.error is not None
    assert [] == exchange.messages
    assert [] == await rows()
