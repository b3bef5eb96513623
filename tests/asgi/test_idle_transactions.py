"""`idle_warning`, `idle_timeout`: a transaction that waits for something else holds its locks."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.util import await_only

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    State,
    TransactionIdleError,
    current_scope,
)
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_clock import LONG
from tests.fix_database import POSTGRES_DRIVERS, Item

ON_ALL = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


class Elsewhere:
    """An outside API that answers once somebody has seen what was to be seen."""

    def __init__(self):
        self.answer = asyncio.Event()

    async def ask(self):
        """Wait for the answer."""
        await asyncio.wait_for(self.answer.wait(), 10)


def charging(db, elsewhere):
    """An app that writes, and then asks elsewhere."""

    async def charge():
        await elsewhere.ask()

    async def app(scope, receive, send):
        db.session.add(Item(id=int(scope["path"][1:])))
        await db.session.flush()
        await charge()
        await respond(send)

    return app


async def told(caplog, count=1):
    """Wait for that many warnings."""
    async with asyncio.timeout(10):
        while len([each for each in caplog.messages if "idle" in each]) < count:
            await asyncio.sleep(0.005)
    return [each for each in caplog.messages if "idle" in each]


@ON_ALL
async def test_idle_transaction_is_told_of_with_its_place_and_the_cure(engine, drive, rows, caplog):
    """The warning names the request, the innermost line of the user's, and `release()`."""
    db = Database(engine, idle_warning=0.05)
    elsewhere = Elsewhere()
    app = DBSessionMiddleware(charging(db, elsewhere), database=db)
    request = asyncio.create_task(drive(app, http_scope("/1")))

    [message] = await told(caplog)
    elsewhere.answer.set()
    exchange = await request

    assert message.startswith("GET /1: its transaction on 'default' has been idle for ")
    assert ", while Elsewhere.ask() (asgi/test_idle_transactions.py:" in message
    assert "`await db.release()`" in message
    assert 200 == exchange.status
    assert [1] == await rows()


async def test_place_is_told_once(engine, drive, caplog):
    """The log of a place that is slow every time has one line."""
    db = Database(engine, idle_warning=0.02)
    elsewhere = Elsewhere()
    app = DBSessionMiddleware(charging(db, elsewhere), database=db)
    requests = [asyncio.create_task(drive(app, http_scope(f"/{n}"))) for n in range(2)]
    await told(caplog)
    await asyncio.sleep(0.1)
    elsewhere.answer.set()
    await asyncio.gather(*requests)

    assert 1 == len(await told(caplog))


async def test_places_that_were_told_are_not_kept_for_ever(engine, drive, caplog):
    """Where no place is known it is the request's path, and clients know many."""
    db = Database(engine, idle_warning=0.02)
    db.idle_places.update(f"GET /{number}" for number in range(1000))
    elsewhere = Elsewhere()
    app = DBSessionMiddleware(charging(db, elsewhere), database=db)
    request = asyncio.create_task(drive(app, http_scope("/1")))
    await told(caplog)
    elsewhere.answer.set()
    await request

    assert 1 == len(db.idle_places)


@ON_ALL
async def test_release_before_the_wait_is_the_cure(engine, drive, caplog, rows):
    """G6: who has given the connection back idles at nobody's cost, and nothing is said."""
    db = Database(engine, idle_warning=0.02, idle_timeout=0.05)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.release()
        await asyncio.sleep(0.15)
        db.session.add(Item(id=2))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1, 2] == await rows()
    assert [] == caplog.messages


@ON_ALL
async def test_idle_transaction_is_ended_and_its_connection_free(engine, drive, rows, timeline):
    """After `idle_timeout` the work is rolled back, at once, and the head is no success."""
    db = Database(engine, idle_timeout=0.05)

    async def app(scope, receive, send):
        session_scope = current_scope()
        db.session.add(Item(id=1))
        await db.session.flush()
        while session_scope.state is not State.IDLE or engine.pool.checkedout():
            await asyncio.sleep(0.005)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionIdleError)
    assert "idle for more than 0.05 seconds (idle_timeout)" in str(exchange.error)
    assert "`await db.release()`" in str(exchange.error)
    assert [] == exchange.messages
    assert ["checkout", "begin", "rollback", "checkin"] == timeline  # the connection is kept
    assert [] == await rows()


async def test_hooks_follow_the_rollback(engine, drive):
    """A hook that waits for the rollback doesn't wait for the response."""
    db = Database(engine, idle_timeout=0.05)
    called = asyncio.Event()

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SELECT 1"))
        db.on_rollback(called.set)
        await asyncio.wait_for(called.wait(), 10)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionIdleError)


@ON_POSTGRES
async def test_time_that_is_up_while_another_database_commits_is_told(engine, make_engine, drive):
    """The second database of a request idles while the first one commits; it says so by itself."""
    first = Database(engine, name="first")
    other = make_engine(engine.driver)
    second = Database(other, name="second", idle_timeout=0.05)

    scopes: list[Any] = []

    def wait_for_the_other(connection):
        async def until_it_is_over():
            while scopes[0].state is not State.IDLE:
                await asyncio.sleep(0.005)

        await_only(until_it_is_over())

    async def app(scope, receive, send):
        scopes.append(second.scope)
        await first.session.execute(sa.text("SELECT 1"))
        await second.session.execute(sa.text("SELECT 1"))
        await respond(send)

    sa.event.listen(engine.sync_engine, "commit", wait_for_the_other)
    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))
    sa.event.remove(engine.sync_engine, "commit", wait_for_the_other)
    await other.dispose()

    assert isinstance(exchange.error, TransactionIdleError)
    assert [] == exchange.messages


@ON_ALL
async def test_next_use_is_the_error(engine, drive, rows):
    """Code that comes back to its session is told where it has been too long."""
    db = Database(engine, idle_timeout=0.05)

    async def app(scope, receive, send):
        session_scope = current_scope()
        db.session.add(Item(id=1))
        await db.session.flush()
        while session_scope.state is not State.IDLE:
            await asyncio.sleep(0.005)
        with pytest.raises(TransactionIdleError, match="rolled back, while"):
            await db.session.execute(sa.text("SELECT 1"))
        with pytest.raises(TransactionIdleError):
            await db.session.commit()
        await respond(send, 503)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 503 == exchange.status
    assert [] == await rows()


@ON_POSTGRES
async def test_long_statement_is_not_idle(engine, drive, rows, caplog):
    """Whoever is inside a statement is at work, however long it takes."""
    db = Database(engine, idle_warning=0.03, idle_timeout=0.1)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.text("SELECT pg_sleep(0.3)"))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()
    assert [] == caplog.messages


@ON_POSTGRES
async def test_rows_of_a_server_side_cursor_are_not_idle(engine, drive, caplog):
    """What reads from a stream may take its time between the rows."""
    db = Database(engine, idle_warning=0.02, idle_timeout=0.05)
    numbers = []

    async def app(scope, receive, send):
        result = await db.session.stream(sa.text("SELECT generate_series(1, 4)"))
        async for (number,) in result:
            numbers.append(number)
            await asyncio.sleep(0.04)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1, 2, 3, 4] == numbers
    assert [] == caplog.messages


@ON_POSTGRES
async def test_many_short_statements_are_not_idle(engine, drive, clock, rows):
    """The clock looks at the last operation, with one timer for the whole transaction."""
    db = Database(engine, idle_timeout=LONG)

    async def app(scope, receive, send):
        for _ in range(8):
            await db.session.execute(sa.text("SELECT 1"))
            clock.forward(LONG / 2, current_scope())
        db.session.add(Item(id=1))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()


@ON_POSTGRES
async def test_locks_are_free(engine, drive):
    """A row that an idle transaction has locked can be had as soon as it is ended."""
    db = Database(engine, idle_timeout=0.1)
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Item).values(id=1))
    is_locked, is_seen = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await db.session.execute(sa.select(Item).with_for_update())
        is_locked.set()
        await is_seen.wait()
        await respond(send)

    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await is_locked.wait()
    async with asyncio.timeout(10), engine.begin() as connection:
        await connection.execute(sa.update(Item).values(note="mine"))
    is_seen.set()
    exchange = await request

    assert isinstance(exchange.error, TransactionIdleError)


@pytest.mark.parametrize("mode", ["manual", "transaction"])
async def test_head_after_a_rollback_nobody_asked_for_is_never_a_success(engine, drive, mode):
    """G4: not in mode "manual", nor in a dry run, whose rollback was to come at the head."""
    db = Database(engine, idle_timeout=0.05)

    async def app(scope, receive, send):
        session_scope = current_scope()
        if mode == "transaction":
            db.set_rollback_only()
        db.session.add(Item(id=1))
        await db.session.flush()
        while session_scope.state in {State.ACTIVE, State.ROLLBACK_ONLY_ACTIVE}:
            await asyncio.sleep(0.005)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode=mode))

    assert isinstance(exchange.error, TransactionIdleError)


@ON_ALL
async def test_idle_in_a_body_tears_it(engine, drive):
    """G7: a streaming body whose transaction was ended doesn't end cleanly."""
    db = Database(engine, idle_timeout=0.05)

    async def app(scope, receive, send):
        session_scope = current_scope()
        await send(start(200))
        await db.session.execute(sa.text("SELECT 1"))
        while session_scope.state is not State.IDLE:
            await asyncio.sleep(0.005)
        await send(body(b"all"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, TransactionIdleError)
    assert not exchange.is_complete


@pytest.mark.parametrize("name", ["idle_warning", "idle_timeout"])
def test_seconds_are_checked(name):
    """Both are a number of seconds above 0."""
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigurationError, match=f"{name} must be a number of seconds"):
        Database("sqlite+aiosqlite://", **options)
