"""A transaction that the database has aborted: never taken for committed."""

import asyncio
import gc
import weakref

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware, Outcome, current_scope
from asgi_dbscope.errors import TransactionAbortedError
from tests.fix_asgi import body, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Item

ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


async def fail(session):
    """Run a statement that the server refuses, and go on as if nothing had been."""
    with pytest.raises(sa.exc.DBAPIError):
        await session.execute(sa.text("SELECT 1 / 0"))


@ON_POSTGRES
async def test_success_after_a_swallowed_error_becomes_an_error(db, drive, rows):
    """G21: the head of a transaction that the server aborted is never sent."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert exchange.error.__cause__ is not None
    assert "division by zero" in str(exchange.error.__cause__)
    assert type(exchange.error.__cause__).__name__ in str(exchange.error)
    assert "division by zero" not in str(exchange.error)  # what the database says holds values
    assert [] == exchange.messages
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert [] == await rows()


@ON_POSTGRES
async def test_error_response_after_a_swallowed_error_goes_out(db, drive, rows):
    """G21, G3: a 5xx claims nothing, so the swallowed error is nobody's business."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 500 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_swallowed_conflict_of_a_flush_becomes_an_error(db, drive, rows):
    """G21: a unique key's conflict in a flush, swallowed, ends no differently."""
    async with db.session_scope() as session:
        session.add(Item(id=1))

    async def app(scope, receive, send):
        db.session.add(Item(id=2))
        await db.session.flush()
        db.session.add(Item(id=1))
        with pytest.raises(sa.exc.IntegrityError):
            await db.session.flush()
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is not None
    assert [] == exchange.messages
    assert [1] == await rows()


@ON_POSTGRES
async def test_commit_by_hand_after_a_swallowed_error_raises(db, drive, rows):
    """G21: the user's own `session.commit()` tells that nothing was committed."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        with pytest.raises(TransactionAbortedError):
            await db.session.commit()
        await db.session.rollback()
        await respond(send, 409)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 409 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_commit_by_hand_that_was_refused_is_not_forgotten(db, drive, rows):
    """G21: without a `rollback()` after the refusal, the head that claims success is refused."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        with pytest.raises(TransactionAbortedError):
            await db.session.commit()
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is not None
    assert [] == exchange.messages
    assert [] == await rows()


@ON_POSTGRES
async def test_commit_through_the_connection_after_a_swallowed_error_raises(db, drive, rows):
    """G21: `connection.commit()` tells that nothing was committed, like `session.commit()`."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        await connection.execute(sa.insert(Item).values(id=1))
        await fail(connection)
        with pytest.raises(TransactionAbortedError):
            await connection.commit()
        await db.session.rollback()
        await respond(send, 409)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 409 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_begin_block_after_a_swallowed_error_raises(db, drive, rows):
    """G21: the end of the user's own `session.begin()` block raises."""

    async def app(scope, receive, send):
        with pytest.raises(TransactionAbortedError):
            async with db.session.begin():
                db.session.add(Item(id=1))
                await db.session.flush()
                await fail(db.session)
        await respond(send, 409)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 409 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_release_after_a_swallowed_error_raises(db, drive, rows):
    """G21: `release()` tells that nothing was committed."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        with pytest.raises(TransactionAbortedError):
            await db.release()
        await respond(send, 409)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 409 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_job_after_a_swallowed_error_raises(db, rows):
    """G21: a job that swallowed an error ends with an error."""
    with pytest.raises(TransactionAbortedError):
        async with db.session_scope() as session:
            session.add(Item(id=1))
            await session.flush()
            await fail(session)

    assert [] == await rows()


async def test_savepoint_heals_the_transaction(db, drive, rows):
    """G21: an error inside a savepoint, swallowed outside of it, spoils nothing."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        with pytest.raises(sa.exc.DBAPIError):
            async with db.session.begin_nested():
                await db.session.execute(sa.text("SELECT * FROM missing"))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


@ON_POSTGRES
async def test_inner_savepoint_heals_to_its_own_begin_only(db, drive, rows):
    """G21: in nested savepoints, an error is healed by the innermost that is rolled back."""

    async def app(scope, receive, send):
        async with db.session.begin_nested():
            db.session.add(Item(id=1))
            await db.session.flush()
            with pytest.raises(sa.exc.DBAPIError):
                async with db.session.begin_nested():
                    db.session.add(Item(id=2))
                    await db.session.flush()
                    await db.session.execute(sa.text("SELECT 1 / 0"))
            db.session.add(Item(id=3))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1, 3] == await rows()


@ON_POSTGRES
async def test_error_swallowed_inside_a_savepoint_is_not_healed(db, drive, rows):
    """G21: swallowed inside the savepoint's block, the error makes its RELEASE fail, and raise."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        with pytest.raises(sa.exc.DBAPIError, match="aborted"):
            async with db.session.begin_nested():
                await fail(db.session)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert [] == exchange.messages
    assert [] == await rows()


@ON_POSTGRES
async def test_savepoint_of_raw_sql_heals_too(db, drive, rows):
    """G21: the database is asked, so a savepoint that SQLAlchemy knows nothing of heals as well."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text("SAVEPOINT mine"))
        await fail(db.session)
        await db.session.execute(sa.text("ROLLBACK TO SAVEPOINT mine"))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


@ON_POSTGRES
async def test_error_that_never_reached_the_server_aborts_nothing(db, drive, rows):
    """G21: a parameter that the driver itself refuses leaves the transaction as it was."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        with pytest.raises(sa.exc.DBAPIError):
            await db.session.execute(sa.insert(Item).values(id=object()))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


@ON_POSTGRES
async def test_rollback_by_hand_begins_afresh(db, drive, rows):
    """G21: after the user's own `session.rollback()` new work commits."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        await db.session.rollback()
        db.session.add(Item(id=2))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [2] == await rows()


@ON_POSTGRES
async def test_query_that_timed_out_and_was_swallowed_becomes_an_error(db, drive, engine, rows):
    """G21, G10: after `asyncio.timeout()` cut off a query nothing is claimed as committed."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await db.session.execute(sa.text("SELECT pg_sleep(5)"))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is not None
    assert [] == exchange.messages
    assert 0 == engine.pool.checkedout()
    assert [] == await rows()


@ON_POSTGRES
async def test_rollback_after_a_query_that_timed_out_begins_afresh(db, drive, rows):
    """G21, G10: after `session.rollback()` the scope goes on, on another connection."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await db.session.execute(sa.text("SELECT pg_sleep(5)"))
        await db.session.rollback()
        db.session.add(Item(id=2))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [2] == await rows()


@ON_POSTGRES
async def test_error_swallowed_in_a_stream_tears_it(db, drive, rows):
    """G21, G7: a body whose transaction the server aborted is not brought to its end."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        await db.session.flush()
        await fail(db.session)
        await send(body(b"chunk", more=True))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert not exchange.is_complete
    assert [] == await rows()


@ON_SQLITE
async def test_conflict_that_rolls_back_in_sqlite_becomes_an_error(db, drive, rows):
    """G21: `INSERT OR ROLLBACK` ends SQLite's transaction, and the rows before are gone."""
    async with db.session_scope() as session:
        session.add(Item(id=1))

    async def app(scope, receive, send):
        db.session.add(Item(id=2))
        await db.session.flush()
        with pytest.raises(sa.exc.IntegrityError):
            await db.session.execute(sa.text("INSERT OR ROLLBACK INTO item (id) VALUES (1)"))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert [] == exchange.messages
    assert [1] == await rows()


@ON_SQLITE
async def test_conflict_that_was_swallowed_in_sqlite_undoes_its_statement_only(db, drive, rows):
    """G21: in SQLite an ordinary conflict aborts one statement, and the rest commits."""
    async with db.session_scope() as session:
        session.add(Item(id=1))

    async def app(scope, receive, send):
        db.session.add(Item(id=2))
        await db.session.flush()
        with pytest.raises(sa.exc.IntegrityError):
            await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1, 2] == await rows()


async def test_swallowed_error_is_not_kept(db, drive):
    """G21, G9: once the request is over nothing holds its connection, its error or its scope."""
    kept = []

    async def app(scope, receive, send):
        connection = await db.session.connection()
        kept.extend([weakref.ref(current_scope()), weakref.ref(connection.sync_connection)])
        with pytest.raises(sa.exc.DBAPIError):
            await db.session.execute(sa.text("SELECT * FROM missing"))
        await db.session.rollback()
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    gc.collect()

    assert exchange.error is None
    assert [None, None] == [reference() for reference in kept]
