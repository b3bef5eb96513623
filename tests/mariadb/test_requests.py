"""Requests on MariaDB: each ending of each of their transactions, as on the other databases."""

import asyncio
import contextlib

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware, Outcome, current_scope, session_options
from asgi_dbscope.errors import ConcurrentSessionUseError, SessionScopeClosedError
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import Item
from tests.fix_mariadb import numbers

pytestmark = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)


@contextlib.contextmanager
def commits_are_refused(observer):
    """While this lasts the server lets no transaction with writes commit.

    There are no deferred constraints; but COMMIT waits for a lock that a backup holds, for as long
    as the session's `lock_wait_timeout` says.
    """
    with observer.connect() as connection:
        connection.exec_driver_sql("FLUSH TABLES WITH READ LOCK")
        try:
            yield
        finally:
            connection.exec_driver_sql("UNLOCK TABLES")


IMPATIENT = sa.text("SET SESSION lock_wait_timeout = 0")


async def test_commit_comes_before_the_head_and_the_connection_back(db, drive, rows, timeline):
    """G1, G6: committed and given back, then the head."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


async def test_commit_that_fails_is_an_error(db, drive, rows, mariadb_schema):
    """G2, G19: a COMMIT that the server refuses is no success; the next request is served."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        number = int(scope["path"][1:])
        await db.session.execute(IMPATIENT)
        db.session.add(Item(id=number))
        await db.session.flush()
        with commits_are_refused(mariadb_schema) if number == 1 else contextlib.nullcontext():
            await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    refused = await drive(wrapped, http_scope("/1"))
    served = await drive(wrapped, http_scope("/2"))

    assert isinstance(refused.error, sa.exc.OperationalError)
    assert [] == refused.messages
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert 200 == served.status
    assert [2] == await rows()


async def test_body_whose_commit_fails_ends_torn(db, drive, rows, mariadb_schema):
    """G7: if the COMMIT of the body fails its last message is not sent."""

    async def app(scope, receive, send):
        await send(start(200))
        await db.session.execute(IMPATIENT)
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        with commits_are_refused(mariadb_schema):
            await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.OperationalError)
    assert not exchange.is_complete
    assert [] == await rows()


async def test_exception_error_status_and_preview_leave_nothing(db, drive, rows):
    """G3, G4: an exception, a 5xx and a rollback-only scope are rolled back."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        if scope["path"] == "/raise":
            raise ValueError
        if scope["path"] == "/preview":
            db.set_rollback_only()
        await respond(send, 500 if scope["path"] == "/500" else 200)

    wrapped = DBSessionMiddleware(app, database=db)
    paths = ("/raise", "/preview", "/500")
    exchanges = [await drive(wrapped, http_scope(path)) for path in paths]

    assert [None, 200, 500] == [each.status for each in exchanges]
    assert [] == await rows()


async def test_request_without_the_session_has_no_connection(db, drive, timeline):
    """G5: nothing is asked of the database."""

    async def app(scope, receive, send):
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["start 200", "last body"] == timeline


async def test_stream_and_background_have_transactions_of_their_own(db, drive, rows, timeline):
    """G7, G8: body and background work commit by themselves."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        await send(body())
        db.session.add(Item(id=3))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 3 == timeline.count("commit")
    assert timeline.index("last body") > [n for n, e in enumerate(timeline) if e == "commit"][1]
    assert [1, 2, 3] == await rows()


@pytest.mark.parametrize("end", ["raise", "cancel"])
async def test_torn_stream_is_rolled_back(db, drive, rows, end):
    """G7: an exception or a cancellation in mid-stream rolls the body's transaction back."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        if end == "cancel":
            raise asyncio.CancelledError
        raise ValueError

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert not exchange.is_complete
    assert [1] == await rows()


async def test_held_stream_reads_on_the_servers_cursor(db, drive, timeline):
    """G7: `stream="hold"` keeps an unbuffered result readable to the body's end."""

    @session_options(stream="hold")
    async def app(scope, receive, send):
        found = await db.session.stream_scalars(numbers(5000), execution_options={"yield_per": 100})
        await send(start(200))
        count = 0
        async for _ in found:
            count += 1
        await send(body(str(count).encode()))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert b"5000" == exchange.body
    assert ["checkout", "begin", "start 200", "commit", "checkin", "last body"] == timeline


async def test_unread_result_is_no_obstacle_to_the_end(db, drive, rows, engine):
    """G19: a server's cursor that is left half read ends with its request; the next is served."""

    @session_options(stream="hold")
    async def app(scope, receive, send):
        found = await db.session.stream_scalars(numbers(5000), execution_options={"yield_per": 10})
        await anext(aiter(found))
        await respond(send, int(scope["path"][1:]))

    wrapped = DBSessionMiddleware(app, database=db)
    statuses = [(await drive(wrapped, http_scope(path))).status for path in ("/200", "/500")]
    async with db.session_scope() as session:
        session.add(Item(id=1))

    assert [200, 500] == statuses
    assert [1] == await rows()


async def test_late_use_is_refused(db, drive):
    """G9: after its request the session refuses use."""
    kept = []

    async def app(scope, receive, send):
        kept.append(db.session)
        await db.session.scalar(sa.select(1))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    with pytest.raises(SessionScopeClosedError):
        await kept[0].scalar(sa.select(1))


async def test_requests_at_the_same_time_share_nothing(db, drive, rows):
    """G11, G12: twenty requests at once have a session each, and all is written."""
    sessions = set()

    async def app(scope, receive, send):
        number = int(scope["path"][1:])

        async def child():
            sessions.add(id(db.session))
            db.session.add(Item(id=number))
            await db.session.flush()

        await asyncio.create_task(child())
        assert id(db.session) in sessions
        await barrier.wait()
        await respond(send)

    barrier = asyncio.Barrier(2)
    wrapped = DBSessionMiddleware(app, database=db)
    exchanges = await asyncio.gather(*(drive(wrapped, http_scope(f"/{n}")) for n in range(20)))

    assert [200] * 20 == [each.status for each in exchanges]
    assert list(range(20)) == await rows()


async def test_two_tasks_in_one_session_get_an_error(db, rows):
    """G13: the second task is refused before anything is sent, and the connection stays whole."""
    async with db.session_scope() as session:
        session.add(Item(id=1))
        slow = asyncio.create_task(session.scalar(sa.text("SELECT SLEEP(0.05)")))
        await asyncio.sleep(0)
        with pytest.raises(ConcurrentSessionUseError):
            await session.scalar(sa.select(1))
        await slow

    assert [1] == await rows()


async def test_scope_waits_for_a_sibling_that_runs_a_statement(db, drive, engine, rows):
    """G22: after a failing branch of a cold `gather` the other's statement is let finish."""
    is_running = asyncio.Event()
    siblings = []

    @sa.event.listens_for(engine.sync_engine, "before_cursor_execute")
    def running(connection, cursor, statement, *more):
        if "SLEEP" in statement:
            is_running.set()

    async def sibling():
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text("SELECT SLEEP(0.1)"))
        return "finished"

    async def fail():
        await is_running.wait()
        raise ValueError

    async def app(scope, receive, send):
        siblings.append(asyncio.ensure_future(sibling()))
        await asyncio.gather(siblings[0], fail())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ValueError)
    assert "finished" == await siblings[0]
    assert [] == await rows()


async def test_sibling_that_outlives_the_deadline_is_cut_off(engine, drive, rows):
    """G22: after `cleanup_timeout` the connection is thrown away, and the pool is intact."""
    db = Database(engine, cleanup_timeout=0.05)
    is_running = asyncio.Event()
    siblings = []

    @sa.event.listens_for(engine.sync_engine, "before_cursor_execute")
    def running(connection, cursor, statement, *more):
        if "SLEEP" in statement:
            is_running.set()

    async def sibling():
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text("SELECT SLEEP(0.5)"))

    async def app(scope, receive, send):
        siblings.append(asyncio.ensure_future(sibling()))
        await is_running.wait()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    await asyncio.gather(*siblings, return_exceptions=True)

    assert isinstance(exchange.error, ConcurrentSessionUseError)
    assert [] == await rows()
    async with engine.connect() as connection:
        assert 1 == await connection.scalar(sa.select(1))


async def test_savepoint_is_rolled_back_alone(db, drive, rows):
    """A nested block that fails takes back what it did, and no more."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        with contextlib.suppress(ValueError):
            async with db.transactional("NESTED"):
                db.session.add(Item(id=2))
                raise ValueError
        with pytest.raises(sa.exc.IntegrityError):
            async with db.session.begin_nested():
                await db.session.execute(sa.insert(Item).values(id=1))
        async with db.transactional("REQUIRES_NEW"):
            db.session.add(Item(id=3))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1, 3] == await rows()


async def test_autocommit_needs_no_commit(engine, drive, rows, timeline):
    """Mode "autocommit": each statement is durable, a `begin()` inside is a transaction.

    The connection's next user has transactions again.
    """
    db = Database(engine, mode="autocommit")
    kept = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        kept.append(await rows())
        with contextlib.suppress(ValueError):
            async with db.session.begin():
                db.session.add(Item(id=2))
                await db.session.flush()
                raise ValueError
        await respond(send, 500)

    await drive(DBSessionMiddleware(app, database=db))
    async with engine.connect() as connection:
        autocommit = await connection.scalar(sa.text("SELECT @@autocommit"))

    assert [[1]] == kept
    assert [1] == await rows()
    assert 0 == autocommit


async def test_label_stands_behind_each_statement(engine, drive):
    """`label_transactions="comment"`: the server sees the block's name, also with a percent."""
    db = Database(engine, label_transactions="comment")
    seen = []

    @sa.event.listens_for(engine.sync_engine, "after_cursor_execute")
    def executed(connection, cursor, statement, *more):
        seen.append(statement)

    async def app(scope, receive, send):
        async with db.transactional("REQUIRES_NEW", label="100% */ ours"):
            found = await db.session.scalar(
                sa.text("SELECT info FROM information_schema.processlist WHERE id = :id"),
                {"id": await db.session.scalar(sa.text("SELECT CONNECTION_ID()"))},
            )
            assert found is not None
            assert found.endswith("/* 100% / ours */")
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 2 == len(seen)
