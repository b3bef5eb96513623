"""Ways of using a session that meet the scope at an edge."""

import asyncio
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    TransactionAbortedError,
    WebSocketSessionError,
    current_scope,
)
from tests.fix_asgi import body, respond, start
from tests.fix_database import Item


async def test_write_with_a_common_table_expression_is_rolled_back(db, drive, rows):
    """G3: also where it is the first statement, which the SQLite driver doesn't begin before."""
    chosen = sa.select(sa.literal(1).label("id")).cte("chosen")

    async def app(scope, receive, send):
        columns = sa.select(chosen.c.id, sa.null())
        await db.session.execute(sa.insert(Item).from_select(["id", "note"], columns))
        await db.session.execute(sa.text("WITH c AS (SELECT 2) INSERT INTO item SELECT 2, NULL"))
        await send(start(500))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 500 == exchange.status
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_statement_that_sqlite_refuses_in_a_transaction_runs(db, drive):
    """G18: VACUUM is no reason to begin."""

    async def app(scope, receive, send):
        await db.session.execute(sa.text("VACUUM"))
        await send(start())

    assert (await drive(DBSessionMiddleware(app, database=db))).error is None


async def test_rollback_only_scope_refuses_autocommit(db, drive, rows):
    """G4: its statements would be durable one by one."""

    async def app(scope, receive, send):
        db.set_rollback_only()
        current_scope().configure(mode="autocommit")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ConfigurationError)
    assert "rollback-only" in str(exchange.error)


async def test_engine_that_is_autocommit_is_refused_where_a_transaction_is_asked_for(
    make_engine, engine, drive, rows
):
    """G3, G4: there would be nothing to roll back."""
    autocommit = make_engine(engine.dialect.driver.replace("aio", ""), isolation_level="AUTOCOMMIT")
    db = Database(autocommit)

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item).values(id=1))
        await send(start())

    exchange = await drive(DBSessionMiddleware(app, database=db))
    await autocommit.dispose()

    assert isinstance(exchange.error, ConfigurationError)
    assert "mode='autocommit'" in str(exchange.error)
    assert [] == await rows()


async def test_engine_that_is_autocommit_is_refused_again_where_that_is_swallowed(
    make_engine, engine, drive, rows
):
    """G3: a statement after the refusal finds no connection to be durable on."""
    autocommit = make_engine(engine.dialect.driver.replace("aio", ""), isolation_level="AUTOCOMMIT")
    db = Database(autocommit)

    async def app(scope, receive, send):
        for _ in range(2):
            with suppress(ConfigurationError, sa.exc.PendingRollbackError):
                await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    await autocommit.dispose()

    assert 500 == exchange.status
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_error_on_the_drivers_own_connection_is_found_at_commit(db, drive, rows):
    """G21: nobody hears of it, so who was handed the connection is asked before COMMIT."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        raw = await (await db.session.connection()).get_raw_connection()
        with pytest.raises(Exception, match="nonsense"):
            await raw.driver_connection.execute("nonsense")
        await send(start(201))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert [] == exchange.messages
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_error_that_a_listener_to_the_commit_swallows_is_found(engine, drive, rows):
    """G21: it comes after the scope has looked, and is found all the same."""

    class Audited(Session):
        pass

    db = Database(async_sessionmaker(engine, sync_session_class=Audited))

    async def app(scope, receive, send):
        session = db.session
        session.add(Item(id=1))

        @sa.event.listens_for(session.sync_session, "before_commit")
        def audit(session):
            with pytest.raises(sa.exc.DBAPIError):
                session.execute(sa.text("nonsense"))

        await send(start(201))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert [] == await rows()


async def test_first_change_made_by_a_listener_to_the_commit_is_committed(engine, drive, rows):
    """G1: a transaction that begins inside its own COMMIT is one like any other."""

    class Audited(Session):
        pass

    db = Database(async_sessionmaker(engine, sync_session_class=Audited))

    async def app(scope, receive, send):
        session = db.session

        @sa.event.listens_for(session.sync_session, "before_commit")
        def audit(session):
            session.add(Item(id=7))

        async with session.begin():
            pass
        await send(start(201))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (201, None) == (exchange.status, exchange.error)
    assert [7] == await rows()


async def test_session_class_that_commits_in_a_task_of_its_own_is_kept(engine, drive, rows):
    """G10, G11: the ending lets in the tasks that the user's own commit() starts."""

    class Shielding(AsyncSession):
        async def commit(self):
            await asyncio.shield(asyncio.create_task(super().commit()))

    db = Database(async_sessionmaker(engine, class_=Shielding), cleanup_timeout=2.0)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(201))
        await send(body())

    async with asyncio.timeout(10):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (201, None) == (exchange.status, exchange.error)
    assert [1] == await rows()


async def test_two_scopes_on_one_connection_end_in_turn(engine, drive):
    """G11: as in a test that keeps everything in a transaction of its own, to roll it back."""
    async with engine.connect() as connection:
        outer = await connection.begin()
        factory = async_sessionmaker(
            bind=connection, join_transaction_mode="create_savepoint", expire_on_commit=False
        )
        db = Database(factory)

        async def app(scope, receive, send):
            db.session.add(Item(id=1))
            await db.session.flush()
            async with db.session_scope() as session:
                session.add(Item(id=2))
            await send(start(201))
            await send(body())

        exchange = await drive(DBSessionMiddleware(app, database=db))
        seen = list(await connection.scalars(sa.select(Item.id).order_by(Item.id)))
        await outer.rollback()

    assert (201, None) == (exchange.status, exchange.error)
    assert [1, 2] == seen


async def test_changed_attributes_that_are_flushed_and_closed_are_no_success(db, drive, rows):
    """G1: a change is a change, whichever verb made it."""
    async with db.session_scope() as session:
        session.add(Item(id=1, note="before"))

    async def app(scope, receive, send):
        async with db.session as session:
            item = (await session.execute(sa.select(Item))).scalar_one()
            item.note = "after"
            await session.flush()
        await send(start(200))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert "closed by hand" in str(exchange.error)
    assert [] == exchange.messages


async def test_rows_saved_in_bulk_and_closed_are_no_success(db, drive, rows):
    """G1: `bulk_save_objects()` writes past the unit of work, and closing by hand loses it."""

    async def app(scope, receive, send):
        await db.session.run_sync(lambda session: session.bulk_save_objects([Item(id=1)]))
        await db.session.close()
        await send(start(201))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [] == exchange.messages
    assert "closed by hand" in str(exchange.error)
    assert [] == await rows()


async def test_options_on_a_websocket_are_refused(db):
    """G17: they would have no session to apply to."""
    refused = []

    async def app(scope, receive, send):
        for call in (db.set_rollback_only, lambda: current_scope().configure(read_only=True)):
            try:
                call()
            except WebSocketSessionError as error:
                refused.append(str(error))

    await DBSessionMiddleware(app, database=db)({"type": "websocket", "path": "/"}, None, None)

    assert 2 == len(refused)
    assert "read_only=" in refused[1]


async def test_websocket_blocks_have_the_mode_of_the_middleware(db, rows):
    """G17: `mode=` of the middleware holds in each block; here each statement is durable."""

    async def app(scope, receive, send):
        async with db.session_scope() as session:
            await session.execute(sa.insert(Item).values(id=1))
            assert [1] == await rows()

    served = DBSessionMiddleware(app, database=db, mode="autocommit")
    await served({"type": "websocket", "path": "/"}, None, None)


async def test_engine_variants_are_watched_once(engine, drive):
    """G18: a session class that routes to a new variant each time costs no more each time."""

    class Routed(Session):
        def get_bind(self, *args, **kwargs):
            return super().get_bind(*args, **kwargs).execution_options(tenant=object())

    db = Database(async_sessionmaker(engine, sync_session_class=Routed))

    async def app(scope, receive, send):
        await db.session.execute(sa.select(sa.literal(1)))
        await send(start())
        await send(body())

    served = DBSessionMiddleware(app, database=db)
    await drive(served)
    listeners = len(engine.sync_engine.pool.dispatch.checkin)
    await drive(served)

    assert listeners == len(engine.sync_engine.pool.dispatch.checkin)


async def test_session_that_cannot_be_made_leaves_no_scope(engine):
    """G9: the error goes out, and the context is as it was."""

    class Broken(AsyncSession):
        def __init__(self, *args, **kwargs):
            raise RuntimeError("no session today")

    db = Database(async_sessionmaker(engine, class_=Broken))
    block = db.session_scope()

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no session today"):
            await block.__aenter__()
