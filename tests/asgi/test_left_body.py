"""A client that leaves in mid-stream: what the body does until it hears of that."""

import asyncio

import pytest
import sqlalchemy as sa

from asgi_dbscope import ConcurrentSessionUseError, DBSessionMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import POSTGRES_DRIVERS, Item

pytestmark = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)

DISCONNECT = {"type": "http.disconnect"}


async def begin_body(db, send):
    """A head, and a piece of a body that has written the first item."""
    await send(start(200))
    db.session.add(Item(id=1))
    await db.session.flush()
    await send(body(b"chunk", more=True))


async def test_body_that_goes_on_while_it_is_rolled_back_is_rolled_back_too(db, drive, rows):
    """G7: what a body adds before the disconnect is told is the body's, and no background work."""
    rolling_back = asyncio.Event()
    streaming = asyncio.Event()
    sync_engine = db.session_factory.kw["bind"].sync_engine

    async def app(scope, receive, send):
        async def stream():
            await begin_body(db, send)
            streaming.set()
            await rolling_back.wait()
            db.session.add(Item(id=2))
            await db.session.flush()
            await send(body(b"chunk", more=True))

        streamer = asyncio.create_task(stream())
        await streaming.wait()
        sa.event.listen(sync_engine, "reset", lambda *_: rolling_back.set())
        assert DISCONNECT == await receive()
        streamer.cancel()
        await asyncio.wait([streamer])
        db.session.add(Item(id=3))

    exchange = await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert exchange.error is None
    assert [3] == await rows()


@pytest.fixture
def serve(db, drive):
    """Serve a body that does one more thing when its client has left, and what comes *after* it."""

    async def serve(go_on, after):
        async def app(scope, receive, send):
            streaming = asyncio.Event()
            has_left = asyncio.Event()

            async def stream():
                await begin_body(db, send)
                streaming.set()
                await has_left.wait()
                await go_on()
                await send(body(b"chunk", more=True))

            streamer = asyncio.create_task(stream())
            await streaming.wait()
            assert DISCONNECT == await receive()
            has_left.set()
            await streamer
            await after()

        return await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    return serve


@pytest.mark.parametrize("after", ["nothing", "adds", "executes", "releases"])
@pytest.mark.parametrize("late", ["adds", "executes", "flushes"])
async def test_body_that_goes_on_after_its_client_has_left_is_rolled_back_too(
    db, serve, rows, late, after
):
    """G7, G8: what it does until it is cancelled is the body's; what comes after is kept."""

    async def work(how, number):
        if how == "executes":
            await db.session.execute(sa.insert(Item).values(id=number))
        elif how == "releases":
            await db.release()
        elif how != "nothing":
            db.session.add(Item(id=number))
        if how == "flushes":
            await db.session.flush()

    exchange = await serve(lambda: work(late, 2), lambda: work(after, 3))

    assert exchange.error is None
    assert ([3] if after in {"adds", "executes"} else []) == await rows()


async def test_body_can_add_nothing_to_what_comes_after_it(db, drive, rows):
    """G7, G8, G13: a body that isn't cancelled is told, and what comes after it is kept whole."""

    async def app(scope, receive, send):
        streaming = asyncio.Event()
        has_begun = asyncio.Event()

        async def stream():
            await begin_body(db, send)
            streaming.set()
            await has_begun.wait()
            with pytest.raises(ConcurrentSessionUseError, match="client of this body has left"):
                db.session.add(Item(id=2))

        streamer = asyncio.create_task(stream())
        await streaming.wait()
        assert DISCONNECT == await receive()
        await db.session.execute(sa.insert(Item).values(id=3))
        has_begun.set()
        await streamer

    exchange = await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert exchange.error is None
    assert [3] == await rows()


async def test_cancelled_while_a_body_is_rolled_back_it_is_cancelled(db, drive, rows):
    """G7, G10: a cancellation that comes while `receive()` rolls back a body is not lost."""
    rolling_back = asyncio.Event()
    sync_engine = db.session_factory.kw["bind"].sync_engine

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        await db.session.flush()
        sa.event.listen(sync_engine, "rollback", lambda _: rolling_back.set())
        await receive()
        await asyncio.Event().wait()

    task = asyncio.create_task(drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT]))
    await rolling_back.wait()
    task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait([task])

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert [] == await rows()


@pytest.mark.parametrize("propagation", ["REQUIRED", "NESTED"])
async def test_other_half_of_a_bodys_block_is_rolled_back_too(db, drive, rows, propagation):
    """G7: A client that leaves inside a body's block leaves neither half of it."""

    async def app(scope, receive, send):
        await send(start(200))
        await send(body(b"chunk", more=True))
        async with db.transactional(propagation) as session:
            session.add(Item(id=1))
            await session.flush()
            assert DISCONNECT == await receive()
            session.add(Item(id=2))
            await session.flush()

    await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert [] == await rows()


async def test_other_half_of_a_body_in_a_block_of_autocommit_is_rolled_back_too(db, drive, rows):
    """G7: The same where the block has a transaction of its own."""

    async def app(scope, receive, send):
        await send(start(200))
        await send(body(b"chunk", more=True))
        async with db.transactional() as session:
            session.add(Item(id=1))
            await session.flush()
            assert DISCONNECT == await receive()
            session.add(Item(id=2))
            await session.flush()

    served = DBSessionMiddleware(app, database=db, mode="autocommit")
    await drive(served, received=[DISCONNECT])

    assert [] == await rows()
