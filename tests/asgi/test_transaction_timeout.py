"""`timeout` of a request's transaction: seconds from its BEGIN, for whatever it waits for."""

import asyncio
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.util import await_only

from asgi_dbscope import (
    CommitInDoubtError,
    ConfigurationError,
    DBSessionMiddleware,
    Outcome,
    State,
    TransactionTimeoutError,
    current_scope,
    session_options,
)
from tests.fix_asgi import respond
from tests.fix_clock import LONG
from tests.fix_database import POSTGRES_DRIVERS, Item

ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
ON_ALL = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)
SLOW = sa.text("SELECT pg_sleep(30)")


@ON_POSTGRES
async def test_statement_that_takes_too_long_is_interrupted(db, drive, rows):
    """The statement ends when the transaction's time is up, and the answer is 504."""
    outcomes = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await db.session.flush()
            await db.session.execute(SLOW)
        except TransactionTimeoutError:
            task = asyncio.current_task()
            assert task is not None
            outcomes.append(task.cancelling())
            raise

    begun = monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.2))

    assert 504 == exchange.status
    assert [0] == outcomes
    assert monotonic() - begun < 10
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_thread_of_the_driver_gives_up_a_statement_that_takes_too_long(db, drive):
    """The thread of aiosqlite does not go on with it, so that the rollback need not wait."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text(endless))

    begun = monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert 504 == exchange.status
    assert monotonic() - begun < 20


@ON_ALL
async def test_time_that_is_up_in_the_moment_of_the_answer_ends_the_transaction_once(
    db, drive, clock, caplog
):
    """The clock's rollback waits for that of the response, and finds nothing left to do."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        clock.forward(LONG, current_scope())
        await respond(send, 409)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))
    await asyncio.sleep(0.01)

    assert 409 == exchange.status
    assert [] == caplog.messages


@ON_ALL
@pytest.mark.parametrize("status", [201, 404])
async def test_time_that_is_up_after_the_end_is_no_error(db, engine, drive, rows, status):
    """G1, G3: while the connection goes back to the pool, what was answered stays answered."""
    scopes: list[Any] = []

    @sa.event.listens_for(engine.sync_engine, "reset")
    def be_late(*args):
        for scope in scopes:
            scope.watch.deadline = 0.0
            asyncio.get_running_loop().call_soon(scope.watch._look)

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        if status == 404:
            db.set_rollback_only()
        await respond(send, status)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=30))

    assert exchange.error is None
    assert (status, b"ok") == (exchange.status, exchange.body)
    assert ([1] if status == 201 else []) == await rows()


@ON_ALL
async def test_transaction_is_over_in_time_also_where_nobody_uses_it(db, drive, rows, engine):
    """While the handler waits elsewhere: rolled back at once, the connection free; no 2xx."""
    scopes: list[Any] = []

    async def app(scope, receive, send):
        session_scope = current_scope()
        scopes.append(session_scope)
        db.session.add(Item(id=1))
        await db.session.flush()
        while session_scope.state is not State.IDLE or engine.pool.checkedout():
            await asyncio.sleep(0.01)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert 504 == exchange.status
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert [] == await rows()


@ON_ALL
async def test_session_is_refused_after_its_time(db, drive, clock):
    """The next use is the error; caught, the head that claims a success is it again."""
    seen = []

    async def app(scope, receive, send):
        session_scope = current_scope()
        await db.session.execute(sa.text("SELECT 1"))
        clock.forward(LONG, session_scope)
        while session_scope.state is not State.IDLE:
            await asyncio.sleep(0.01)
        for _ in range(2):
            try:
                await db.session.execute(sa.text("SELECT 1"))
            except TransactionTimeoutError as error:
                seen.append(str(error))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))

    assert 504 == exchange.status
    assert 2 == len(seen)
    assert "took longer than its timeout of 300 seconds and was rolled back." in seen[1]


async def test_error_response_of_the_apps_own_goes_out(db, drive):
    """An app that tells of an error by itself is let."""

    async def app(scope, receive, send):
        session_scope = current_scope()
        with suppress(TransactionTimeoutError):  # the time may be up already, on a busy machine
            await db.session.execute(sa.text("SELECT 1"))
        while session_scope.state is not State.IDLE:
            await asyncio.sleep(0.01)
        await respond(send, 418)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert (418, b"ok") == (exchange.status, exchange.body)


@ON_ALL
async def test_transaction_in_time_is_none_the_wiser(db, drive, rows):
    """What ends in time commits, and the timer goes with it."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=30))

    assert 200 == exchange.status
    assert [1] == await rows()


@ON_POSTGRES
@pytest.mark.parametrize("way", ["head", "by hand"])
async def test_flush_that_waits_for_a_lock_at_commit_is_interrupted(db, drive, engine, rows, way):
    """What COMMIT brings with it has what is left of the time, too."""

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SELECT 1"))
        await db.release()
        if way == "by hand":
            async with db.session.begin():
                db.session.add(Item(id=1))
        else:
            await db.session.execute(sa.text("SELECT 1"))
            db.session.add(Item(id=1))
        await respond(send)

    async with engine.connect() as connection:
        await connection.execute(sa.insert(Item).values(id=1))
        exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.2))

    assert 504 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_statement_timeout_of_the_users_own_is_none_of_ours(db, drive):
    """An error of the server's before the time is up stays what it is."""

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SET LOCAL statement_timeout = 50"))
        await db.session.execute(SLOW)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=30))

    assert isinstance(exchange.error, sa.exc.DBAPIError)


@ON_POSTGRES
async def test_server_may_be_faster_than_the_clock(db, drive):
    """Where the server's own limit ends the statement first, it is the same error."""

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SET LOCAL statement_timeout = 50"))
        db.scope.watch.deadline = 0.0
        await db.session.execute(SLOW)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=30))

    assert 504 == exchange.status


LIMITS = sa.text(
    "SELECT name, setting FROM pg_settings WHERE name IN "
    "('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')"
)
"""Those that the server knows, in milliseconds; `transaction_timeout` from PostgreSQL 17 on."""


@ON_POSTGRES
async def test_server_knows_in_every_transaction_and_forgets_with_it(db, drive, engine):
    """G20: each transaction of the scope has the limits, and the connection's next user none."""
    seen = []

    async def app(scope, receive, send):
        seen.append(dict((await db.session.execute(LIMITS)).all()))
        await db.session.commit()
        seen.append(dict((await db.session.execute(LIMITS)).all()))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db, timeout=5))
    async with engine.connect() as connection:
        after = dict((await connection.execute(LIMITS)).all())

    assert {"statement_timeout", "idle_in_transaction_session_timeout"} <= after.keys()
    assert [{**dict.fromkeys(after, "6000"), "statement_timeout": "5000"}] * 2 == seen
    assert {"0"} == set(after.values())


@ON_POSTGRES
async def test_time_begins_anew_with_each_transaction(db, drive, clock, rows):
    """The timeout is the transaction's and not the request's."""

    async def app(scope, receive, send):
        for number in range(4):
            db.session.add(Item(id=number))
            await db.session.flush()
            clock.forward(LONG / 2, current_scope())
            await db.release()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))

    assert 200 == exchange.status
    assert 4 == len(await rows())


async def test_endpoint_may_have_its_own(db, drive):
    """`session_options(timeout=...)` and `session_scope(timeout=...)` say it for one."""
    timeouts = []

    @session_options(timeout=7)
    async def endpoint():
        timeouts.append(current_scope().options.timeout)
        async with db.session_scope(timeout=3):
            timeouts.append(db.scope.options.timeout)

    async def app(scope, receive, send):
        timeouts.append(current_scope().options.timeout)
        await endpoint()
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db, timeout=5))

    assert [5, 7, 3] == timeouts


OWN = {
    "session_scope()": lambda db: db.session_scope(),
    "transactional(REQUIRES_NEW)": lambda db: db.transactional("REQUIRES_NEW"),
    "branch()": lambda db: db.branch(),
}


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("label", OWN)
async def test_scope_inside_has_the_requests_timeout(db, drive, rows, label):
    """A transaction of its own in a request takes no longer than the request's would."""

    async def app(scope, receive, send):
        async with OWN[label](db) as session:
            session.add(Item(id=1))
            await session.execute(SLOW)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert 504 == exchange.status
    assert [] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("label", OWN)
async def test_scope_inside_shares_the_time_of_the_open_transaction(db, drive, clock, label):
    """It ends with the transaction around it: what began later has no more time than that."""
    errors = []

    async def app(scope, receive, send):
        outer = current_scope()
        await db.session.execute(sa.text("SELECT 1"))
        assert outer.watch is not None
        try:
            async with OWN[label](db) as session:
                inner = db.scope
                await session.execute(sa.text("SELECT 1"))
                assert outer.watch.deadline == pytest.approx(inner.watch.deadline)
                assert inner.watch.timeout < LONG
                clock.forward(LONG, inner, outer)
                while inner.state is not State.IDLE:
                    await asyncio.sleep(0.005)
        except TransactionTimeoutError as error:
            errors.append(str(error))
            raise

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))

    assert 504 == exchange.status
    [message] = errors
    assert message.startswith(f"The transaction of {label} was rolled back: the timeout of 300")
    assert "seconds has passed for that of GET /, around it, whose time it shares" in message


@ON_ALL
async def test_answer_waits_until_the_connection_is_back(db, engine, drive):
    """G8: the clock's rollback is over when its connection is in the pool, and the request then."""
    checked_out = []

    @sa.event.listens_for(engine.sync_engine, "checkin")
    def return_slowly(*args):
        for _ in range(10):
            await_only(asyncio.sleep(0))

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SELECT 1"))
        while db.session.in_transaction():
            await asyncio.sleep(0)
        await respond(send, 503)

    async def on_send(message):
        checked_out.append(engine.pool.checkedout())

    await drive(DBSessionMiddleware(app, database=db, timeout=0.05), on_send=on_send)

    assert [0, 0] == checked_out


async def test_head_that_waits_for_a_commit_that_the_clock_cuts_short_claims_no_success(
    db, engine, drive, clock
):
    """G1: the transaction that a child task commits is the response's, too."""
    is_committing = asyncio.Event()
    tasks = []

    def wait_for_ever(connection):
        is_committing.set()
        await_only(asyncio.Event().wait())

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        tasks.append(asyncio.create_task(db.release()))
        await is_committing.wait()
        asyncio.get_running_loop().call_soon(clock.forward, LONG, current_scope())
        await respond(send)

    sa.event.listen(engine.sync_engine, "commit", wait_for_ever)
    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))
    sa.event.remove(engine.sync_engine, "commit", wait_for_ever)
    [error] = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(error, CommitInDoubtError)
    assert [] == exchange.messages
    assert isinstance(exchange.error, CommitInDoubtError)


async def test_scope_inside_with_a_timeout_of_its_own_shares_nothing(db, drive, clock, rows):
    """Whoever names a timeout has that: for a job that takes longer than its request may."""

    async def app(scope, receive, send):
        outer = current_scope()
        await db.session.execute(sa.text("SELECT 1"))
        async with db.session_scope(timeout=2 * LONG) as session:
            await session.execute(sa.text("SELECT 1"))
            clock.forward(LONG, outer, db.scope)
            while outer.state is not State.IDLE:
                await asyncio.sleep(0.005)
            session.add(Item(id=1))
        async with db.session_scope() as session:  # after the request's time: an error's record
            session.add(Item(id=2))

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))

    assert (None, None) == (exchange.status, exchange.error)
    assert [1, 2] == await rows()


@ON_POSTGRES
async def test_scope_of_its_own_raises_at_its_end(db, rows):
    """A job whose transaction ran out of time doesn't end well."""
    with pytest.raises(TransactionTimeoutError):
        async with db.session_scope(timeout=0.1) as session:
            session.add(Item(id=1))
            await session.flush()
            while db.scope.state is not State.IDLE:
                await asyncio.sleep(0.01)

    assert [] == await rows()


@ON_POSTGRES
async def test_cancellation_of_the_users_own_stays_one(db, clock):
    """G10: an operation that somebody else cancels at the same time ends cancelled."""
    scopes: list[Any] = []
    is_inside = asyncio.Event()

    async def work():
        async with db.session_scope(timeout=LONG) as session:
            await session.execute(sa.text("SELECT 1"))
            scopes.append(db.scope)
            is_inside.set()
            await session.execute(SLOW)

    task = asyncio.create_task(work())
    await is_inside.wait()
    clock.forward(LONG, *scopes)
    assert 1 == task.cancelling()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_shorter_timeout_of_the_users_own_is_none_of_ours(db):
    """G10: an `asyncio.timeout()` around a statement says so itself, and the scope rolls back."""
    with pytest.raises(TimeoutError) as raised:
        async with db.session_scope(timeout=30) as session, asyncio.timeout(0.05):
            await session.execute(SLOW)

    assert TimeoutError is raised.type


async def test_autocommit_has_no_transaction_to_limit(db, drive, rows):
    """In mode "autocommit" bare statements have no limit."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        assert db.scope.watch is None
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit", timeout=0.1))

    assert 200 == exchange.status


@pytest.mark.parametrize("value", [0, -1, "1", True, float("nan")])
def test_seconds_are_checked(value):
    """A timeout is a number of seconds above 0."""
    with pytest.raises(ConfigurationError, match="timeout must be a number of seconds"):
        session_options(timeout=value)


async def test_code_that_never_waits_is_late_too(db, drive, rows):
    """G4: no timer strikes where the handler holds up the event loop; COMMIT isn't sent then."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        sleep(0.2)  # noqa: ASYNC251 - that is the point
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.1))

    assert 504 == exchange.status
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert [] == await rows()


async def test_commit_that_a_listener_holds_up_is_in_doubt(db, engine, drive, clock):
    """G15: time that is up inside COMMIT, where the driver says nothing, leaves it in doubt."""
    scopes: list[Any] = []

    def wait_for_ever(connection):
        asyncio.get_running_loop().call_soon(clock.forward, LONG, *scopes)
        await_only(asyncio.Event().wait())

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await db.session.execute(sa.text("SELECT 1"))
        await respond(send)

    sa.event.listen(engine.sync_engine, "commit", wait_for_ever)
    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=LONG))
    sa.event.remove(engine.sync_engine, "commit", wait_for_ever)

    assert [] == exchange.messages
    assert isinstance(exchange.error, CommitInDoubtError)
    assert Outcome.IN_DOUBT is scopes[0].outcome
