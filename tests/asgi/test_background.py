"""Work after the last body message: a transaction of its own, ended when the app returns."""

import asyncio
import logging

import anyio
import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware, RollbackOnlyError
from tests.fix_asgi import body, respond, start
from tests.fix_database import Child, Item

DISCONNECT = {"type": "http.disconnect"}
TRANSACTION = ["checkout", "begin", "commit", "checkin"]
RESPONSE = ["start 200", "last body"]


async def test_background_work_is_committed_when_the_app_returns(db, drive, rows, timeline):
    """G8: work after the last body message gets a transaction, committed at the app's return."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)
        db.session.add(Item(id=2))
        await db.session.flush()

    await drive(DBSessionMiddleware(app, database=db))

    assert [*TRANSACTION, *RESPONSE, *TRANSACTION] == timeline
    assert [1, 2] == await rows()


async def test_background_work_that_was_only_registered_is_written(db, drive, rows):
    """G8: `session.add()` as the last thing an app does is not lost."""

    async def app(scope, receive, send):
        await respond(send)
        db.session.add(Item(id=2))

    await drive(DBSessionMiddleware(app, database=db))

    assert [2] == await rows()


async def test_background_work_that_raises_is_rolled_back(db, drive, rows, timeline):
    """G8: an exception in background work rolls it back, comes out, and undoes nothing else."""
    error = ZeroDivisionError()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)
        db.session.add(Item(id=2))
        await db.session.flush()
        raise error

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert error is exchange.error
    expected = [*TRANSACTION, *RESPONSE, "checkout", "begin", "rollback", "checkin"]
    assert expected == timeline
    assert [1] == await rows()


async def test_failed_commit_of_background_work_is_logged(db, drive, rows, caplog):
    """G8, G2: too late to tell the client: it is logged as an error, and the app returns."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        return "returned"

    with caplog.at_level(logging.ERROR, "asgi_dbscope"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert "returned" == exchange.result
    assert ["GET /: work after the response was not committed"] == caplog.messages
    assert caplog.records[0].exc_info is not None
    assert isinstance(caplog.records[0].exc_info[1], sa.exc.IntegrityError)
    assert [1] == await rows()


async def test_swallowed_failure_of_a_block_in_background_work_is_logged(db, drive, rows, caplog):
    """G8, G4: Too late for an error response: the work is rolled back, and the log says why."""
    error = ValueError("boom")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)
        db.session.add(Item(id=2))
        with pytest.raises(ValueError, match="boom"):
            async with db.transactional():
                raise error
        return "returned"

    with caplog.at_level(logging.ERROR, "asgi_dbscope"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (None, "returned") == (exchange.error, exchange.result)
    assert ["GET /: work after the response is rolled back"] == caplog.messages
    assert caplog.records[0].exc_info is not None
    assert isinstance(caplog.records[0].exc_info[1], RollbackOnlyError)
    assert error is caplog.records[0].exc_info[1].__cause__
    assert [1] == await rows()


async def test_background_work_after_a_disconnect_is_kept(db, drive, rows):
    """G7, G8: a disconnect in mid-stream undoes the body's work, not the background's."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        await receive()
        db.session.add(Item(id=3))

    exchange = await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert exchange.error is None
    assert [1, 3] == await rows()


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_background_work_after_a_disconnect_in_mid_query_is_kept(db, drive, rows):
    """G7, G8, G10: the stream may be cancelled inside a query, as frameworks do at a disconnect."""
    is_querying = asyncio.Event()

    async def app(scope, receive, send):
        async def stream():
            await send(start(200))
            db.session.add(Item(id=2))
            await db.session.flush()
            await send(body(b"chunk", more=True))
            is_querying.set()
            while True:
                await db.session.scalar(sa.select(sa.func.count(Item.id)))

        async def listen():
            await is_querying.wait()
            assert DISCONNECT == await receive()
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await stream()
        db.session.add(Item(id=3))
        await db.session.flush()

    exchange = await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert exchange.error is None
    assert [3] == await rows()


async def test_background_work_that_waits_holds_no_connection(db, drive, engine):
    """G6: a background task that has not begun with the session, or released it, holds none."""
    held = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)
        held.append(engine.pool.checkedout())
        db.session.add(Item(id=2))
        await db.session.flush()
        held.append(engine.pool.checkedout())
        await db.release()
        held.append(engine.pool.checkedout())

    await drive(DBSessionMiddleware(app, database=db))

    assert [0, 1, 0] == held


async def test_background_tasks_one_after_another_share_the_session(db, drive, rows):
    """G8, G11: what one background task wrote the next one sees, and both are committed."""

    async def app(scope, receive, send):
        await respond(send)
        db.session.add(Item(id=1))
        assert [1] == list(await db.session.scalars(sa.select(Item.id)))
        db.session.add(Item(id=2))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1, 2] == await rows()


async def test_rollback_only_holds_for_background_work_too(db, drive, rows):
    """G4, G8: from a rollback-only scope nothing commits, to its very end."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        db.set_rollback_only()
        await respond(send)
        db.session.add(Item(id=2))
        await db.session.flush()

    await drive(DBSessionMiddleware(app, database=db))

    assert [] == await rows()
