"""`checkout_timeout`: the wait for a connection is bounded, and its error says who holds them."""

import asyncio
import random
import re

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DatabaseUnreachableError,
    DBSessionMiddleware,
    PoolExhaustedError,
)
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import POSTGRES_DRIVERS, Item

ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
SMALL = {"pool_size": 1, "max_overflow": 0}


@pytest.fixture(params=["sqlite", *POSTGRES_DRIVERS])
async def small(request, make_engine):
    """An engine whose pool has one connection."""
    engine = make_engine(request.param, file="small.db", **SMALL)
    async with engine.connect():
        pass  # a connection is made by now, which takes longer than these waits
    yield engine
    leaked = engine.pool.checkedout()
    await engine.dispose()
    assert 0 == leaked


def holding(db, is_held, may_go):
    """An app whose `/hold` holds a connection until it may go; other paths ask for one."""

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SELECT 1"))
        if scope["path"] == "/hold":
            is_held.set()
            await may_go.wait()
        await send(start(200))
        await send(body(b"ok"))

    return app


async def test_exhausted_pool_is_a_quick_503_that_names_the_holders(small, drive, caplog):
    """G14: the error comes in time, with the pool's figures, who holds it, and for how long."""
    db = Database(small, checkout_timeout=0.05)
    is_held, may_go = asyncio.Event(), asyncio.Event()
    app = DBSessionMiddleware(holding(db, is_held, may_go), database=db)
    holder = asyncio.create_task(drive(app, http_scope("/hold")))
    await is_held.wait()

    refused = await drive(app, http_scope("/ask"))
    may_go.set()
    held = await holder
    served = await drive(app, http_scope("/ask"))

    assert [503, 200, 200] == [each.status for each in (refused, held, served)]
    [message] = [each for each in caplog.messages if "answered 503" in each]
    assert re.fullmatch(
        r"GET /ask: answered 503: No connection to the database 'default' came free within 0\.05 "
        r"seconds \(checkout_timeout\)\. No transaction was begun\. \(asgi_dbscope: The pool "
        r"has at most 1 \(pool_size=1\), and 1 are taken: GET /hold for \d\.\d s\.\)",
        message,
    )


async def test_error_is_raised_where_the_session_asks(small):
    """G14: code may catch it, and notes say whose connection did not come."""
    db = Database(small, name="shop", checkout_timeout=0.01)
    async with small.connect():
        with pytest.raises(PoolExhaustedError, match="'shop' came free") as raised:
            async with db.session_scope() as session:
                await session.execute(sa.text("SELECT 1"))

    assert isinstance(raised.value, TimeoutError)
    assert "taken" not in str(raised.value)  # other requests are named in a note, not to clients
    assert any("got no connection to the database 'shop'" in each for each in notes(raised.value))


def notes(error):
    """Its notes."""
    return getattr(error, "__notes__", [])


async def test_flush_that_commit_brings_is_bounded_too(small, drive):
    """G2, G14: where only the COMMIT needs a connection, its head becomes the 503."""
    db = Database(small, checkout_timeout=0.05)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(201))
        await send(body())

    async with small.connect():
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 503 == exchange.status


async def test_pool_that_isnt_exhausted_is_not_described(make_engine):
    """G14: of several engines, the figures of one say nothing of the other's timeout."""
    one = create_async_engine("sqlite+aiosqlite://", poolclass=sa.NullPool)
    other = make_engine("sqlite", file="other.db", **SMALL, pool_timeout=0.05)
    db = Database(async_sessionmaker(one, binds={Item: other}))
    async with other.connect():
        with pytest.raises(sa.exc.TimeoutError) as raised:
            async with db.session_scope() as session:
                await session.execute(sa.select(Item))
    await other.dispose()

    assert any("no transaction was begun" in each for each in notes(raised.value))
    assert not any("The pool has" in each for each in notes(raised.value))


async def test_holders_outside_of_any_scope_are_counted(small):
    """G14: connections that nobody told us of are part of the message."""
    db = Database(small, checkout_timeout=0.01)
    async with small.connect():
        with pytest.raises(PoolExhaustedError, match="1 in no transaction of a session scope"):
            async with db.session_scope() as session:
                await session.execute(sa.text("SELECT 1"))


async def test_long_list_of_holders_is_cut(make_engine):
    """G14: ten holders are named, the rest is a number."""
    engine = make_engine("sqlite", pool_size=12, max_overflow=0)
    for each in [await engine.connect() for _ in range(12)]:
        await each.close()  # it is made by now, which takes longer than this wait
    db = Database(engine, checkout_timeout=0.2)
    may_go, held = asyncio.Event(), asyncio.Semaphore(0)

    async def hold():
        async with db.session_scope() as session:
            await session.execute(sa.text("SELECT 1"))
            held.release()
            await may_go.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(hold())
        for _ in range(12):
            await held.acquire()
        with pytest.raises(PoolExhaustedError, match="; 2 more transactions"):
            async with db.session_scope() as session:
                await session.execute(sa.text("SELECT 1"))
        may_go.set()
    await engine.dispose()


async def test_pools_own_timeout_is_treated_the_same(make_engine, drive, caplog):
    """G14: without `checkout_timeout` SQLAlchemy's error has the figures in a note; 503."""
    engine = make_engine("sqlite", **SMALL, pool_timeout=0.05)
    db = Database(engine)
    seen = []

    async def app(scope, receive, send):
        try:
            await db.session.execute(sa.text("SELECT 1"))
        except sa.exc.TimeoutError as error:
            seen.append(error)
            raise

    async with engine.connect():
        exchange = await drive(DBSessionMiddleware(app, database=db))
    await engine.dispose()

    assert 503 == exchange.status
    assert any("The pool has at most 1" in each for each in notes(seen[0]))


async def test_nobody_elses_engine_is_changed(make_engine):
    """G14: who uses the engine by itself waits as long as the engine says."""
    engine = make_engine("sqlite", **SMALL, pool_timeout=0.2)
    db = Database(engine, checkout_timeout=0.1)
    async with engine.connect():
        with pytest.raises(PoolExhaustedError):
            async with db.session_scope() as session:
                await session.execute(sa.text("SELECT 1"))
        with pytest.raises(sa.exc.TimeoutError, match=r"timeout 0\.20"):
            await engine.connect()
    await engine.dispose()


@pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)
async def test_other_shapes_of_a_transaction_are_kept(engine, drive, rows):
    """G14, G20: isolation level, read-only and autocommit go with a bounded wait."""
    db = Database(engine, checkout_timeout=5)
    async with db.session_scope(isolation_level="SERIALIZABLE", read_only=True) as session:
        assert 1 == await session.scalar(sa.text("SELECT 1"))
        with pytest.raises(sa.exc.DBAPIError):
            await session.execute(sa.insert(Item).values(id=1))
        await session.rollback()
    async with db.session_scope(mode="autocommit") as session:
        await session.execute(sa.insert(Item).values(id=2))
        await session.rollback()
        async with session.begin():
            await session.execute(sa.insert(Item).values(id=3))

    assert [2, 3] == await rows()


@pytest.mark.parametrize("driver", POSTGRES_DRIVERS)
async def test_host_that_does_not_answer_is_given_up(driver, drive, caplog):
    """G14: a connection attempt into silence ends in time, and its place is free again."""
    has_come, may_go = asyncio.Event(), asyncio.Event()

    async def be_silent(reader, writer):
        has_come.set()
        await may_go.wait()
        writer.close()

    server = await asyncio.start_server(be_silent, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    url = f"postgresql+{driver}://nobody@127.0.0.1:{port}/nothing"
    engine = create_async_engine(url, pool_size=1, max_overflow=0)
    db = Database(engine, checkout_timeout=0.1)

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SELECT 1"))

    exchanges = [await drive(DBSessionMiddleware(app, database=db)) for _ in range(2)]
    may_go.set()
    server.close()
    await server.wait_closed()
    await engine.dispose()

    assert has_come.is_set()
    assert [503, 503] == [each.status for each in exchanges]
    assert 2 == sum("it didn't answer" in each for each in caplog.messages)
    assert 0 == engine.pool.checkedout()  # type: ignore[attr-defined]
    assert issubclass(DatabaseUnreachableError, TimeoutError)


async def test_timeout_of_the_drivers_own_stays_one(drive):
    """G14: a driver that gives up earlier says so in its own words."""
    may_go = asyncio.Event()

    async def be_silent(reader, writer):
        await may_go.wait()
        writer.close()

    server = await asyncio.start_server(be_silent, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    url = f"postgresql+asyncpg://nobody@127.0.0.1:{port}/nothing"
    engine = create_async_engine(url, connect_args={"timeout": 0.1})
    db = Database(engine, checkout_timeout=30)

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SELECT 1"))

    exchange = await drive(DBSessionMiddleware(app, database=db))
    may_go.set()
    server.close()
    await server.wait_closed()
    await engine.dispose()

    assert isinstance(exchange.error, TimeoutError)
    assert not isinstance(exchange.error, DatabaseUnreachableError)


@ON_POSTGRES
@pytest.mark.once
async def test_no_place_is_lost_however_many_give_up(engine, make_engine):
    """G10, G14: after hundreds of waits that ran out at any moment the pool is whole."""
    small = make_engine(engine.driver, pool_size=2, max_overflow=1, pool_pre_ping=True)
    async with small.connect():
        pass  # a connection is there: somebody gets one in time
    db = Database(small, checkout_timeout=0.3)
    dice = random.Random(14)
    got, refused = 0, 0

    async def work():
        nonlocal got, refused
        seconds = dice.random() / 10
        try:
            async with asyncio.timeout(dice.choice([0.03, 0.15, 5])):
                async with db.session_scope() as session:
                    await session.execute(sa.text("SELECT pg_sleep(:s)"), {"s": seconds})
            got += 1
        except (PoolExhaustedError, DatabaseUnreachableError, TimeoutError):
            refused += 1

    for _ in range(6):
        await asyncio.gather(*(work() for _ in range(20)))
    assert 120 == got + refused
    assert got
    assert refused
    assert 0 == small.pool.checkedout()
    connections = [await small.connect() for _ in range(3)]
    for each in connections:
        await each.close()
    await small.dispose()


@pytest.mark.parametrize("value", [0, -1, "1", True, float("inf")])
def test_seconds_are_checked(value):
    """A wait is a number of seconds above 0."""
    with pytest.raises(ConfigurationError, match="checkout_timeout must be a number of seconds"):
        Database("sqlite+aiosqlite://", checkout_timeout=value)


async def test_session_of_a_connection_needs_no_place(engine, rows):
    """A session that is bound to a connection has one already."""
    async with engine.connect() as connection:
        db = Database(async_sessionmaker(bind=connection), checkout_timeout=1)
        async with db.session_scope() as session:
            session.add(Item(id=1))

    assert [1] == await rows()
