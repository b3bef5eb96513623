"""Settings of a transaction on MariaDB: they hold in each one, and no other user has them."""

import asyncio
import time
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker

from asgi_dbscope import ConfigurationError, Database, DBSessionMiddleware, session_options
from asgi_dbscope._driver_errors import mysql_error
from asgi_dbscope.errors import TransactionTimeoutError
from tests.fix_asgi import http_scope, respond
from tests.fix_database import Item

pytestmark = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)

READ = sa.select(Item.note).where(Item.id == 1)
WRITE = sa.update(Item).where(Item.id == 1).values(note="written")


@pytest.fixture
def single(make_engine):
    """An engine with one connection, so that its next user is sure to have the same."""
    return make_engine("asyncmy", pool_size=1, max_overflow=0)


async def refusal(session: Any) -> int | None:
    """The number of the server's error when it is asked to write."""
    try:
        await session.execute(WRITE)
    except sa.exc.OperationalError as error:
        return mysql_error(error.orig)
    return None


async def is_serializable(session, engine):
    """Whether what the session reads is locked against others."""
    await session.execute(READ)
    async with engine.connect() as other:
        await other.execute(sa.text("SET SESSION innodb_lock_wait_timeout = 0"))
        number = await refusal(other)
        await other.rollback()
        await other.execute(sa.text("SET SESSION innodb_lock_wait_timeout = DEFAULT"))
    assert number in {None, 1205}  # ER_LOCK_WAIT_TIMEOUT
    return number is not None


async def is_read_only(session):
    """Whether the server refuses to write."""
    number = await refusal(session)
    assert number in {None, 1792}  # ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION
    return number is not None


async def test_isolation_level_holds_in_each_transaction_and_no_longer(single, engine, drive):
    """G20: also after a commit in mid-request; the connection's next user has its own."""
    db = Database(single)
    seen = []

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        seen.append(await is_serializable(db.session, engine))
        await db.session.commit()
        seen.append(await is_serializable(db.session, engine))
        await db.release()
        seen.append(await is_serializable(db.session, engine))
        await respond(send)

    async def plain(scope, receive, send):
        seen.append(await is_serializable(db.session, engine))
        await respond(send)

    async with db.session_scope() as session:
        session.add(Item(id=1))
    exchanges = [await drive(DBSessionMiddleware(each, database=db)) for each in (app, plain)]
    await single.dispose()

    assert [200, 200] == [each.status for each in exchanges]
    assert [True, True, True, False] == seen


async def test_read_only_holds_in_each_transaction_and_no_longer(single, drive, rows):
    """G20: the server refuses each write, and lets the connection's next user write."""
    db = Database(single)
    seen = []

    @session_options(read_only=True, isolation_level="READ COMMITTED")
    async def app(scope, receive, send):
        seen.append(await is_read_only(db.session))
        await db.session.execute(READ)
        seen.append(await is_read_only(db.session))
        await db.session.commit()
        seen.append(await is_read_only(db.session))
        await respond(send)

    @session_options(read_only=True)
    async def idle(scope, receive, send):
        await db.session.connection()
        await respond(send)

    async def plain(scope, receive, send):
        seen.append(await is_read_only(db.session))
        await respond(send)

    async with db.session_scope() as session:
        session.add(Item(id=1))
    apps = (app, plain, idle, plain)
    exchanges = [await drive(DBSessionMiddleware(each, database=db)) for each in apps]
    await single.dispose()

    assert [200] * 4 == [each.status for each in exchanges]
    assert [True, True, True, False, False] == seen
    assert [1] == await rows()


async def test_block_has_its_own_settings(db, drive, engine, rows):
    """G20: `REQUIRES_NEW` and a joined block that comes first shape their transactions."""
    seen = []
    async with db.session_scope() as session:
        session.add(Item(id=1))

    async def app(scope, receive, send):
        async with db.transactional(read_only=True):
            seen.append(await is_read_only(db.session))
        async with db.transactional("REQUIRES_NEW", isolation_level="serializable") as session:
            seen.append(await is_serializable(session, engine))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [True, True] == seen


async def test_unknown_isolation_level_is_refused(db, drive):
    """G20: a level that the server doesn't have never reaches it."""

    @session_options(isolation_level="SNAPSHOT; DROP TABLE item")
    async def app(scope, receive, send):
        await db.session.execute(READ)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ConfigurationError)
    assert "is none of mysql's: SERIALIZABLE" in str(exchange.error)


async def test_transaction_that_is_open_already_is_not_reshaped(engine, db):
    """G20: where a listener has begun first, the server refuses; nothing is done without."""

    @sa.event.listens_for(engine.sync_engine, "begin")
    def read(connection):
        connection.exec_driver_sql("SELECT count(*) FROM item")

    with pytest.raises(sa.exc.OperationalError, match="while a transaction is in progress"):
        async with db.session_scope(read_only=True) as session:
            await session.execute(READ)


@pytest.mark.usefixtures("of_mariadb")
async def test_timeout_ends_the_statement_and_leaves_no_trace(single, rows):
    """G20: the transaction is rolled back in time, and the server's own limits are back."""
    db = Database(single)
    own = sa.text("SET SESSION max_statement_time = 77, SESSION idle_transaction_timeout = 99")
    limits = sa.text("SELECT @@SESSION.max_statement_time, @@SESSION.idle_transaction_timeout")

    began = time.monotonic()
    with pytest.raises(TransactionTimeoutError):
        async with db.transactional(timeout=0.2) as session:
            session.add(Item(id=1))
            await session.flush()
            await session.execute(sa.text("SELECT SLEEP(20)"))
    took = time.monotonic() - began
    async with single.connect() as connection:
        await connection.execute(own)
    async with db.transactional(timeout=30) as session:
        during = (await session.execute(limits)).one()
    async with single.connect() as connection:
        after = (await connection.execute(limits)).one()
    await single.dispose()

    assert took < 10
    assert 29 < during[0] <= 30
    assert 31 == during[1]  # for a process that is gone: a second more
    assert (77, 99) == after
    assert [] == await rows()


@pytest.mark.usefixtures("of_mariadb")
async def test_limits_are_the_users_own_after_several_timeouts(single, engine):
    """G20: on a connection of the user's, limited twice before it goes back to the pool."""
    limits = sa.text("SELECT @@SESSION.max_statement_time, @@SESSION.idle_transaction_timeout")
    async with single.connect() as connection:
        db = Database(async_sessionmaker(connection))
        for _ in range(2):
            async with db.transactional(timeout=30) as session:
                await session.execute(READ)
    async with single.connect() as connection:
        after = (await connection.execute(limits)).one()
    await single.dispose()

    assert (0, 0) == after


async def test_ddl_commits_what_was_before_it(db, drive, rows):
    """MariaDB's own: DDL ends the transaction around it, so nothing before it can be taken back."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text("CREATE TABLE IF NOT EXISTS other (id INTEGER)"))
        db.session.add(Item(id=2))
        await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 500 == exchange.status
    assert [1] == await rows()


@pytest.mark.usefixtures("of_mariadb")
async def test_server_that_the_url_calls_mariadb_is_the_same(mariadb_schema, engine, rows):
    """G20, G21: `mariadb+asyncmy://` is another dialect of SQLAlchemy's, with the same promises."""
    async with Database(engine).session_scope() as session:
        session.add(Item(id=1))
    db: Database[Any] = Database(mariadb_schema.url.set(drivername="mariadb+asyncmy"))

    async with db.session_scope(read_only=True, isolation_level="SERIALIZABLE") as session:
        assert await is_serializable(session, engine)
        assert await is_read_only(session)
    with pytest.raises(TransactionTimeoutError):
        async with db.transactional(timeout=0.1) as session:
            await session.execute(sa.text("SELECT SLEEP(20)"))
    await db.dispose()

    assert [1] == await rows()


async def test_requests_with_and_without_settings_do_not_mix(db, drive, rows):
    """G12, G20: at the same time, each has the settings it asked for."""

    @session_options(read_only=True)
    async def reading(scope, receive, send):
        await respond(send, 200 if await is_read_only(db.session) else 500)

    async def writing(scope, receive, send):
        db.session.add(Item(id=int(scope["path"][1:])))
        await db.session.flush()
        await respond(send)

    async with db.session_scope() as session:
        session.add(Item(id=1))
    apps = [DBSessionMiddleware(each, database=db) for each in (reading, writing)]
    exchanges = await asyncio.gather(
        *(drive(apps[number % 2], http_scope(f"/{number}")) for number in range(10, 30))
    )

    assert [200] * 20 == [each.status for each in exchanges]
    assert [1, *range(11, 30, 2)] == await rows()


async def test_request_is_over_in_time(db, engine, drive, rows):
    """A request's `timeout` interrupts its statement, and its transaction where nobody uses it."""

    async def busy(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text("SELECT SLEEP(30)"))
        await respond(send)

    async def idle(scope, receive, send):
        db.session.add(Item(id=2))
        await db.session.flush()
        while engine.pool.checkedout():
            await asyncio.sleep(0.01)
        await respond(send)

    began = time.monotonic()
    wrapped = [DBSessionMiddleware(each, database=db, timeout=0.2) for each in (busy, idle)]
    exchanges = [await drive(each) for each in wrapped]

    assert [504, 504] == [each.status for each in exchanges]
    assert time.monotonic() - began < 10
    assert [] == await rows()
