"""Statements through `await session.connection()`: a use of the session like any other."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker

from asgi_dbscope import (
    CommitInDoubtError,
    ConcurrentSessionUseError,
    Database,
    DBSessionMiddleware,
    SessionScopeClosedError,
    State,
    TransactionIdleError,
    TransactionTimeoutError,
    current_scope,
)
from tests.fix_asgi import respond
from tests.fix_cancel import SlowCommit
from tests.fix_clock import LONG
from tests.fix_database import POSTGRES_DRIVERS, Item
from tests.fix_siblings import end_beside_a_sibling

ON_ASYNCPG = pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
SLOW = sa.text("SELECT pg_sleep(30)")
INSERT = sa.insert(Item).values(id=1)


@ON_POSTGRES
@pytest.mark.parametrize("verb", ["execute", "exec_driver_sql", "scalar"])
async def test_statement_that_takes_too_long_is_interrupted(db, drive, verb):
    """G10: the time of the transaction is up for a statement of its connection, too: 504."""
    seen = []

    async def app(scope, receive, send):
        try:
            connection = await db.session.connection()
            await getattr(connection, verb)("SELECT pg_sleep(30)" if "sql" in verb else SLOW)
        except TransactionTimeoutError as error:
            task: Any = asyncio.current_task()
            seen.append((str(error), task.cancelling()))
            raise

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert 504 == exchange.status
    [(message, requests)] = seen
    assert "took longer than its timeout of 0.1 seconds and was rolled back" in message
    assert 0 == requests


@ON_ASYNCPG
async def test_statement_that_runs_is_not_idle(engine, drive, rows):
    """Whoever is inside a statement of the connection is at work, however long it takes."""
    db = Database(engine, idle_timeout=0.05)

    async def app(scope, receive, send):
        connection = await db.session.connection()
        await connection.execute(INSERT)
        await connection.execute(sa.text("SELECT pg_sleep(0.2)"))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()


@ON_POSTGRES
@pytest.mark.parametrize("way", ["session", "connection"])
async def test_rows_that_are_read_too_late_are_the_same_error(db, drive, engine, clock, way):
    """Rows of a server-side cursor, which are read past the session, end with their time: 504."""

    async def app(scope, receive, send):
        source = db.session if way == "session" else await db.session.connection()
        numbers = sa.text("SELECT pg_sleep(0.05), n FROM generate_series(1, 100) n")
        # Cut short in here, SQLAlchemy leaves a cursor of psycopg's open.
        result = await source.stream(numbers, execution_options={"yield_per": 1})
        async for _ in result:
            asyncio.get_running_loop().call_soon(clock.forward, LONG, current_scope())

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))

    assert 504 == exchange.status
    assert 0 == engine.pool.checkedout()


@ON_SQLITE
@pytest.mark.parametrize("way", ["execute", "exec_driver_sql", "before a read"])
async def test_write_that_closing_rolled_back_is_an_error(db, drive, rows, way):
    """G1: a session closed by hand after a write through its connection claims no success."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        if way == "exec_driver_sql":
            await connection.exec_driver_sql("INSERT INTO item (id) VALUES (1)")
        else:
            await connection.execute(INSERT)
        if way == "before a read":
            await connection.execute(sa.text("SELECT 1"))
        await db.session.close()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, SessionScopeClosedError)
    assert [] == exchange.messages
    assert [] == await rows()


@ON_SQLITE
async def test_read_that_closing_rolled_back_is_none(db, drive):
    """Where nothing but reads went through the connection, closing by hand loses nothing."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        await connection.execute(sa.select(Item))
        await connection.exec_driver_sql("SELECT 1")
        await db.session.close()
        await respond(send)

    assert 200 == (await drive(DBSessionMiddleware(app, database=db))).status


@ON_ASYNCPG
@pytest.mark.parametrize("ending", ["commit", "raise"])
async def test_end_waits_for_a_siblings_statement(db, drive, engine, rows, ending):
    """G22: neither COMMIT nor ROLLBACK goes out beside a statement of the connection."""
    exchange, told = await end_beside_a_sibling(db, drive, "SELECT pg_sleep(0.1)", ending=ending)

    assert ["finished"] == told
    assert ((None, []) if ending == "raise" else (200, [1])) == (exchange.status, await rows())
    assert 0 == engine.pool.checkedout()


@ON_ASYNCPG
async def test_two_tasks_at_once_are_told_of_each_other(db, drive):
    """G13: a statement of the connection beside another task's gets an error that names both."""
    errors = []

    async def sleep():
        await db.session.execute(sa.text("SELECT pg_sleep(0.1)"))

    async def app(scope, receive, send):
        connection = await db.session.connection()
        task = asyncio.create_task(sleep(), name="sleeper")
        await asyncio.sleep(0)  # it is inside
        try:
            await connection.execute(sa.text("SELECT 1"))
        except ConcurrentSessionUseError as error:
            errors.append(str(error))
        await task
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    [message] = errors
    assert "task 'sleeper'" in message


@pytest.mark.parametrize("option", ["idle_warning", "idle_timeout"])
@ON_SQLITE
async def test_transaction_idles_once_its_rows_are_read(engine, drive, caplog, option):
    """A server-side cursor that was read to its end doesn't keep a transaction from idling."""
    options: dict[str, Any] = {option: 0.05}
    db = Database(engine, **options)

    async def app(scope, receive, send):
        session_scope = current_scope()
        result = await db.session.stream(sa.text("SELECT 1"))
        assert [1] == [number async for (number,) in result]
        while session_scope.state is not State.IDLE and not caplog.messages:
            await asyncio.sleep(0.005)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    if option == "idle_timeout":
        assert isinstance(exchange.error, TransactionIdleError)
    else:
        [message] = caplog.messages
        assert "has been idle for" in message


@ON_ASYNCPG
async def test_savepoint_of_the_connection_is_seen(db, drive, rows):
    """Its begin and its ends are uses as well."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        async with connection.begin_nested():
            await connection.execute(INSERT)
        with pytest.raises(ZeroDivisionError):
            async with connection.begin_nested():
                await connection.execute(sa.insert(Item).values(id=2))
                raise ZeroDivisionError
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=30))

    assert 200 == exchange.status
    assert [1] == await rows()


@ON_SQLITE
async def test_connection_of_the_users_own_works_after_the_scope(engine, rows):
    """A connection that a session was bound to goes on as before when the session is gone."""
    async with engine.connect() as connection:
        db = Database(engine)
        async with db.session_scope() as session:
            await session.execute(sa.text("SELECT 1"))
        bound = Database(async_sessionmaker(connection))
        async with bound.session_scope() as session:
            assert connection.sync_connection is (await session.connection()).sync_connection
            await session.execute(INSERT)
        await connection.execute(sa.insert(Item).values(id=2))
        await connection.commit()

    assert [1, 2] == await rows()


@ON_ASYNCPG
async def test_end_waits_for_a_block_that_a_sibling_commits(db, engine, drive, rows):
    """G22: while a child task's `session.begin()` commits, the response waits for it."""
    siblings = []

    async def sibling():
        async with db.session.begin():
            db.session.add(Item(id=1))

    async with SlowCommit(engine) as slow:

        async def app(scope, receive, send):
            siblings.append(asyncio.create_task(sibling()))
            await slow.wait_until_reached()
            asyncio.get_running_loop().call_later(0.02, has_begun.set)
            await respond(send)

        has_begun = asyncio.Event()
        request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
        await has_begun.wait()
        await slow.let_through()
        exchange = await request

    assert [None] == await asyncio.gather(*siblings)
    assert 200 == exchange.status
    assert [1] == await rows()
    assert 0 == engine.pool.checkedout()


@ON_ASYNCPG
async def test_block_whose_commit_takes_too_long_is_in_doubt(db, engine, drive, clock):
    """G15: swallowed, it is so at the head again: nobody may say that it was rolled back."""
    scopes: list[Any] = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        with pytest.raises(CommitInDoubtError):
            async with db.session.begin():
                db.session.add(Item(id=1))
        await respond(send)

    async with SlowCommit(engine) as slow:
        request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db, timeout=LONG)))
        await slow.wait_until_reached()
        clock.forward(LONG, *scopes)
        exchange = await request

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages


@ON_SQLITE
@pytest.mark.parametrize("concurrency", ["error", "serialize"])
async def test_block_of_the_users_own_that_fails_is_rolled_back(engine, drive, rows, concurrency):
    """A block's ROLLBACK is a use, too, and nobody else's turn is taken by it."""
    db = Database(engine, concurrency=concurrency)

    async def app(scope, receive, send):
        for number in range(2):
            with pytest.raises(ZeroDivisionError):
                async with db.session.begin():
                    db.session.add(Item(id=number))
                    await db.session.flush()
                    raise ZeroDivisionError
        async with db.session.begin():
            db.session.add(Item(id=3))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [3] == await rows()


@ON_SQLITE
async def test_connection_whose_time_is_up_says_so(db, drive):
    """A connection that is used after its transaction was ended tells why it is closed: 504."""

    async def app(scope, receive, send):
        session_scope = current_scope()
        connection = await db.session.connection()
        while session_scope.state is not State.IDLE:
            await asyncio.sleep(0.005)
        await connection.execute(sa.text("SELECT 1"))

    assert 504 == (await drive(DBSessionMiddleware(app, database=db, timeout=0.05))).status


@ON_ASYNCPG
async def test_who_queues_for_a_session_whose_time_is_up_is_told(engine, drive, timeline):
    """G13: a turn that comes after the end of the transaction is none: nothing begins anew."""
    db = Database(engine, concurrency="serialize")
    errors: list[Any] = []

    async def app(scope, receive, send):
        operations = [db.session.execute(SLOW) for _ in range(3)]
        errors.extend(await asyncio.gather(*operations, return_exceptions=True))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert 504 == exchange.status
    assert [TransactionTimeoutError] * 3 == [type(each) for each in errors]
    assert 1 == timeline.count("begin")
