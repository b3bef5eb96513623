"""Sessions in a streaming body: a transaction of its own, ended before the last body message."""

import asyncio
import contextlib

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware, Outcome, current_scope
from asgi_dbscope.errors import StreamSessionError
from tests.fix_asgi import body, start
from tests.fix_database import POSTGRES_DRIVERS, Child, Item

ALL_DRIVERS = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)

DISCONNECT = {"type": "http.disconnect"}
TRANSACTION = ["checkout", "begin", "commit", "checkin"]


@ALL_DRIVERS
async def test_body_has_a_transaction_of_its_own(db, drive, rows, timeline):
    """G7: the response's transaction ends before the head, the body's before its last message."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        db.session.add(Item(id=3))
        await send(body(b"end"))

    await drive(DBSessionMiddleware(app, database=db))

    expected = [*TRANSACTION, "start 200", "checkout", "begin", "body", "commit", "checkin"]
    assert [*expected, "last body"] == timeline
    assert [1, 2, 3] == await rows()


async def test_body_without_work_gets_no_transaction(db, drive, timeline):
    """G7, G5: a body that doesn't use the session takes no connection."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await send(body(b"chunk", more=True))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [*TRANSACTION, "start 200", "body", "last body"] == timeline


async def test_object_of_the_handler_serves_the_body(db, drive, rows):
    """G7, G11: it is one session: an object loaded in the handler is written to in the body."""

    async def app(scope, receive, send):
        item = Item(id=1)
        db.session.add(item)
        await send(start(200))
        item.note = "streamed"
        await send(body(b"chunk", more=True))
        assert "streamed" == await db.session.scalar(sa.select(Item.note))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


@ALL_DRIVERS
async def test_failed_commit_of_the_body_tears_it(db, drive, rows, timeline):
    """G7: where the body's COMMIT fails its last message is never sent, and the error surfaces."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await send(body(b"chunk", more=True))
        await send(body(b"end"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert "was rolled back" in exchange.error.__notes__[0]
    assert "last body" not in timeline
    assert [1] == await rows()


async def test_app_that_swallows_the_failed_commit_of_its_body_does_not_hide_it(db, drive):
    """G7: the body ends torn also where the app catches the error and sends the end again."""

    async def app(scope, receive, send):
        await send(start(200))
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await send(body(b"chunk", more=True))
        for _ in range(2):
            with contextlib.suppress(sa.exc.IntegrityError):
                await send(body(b"end"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert not exchange.is_complete


@ALL_DRIVERS
async def test_exception_in_the_body_rolls_back_its_work(db, drive, rows, timeline):
    """G7: an exception in mid-stream rolls back the body's work, and keeps the response's."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        raise ZeroDivisionError

    exchange = await drive(DBSessionMiddleware(app, database=db))

    expected = [*TRANSACTION, "start 200", "checkout", "begin", "body", "rollback", "checkin"]
    assert expected == timeline
    assert isinstance(exchange.error, ZeroDivisionError)
    assert [1] == await rows()


async def test_body_that_is_never_finished_is_rolled_back(db, drive, rows):
    """G7: an app that returns without its last body message has torn the body itself."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [] == await rows()


@ALL_DRIVERS
async def test_cancellation_in_the_body_rolls_back_its_work(db, drive, rows):
    """G7, G10: a task that is stopped in mid-stream keeps the response's work only."""
    reached = asyncio.Event()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await reached.wait()
    task.cancel()
    exchange = await task

    assert isinstance(exchange.error, asyncio.CancelledError)
    assert [1] == await rows()


@ALL_DRIVERS
async def test_disconnect_in_the_body_rolls_back_its_work(db, drive, rows, timeline):
    """G7: a disconnect that the app sees in mid-stream rolls back what the body has written."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        assert DISCONNECT == await receive()

    await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    expected = [*TRANSACTION, "start 200", "checkout", "begin", "body", "rollback", "checkin"]
    assert expected == timeline
    assert [1] == await rows()


async def test_disconnect_that_a_sibling_task_sees_rolls_back_the_body(db, drive, rows):
    """G7: the task that waits for the disconnect may be another than the one that streams."""
    streaming = asyncio.Event()

    async def app(scope, receive, send):
        async def listen():
            await streaming.wait()
            assert DISCONNECT == await receive()

        async with asyncio.TaskGroup() as tasks:
            listener = tasks.create_task(listen())
            await send(start(200))
            db.session.add(Item(id=2))
            await db.session.flush()
            streaming.set()
            await listener
            await send(body(b"chunk", more=True))
            await send(body())

    await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert [] == await rows()


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_disconnect_while_the_last_message_commits_changes_nothing(db, drive, rows):
    """G7: a disconnect that comes when the body's COMMIT is under way is too late to undo it."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        sending = asyncio.create_task(send(body(b"end")))
        await committing.wait()
        assert DISCONNECT == await receive()
        await sending
        db.session.add(Item(id=3))

    committing = asyncio.Event()
    sa.event.listen(db.session_factory.kw["bind"].sync_engine, "commit", lambda _: committing.set())
    exchange = await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert exchange.error is None
    assert [2, 3] == await rows()


async def test_disconnect_before_the_head_changes_nothing(db, drive, rows):
    """G18: a handler that sees a disconnect and answers all the same commits all the same."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        assert DISCONNECT == await receive()
        await send(start(200))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert [1] == await rows()


async def test_disconnect_after_the_body_changes_nothing(db, drive, rows):
    """G8, G18: a disconnect after the last body message is the normal end of every response."""

    async def app(scope, receive, send):
        await send(start(200))
        await send(body())
        db.session.add(Item(id=3))
        await db.session.flush()
        assert DISCONNECT == await receive()

    await drive(DBSessionMiddleware(app, database=db), received=[DISCONNECT])

    assert [3] == await rows()


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_hold_keeps_a_server_side_cursor_open_to_the_end(db, drive, rows, timeline):
    """G7: with `stream="hold"` a server-side cursor opened in the handler feeds the body."""
    async with db.session_scope() as session:
        session.add_all([Item(id=number) for number in range(100)])
    timeline.clear()

    async def app(scope, receive, send):
        db.session.add(Item(id=100))
        await db.session.flush()
        found = await db.session.stream_scalars(
            sa.select(Item.id).order_by(Item.id).execution_options(yield_per=7)
        )
        await send(start(200))
        async for part in found.partitions():
            await send(body(b"".join(b"%d " % number for number in part), more=True))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db, stream="hold"))

    assert list(range(101)) == [int(number) for number in exchange.body.split()]
    chunks = ["body"] * 15
    expected = ["checkout", "begin", "start 200", *chunks, "commit", "checkin", "last body"]
    assert expected == timeline
    assert 101 == len(await rows())


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_server_side_cursor_does_not_survive_the_head_without_hold(db, drive, rows):
    """G6, G7: by default the head ends the cursor's transaction, and reading on is an error."""

    async def app(scope, receive, send):
        db.session.add_all([Item(id=number) for number in range(20)])
        await db.session.flush()
        found = await db.session.stream_scalars(
            sa.select(Item.id).execution_options(yield_per=2, stream_results=True)
        )
        await found.fetchmany(2)
        await send(start(200))
        await found.fetchall()
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is not None
    assert not exchange.is_complete
    assert 20 == len(await rows())


@ALL_DRIVERS
async def test_hold_commits_response_and_body_together(db, drive, rows, timeline):
    """G7: with `stream="hold"` one transaction serves both, ended before the last body message."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(start(200))
        db.session.add(Item(id=2))
        await send(body(b"chunk", more=True))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db, stream="hold"))

    expected = ["checkout", "begin", "start 200", "body", "commit", "checkin", "last body"]
    assert expected == timeline
    assert [1, 2] == await rows()


async def test_hold_still_rolls_back_an_error_before_its_head(db, drive, rows, timeline):
    """G3, G7: only what would be committed is held: a 5xx is rolled back before its head."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(start(500))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db, stream="hold"))

    assert ["checkout", "begin", "rollback", "checkin", "start 500", "last body"] == timeline


@ALL_DRIVERS
async def test_hold_rolls_back_all_of_a_torn_body(db, drive, rows):
    """G7: with `stream="hold"` an exception in mid-stream takes the handler's work with it."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(start(200))
        await send(body(b"chunk", more=True))
        raise ZeroDivisionError

    await drive(DBSessionMiddleware(app, database=db, stream="hold"))

    assert [] == await rows()


async def test_error_refuses_the_session_in_a_body(db, drive, rows):
    """G7: with `stream="error"` the body's first use of the session is an error that says so."""
    refused = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        try:
            await db.session.scalar(sa.select(1))
        except StreamSessionError as error:
            refused.append(str(error))
        await send(body())
        db.session.add(Item(id=3))

    exchange = await drive(DBSessionMiddleware(app, database=db, stream="error"))

    assert 1 == len(refused)
    assert "stream='error'" in refused[0]
    assert exchange.error is None
    assert [1, 3] == await rows()


async def test_body_may_commit_in_portions(db, drive, rows, timeline):
    """G7: a body that commits by itself, portion by portion, keeps what it has committed."""

    async def app(scope, receive, send):
        await send(start(200))
        for number in (1, 2):
            db.session.add(Item(id=number))
            await db.session.commit()
            await send(body(b"chunk", more=True))
        raise ZeroDivisionError

    await drive(DBSessionMiddleware(app, database=db))

    assert ["start 200", *TRANSACTION, "body", *TRANSACTION, "body"] == timeline
    assert [1, 2] == await rows()


async def test_body_of_a_slow_client_holds_no_connection_without_work(db, drive, engine):
    """G6: a client that is slow to read a body that is done with the session holds nothing."""
    held = []
    client_waits = asyncio.Event()
    client_reads = asyncio.Event()

    async def app(scope, receive, send):
        await db.session.scalar(sa.select(1))
        await send(start(200))
        for _ in range(3):
            await send(body(b"x" * 100_000, more=True))
        await send(body())

    async def on_send(message):
        held.append(engine.pool.checkedout())
        client_waits.set()
        await client_reads.wait()

    task = asyncio.create_task(drive(DBSessionMiddleware(app, database=db), on_send=on_send))
    await client_waits.wait()
    assert 0 == engine.pool.checkedout()
    client_reads.set()
    await task

    assert [0] * 5 == held


async def test_release_gives_the_connection_back_in_mid_stream(db, drive, engine, rows):
    """G6, G7: `release()` in a body commits its portion, and holds nothing until the next use."""
    held = []

    async def app(scope, receive, send):
        await send(start(200))
        for number in (1, 2):
            db.session.add(Item(id=number))
            await db.session.flush()
            held.append(engine.pool.checkedout())
            await db.release()
            held.append(engine.pool.checkedout())
            await send(body(b"chunk", more=True))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [1, 0, 1, 0] == held
    assert [1, 2] == await rows()


async def test_outcome_of_a_torn_body_is_told(db, drive):
    """G7: after the rollback of a torn body the scope's outcome is ROLLED_BACK."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await send(start(200))
        assert Outcome.COMMITTED is current_scope().outcome
        db.session.add(Item(id=2))
        await db.session.flush()
        raise ZeroDivisionError

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ZeroDivisionError)
    assert Outcome.ROLLED_BACK is scopes[0].outcome
