"""A decorated function that lost to a conflict is called again, if the transaction is its own."""

import asyncio
import contextlib
import logging
import threading

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    Retry,
    current_scope,
    transactional,
)
from asgi_dbscope.testing import inject_conflicts
from tests.fix_asgi import body, start
from tests.fix_database import Item

AT_ONCE = Retry(attempts=3, base=0)


def insert(number=1):
    """Write one row."""
    return sa.insert(Item).values(id=number)


@pytest.mark.parametrize("kind", ["transactional", "session_scope"])
@pytest.mark.parametrize("at", ["commit", "INSERT"])
async def test_lost_call_is_made_again(kind, at, db, rows, timeline, caplog):
    """G16: each call has a session scope of its own, and the last one's value is returned."""
    attempts = []

    @getattr(db, kind)(retry=AT_ONCE)
    async def place(number):
        """Place it."""
        attempts.append((current_scope().attempt, current_scope().is_last_attempt))
        await db.session.execute(insert(number))
        return number

    with inject_conflicts(db, at=at, times=2), caplog.at_level(logging.INFO):
        value = await place(1)

    assert 1 == value
    assert ("place", "Place it.") == (place.__name__, place.__doc__)
    assert [(1, False), (2, False), (3, True)] == attempts
    assert 3 == timeline.count("checkin")
    assert [1] == await rows()
    assert "place(): attempt 1 of 3 has lost to a conflict (" in caplog.text


@pytest.mark.parametrize("kind", ["transactional", "session_scope"])
def test_lost_call_of_a_plain_function_is_made_again(kind, sync_db, sync_rows):
    """G16: the same for a synchronous engine, in whatever thread it is called."""
    attempts = []

    @getattr(sync_db, kind)(retry=Retry(base=0.001))
    def place():
        attempts.append(current_scope().attempt)
        sync_db.session.execute(insert())
        return threading.current_thread()

    with inject_conflicts(sync_db, times=2):
        thread = place()

    assert threading.current_thread() is thread
    assert [1, 2, 3] == attempts
    assert [1] == sync_rows()


def test_plain_function_that_goes_on_losing_raises_what_it_lost_to(sync_db, sync_rows):
    """G16: after the last attempt of a plain function the error is the caller's."""

    @sync_db.transactional(retry=AT_ONCE)
    def place():
        sync_db.session.execute(insert())

    injecting = inject_conflicts(sync_db, at="INSERT", times=None)
    with injecting as injected, pytest.raises(sa.exc.DBAPIError):
        place()

    assert 3 == injected.count
    assert [] == sync_rows()


async def test_last_loser_raises_what_it_lost_to(db, rows, caplog):
    """G16: after the last attempt the database's error is the caller's."""

    @db.transactional(retry=AT_ONCE)
    async def place():
        await db.session.execute(insert())

    with inject_conflicts(db, times=None) as injected, pytest.raises(sa.exc.DBAPIError):
        await place()

    assert 3 == injected.count
    assert "attempt 3 of 3 has lost to a conflict (" in caplog.text
    assert "no attempt is left" in caplog.text
    assert [] == await rows()


async def test_other_errors_are_raised_at_once(db):
    """G16: what isn't a conflict is the caller's."""
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append(1)
        raise LookupError

    with pytest.raises(LookupError):
        await place()

    assert [1] == attempts


async def test_error_of_ones_own_may_be_a_conflict(db):
    """G16: `also` names classes that mean a conflict."""
    attempts = []

    @db.transactional(retry=Retry(attempts=2, base=0, also=[LookupError]))
    async def place():
        attempts.append(1)
        raise LookupError

    with pytest.raises(LookupError):
        await place()

    assert [1, 1] == attempts


async def test_error_that_follows_a_conflict_is_one(db, rows):
    """G16: a function that answers the conflict with an error of its own has lost all the same."""
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append(1)
        try:
            await db.session.execute(insert())
        except sa.exc.DBAPIError:
            raise LookupError from None

    with inject_conflicts(db, at="INSERT"):
        await place()

    assert [1, 1] == attempts
    assert [1] == await rows()


async def test_error_after_a_healed_conflict_is_the_callers(db):
    """G16: a conflict that a savepoint healed is forgotten."""
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append(1)
        with contextlib.suppress(sa.exc.DBAPIError):
            async with db.session.begin_nested():
                await db.session.execute(insert())
        raise LookupError

    with inject_conflicts(db, at="INSERT"), pytest.raises(LookupError):
        await place()

    assert [1] == attempts


async def test_group_of_errors_with_a_conflict_in_it_is_one(db, rows):
    """G16: what child tasks lost, in sessions of their own, comes out of a task group."""
    attempts = []

    async def write(number):
        async with db.branch() as session:
            await session.execute(insert(number))

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append(1)
        async with asyncio.TaskGroup() as group:
            group.create_task(write(1))

    with inject_conflicts(db, at="INSERT"):
        await place()

    assert [1, 1] == attempts
    assert [1] == await rows()


async def test_block_that_joins_leaves_it_to_the_transaction(db, drive, rows):
    """G16: inside a request's transaction a retry waits for the request's own."""
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append(("block", current_scope().attempt))
        await db.session.execute(insert())

    async def app(scope, receive, send):
        attempts.append(("request", current_scope().attempt))
        await place()
        await send(start())
        await send(body())

    with inject_conflicts(db, at="INSERT"):
        without = await drive(DBSessionMiddleware(app, database=db))
    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    once = [("request", 1), ("block", 1)]
    assert isinstance(without.error, sa.exc.DBAPIError)
    assert 200 == exchange.status
    assert [*once, *once, ("request", 2), ("block", 2)] == attempts
    assert [1] == await rows()


async def test_block_with_a_savepoint_leaves_it_to_the_transaction(db):
    """G16: rolling back to a savepoint takes back no conflict: that is for who began."""
    attempts = []

    @db.transactional("NESTED", retry=AT_ONCE)
    async def add_extra():
        attempts.append(1)
        await db.session.execute(insert(2))

    async with db.session_scope():
        with inject_conflicts(db, at="INSERT"), pytest.raises(sa.exc.DBAPIError):
            await add_extra()

    assert [1] == attempts


async def test_block_that_begins_on_the_requests_session_is_made_again(engine, drive, rows):
    """G16: in mode "autocommit" a block's transaction is its own, and the session's next try."""
    db = Database(engine, mode="autocommit")
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append((current_scope().attempt, current_scope().is_last_attempt))
        await db.session.execute(insert())

    async def app(scope, receive, send):
        await place()
        attempts.append((current_scope().attempt, current_scope().is_last_attempt))
        await send(start())
        await send(body())

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [(1, False), (2, False), (1, True)] == attempts
    assert [1] == await rows()


async def test_block_that_committed_forbids_the_replay_of_its_request(engine, drive, rows):
    """G16: a block's COMMIT is one of the request's attempt, whichever of its own tries it was."""
    db = Database(engine, mode="autocommit")
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place(number):
        attempts.append(number)
        await db.session.execute(insert(number))

    async def app(scope, receive, send):
        await place(1)
        with inject_conflicts(db, at="INSERT", times=None):
            await place(2)

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 2, 2, 2] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [1] == await rows()


async def test_block_of_its_own_is_made_again_inside_of_a_request(db, drive, rows):
    """G16: REQUIRES_NEW has a transaction of its own, and with it its own attempts."""
    attempts = []

    @db.transactional("REQUIRES_NEW", retry=AT_ONCE)
    async def audit():
        attempts.append(current_scope().attempt)
        await db.session.execute(insert())

    async def app(scope, receive, send):
        await audit()
        await send(start())
        await send(body())

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1, 2] == attempts
    assert [1] == await rows()


async def test_with_statement_is_refused(db, sync_db):
    """G16: a `with` block can't be run twice, and says so when it is entered."""
    message = "can't be run a second time. Make a function of it"

    with pytest.raises(ConfigurationError, match=message):
        async with db.transactional(retry=AT_ONCE):
            pass
    with pytest.raises(ConfigurationError, match=message):
        async with db.session_scope(retry=AT_ONCE):
            pass
    with pytest.raises(ConfigurationError, match=message), sync_db.transactional(retry=AT_ONCE):
        pass
    with pytest.raises(ConfigurationError, match=message), sync_db.session_scope(retry=AT_ONCE):
        pass


@pytest.mark.parametrize("propagation", ["SUPPORTS", "NOT_SUPPORTED", "MANDATORY", "NEVER"])
def test_retry_without_a_transaction_of_its_own_is_refused(propagation, db):
    """G16: a propagation that never begins a transaction has nothing to do again."""
    with pytest.raises(ConfigurationError, match="never has a transaction of its own"):
        db.transactional(propagation, retry=AT_ONCE)


def test_retry_of_a_block_is_checked_at_once(db):
    """G16: what is no `Retry` is refused where the decorator is made."""
    with pytest.raises(ConfigurationError, match="retry takes a Retry"):
        db.transactional(retry=3)
    with pytest.raises(ConfigurationError, match="retry takes a Retry"):
        db.session_scope(retry=3)


async def test_methods_and_the_decorator_without_a_database_have_it_too(engine, rows):
    """G16: class methods are called again, and the database may be found on entering."""
    db = Database(engine)

    class Service:
        @classmethod
        @transactional(database="default", retry=AT_ONCE)
        async def find(cls):
            raise AssertionError

        @db.transactional(retry=AT_ONCE)
        @classmethod
        async def place(cls):
            await db.session.execute(insert())

    with inject_conflicts(db, at="INSERT"):
        await Service.place()

    assert [1] == await rows()


async def test_cancellation_between_two_calls_ends_them(db):
    """G16, G10: a pause is an `await` like any other."""
    attempts = []

    @db.transactional(retry=Retry(base=60, cap=60, max_elapsed=600))
    async def place():
        attempts.append(1)
        await db.session.execute(insert())

    with inject_conflicts(db, at="INSERT"):
        task = asyncio.create_task(place())
        while not attempts or db.session_factory.kw["bind"].pool.checkedout():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert [1] == attempts
