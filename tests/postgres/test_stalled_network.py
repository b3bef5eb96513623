"""A network that is silent: nothing arrives any more, and no connection is ever closed."""

import asyncio
from time import monotonic
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import (
    CommitInDoubtError,
    Database,
    DBSessionMiddleware,
    Outcome,
    TransactionIdleError,
    current_scope,
)
from bench.proxy import any_query, before_commit
from tests.fix_asgi import respond
from tests.fix_clock import LONG
from tests.fix_database import POSTGRES_DRIVERS, Item
from tests.sync_apps import endpoint

ON_BOTH = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)

ENOUGH = 30.0
"""Seconds in which everything here has to be over; without bounds it never is."""


@pytest.fixture
async def far(engine, proxy):
    """An engine behind the proxy; its pool has one connection."""
    url = proxy.url.set(drivername=f"postgresql+{engine.driver}")
    far = create_async_engine(url, pool_size=1, max_overflow=0)
    async with far.connect() as connection:
        await connection.execute(sa.text("SELECT 1"))
    yield far
    leaked = far.pool.checkedout()  # type: ignore[attr-defined]
    proxy.disarm()
    proxy.cut()
    await far.dispose()
    assert 0 == leaked


def writing(db, silence, scopes=None):
    """An app that writes, and then the network is silent."""

    async def app(scope, receive, send):
        if scopes is not None:
            scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        silence()
        await respond(send)

    return app


@ON_BOTH
async def test_commit_that_is_not_answered_is_in_doubt_after_the_timeout(far, proxy, drive, clock):
    """G15: COMMIT has what is left of the transaction's time; then nobody knows, and it's said."""
    db = Database(far, cleanup_timeout=0.3)
    scopes: list[Any] = []
    fault = proxy.arm("stall", before_commit)
    app = DBSessionMiddleware(writing(db, lambda: None, scopes), database=db, timeout=LONG)
    request = asyncio.create_task(drive(app))
    await fault.wait()
    begun = monotonic()
    clock.forward(LONG, *scopes)

    exchange = await request

    assert isinstance(exchange.error, CommitInDoubtError)
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert [] == exchange.messages
    assert monotonic() - begun < ENOUGH


@ON_BOTH
async def test_statement_that_is_not_answered_ends_with_the_timeout(far, proxy, drive, rows):
    """G10: the statement is given up, the connection thrown away, and the answer is 504."""
    db = Database(far, cleanup_timeout=0.3)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("swallow", any_query, times=None)
        await db.session.execute(sa.text("SELECT 1"))

    begun = monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.3))

    assert 504 == exchange.status
    assert monotonic() - begun < ENOUGH
    assert 0 == far.pool.checkedout()


@ON_BOTH
async def test_rollback_that_is_not_answered_ends_with_the_cleanup_timeout(far, proxy, drive):
    """G10: the connection is thrown away instead, and the response goes out."""
    db = Database(far, cleanup_timeout=0.2)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("swallow", any_query, times=None)
        await respond(send, 500)

    begun = monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 500 == exchange.status
    assert monotonic() - begun < ENOUGH
    assert 0 == far.pool.checkedout()


@ON_BOTH
async def test_idle_transaction_behind_a_silent_network_is_ended_too(far, proxy, drive):
    """G10: its rollback has `cleanup_timeout`, and then the connection is thrown away."""
    db = Database(far, cleanup_timeout=0.2, idle_timeout=0.1)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("swallow", any_query, times=None)
        while far.pool.checkedout():
            await asyncio.sleep(0.01)
        await respond(send)

    begun = monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionIdleError)
    assert monotonic() - begun < ENOUGH


@ON_BOTH
async def test_cancelled_request_behind_a_silent_network_ends(far, proxy, drive):
    """G10: cancelled in the middle of a statement, the request is over in bounded time."""
    db = Database(far, cleanup_timeout=0.2)
    is_silent = asyncio.Event()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        proxy.arm("swallow", any_query, times=None)
        is_silent.set()
        await db.session.execute(sa.text("SELECT 1"))

    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await is_silent.wait()
    begun = monotonic()
    await asyncio.sleep(0.05)
    request.cancel()
    await asyncio.wait([request])

    assert monotonic() - begun < ENOUGH
    assert 0 == far.pool.checkedout()


@ON_BOTH
async def test_disposing_ends_behind_a_silent_network(engine, proxy):
    """G10: no shutdown waits for ever: connections that don't answer are dropped."""
    url = proxy.url.set(drivername=f"postgresql+{engine.driver}")
    db = Database(url, cleanup_timeout=0.3)
    async with db.session_scope() as session:
        await session.execute(sa.text("SELECT 1"))
    for link in proxy.links:
        proxy.arm("swallow", any_query, times=None, link=link)

    begun = monotonic()
    await db.dispose()

    assert monotonic() - begun < ENOUGH


@pytest.mark.parametrize("engine", ["psycopg"], indirect=True)
@pytest.mark.parametrize("fate", ["rollback", "timeout"])
async def test_thread_behind_a_silent_network_ends(engine, proxy, drive, fate):
    """G10: a synchronous connection that hangs in its end, or past its time, is cut."""
    far = sa.create_engine(
        proxy.url.set(drivername="postgresql+psycopg"), pool_size=1, max_overflow=0
    )
    db = Database(far, cleanup_timeout=0.3)
    loop = asyncio.get_running_loop()

    async def fall_silent():
        proxy.arm("swallow", any_query, times=None)

    def work():
        db.session.add(Item(id=1))
        db.session.flush()
        asyncio.run_coroutine_threadsafe(fall_silent(), loop).result()
        if fate == "timeout":
            db.session.execute(sa.text("SELECT 1"))

    timeout = 0.3 if fate == "timeout" else None
    begun = monotonic()
    exchange = await drive(
        DBSessionMiddleware(endpoint(work, status=500), database=db, timeout=timeout)
    )

    assert (504 if fate == "timeout" else 500) == exchange.status
    assert monotonic() - begun < ENOUGH
    assert 0 == far.pool.checkedout()  # type: ignore[attr-defined]
    proxy.disarm()
    proxy.cut()
    await asyncio.to_thread(far.dispose)
