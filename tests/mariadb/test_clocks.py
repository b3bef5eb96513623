"""Clocks and siblings on MariaDB, whose drivers let two readers take each other's answers."""

import asyncio

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware, TransactionTimeoutError
from tests.fix_asgi import respond
from tests.fix_database import Item
from tests.fix_mariadb import numbers
from tests.fix_siblings import end_beside_a_sibling

pytestmark = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)
SLOW = sa.text("SELECT SLEEP(30)")
ENOUGH = 20.0
"""Seconds in which everything here has to be over."""


async def test_connection_that_was_handed_out_is_thrown_away(engine, drive):
    """G10: what is under way on the driver's own connection is unseen, and ends all the same."""
    db = Database(engine, cleanup_timeout=2)

    async def app(scope, receive, send):
        connection = await db.session.connection()
        driver = (await connection.get_raw_connection()).driver_connection
        async with driver.cursor() as cursor:
            await cursor.execute("SELECT SLEEP(30)")

    async with asyncio.timeout(ENOUGH):
        exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.15))
        while engine.pool.checkedout():
            await asyncio.sleep(0.005)

    assert exchange.error is not None
    assert [] == exchange.messages


@pytest.mark.parametrize("way", ["session", "connection", "rows"])
async def test_statement_that_takes_too_long_is_interrupted(engine, drive, way):
    """G10: whoever waits for the server when the time is up is answered at once, with 504."""
    db = Database(engine, cleanup_timeout=2)

    async def app(scope, receive, send):
        source = db.session if way == "session" else await db.session.connection()
        if way != "rows":
            await source.execute(SLOW)
            return
        slow_rows = numbers(100, more=", SLEEP(0.05)")
        async for _ in await source.stream(slow_rows, execution_options={"yield_per": 1}):
            pass

    async with asyncio.timeout(ENOUGH):
        exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.15))

    assert 504 == exchange.status
    assert 0 == engine.pool.checkedout()


async def test_statement_that_runs_is_not_idle(engine, drive, rows):
    """Whoever is inside a statement of the connection is at work, however long it takes."""
    db = Database(engine, idle_timeout=0.05)

    async def app(scope, receive, send):
        connection = await db.session.connection()
        await connection.execute(sa.insert(Item).values(id=1))
        await connection.execute(sa.text("SELECT SLEEP(0.2)"))
        await respond(send)

    async with asyncio.timeout(ENOUGH):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()


@pytest.mark.parametrize("ending", ["commit", "raise"])
async def test_end_waits_for_a_siblings_statement(engine, drive, rows, ending):
    """G22: neither COMMIT nor ROLLBACK goes out beside a statement of the connection."""
    db = Database(engine, cleanup_timeout=2)

    async with asyncio.timeout(ENOUGH):
        exchange, told = await end_beside_a_sibling(db, drive, "SELECT SLEEP(0.2)", ending=ending)

    assert ["finished"] == told
    assert ((None, []) if ending == "raise" else (200, [1])) == (exchange.status, await rows())


async def test_time_that_is_up_in_a_block_of_the_users_own_ends_it(engine, drive):
    """The rollback of the clock waits for no block, and none for it."""
    db = Database(engine, cleanup_timeout=2)

    async def app(scope, receive, send):
        async with db.session.begin(), db.session.begin_nested():
            await db.session.execute(SLOW)

    async with asyncio.timeout(ENOUGH):
        exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.15))
        with pytest.raises(TransactionTimeoutError):
            async with db.session_scope(timeout=0.15) as session:
                await (await session.connection()).execute(SLOW)

    assert 504 == exchange.status
    assert 0 == engine.pool.checkedout()
