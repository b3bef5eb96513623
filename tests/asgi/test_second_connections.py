"""A second connection while one is held: warned, refused at once, never waited for without end."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import Database, DBSessionMiddleware, PoolTooSmallError
from tests.fix_asgi import respond
from tests.fix_database import Item

AT_ONCE = 20.0
"""Seconds; the pool itself would wait for thirty."""


async def read(session):
    """Take a connection."""
    return await session.scalar(sa.select(1))


@pytest.fixture
async def make_db(engine, make_engine):
    """Make a database whose pool has so many connections; its schema is there."""
    made = []

    def make(size, **options: Any):
        made.append(
            make_engine(
                "sqlite" if engine.dialect.name == "sqlite" else engine.dialect.driver,
                **{"pool_size": size, "max_overflow": 0, "pool_timeout": 30, **options},
            )
        )
        return Database(made[-1])

    yield make
    for each in made:
        assert 0 == each.pool.checkedout()
        await each.dispose()


SECOND = {
    "REQUIRES_NEW": lambda db: db.transactional("REQUIRES_NEW"),
    "NOT_SUPPORTED": lambda db: db.transactional("NOT_SUPPORTED"),
    "session_scope()": lambda db: db.session_scope(),
    "branch()": lambda db: db.branch(),
}


@pytest.mark.parametrize("kind", SECOND)
async def test_second_connection_of_a_pool_of_one_is_refused_at_once(make_db, rows, kind):
    """G14: With pool_size=1 a second connection is an error at once that says why."""
    db = make_db(1)

    async with asyncio.timeout(AT_ONCE), db.session_scope() as session:
        await read(session)
        with pytest.raises(PoolTooSmallError) as caught:
            async with SECOND[kind](db) as other:
                await read(other)
        session.add(Item(id=1))

    told = str(caught.value)
    assert "needs a second connection while <SessionScope ACTIVE session_scope()> holds one" in told
    assert "The pool has 1 (pool_size + max_overflow)" in told
    assert "2 * n for none to wait" in told
    assert [1] == await rows()


async def test_second_connection_is_none_where_the_outer_one_holds_none(make_db, rows):
    """G14: Before its first statement the outer scope holds nothing: one connection is enough."""
    db = make_db(1)

    async with asyncio.timeout(AT_ONCE), db.session_scope() as session:
        async with db.transactional("REQUIRES_NEW") as other:
            other.add(Item(id=1))
        await read(session)
        await db.release()
        async with db.transactional("REQUIRES_NEW") as other:
            other.add(Item(id=2))

    assert [1, 2] == await rows()


async def test_two_requests_that_each_want_a_second_connection_of_two_fail_at_once(make_db, drive):
    """G14: Where nobody could go on the last one in gets an error, and the other goes on."""
    db = make_db(2)
    both_hold = asyncio.Barrier(2)

    async def app(scope, receive, send):
        await read(db.session)
        await both_hold.wait()
        async with db.transactional("REQUIRES_NEW") as other:
            await read(other)
        await respond(send)

    served = DBSessionMiddleware(app, database=db)
    async with asyncio.timeout(AT_ONCE):
        exchanges = await asyncio.gather(drive(served), drive(served))

    errors = [each.error for each in exchanges if each.error is not None]
    assert [PoolTooSmallError] == [type(each) for each in errors]
    assert "held by blocks that wait like this; at 2 nobody could go on" in str(errors[0])
    assert 1 == len([each for each in exchanges if each.status == 200])


async def test_many_requests_that_hold_one_and_want_another_never_hang(make_db, drive):
    """G14: 20 such requests on a pool of 5 end soon, well or with the error; none is lost."""
    db = make_db(5)

    async def app(scope, receive, send):
        await read(db.session)
        await db.gather(*(read_in_branch() for _ in range(3)))
        async with db.transactional("REQUIRES_NEW") as other:
            await read(other)
        await respond(send)

    async def read_in_branch():
        await read(db.session)

    served = DBSessionMiddleware(app, database=db)
    async with asyncio.timeout(20):
        exchanges = await asyncio.gather(*(drive(served) for _ in range(20)))

    assert {None, PoolTooSmallError} >= {
        None if each.error is None else type(each.error) for each in exchanges
    }
    assert [200] == [(await drive(served)).status]


async def test_three_levels_count_the_connections_of_all(make_db):
    """G14: A block in a block in a block needs three; on a pool of two the third is refused."""
    db = make_db(2)

    async with asyncio.timeout(AT_ONCE), db.session_scope() as session:
        await read(session)
        async with db.transactional("REQUIRES_NEW") as second:
            await read(second)
            with pytest.raises(PoolTooSmallError, match="and 2 of them are held"):
                async with db.transactional("REQUIRES_NEW") as third:
                    await read(third)


async def test_tight_pool_is_warned_of_once_with_the_arithmetic(make_db, caplog):
    """A pool that holds it now, but not twice at once, is warned of at the first use."""
    db = make_db(2)

    for _ in range(2):
        async with db.session_scope() as session:
            await read(session)
            async with db.transactional("REQUIRES_NEW") as other:
                await read(other)

    [record] = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "needs n + 1 connections for the first of them to go on" in record.message
    assert "propagation='NESTED', which needs no second connection" in record.message


async def test_large_pool_and_a_pool_without_a_limit_are_not_warned_of(make_db, caplog):
    """Where there is room, nothing is said."""
    for db in (make_db(10), make_db(5, max_overflow=-1)):
        async with db.session_scope() as session:
            await read(session)
            async with db.transactional("REQUIRES_NEW") as other:
                await read(other)

    assert [] == [each for each in caplog.records if each.levelname == "WARNING"]


async def test_pool_s_own_timeout_says_that_a_second_connection_was_wanted(make_db):
    """G14: Where others hold the rest of the pool, its timeout error has the arithmetic noted."""
    db = make_db(2, pool_timeout=0.05)
    engine = db.session_factory.kw["bind"]

    async with engine.connect(), db.session_scope() as session:
        await read(session)
        with pytest.raises(sa.exc.TimeoutError) as caught:
            async with db.transactional("REQUIRES_NEW") as other:
                await read(other)

    assert "needs a second connection while" in "\n".join(caught.value.__notes__)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_static_pool_is_refused_where_it_would_share_the_connection(engine):
    """G12: One connection for all would run the second transaction inside the first: refused."""
    other = create_async_engine("sqlite+aiosqlite://", poolclass=sa.StaticPool)
    db = Database(other)

    async with db.session_scope() as session:
        await read(session)
        with pytest.raises(PoolTooSmallError, match="a StaticPool would give it the one that is"):
            async with db.transactional("REQUIRES_NEW") as second:
                await read(second)
        async with db.transactional("NESTED"):
            await read(session)
    await other.dispose()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_null_pool_has_no_limit(engine, make_engine):
    """A NullPool opens a connection for whoever asks."""
    other = create_async_engine(engine.url, poolclass=sa.NullPool)
    db = Database(other)

    async with db.session_scope() as session:
        await read(session)
        async with db.transactional("REQUIRES_NEW") as second:
            assert 1 == await read(second)
