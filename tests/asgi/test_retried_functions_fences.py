"""What keeps a decorated function that lost from being called again: what it did elsewhere, too."""

import asyncio
import logging

import anyio
import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Retry,
    current_scope,
    on_commit,
)
from asgi_dbscope.testing import inject_conflicts
from tests.fix_asgi import respond
from tests.fix_database import Item

AT_ONCE = Retry(attempts=3, base=0)

LOST = sa.update(Item).values(note="lost")
"""The statement that meets with a conflict."""

on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


def insert(number=1):
    """Write one row."""
    return sa.insert(Item).values(id=number)


async def requires_new(db):
    """A block of its own."""
    async with db.transactional("REQUIRES_NEW") as session:
        await session.execute(insert(7))


async def scope_of_its_own(db):
    """A scope of its own."""
    async with db.session_scope(mode="transaction") as session:
        await session.execute(insert(7))


async def branch(db):
    """A branch."""
    async with db.branch() as session:
        await session.execute(insert(7))


async def nested_in_both(db):
    """A scope inside of a block of its own, by a child task."""
    async with db.transactional("REQUIRES_NEW"):
        await asyncio.create_task(scope_of_its_own(db))


@pytest.mark.parametrize("at", ["commit", "UPDATE"])
async def test_commit_inside_of_a_call_forbids_another(at, db, rows, caplog):
    """G16: what a call has committed is not done twice."""

    @db.session_scope(retry=AT_ONCE)
    async def place():
        async with db.session_scope() as session:
            await session.execute(insert(7))
        with inject_conflicts(db, at=at):
            await db.session.execute(LOST)
            await db.session.commit()

    with pytest.raises(sa.exc.DBAPIError):
        await place()

    assert "and was the last one: a transaction was committed" in caplog.text
    assert [7] == await rows()


@on_sqlite
@pytest.mark.parametrize("mode", ["autocommit", "manual"])
@pytest.mark.parametrize("commit", [requires_new, scope_of_its_own, branch, nested_in_both])
async def test_commit_beside_a_block_that_began_on_the_requests_session_forbids_another(
    commit, mode, engine, drive, rows, caplog
):
    """G16: the scopes inside of a block are parts of its attempt, though not of its session."""
    db = Database(engine, mode=mode)
    seen = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        seen.append(current_scope().is_last_attempt)
        await commit(db)
        seen.append(current_scope().is_last_attempt)
        await db.session.execute(LOST)

    async def app(scope, receive, send):
        await place()

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [False, True] == seen
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert "and was the last one: a transaction was committed" in caplog.text
    assert [7] == await rows()


@pytest.mark.parametrize("mode", ["autocommit", "manual"])
async def test_commit_beside_a_block_of_a_plain_function_forbids_another(
    mode, sync_engine, drive, sync_rows
):
    """G16: the same in a worker thread."""
    db = Database(sync_engine, mode=mode)
    calls = []

    @db.transactional(retry=AT_ONCE)
    def place():
        calls.append(current_scope().attempt)
        with db.transactional("REQUIRES_NEW") as session:
            session.execute(insert(7))
        db.session.execute(LOST)

    async def app(scope, receive, send):
        await anyio.to_thread.run_sync(place)

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [1] == calls
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [7] == sync_rows()


@on_sqlite
@pytest.mark.parametrize("mode", ["transaction", "autocommit"])
@pytest.mark.parametrize("began_before", [False, True])
async def test_what_is_durable_in_another_database_forbids_another_call(
    mode, began_before, engine, make_engine, drive, rows
):
    """G16: a request's session of a second database is no part of the block, its commits are."""
    second = Database(engine, name="second")
    first = Database(make_engine("sqlite", file="first.db"), name="first")
    seen = []

    @first.transactional("REQUIRES_NEW", retry=AT_ONCE)
    async def place():
        seen.append((second.scope.attempt, second.scope.is_last_attempt))
        await second.session.execute(insert(7))
        if mode == "transaction":
            await second.session.commit()
        seen.append((second.scope.attempt, second.scope.is_last_attempt))
        await first.session.execute(LOST)

    async def app(scope, receive, send):
        second.scope.configure(mode=mode)
        if began_before:
            await second.session.execute(sa.select(1))
        await place()

    with inject_conflicts(first, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))
    await first.session_factory.kw["bind"].dispose()

    assert [(1, False), (1, True)] == seen
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [7] == await rows()


@on_sqlite
async def test_flush_in_autocommit_forbids_another_call(engine, make_engine, drive, rows):
    """G16: what a flush writes is as durable as what a statement writes."""
    second = Database(engine, name="second", mode="autocommit")
    first = Database(make_engine("sqlite", file="first.db"), name="first")
    calls = []

    @first.transactional("REQUIRES_NEW", retry=AT_ONCE)
    async def place():
        calls.append(1)
        second.session.add(Item(id=7))
        await second.session.flush()
        await first.session.execute(LOST)

    async def app(scope, receive, send):
        await second.session.execute(sa.select(1))
        await place()

    with inject_conflicts(first, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))
    await first.session_factory.kw["bind"].dispose()

    assert [1] == calls
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [7] == await rows()


@on_sqlite
async def test_transaction_begun_by_hand_in_autocommit_may_be_lost(engine, rows):
    """G16: in mode "autocommit" a `session.begin()` that was rolled back left nothing behind."""
    db = Database(engine)
    calls = []

    @db.session_scope(retry=AT_ONCE)
    async def place():
        calls.append(1)
        async with db.session_scope(mode="autocommit") as session, session.begin():
            await session.execute(insert(7))

    with inject_conflicts(db):
        await place()

    assert [1, 1] == calls
    assert [7] == await rows()


@on_sqlite
async def test_attempt_is_the_innermost_one(engine, drive):
    """G16: a call has its own attempts; the last one only if the request has no other, either."""
    db = Database(engine)
    seen = []

    def look(place):
        seen.append((place, current_scope().attempt, current_scope().is_last_attempt))

    @db.transactional("REQUIRES_NEW", retry=Retry(attempts=2, base=0))
    async def place():
        await db.session.execute(insert())
        async with db.session_scope():
            look("inside")

    async def app(scope, receive, send):
        look("before")
        await place()
        look("after")
        await respond(send)

    middleware = DBSessionMiddleware(app, database=db, retry=Retry(attempts=2, base=0))
    with inject_conflicts(db, times=3):
        exchange = await drive(middleware)

    assert 200 == exchange.status
    assert [
        ("before", 1, False),
        ("inside", 1, False),
        ("inside", 2, False),
        ("before", 2, True),
        ("inside", 1, False),
        ("inside", 2, True),
        ("after", 2, True),
    ] == seen


async def test_fence_and_hooks_forbid_another_call(db, caplog):
    """G16: the fences of a request are those of a function."""

    @db.transactional(retry=AT_ONCE)
    async def fenced():
        async with db.session_scope():
            current_scope().fence("sent an e-mail")
        await db.session.execute(insert())

    @db.transactional(retry=AT_ONCE)
    async def hooked():
        db.on_rollback(print)
        await db.session.execute(insert())

    for place in (fenced, hooked):
        with inject_conflicts(db), pytest.raises(sa.exc.DBAPIError):
            await place()

    assert "the last one: sent an e-mail" in caplog.text
    assert "the last one: a hook ran" in caplog.text


@on_sqlite
async def test_hook_that_waits_for_the_response_forbids_another_call(engine, drive, caplog):
    """G16: an on-rollback hook that runs after the response is to hear of this very rollback."""
    db = Database(engine)
    calls: list[int] = []
    told: list[str] = []

    @db.transactional("REQUIRES_NEW", retry=AT_ONCE)
    async def place():
        calls.append(1)
        db.on_rollback(told.append, "rolled back", when="after_response")
        await db.session.execute(insert())

    async def app(scope, receive, send):
        with pytest.raises(sa.exc.DBAPIError):
            await place()
        await respond(send)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert ([1], ["rolled back"]) == (calls, told)
    assert "the last one: a hook ran" in caplog.text


@on_sqlite
async def test_hook_of_another_database_that_runs_at_once_forbids_another_call(engine, make_engine):
    """G16: where that database has no scope either, the hook was run, and would run again."""
    db = Database(engine)
    other = Database(make_engine("sqlite"), name="other")
    ran: list[int] = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        other.on_commit(ran.append, 1)
        on_commit(ran.append, 2)
        await db.session.execute(insert())

    with inject_conflicts(db), pytest.raises(sa.exc.DBAPIError):
        await place()
    await other.session_factory.kw["bind"].dispose()

    assert [1] == ran


LATE = Retry(base=1e12, cap=1e12, max_elapsed=1e13)
"""Pauses that no timeout waits for, but for one of 1e10: they are drawn from zero on."""


@on_sqlite
async def test_pause_does_not_outlast_the_transaction_around(engine, caplog):
    """G16: an attempt that would begin after the outer block's timeout isn't waited for."""
    db = Database(engine)
    calls = []

    @db.transactional("REQUIRES_NEW", retry=LATE)
    async def place():
        calls.append(1)
        await db.session.execute(insert())

    with inject_conflicts(db), pytest.raises(sa.exc.DBAPIError):
        async with db.transactional(timeout=60), db.session_scope(timeout=50):
            await place()

    assert [1] == calls
    assert "the last one: the transaction around it has to be over by then" in caplog.text


def test_pause_of_a_thread_does_not_outlast_the_transaction_around(sync_db, caplog):
    """G16: the same where nobody could be woken up."""
    calls = []

    @sync_db.transactional("REQUIRES_NEW", retry=LATE)
    def place():
        calls.append(1)
        sync_db.session.execute(insert())

    around = sync_db.transactional(timeout=60)
    with inject_conflicts(sync_db), pytest.raises(sa.exc.DBAPIError), around:
        place()

    assert [1] == calls
    assert "the last one: the transaction around it has to be over by then" in caplog.text


@on_sqlite
@pytest.mark.parametrize("is_expired", [False, True])
async def test_pause_does_not_outlast_the_request(is_expired, engine, drive, caplog):
    """G16: no attempt begins after the timeout of the request's open transaction."""
    db = Database(engine)
    calls = []

    @db.session_scope(retry=AT_ONCE if is_expired else LATE)
    async def place():
        calls.append(1)
        await db.session.execute(insert())

    async def app(scope, receive, send):
        await db.session.execute(sa.select(1))
        while is_expired and db.scope.expiry is None:
            await asyncio.sleep(0.001)
        await place()

    with inject_conflicts(db):
        timeout = 0.2 if is_expired else 60
        await drive(DBSessionMiddleware(app, database=db, timeout=timeout))

    assert [1] == calls
    if not is_expired:  # else its own clock may strike before the conflict
        assert "the last one: the transaction around it has to be over by then" in caplog.text


@on_sqlite
async def test_request_in_process_does_not_outlast_its_caller(engine, drive, caplog):
    """G16: a request that is served inside of a transaction has no more time than that."""
    db = Database(engine)

    async def app(scope, receive, send):
        await db.session.execute(insert())

    with inject_conflicts(db, at="INSERT"):
        async with db.transactional(timeout=60):
            exchange = await drive(DBSessionMiddleware(app, database=db, retry=LATE))

    assert 503 == exchange.status
    assert "the last one: the transaction around it has to be over by then" in caplog.text


@on_sqlite
async def test_hook_of_a_scope_inside_of_a_call_waits_for_the_response(engine, drive, timeline):
    """G16: the call is no request, but it is inside of one."""
    db = Database(engine)

    @db.transactional("REQUIRES_NEW", retry=AT_ONCE)
    async def place():
        async with db.session_scope():
            db.on_commit(timeline.append, "hook", when="after_response")

    async def app(scope, receive, send):
        await place()
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["start 200", "last body", "hook"] == timeline


class PauseBegins(logging.Handler):
    """Tells of the pause between two calls, by the line of the log that comes before it."""

    def __init__(self):
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record):
        """Look at a line."""
        if "the next one in" in record.getMessage():
            self.event.set()


@on_sqlite
async def test_fence_that_comes_in_the_pause_forbids_the_next_call(engine, caplog, rows):
    """G16: what a task of the lost call does before the next one begins would be done twice."""
    db = Database(engine)
    tasks = []
    calls = []
    pause_begins = PauseBegins()

    async def report():
        await pause_begins.event.wait()
        current_scope().fence("told somebody")

    @db.session_scope(retry=AT_ONCE)
    async def place():
        calls.append(current_scope().attempt)
        tasks.append(asyncio.create_task(report()))
        await db.session.execute(insert())

    logging.getLogger("asgi_dbscope").addHandler(pause_begins)
    with (
        caplog.at_level(logging.INFO, "asgi_dbscope"),
        inject_conflicts(db),
        pytest.raises(sa.exc.DBAPIError),
    ):
        await place()
    logging.getLogger("asgi_dbscope").removeHandler(pause_begins)
    await asyncio.wait(tasks)

    assert [1] == calls
    assert "attempt 1 has lost, and was the last one after all: told somebody" in caplog.text
    assert [] == await rows()


@on_sqlite
@pytest.mark.parametrize("status", [None, 409])
async def test_fence_that_comes_in_the_pause_forbids_the_replay(status, engine, drive, caplog):
    """G16: the same in a request, which is then answered as after any failure."""
    db = Database(engine)
    tasks: list[asyncio.Task[None]] = []
    calls = []
    pause_begins = asyncio.Event()

    async def report():
        await pause_begins.wait()
        current_scope().fence("told somebody")

    async def app(scope, receive, send):
        calls.append(current_scope().attempt)
        tasks.append(asyncio.create_task(report()))
        await db.session.execute(insert())
        await respond(send)

    async def sorry(scope, receive, send):
        await respond(send, 409)

    middleware = DBSessionMiddleware(
        app,
        database=db,
        retry=AT_ONCE,
        commit_error_response=lambda scope, error: None if status is None else sorry,
    )

    async def at_server(scope, receive, send):
        async def told():
            pause_begins.set()
            return await receive()

        await middleware(scope, told, send)

    with inject_conflicts(db):
        exchange = await drive(at_server)
    await asyncio.wait(tasks)

    assert [1] == calls
    assert status == exchange.status
    assert isinstance(exchange.error, sa.exc.DBAPIError) is (status is None)
    assert "attempt 1 has lost, and was the last one after all: told somebody" in caplog.text


@on_sqlite
async def test_fence_of_a_lost_attempt_holds_for_those_after_it(engine, drive, rows):
    """G16: what a task of the first attempt does in the second is a reason against the third."""
    db = Database(engine)
    second_begins = asyncio.Event()
    tasks = []
    calls = []

    async def report():
        await second_begins.wait()
        async with db.session_scope() as session:
            await session.execute(insert(7))

    async def app(scope, receive, send):
        attempt = current_scope().attempt
        calls.append(attempt)
        if attempt == 1:
            tasks.append(asyncio.create_task(report()))
        else:
            second_begins.set()
            await asyncio.wait(tasks)
        await db.session.execute(LOST)

    with inject_conflicts(db, at="UPDATE", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 2] == calls
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [7] == await rows()
