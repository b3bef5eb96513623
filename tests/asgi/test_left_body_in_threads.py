"""A client that leaves in mid-stream, while a thread of the body is under way."""

import asyncio
import threading

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import Item

DISCONNECT = {"type": "http.disconnect"}


@pytest.fixture
def add(sync_db):
    """Write an item, as the code of a thread does."""

    def add(number):
        sync_db.session.add(Item(id=number))
        sync_db.session.flush()

    return add


@pytest.fixture
def serve(sync_db, drive, add):
    """Serve a stream whose client leaves while its thread is on the way to its second item."""

    async def serve(*, after, has_streamer, moment="in body"):
        has_left = threading.Event()
        is_streaming = asyncio.Event()

        def go_on():
            has_left.wait()
            add(2)

        async def stream(send):
            if moment == "after head":
                await asyncio.to_thread(sync_db.session.get, Item, 0)
            await send(start(200))
            if moment == "in body":
                await asyncio.to_thread(add, 1)
            if moment != "after head":
                await send(body(b"chunk", more=True))
            is_streaming.set()
            await asyncio.to_thread(go_on)

        async def listen(receive):
            await is_streaming.wait()
            assert DISCONNECT == await receive()
            has_left.set()

        async def app(scope, receive, send):
            # Who streams and who listens is the framework's choice: Starlette's listener is its
            # request's own task, others do it the other way round.
            own, other = (listen(receive), stream(send))
            if not has_streamer:
                own, other = other, own
            task = asyncio.create_task(other)
            await own
            await task
            for number in after:
                await asyncio.to_thread(add, number)

        return await drive(DBSessionMiddleware(app, database=sync_db), received=[DISCONNECT])

    return serve


@pytest.mark.parametrize("moment", ["after head", "in body", "before the first write"])
@pytest.mark.parametrize("after", [[], [3, 4]])
async def test_thread_that_cannot_be_told_leaves_no_half_of_a_body(serve, sync_rows, after, moment):
    """G7, G8: what it writes after the disconnect is rolled back, and what comes after is kept."""
    exchange = await serve(after=after, has_streamer=True, moment=moment)

    assert exchange.error is None
    assert after == sync_rows()


async def test_work_after_a_body_in_the_same_task_is_kept(serve, sync_rows):
    """G8: where the request's own task streams, nobody can tell its body from what comes after."""
    exchange = await serve(after=[3], has_streamer=False)

    assert exchange.error is None
    assert [2, 3] == sync_rows()


async def test_body_that_asks_by_itself_may_write_that_its_client_has_left(
    sync_db, drive, add, sync_rows
):
    """G7, G8: the task that was told of the disconnect knows what it does."""

    async def app(scope, receive, send):
        async def stream():
            await send(start(200))
            await asyncio.to_thread(add, 1)
            await send(body(b"chunk", more=True))
            assert DISCONNECT == await receive()
            await asyncio.to_thread(add, 2)

        await asyncio.create_task(stream())

    await drive(DBSessionMiddleware(app, database=sync_db), received=[DISCONNECT])

    assert [2] == sync_rows()


@pytest.mark.parametrize("sync_engine", ["sqlite"], indirect=True)
async def test_client_that_leaves_is_told_while_a_thread_hangs_in_a_commit(sync_db, drive, add):
    """G10: a COMMIT that was given up belongs to its thread, and the event loop goes on."""
    is_committing, may_end = threading.Event(), threading.Event()
    was_let = []
    sync_db.cleanup_timeout = 0.1

    def hang(connection):
        is_committing.set()
        was_let.append(may_end.wait(20))

    async def app(scope, receive, send):
        await send(start(200))
        await send(body(b"chunk", more=True))
        await asyncio.to_thread(add, 1)
        last = asyncio.create_task(send(body()))
        await asyncio.to_thread(is_committing.wait)
        last.cancel()
        await asyncio.wait([last])
        assert DISCONNECT == await receive()
        may_end.set()

    sa.event.listen(sync_db.engine, "commit", hang)
    exchange = await drive(DBSessionMiddleware(app, database=sync_db), received=[DISCONNECT])
    while not was_let or sync_db.engine.pool.checkedout():
        await asyncio.sleep(0.01)

    assert exchange.error is None
    assert [True] == was_let
