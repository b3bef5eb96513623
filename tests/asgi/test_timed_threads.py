"""`timeout`, `idle_warning` and `idle_timeout` of a synchronous database."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from time import monotonic
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    State,
    TransactionIdleError,
    TransactionTimeoutError,
    _dialects,
)
from tests.fix_clock import LONG
from tests.fix_database import Item
from tests.fix_sync import SYNC_DRIVERS
from tests.sync_apps import endpoint

ENDLESS = {
    "sqlite": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    ),
    "psycopg": "SELECT pg_sleep(30)",
}


@pytest.fixture(params=SYNC_DRIVERS)
def engine(request, make_sync_engine):
    """A synchronous engine."""
    return make_sync_engine(request.param)


def wait_for(condition):
    """Wait until it is so."""
    pause, deadline = threading.Event(), monotonic() + 10
    while not condition():
        assert monotonic() < deadline
        pause.wait(0.005)


@pytest.mark.parametrize("moment", ["commit", "reset"])
async def test_time_that_is_up_with_the_commit_is_no_error(engine, drive, moment):
    """G1: whether the clock struck just before or after COMMIT was answered, the answer counts."""
    db = Database(engine)
    scopes: list[Any] = []

    @sa.event.listens_for(engine, moment)
    def be_late(*args):
        for scope in scopes:
            scope.watch.deadline = 0.0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_dialects, "cut", lambda connection: False)
                scope.watch._look()

    def work():
        scopes.append(db.scope)
        db.session.add(Item(id=1))
        db.session.flush()

    exchange = await drive(DBSessionMiddleware(endpoint(work), database=db, timeout=30))

    scopes.clear()
    with engine.connect() as connection:
        assert [1] == list(connection.scalars(sa.select(Item.id)))
    assert exchange.error is None
    assert exchange.is_complete
    assert 300 > (exchange.status or 500)


async def test_statement_that_takes_too_long_is_interrupted(engine, drive):
    """The connection is cut, the thread gets an error at once, and the answer is 504."""
    db = Database(engine)
    begun = monotonic()

    def work():
        db.session.execute(sa.text(ENDLESS[engine.driver.replace("pysqlite", "sqlite")]))

    exchange = await drive(DBSessionMiddleware(endpoint(work), database=db, timeout=0.2))

    assert 504 == exchange.status
    assert monotonic() - begun < 10
    assert 0 == engine.pool.checkedout()


def test_transaction_is_over_though_its_time_was_up_as_a_statement_ended(engine, clock):
    """Where the clock comes too late to cut a thread's statement, the thread itself rolls back."""
    db = Database(engine)

    with pytest.raises(TransactionTimeoutError), db.session_scope(timeout=LONG) as session:
        session.scalar(sa.text("SELECT 1"))
        sa.event.listen(session, "after_flush", lambda *_: clock.forward(LONG, db.scope))
        session.add(Item(id=1))
        session.flush()

        assert State.IDLE is db.scope.state
        assert 0 == engine.pool.checkedout()

    with engine.connect() as connection:
        assert [] == connection.scalars(sa.select(Item.id)).all()


@pytest.mark.parametrize(
    ("option", "kind"),
    [("timeout", TransactionTimeoutError), ("idle_timeout", TransactionIdleError)],
)
def test_transaction_is_over_also_where_nobody_uses_it(engine, option, kind):
    """Rolled back while its thread is elsewhere; the next use, and the end, are the error."""
    db = Database(engine, idle_timeout=0.05 if option == "idle_timeout" else None)
    with (
        pytest.raises(kind),
        db.session_scope(timeout=0.05 if option == "timeout" else None) as session,
    ):
        session.add(Item(id=1))
        session.flush()
        wait_for(lambda: db.scope.state is State.IDLE)
        wait_for(lambda: not engine.pool.checkedout())
        with pytest.raises(kind):
            session.execute(sa.text("SELECT 1"))

    with engine.connect() as connection:
        assert [] == connection.scalars(sa.select(Item.id)).all()


async def test_scope_inside_shares_the_requests_time(engine, drive, clock):
    """A block with a session of its own ends with the transaction of the request around it."""
    db = Database(engine)
    errors = []

    def work():
        db.session.execute(sa.text("SELECT 1"))
        try:
            with db.transactional("REQUIRES_NEW") as session:
                inner = db.scope
                session.execute(sa.text("SELECT 1"))
                threading.Thread(target=clock.forward, args=(LONG, inner)).start()
                wait_for(lambda: inner.state is State.IDLE)
        except TransactionTimeoutError as error:
            errors.append(str(error))
            raise

    exchange = await drive(DBSessionMiddleware(endpoint(work), database=db, timeout=LONG))

    assert 504 == exchange.status
    [message] = errors
    assert "for that of GET /, around it, whose time it shares" in message


def test_transaction_in_time_is_none_the_wiser(engine):
    """What ends in time commits."""
    db = Database(engine, idle_warning=30, idle_timeout=30)
    with db.session_scope(timeout=30) as session:
        session.add(Item(id=1))
        session.flush()
        watch: Any = db.scope.watch
        session.commit()
        watch._expire(TransactionTimeoutError("late"))  # the timer's thread was on its way
        assert db.scope.expiry is None
        session.add(Item(id=2))

    with engine.connect() as connection:
        assert [1, 2] == connection.scalars(sa.select(Item.id)).all()


def test_idle_transaction_is_told_of_with_its_place(engine, caplog):
    """The warning names the line that the thread is at."""
    db = Database(engine, idle_warning=0.03)

    @db.session_scope
    def charge():
        db.session.execute(sa.text("SELECT 1"))
        wait_for(lambda: caplog.messages)

    charge()

    [message] = caplog.messages
    assert "has been idle for" in message
    assert "wait_for() (asgi/test_timed_threads.py:" in message
    assert "`db.release()`" in message


def test_place_of_a_thread_that_is_elsewhere_is_not_told(engine, caplog):
    """A thread that has begun and gone on to other things says nothing of who waits."""
    db = Database(engine, idle_warning=0.03)

    def begin():
        db.session.execute(sa.text("SELECT 1"))

    with db.session_scope(), ThreadPoolExecutor(1) as threads:
        threads.submit(copy_context().run, begin).result()
        wait_for(lambda: caplog.messages)

    [message] = caplog.messages
    assert "holds a connection. Before such a wait" in message


def test_statement_of_the_connection_that_takes_too_long_is_interrupted(make_sync_engine):
    """Past the session it is the same error."""
    engine = make_sync_engine("psycopg")
    db = Database(engine)
    with pytest.raises(TransactionTimeoutError), db.session_scope(timeout=0.1) as session:
        session.connection().execute(sa.text("SELECT pg_sleep(30)"))

    assert 0 == engine.pool.checkedout()


def test_connection_that_was_cut_unnoticed_does_not_come_back(make_sync_engine):
    """G19: psycopg has said nothing to the server yet, so its ROLLBACK succeeds."""
    engine = make_sync_engine("psycopg")
    db = Database(engine)
    with db.session_scope() as session:
        db.scope.set_rollback_only()
        assert _dialects.cut(session.connection())

    with engine.connect() as connection:
        assert 1 == connection.scalar(sa.text("SELECT 1"))


def test_statement_of_the_connection_is_not_idle(make_sync_engine):
    """A thread that is inside a statement of the connection is at work."""
    engine = make_sync_engine("psycopg")
    db = Database(engine, idle_timeout=0.05)
    with db.session_scope() as session, session.begin_nested():
        session.connection().execute(sa.insert(Item).values(id=1))
        session.connection().execute(sa.text("SELECT pg_sleep(0.15)"))

    with engine.connect() as connection:
        assert [1] == connection.scalars(sa.select(Item.id)).all()


def test_rows_that_are_read_too_late_are_the_same_error(make_sync_engine):
    """The thread that reads them ends the transaction; nobody does beside it."""
    engine = make_sync_engine("sqlite")
    db = Database(engine)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    with pytest.raises(TransactionTimeoutError), db.session_scope(timeout=0.1) as session:
        for _ in session.execute(sa.text(numbers), execution_options={"yield_per": 1}):
            pass

    assert 0 == engine.pool.checkedout()


def test_end_of_a_transaction_that_was_cut_is_no_failed_rollback(make_sync_engine, caplog):
    """Where the connection was cut nothing is said on it any more, about a savepoint neither."""
    engine = make_sync_engine("psycopg")
    db = Database(engine)
    with (
        pytest.raises(TransactionTimeoutError),
        db.session_scope(timeout=0.05) as session,
        session.begin_nested(),
    ):
        session.add(Item(id=1))
        session.flush()
        wait_for(lambda: db.scope.state is State.IDLE)

    assert [] == caplog.messages
    assert 0 == engine.pool.checkedout()
