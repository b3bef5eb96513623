"""What a connection is like when it goes back to the pool, whoever had it: in no transaction."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker
from sqlalchemy.util import greenlet_spawn

from asgi_dbscope import Database
from asgi_dbscope._dialects import is_in_transaction
from tests.fix_database import Child, Item

DANGLING = sa.insert(Child).values(id=1, item_id=5)
INSERT = sa.insert(Item).values(id=1)
NAMES = {"aiosqlite": "sqlite"}


async def driver_connection(connection: AsyncConnection) -> Any:
    """The driver's own connection, below the pool."""
    return (await connection.get_raw_connection()).driver_connection


@pytest.fixture
async def trusting_engine(
    engine: AsyncEngine, make_engine: Callable[..., AsyncEngine]
) -> AsyncIterator[AsyncEngine]:
    """A second engine on the schema of `engine`, whose one connection the pool doesn't reset."""
    driver = NAMES.get(engine.driver, engine.driver)
    trusting = make_engine(driver, pool_size=1, max_overflow=0, pool_reset_on_return=None)
    async with Database(trusting).session_scope() as session:
        await session.execute(sa.select(Item.id))
    yield trusting
    assert 0 == trusting.pool.checkedout()  # type: ignore[attr-defined]
    await trusting.dispose()


async def check_out_in_transaction(engine: AsyncEngine) -> Any:
    """Take a connection from the pool, past SQLAlchemy's transactions, and write on it."""
    raw = await engine.raw_connection()

    def write() -> None:
        cursor = raw.cursor()
        cursor.execute("INSERT INTO item (id) VALUES (1)")
        cursor.close()

    await greenlet_spawn(write)
    assert is_in_transaction(raw.dbapi_connection)
    return raw


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_connection_that_the_pool_does_not_reset_is_rolled_back(trusting_engine, rows):
    """G19: With `pool_reset_on_return=None` an open transaction is still rolled back at checkin."""
    raw = await check_out_in_transaction(trusting_engine)
    driver = raw.driver_connection

    await greenlet_spawn(raw.close)

    async with trusting_engine.connect() as connection:
        assert driver is await driver_connection(connection)
        assert not is_in_transaction(driver)
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["psycopg"], indirect=True)
async def test_connection_whose_rollback_fails_is_thrown_away(engine, trusting_engine, rows):
    """G19: A connection that can't be rolled back at checkin is not handed to the next user."""
    raw = await check_out_in_transaction(trusting_engine)
    driver = raw.driver_connection
    async with engine.connect() as killer:
        await killer.execute(sa.select(sa.func.pg_terminate_backend(driver.info.backend_pid, 5000)))

    await greenlet_spawn(raw.close)

    async with trusting_engine.connect() as connection:
        assert driver is not await driver_connection(connection)
        assert 1 == await connection.scalar(sa.select(1))
    assert driver.closed
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_transaction_that_sqlalchemy_does_not_know_costs_the_connection(trusting_engine):
    """G19: A BEGIN past SQLAlchemy, which its rollback doesn't end, costs the connection."""
    async with trusting_engine.connect() as connection:
        driver = await driver_connection(connection)
        await driver.execute("BEGIN")

    async with trusting_engine.connect() as connection:
        assert driver is not await driver_connection(connection)
    assert driver.is_closed()


async def test_failed_commit_past_the_scope_leaves_no_transaction_behind(engine, db, rows):
    """G19: A connection whose COMMIT failed and that was just closed goes back rolled back."""
    async with db.session_scope() as session:
        await session.execute(sa.select(Item.id))
    connection = await engine.connect()
    driver = await driver_connection(connection)
    await connection.execute(DANGLING)
    with pytest.raises(sa.exc.IntegrityError):
        await connection.commit()
    await connection.close()

    async with engine.connect() as after:
        assert driver is await driver_connection(after)
        assert not is_in_transaction(driver)
        assert [] == list(await after.scalars(sa.select(Child.id)))


async def test_commit_by_the_owner_of_the_connection_is_no_business_of_an_ended_scope(engine, rows):
    """G12: Who lent a scope its connection may commit on it after the scope, as before."""
    async with engine.connect() as connection:
        database = Database(async_sessionmaker(connection))
        async with database.session_scope() as session:
            assert connection.sync_connection is (await session.connection()).sync_connection
            await session.execute(INSERT)

        await connection.execute(sa.insert(Item).values(id=2))
        await connection.commit()

    assert [1, 2] == await rows()
