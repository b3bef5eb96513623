"""What MariaDB rolls back by itself: never taken for committed, and told as what it is."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Outcome,
    Retry,
    current_scope,
    session_options,
)
from asgi_dbscope._driver_errors import find_conflict, mysql_error
from asgi_dbscope.errors import TransactionAbortedError
from tests.fix_asgi import respond
from tests.fix_database import Item
from tests.fix_mariadb import schema_on

ON_MARIADB = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)


def write(number: int) -> Any:
    """Write into a row."""
    return sa.update(Item).where(Item.id == number).values(note="written")


async def prepare(engine: AsyncEngine) -> None:
    """Put two rows there."""
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Item), [{"id": 1}, {"id": 2}])


async def lose_a_deadlock(session: Any, engine: AsyncEngine) -> sa.exc.OperationalError:
    """Wait for somebody who waits for us and has done more; return what we got for it."""
    async with engine.connect() as other:
        await other.execute(sa.insert(Item), [{"id": number} for number in range(100, 120)])
        await other.execute(write(2))
        await session.execute(write(1))
        waiting = asyncio.create_task(other.execute(write(1)))
        with pytest.raises(sa.exc.OperationalError) as caught:
            await session.execute(write(2))
        await waiting
        await other.rollback()
    return caught.value


async def time_out(session: Any, engine: AsyncEngine) -> sa.exc.OperationalError:
    """Wait for a lock that is not given."""
    async with engine.connect() as other:
        await other.execute(write(1))
        await session.execute(sa.text("SET SESSION innodb_lock_wait_timeout = 0"))
        with pytest.raises(sa.exc.OperationalError) as caught:
            await session.execute(write(1))
        await other.rollback()
    return caught.value


@ON_MARIADB
async def test_success_after_a_swallowed_deadlock_becomes_an_error(db, drive, engine, rows):
    """G21: InnoDB has rolled back all; what follows is another transaction, and isn't committed."""
    await prepare(engine)
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=3))
        await db.session.flush()
        await lose_a_deadlock(db.session, engine)
        db.session.add(Item(id=4))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert 1213 == mysql_error(exchange.error.__cause__)
    assert "begin_nested" not in str(exchange.error)
    assert [] == exchange.messages
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert [1, 2] == await rows()


@ON_MARIADB
async def test_savepoint_heals_no_deadlock(db, drive, engine, rows):
    """G21: the savepoint went with its transaction, so rolling back to it makes nothing good."""
    await prepare(engine)

    async def app(scope, receive, send):
        db.session.add(Item(id=3))
        await db.session.flush()
        try:
            async with db.transactional("NESTED"):
                raise await lose_a_deadlock(db.session, engine)
        except sa.exc.OperationalError:
            db.session.add(Item(id=4))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is not None
    assert [] == exchange.messages
    assert [1, 2] == await rows()


@ON_MARIADB
async def test_after_a_deadlock_one_may_roll_back_and_begin_again(db, drive, engine, rows):
    """G21: `session.rollback()` makes room for a transaction that commits."""
    await prepare(engine)

    async def app(scope, receive, send):
        db.session.add(Item(id=3))
        await db.session.flush()
        await lose_a_deadlock(db.session, engine)
        await db.session.rollback()
        db.session.add(Item(id=4))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1, 2, 4] == await rows()


@ON_MARIADB
async def test_wait_that_timed_out_undoes_its_statement_only(db, drive, engine, rows):
    """G21: after a swallowed lock wait timeout the server is asked, and the rest is committed."""
    await prepare(engine)

    async def app(scope, receive, send):
        db.session.add(Item(id=3))
        await db.session.flush()
        await time_out(db.session, engine)
        db.session.add(Item(id=4))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 201 == exchange.status
    assert [1, 2, 3, 4] == await rows()


@ON_MARIADB
async def test_deadlock_after_a_wait_that_timed_out_is_not_overlooked(db, drive, engine, rows):
    """G21: of two swallowed errors the one that has undone everything counts."""
    await prepare(engine)

    async def app(scope, receive, send):
        db.session.add(Item(id=3))
        await db.session.flush()
        await time_out(db.session, engine)
        await db.session.execute(sa.text("SET SESSION innodb_lock_wait_timeout = 50"))
        await lose_a_deadlock(db.session, engine)
        await time_out(db.session, engine)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert [1, 2] == await rows()


async def test_wait_that_timed_out_undoes_all_where_the_server_says_so(
    strict_mariadb_server, drive
):
    """G21: with `innodb_rollback_on_timeout` a swallowed lock wait timeout is as bad."""
    with schema_on(strict_mariadb_server) as observer:
        engine = create_async_engine(observer.url.set(drivername="mysql+asyncmy"))
        db = Database(engine)
        await prepare(engine)

        async def app(scope, receive, send):
            db.session.add(Item(id=3))
            await db.session.flush()
            await time_out(db.session, engine)
            db.session.add(Item(id=4))
            await respond(send, 201)

        exchange = await drive(DBSessionMiddleware(app, database=db))
        await engine.dispose()
        with observer.connect() as connection:
            rows = list(connection.scalars(sa.select(Item.id)))

    assert isinstance(exchange.error, TransactionAbortedError)
    assert 1205 == mysql_error(exchange.error.__cause__)
    assert [1, 2] == rows


@ON_MARIADB
async def test_error_of_one_statement_leaves_the_rest(db, drive, rows):
    """G21: a duplicate key undoes its statement; what the code does besides is committed."""

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item).values(id=1))
        with pytest.raises(sa.exc.IntegrityError):
            await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 201 == exchange.status
    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# Done again
# --------------------------------------------------------------------------------------


@ON_MARIADB
async def test_request_that_lost_a_deadlock_is_run_again(db, drive, engine, rows):
    """G16: the loser's second attempt commits, and nothing of its first is there."""
    await prepare(engine)
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=10 + current_scope().attempt))
        await db.session.flush()
        if current_scope().attempt == 1:
            raise await lose_a_deadlock(db.session, engine)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(base=0)))

    assert 201 == exchange.status
    assert [1, 2] == attempts
    assert [1, 2, 12] == await rows()


@ON_MARIADB
async def test_swallowed_deadlock_is_found_at_the_head_and_run_again(db, drive, engine, rows):
    """G16, G21: a success that would have been half of it is done again as a whole."""
    await prepare(engine)

    async def app(scope, receive, send):
        attempt = current_scope().attempt
        db.session.add(Item(id=10 + attempt))
        await db.session.flush()
        if attempt == 1:
            await lose_a_deadlock(db.session, engine)
        db.session.add(Item(id=20 + attempt))
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(base=0)))

    assert 201 == exchange.status
    assert [1, 2, 12, 22] == await rows()


@ON_MARIADB
@pytest.mark.parametrize(("lose", "number"), [(lose_a_deadlock, 1213), (time_out, 1205)])
async def test_conflict_is_told_by_its_number(db, engine, lose, number):
    """G16: a deadlock and a lock that doesn't come in time are conflicts, a duplicate key isn't."""
    await prepare(engine)
    async with db.session_scope() as session:
        error = await lose(session, engine)
        assert number == mysql_error(error.orig)
        assert find_conflict(error) in {str(number), "40001"}  # newer drivers tell the SQLSTATE
        await session.rollback()
        with pytest.raises(sa.exc.IntegrityError) as caught:
            await session.execute(sa.insert(Item).values(id=1))
        assert None is find_conflict(caught.value)


@ON_MARIADB
@pytest.mark.once
async def test_counter_of_many_clients_is_the_number_of_its_successes(engine, drive):
    """G16: forty requests, eight at a time, read and write one row; none is lost, none twice."""
    db = Database(engine)
    async with db.session_scope() as session:
        session.add(Item(id=1, note="0"))
    limit = asyncio.Semaphore(8)

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        item = await db.session.get_one(Item, 1)
        item.note = str(int(item.note or 0) + 1)
        await respond(send, 201)

    async def request():
        async with limit:
            retry = Retry(attempts=50, base=0.002, cap=0.02)
            return await drive(DBSessionMiddleware(app, database=db, retry=retry))

    exchanges = await asyncio.gather(*(request() for _ in range(40)))
    async with db.session_scope() as session:
        counted = (await session.get_one(Item, 1)).note

    assert {201, 503} >= {each.status for each in exchanges}
    assert str(sum(each.status == 201 for each in exchanges)) == counted
