"""A child task that nobody awaits ends the transaction, while the response's head waits for it."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.util import await_only

from asgi_dbscope import (
    CommitInDoubtError,
    ConcurrentSessionUseError,
    Database,
    DBSessionMiddleware,
    Outcome,
    current_scope,
)
from tests.fix_asgi import respond
from tests.fix_clock import LONG
from tests.fix_database import Child, Item


class Hold:
    """The first event of its kind waits in its task, in SQLAlchemy's greenlet, until let go.

    Attributes:
        reached: Set when a task has come to it.

        let_go: To be set.
    """

    def __init__(self, engine, event):
        self.reached, self.let_go = asyncio.Event(), asyncio.Event()
        sa.event.listen(engine.sync_engine, event, self._wait, once=True)

    def _wait(self, *args):
        self.reached.set()
        await_only(self.let_go.wait())


async def settled(tasks):
    """What became of *tasks*."""
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("has_sibling", [False, True])
async def test_head_that_waits_for_a_commit_that_fails_claims_no_success(
    db, engine, drive, rows, has_sibling
):
    """G1, G2: the database's error is the head's too, whoever begins a transaction meanwhile."""
    hold = Hold(engine, "commit")
    tasks = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        tasks.append(asyncio.create_task(db.release()))
        await hold.reached.wait()
        if has_sibling:
            tasks.append(asyncio.create_task(db.session.execute(sa.insert(Item).values(id=2))))
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(hold.let_go.set)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    error, *_ = await settled(tasks)

    assert isinstance(error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert exchange.error is error
    assert ["asgi_dbscope: the transaction of GET / was rolled back."] == error.__notes__
    assert [] == await rows()


@pytest.mark.parametrize(
    ("event", "expected"),
    [("commit", CommitInDoubtError), ("before_cursor_execute", ConcurrentSessionUseError)],
)
async def test_head_that_waits_for_a_commit_that_is_given_up_claims_no_success(
    engine, drive, rows, event, expected
):
    """G1, G10: a child task that is cancelled, and out of grace, takes the response with it."""
    db = Database(engine, cleanup_timeout=0.05)
    hold = Hold(engine, event)
    tasks = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        tasks.append(asyncio.create_task(db.release()))
        await hold.reached.wait()
        tasks[0].cancel()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    [error] = await settled(tasks)

    assert isinstance(error, asyncio.CancelledError)
    assert [] == exchange.messages
    assert expected is type(exchange.error)
    assert [] == await rows()


@pytest.mark.parametrize("mode", ["transaction", "manual"])
async def test_time_that_is_up_in_a_commit_under_way_claims_no_rollback(
    db, engine, drive, rows, clock, mode
):
    """G15: while nobody knows what becomes of a child task's COMMIT nobody is told that it was."""
    hold = Hold(engine, "commit")
    told = []

    async def release():
        scope = current_scope()
        try:
            await db.release()
        finally:
            told.append(scope.outcome)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        child = asyncio.create_task(release())
        await hold.reached.wait()
        clock.forward(LONG, current_scope())  # it strikes; the COMMIT hasn't heard of it yet
        with pytest.raises(CommitInDoubtError):
            await db.session.execute(sa.text("SELECT 1"))
        await asyncio.gather(respond(send), child)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG, mode=mode))

    assert [Outcome.IN_DOUBT] == told
    assert [] == exchange.messages
    assert isinstance(exchange.error, CommitInDoubtError)
    assert exchange.status is None


async def test_time_that_is_up_while_the_head_waits_for_a_statement_is_no_cancellation(
    db, engine, drive, rows, clock
):
    """G3: the head's ending is what the clock finds at work, as the child task has just left."""
    tasks = []

    def work(session):
        session.execute(sa.select(1))
        clock.forward(LONG, current_scope())

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        hold = Hold(engine, "before_cursor_execute")
        tasks.append(asyncio.create_task(db.session.run_sync(work)))
        await hold.reached.wait()
        asyncio.get_running_loop().call_soon(hold.let_go.set)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))
    await settled(tasks)

    assert (504, None) == (exchange.status, exchange.error)
    assert [] == await rows()


async def in_a_block(session):
    """A block of SQLAlchemy's, which commits at its end."""
    async with session.begin():
        await session.execute(sa.select(1))


ENDS = {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "reset": lambda session: session.reset(),
    "close": lambda session: session.close(),
    "begin": in_a_block,
}


@pytest.mark.parametrize("end", ENDS)
async def test_head_waits_until_the_connection_of_a_childs_own_ending_is_back(
    db, engine, drive, end
):
    """G6: the transaction is over by then, but its connection is still on its way to the pool."""
    hold = Hold(engine, "checkin")
    tasks, checked_out = [], []

    async def app(scope, receive, send):
        if end != "begin":
            await db.session.execute(sa.select(1))
        tasks.append(asyncio.create_task(ENDS[end](db.session)))
        await hold.reached.wait()
        asyncio.get_running_loop().call_soon(hold.let_go.set)
        await respond(send)

    async def on_send(message):
        checked_out.append(engine.pool.checkedout())

    exchange = await drive(DBSessionMiddleware(app, database=db), on_send=on_send)
    await settled(tasks)

    assert exchange.error is None
    assert [0, 0] == checked_out


async def test_connection_of_a_childs_own_ending_is_waited_for_no_longer_than_its_deadline(
    engine, drive
):
    """G22: after `cleanup_timeout` seconds the connection is thrown away, and the head goes out."""
    db = Database(engine, cleanup_timeout=0.05)
    hold = Hold(engine, "checkin")
    tasks = []

    async def app(scope, receive, send):
        await db.session.execute(sa.select(1))
        tasks.append(asyncio.create_task(db.session.rollback()))
        await hold.reached.wait()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    hold.let_go.set()
    await settled(tasks)

    assert (200, None) == (exchange.status, exchange.error)


# --------------------------------------------------------------------------------------
# What takes too long
# --------------------------------------------------------------------------------------


async def test_commit_of_a_childs_own_that_waits_for_the_head_is_in_doubt(engine, drive):
    """G15, G22: the two would wait for each other; `cleanup_timeout` ends that, and is honest."""
    db = Database(engine, cleanup_timeout=0.05)
    hold = Hold(engine, "commit")
    scopes, tasks = [], []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await db.session.execute(sa.select(1))
        tasks.append(asyncio.create_task(db.session.commit()))
        await hold.reached.wait()
        await respond(send)
        hold.let_go.set()

    exchange = await drive(DBSessionMiddleware(app, database=db))
    hold.let_go.set()
    [error] = await settled(tasks)

    assert [] == exchange.messages
    assert isinstance(exchange.error, CommitInDoubtError)
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert isinstance(error, Exception)


@pytest.mark.parametrize("way", ["raised", "cancelled", "cancelled at the head"])
async def test_request_that_fails_waits_no_longer_than_its_deadline_for_a_childs_commit(
    engine, drive, way
):
    """G10: what that came to is in doubt then, and its connection is thrown away."""
    db = Database(engine, cleanup_timeout=0.05)
    hold = Hold(engine, "commit")
    scopes, tasks = [], []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await db.session.execute(sa.select(1))
        tasks.append(asyncio.create_task(db.release()))
        await hold.reached.wait()
        if way == "raised":
            raise ZeroDivisionError
        asyncio.get_running_loop().call_soon(request.cancel)
        if way == "cancelled":
            await asyncio.Event().wait()
        await respond(send)

    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    exchange = await request
    hold.let_go.set()
    [error] = await settled(tasks)

    assert [] == exchange.messages
    assert isinstance(exchange.error, (asyncio.CancelledError, ZeroDivisionError))
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert isinstance(error, Exception)
    assert 0 == engine.pool.checkedout()
