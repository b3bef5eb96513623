"""A scope that ends while child tasks use its session: they are waited for, or cut off."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from time import monotonic
from typing import Any, Self

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database, DBSessionMiddleware
from asgi_dbscope.errors import ConcurrentSessionUseError, SessionScopeClosedError
from tests.fix_asgi import App, respond
from tests.fix_cancel import ENOUGH
from tests.fix_database import POSTGRES_DRIVERS, Item

ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
LOCK = 4711


class BranchError(Exception):
    """What the failing branch raises."""


class Barrier:
    """A lock in PostgreSQL: a statement that asks for it waits until it is opened."""

    statement = sa.select(sa.func.pg_advisory_xact_lock(LOCK))

    def __init__(self, engine: AsyncEngine) -> None:
        self.is_reached = asyncio.Event()
        self._engine = engine
        self._connection: Any = None

    async def __aenter__(self) -> Self:
        self._connection = await self._engine.connect()
        await self._connection.execute(sa.select(sa.func.pg_advisory_lock(LOCK)))
        await self._connection.commit()

        @sa.event.listens_for(self._engine.sync_engine, "before_cursor_execute")
        def reached(connection: object, cursor: object, statement: str, *more: object) -> None:
            if "pg_advisory_xact_lock" in statement:
                self.is_reached.set()

        return self

    async def open(self) -> None:
        """Let the statement through."""
        await self._connection.execute(sa.select(sa.func.pg_advisory_unlock(LOCK)))
        await self._connection.commit()

    async def __aexit__(self, *error: object) -> None:
        await self._connection.execute(sa.select(sa.func.pg_advisory_unlock_all()))
        await self._connection.close()


@pytest.fixture
async def barrier(engine: AsyncEngine, make_engine: Callable[..., AsyncEngine]):
    """A barrier for statements of the engine."""
    async with Barrier(engine) as barrier:
        yield barrier


def gathering(
    sibling: Callable[[], Coroutine[Any, Any, Any]], is_time: Callable[[], Awaitable[object]]
) -> tuple[App, list[asyncio.Future[Any]]]:
    """An app with a cold `gather` of a *sibling* and a branch that fails when it *is_time*.

    The list has the sibling's task once the app has begun.
    """
    siblings: list[asyncio.Future[Any]] = []

    async def fail() -> None:
        await is_time()
        raise BranchError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        siblings.append(asyncio.ensure_future(sibling()))
        await asyncio.gather(siblings[0], fail())

    return app, siblings


async def assert_pool_is_intact(engine, *, in_use=0):
    """Every connection that the pool gives out works, and none is lost."""
    assert in_use == engine.pool.checkedout()
    connections = [await engine.connect() for _ in range(5)]
    for connection in connections:
        assert 1 == await connection.scalar(sa.select(1))
        assert not connection.sync_connection.invalidated
    for connection in connections:
        await connection.close()
    assert in_use == engine.pool.checkedout()


@ON_POSTGRES
async def test_scope_waits_for_a_sibling_that_runs_a_statement(db, drive, engine, rows, barrier):
    """G22: after a failing branch of a cold `gather`, the other's statement is let finish."""

    async def sibling():
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(barrier.statement)
        return "finished"

    app, siblings = gathering(sibling, barrier.is_reached.wait)
    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await barrier.is_reached.wait()
    await asyncio.sleep(0)
    assert not request.done()
    await barrier.open()
    exchange = await request

    assert isinstance(exchange.error, BranchError)
    assert "finished" == await siblings[0]
    await assert_pool_is_intact(engine, in_use=1)
    assert [] == await rows()


@ON_POSTGRES
async def test_sibling_that_outlives_the_deadline_is_cut_off(engine, drive, rows, barrier):
    """G22: after `cleanup_timeout` the connection is thrown away, and the pool is intact."""
    db = Database(engine, cleanup_timeout=0.05)

    async def sibling():
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(barrier.statement)

    app, siblings = gathering(sibling, barrier.is_reached.wait)
    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, BranchError)
    async with asyncio.timeout(ENOUGH):
        [outcome] = await asyncio.gather(*siblings, return_exceptions=True)
    assert isinstance(outcome, Exception)
    await assert_pool_is_intact(engine, in_use=1)
    assert [] == await rows()


ENDLESS = {
    "sqlite": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    ),
    "postgresql": "SELECT pg_sleep(10)",  # the server goes on with it, in a transaction
}


@pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)
async def test_sibling_in_a_savepoint_is_cut_off_as_soon(engine, drive):
    """G22: the connection goes first, so that no savepoint is rolled back to beside a statement."""
    db = Database(engine, cleanup_timeout=0.1)
    statement = sa.text(ENDLESS[engine.dialect.name])
    siblings = []

    async def app(scope, receive, send):
        await db.session.begin_nested()
        await db.session.execute(sa.text("SELECT 1"))
        siblings.append(asyncio.create_task(db.session.execute(statement)))
        await asyncio.sleep(0.01)
        await respond(send)

    begun = monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db))
    [error] = await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(exchange.error, ConcurrentSessionUseError)
    assert isinstance(error, sa.exc.SQLAlchemyError)
    assert monotonic() - begun < 20


async def test_sibling_between_two_statements_is_told(db, drive, engine, rows):
    """G22, G9: a sibling that comes back to an ended scope's session is told to take its own."""
    has_begun = asyncio.Event()
    is_over = asyncio.Event()

    async def sibling():
        session = db.session
        async with session.begin():
            session.add(Item(id=1))
            await session.flush()
            has_begun.set()
            await is_over.wait()
            with pytest.raises(SessionScopeClosedError, match="session_scope"):
                await session.scalar(sa.select(1))

    app, siblings = gathering(sibling, has_begun.wait)
    exchange = await drive(DBSessionMiddleware(app, database=db))
    is_over.set()
    await asyncio.gather(*siblings)

    assert isinstance(exchange.error, BranchError)
    await assert_pool_is_intact(engine)
    assert [] == await rows()


@pytest.fixture
async def narrow(engine: AsyncEngine, make_engine: Callable[..., AsyncEngine]):
    """A pool of one connection, over the engine's tables."""
    driver = {"aiosqlite": "sqlite"}.get(engine.dialect.driver, engine.dialect.driver)
    narrow = make_engine(driver, pool_size=1, max_overflow=0)
    yield narrow
    assert 0 == narrow.pool.checkedout()  # type: ignore[attr-defined]
    await narrow.dispose()


async def until_somebody_waits_for(engine):
    """Wait until a task waits for a connection of the pool."""
    while not engine.pool._pool._queue._getters:
        await asyncio.sleep(0)


async def test_scope_waits_for_a_sibling_that_is_connecting(narrow, drive):
    """G22: a sibling that waits for a connection of an exhausted pool gets it and gives it back."""
    db = Database(narrow)

    async def sibling():
        return await db.session.scalar(sa.select(1))

    app, siblings = gathering(sibling, partial(until_somebody_waits_for, narrow))
    only = await narrow.connect()
    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await until_somebody_waits_for(narrow)
    await only.close()
    exchange = await request
    [outcome] = await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(exchange.error, BranchError)
    assert 1 == outcome or isinstance(outcome, SessionScopeClosedError)
    async with narrow.connect() as connection:
        assert 1 == await connection.scalar(sa.select(1))


async def test_sibling_that_connects_after_the_deadline_leaks_nothing(narrow, drive):
    """G22: a sibling that gets its connection only after the scope's end does not keep it."""
    db = Database(narrow, cleanup_timeout=0.02)

    async def sibling():
        await db.session.scalar(sa.select(1))

    app, siblings = gathering(sibling, partial(until_somebody_waits_for, narrow))
    only = await narrow.connect()
    exchange = await drive(DBSessionMiddleware(app, database=db))
    await only.close()
    [outcome] = await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(exchange.error, BranchError)
    assert isinstance(outcome, Exception)
    assert 0 == narrow.pool.checkedout()
    async with narrow.connect() as connection:
        assert 1 == await connection.scalar(sa.select(1))


async def test_sibling_that_never_connects_keeps_nobody_waiting(narrow, drive):
    """G22: where the pool stays exhausted, the scope ends after its deadline all the same."""
    db = Database(narrow, cleanup_timeout=0.02)

    async def sibling():
        await db.session.scalar(sa.select(1))

    app, siblings = gathering(sibling, partial(until_somebody_waits_for, narrow))
    async with narrow.connect():
        exchange = await drive(DBSessionMiddleware(app, database=db))
        siblings[0].cancel()
        [outcome] = await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(exchange.error, BranchError)
    assert isinstance(outcome, (asyncio.CancelledError, SessionScopeClosedError))
    assert 0 == narrow.pool.checkedout()


async def test_sibling_about_to_begin_is_told(db, drive, engine, rows):
    """G22, G9: a sibling that comes to its first statement after the end takes no connection."""
    is_over = asyncio.Event()

    async def sibling():
        session = db.session
        await is_over.wait()
        async with session.begin():
            await session.execute(sa.insert(Item).values(id=1))

    app, siblings = gathering(sibling, partial(asyncio.sleep, 0))
    await drive(DBSessionMiddleware(app, database=db))
    is_over.set()
    [outcome] = await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(outcome, SessionScopeClosedError)
    await assert_pool_is_intact(engine)
    assert [] == await rows()


@ON_POSTGRES
async def test_task_in_mid_statement_at_the_head_is_waited_for(db, drive, engine, rows, barrier):
    """G22, G1: the head waits for a forgotten task's statement, and commits it with the rest."""
    forgotten = []

    async def work():
        db.session.add(Item(id=2))
        await db.session.flush()
        await db.session.execute(barrier.statement)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        forgotten.append(asyncio.ensure_future(work()))
        await barrier.is_reached.wait()
        await respond(send)

    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await barrier.is_reached.wait()
    await asyncio.sleep(0)
    await barrier.open()
    exchange = await request
    await asyncio.gather(*forgotten)

    assert exchange.error is None
    assert 200 == exchange.status
    assert [1, 2] == await rows()
    await assert_pool_is_intact(engine, in_use=1)


@ON_POSTGRES
async def test_task_that_holds_up_the_head_too_long_makes_it_an_error(engine, drive, rows, barrier):
    """G22, G1: past the deadline nothing can be committed, so the head is never sent."""
    db = Database(engine, cleanup_timeout=0.05)
    forgotten = []

    async def work():
        await db.session.execute(barrier.statement)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        forgotten.append(asyncio.ensure_future(work()))
        await barrier.is_reached.wait()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    async with asyncio.timeout(ENOUGH):
        [outcome] = await asyncio.gather(*forgotten, return_exceptions=True)

    assert isinstance(exchange.error, ConcurrentSessionUseError)
    assert "cleanup_timeout" in str(exchange.error)
    assert [] == exchange.messages
    assert isinstance(outcome, Exception)
    await assert_pool_is_intact(engine, in_use=1)
    assert [] == await rows()


@ON_POSTGRES
async def test_cancelled_request_waits_for_its_sibling_too(db, drive, engine, rows, barrier):
    """G22, G10: a request that is cancelled while a sibling runs a statement ends as cleanly."""
    siblings = []

    async def sibling():
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(barrier.statement)

    async def app(scope, receive, send):
        siblings.append(asyncio.ensure_future(sibling()))
        await asyncio.Event().wait()

    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await barrier.is_reached.wait()
    request.cancel()
    await asyncio.sleep(0)
    await barrier.open()
    exchange = await request
    await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(exchange.error, asyncio.CancelledError)
    await assert_pool_is_intact(engine, in_use=1)
    assert [] == await rows()
