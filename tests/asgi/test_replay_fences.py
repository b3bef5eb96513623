"""What keeps a request from being replayed: each thing that must not be done twice."""

import asyncio
import contextlib
import logging

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Retry,
    current_scope,
    on_commit,
    on_completion,
    on_rollback,
    session_options,
)
from asgi_dbscope.testing import inject_conflicts
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import Item

AT_ONCE = Retry(attempts=3, base=0)

NEVER_MIND = Retry(attempts=3, base=60, cap=60, max_elapsed=600)
"""Pauses so long that a test would not live to see the next attempt."""


async def lose(db, send):
    """Write, and answer; COMMIT meets with a conflict."""
    db.session.add(Item(id=1))
    await respond(send)


def messages_of(*contents):
    """The messages of a body that comes in pieces."""
    last = len(contents) - 1
    return [
        {"type": "http.request", "body": content, "more_body": number < last}
        for number, content in enumerate(contents)
    ]


def fences(caplog):
    """Why there was no other attempt, as the log says."""
    said = [each.getMessage().partition(", and was the last one: ") for each in caplog.records]
    return [reason for _, found, reason in said if found]


@pytest.fixture(autouse=True)
def quietly(caplog):
    """Record what the package logs."""
    with caplog.at_level(logging.INFO, "asgi_dbscope"):
        yield


async def test_body_above_its_limit_is_not_kept(db, drive, caplog):
    """G16: beyond `max_body` bytes nothing is replayed, and the original error surfaces."""
    attempts = []

    async def app(scope, receive, send):
        received = b""
        is_more = True
        while is_more:
            message = await receive()
            received += message["body"]
            is_more = message["more_body"]
        attempts.append((received, current_scope().is_last_attempt))
        await lose(db, send)

    with inject_conflicts(db):
        app = DBSessionMiddleware(app, database=db, retry=Retry(base=0, max_body=8))
        exchange = await drive(app, received=messages_of(b"12345", b"6789", b"0"))

    assert [(b"1234567890", True)] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [] == exchange.messages
    assert ["the body is larger than max_body"] == fences(caplog)


async def test_body_at_its_limit_is_kept(db, drive):
    """G16: `max_body` bytes are not too many."""
    received = []

    async def app(scope, receive, send):
        received.append((await receive())["body"])
        await lose(db, send)

    with inject_conflicts(db):
        app = DBSessionMiddleware(app, database=db, retry=Retry(base=0, max_body=8))
        exchange = await drive(app, received=messages_of(b"12345678"))

    assert [b"12345678"] * 2 == received
    assert 200 == exchange.status


@pytest.mark.usefixtures("forget_endpoints")
async def test_upload_is_not_gathered_beyond_its_limit(db, drive):
    """G16: a long upload is passed on piece by piece; nothing of it is kept once it is too long."""
    kept = []

    async def app(scope, receive, send):
        gate = db.scope.gate
        is_more = True
        while is_more:
            is_more = (await receive())["more_body"]
            kept.append(sum(len(each["body"]) for each in gate._recording.messages))
        await respond(send)

    app = DBSessionMiddleware(app, database=db, retry=Retry(max_body=10))
    exchange = await drive(app, received=messages_of(*[b"1234"] * 5))

    assert 200 == exchange.status
    assert [4, 8, 0, 0, 0] == kept


async def test_nothing_is_kept_once_the_response_has_begun(db, drive):
    """G16: what is read after the head is not kept: there is no other attempt by then."""
    kept = []

    async def app(scope, receive, send):
        gate = db.scope.gate
        await receive()
        await send(start())
        kept.extend(gate._recording.messages)
        await receive()
        kept.extend(gate._recording.messages)
        await send(body())

    app = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
    exchange = await drive(app, received=messages_of(b"one", b"two"))

    assert exchange.is_complete
    assert [] == kept


@pytest.mark.parametrize("kind", ["http.response.early_hint", "http.response.push"])
async def test_message_before_the_head_forbids_a_replay(kind, db, drive, caplog):
    """G16: what went out before the head, an early hint or a push, would go out twice."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await send({"type": kind, "links": [], "path": "/style.css", "headers": []})
        await lose(db, send)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert ["a part of the response was sent"] == fences(caplog)


async def test_debug_message_is_no_part_of_the_response(db, drive):
    """G16: `http.response.debug` is for test clients alone, and keeps from nothing."""

    async def app(scope, receive, send):
        await send({"type": "http.response.debug", "info": {}})
        await lose(db, send)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 200 == exchange.status


async def test_conflict_of_a_stream_tears_it(db, drive, rows):
    """G16, G7: once the head is out a conflict ends the body torn; nothing begins anew."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await send(start())
        db.session.add(Item(id=1))
        await send(body(b"ok"))

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert not exchange.is_complete
    assert [] == await rows()


async def test_conflict_of_background_work_is_not_replayed(db, drive, rows):
    """G16, G8: what comes after the response is not a part of it."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await db.session.execute(sa.select(1))
        await respond(send)
        await db.session.execute(sa.insert(Item).values(id=1))

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert 200 == exchange.status
    assert isinstance(exchange.error, sa.exc.DBAPIError)


async def commit_by_hand(db):
    """`session.commit()`."""
    await db.session.execute(sa.insert(Item).values(id=7))
    await db.session.commit()


async def release(db):
    """`db.release()`."""
    await db.session.execute(sa.insert(Item).values(id=7))
    await db.release()


async def connection_commit(db):
    """COMMIT past the session."""
    connection = await db.session.connection()
    await connection.execute(sa.insert(Item).values(id=7))
    await connection.commit()


async def scope_of_its_own(db):
    """A scope of its own."""
    async with db.session_scope() as session:
        await session.execute(sa.insert(Item).values(id=7))


async def requires_new(db):
    """A block of its own."""
    async with db.transactional("REQUIRES_NEW") as session:
        await session.execute(sa.insert(Item).values(id=7))


async def branch(db):
    """A branch."""
    async with db.branch() as session:
        await session.execute(sa.insert(Item).values(id=7))


async def failed_autocommit(db):
    """Statements in autocommit, in a scope that failed."""
    with contextlib.suppress(LookupError):
        async with db.session_scope(mode="autocommit") as session:
            await session.execute(sa.insert(Item).values(id=7))
            raise LookupError


async def autocommit_connection(db):
    """A statement on a connection in autocommit."""
    options = {"isolation_level": "AUTOCOMMIT"}
    await db.session.connection(execution_options=options)
    await db.session.execute(sa.insert(Item).values(id=7))
    await db.session.commit()


async def failed_autocommit_connection(db):
    """The same, in a scope that failed."""
    with contextlib.suppress(LookupError):
        async with db.session_scope() as session:
            options = {"isolation_level": "AUTOCOMMIT"}
            connection = await session.connection(execution_options=options)
            await connection.execute(sa.insert(Item).values(id=7))
            raise LookupError


@pytest.mark.parametrize(
    "commit",
    [
        commit_by_hand,
        release,
        connection_commit,
        scope_of_its_own,
        requires_new,
        branch,
        failed_autocommit,
        autocommit_connection,
        failed_autocommit_connection,
    ],
)
async def test_what_is_durable_is_not_done_twice(commit, db, drive, rows, caplog):
    """G16: whatever was committed in the course of the request forbids a replay."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await commit(db)
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.execute(sa.update(Item).values(note="lost"))
        await respond(send)

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    [fence] = fences(caplog)
    assert fence in {
        "a transaction was committed",
        "statements in mode 'autocommit' are durable",
    }
    assert [7] == await rows()


async def by_session(session, statement):
    """Execute on the session."""
    await session.execute(sa.text(statement))


async def by_connection(session, statement):
    """Execute on the session's connection."""
    connection = await session.connection()
    await connection.exec_driver_sql(statement)


@pytest.mark.parametrize("execute", [by_session, by_connection])
@pytest.mark.parametrize(
    ("statement", "is_replayed"), [("commit", False), ("SELECT 'commit'", True)]
)
async def test_commit_in_plain_sql_is_not_done_twice(execute, statement, is_replayed, db, drive):
    """G16: a COMMIT by its text is seen where the text goes through the session's connection."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await execute(db.session, "/* this */ " + statement)
        await execute(db.session, "UPDATE item SET note = 'lost'")
        await respond(send)

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert ([1, 2] if is_replayed else [1]) == attempts
    assert is_replayed is (exchange.status == 200)


async def test_mode_autocommit_is_not_replayed(engine, drive, rows, caplog):
    """G16: in mode "autocommit" a statement before the one that lost is durable."""
    db = Database(engine, mode="autocommit")
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await db.session.execute(sa.insert(Item).values(id=1))
        await db.session.execute(sa.update(Item).values(note="lost"))

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert ["statements in mode 'autocommit' are durable"] == fences(caplog)
    assert [1] == await rows()


async def test_request_in_process_that_committed_forbids_the_replay_of_its_caller(db, drive, rows):
    """G16: an app that was called in process, and committed, is a part of the caller's attempt."""
    attempts = []

    other = Database(db.session_factory.kw["bind"], name="other")

    async def inner(scope, receive, send):
        other.session.add(Item(id=7))
        await respond(send)

    async def ignore(*args):
        """Take no notice."""

    inside = DBSessionMiddleware(inner, database=other)

    async def app(scope, receive, send):
        attempts.append(db.scope.attempt)
        await inside(http_scope("/inner"), ignore, ignore)
        await db.session.execute(sa.update(Item).values(note="lost"))

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [7] == await rows()


async def test_declared_effect_forbids_a_replay(db, drive, caplog):
    """G16: `fence()` says that something outside the transaction was done; the log says what."""
    seen = []

    async def app(scope, receive, send):
        await db.session.execute(sa.select(1))
        seen.append(current_scope().is_last_attempt)
        async with db.session_scope():
            current_scope().fence("sent an e-mail")
        current_scope().fence("wrote a file")
        seen.append(current_scope().is_last_attempt)
        await lose(db, send)

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [False, True] == seen
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert ["sent an e-mail"] == fences(caplog)


@pytest.mark.parametrize("register", [on_rollback, on_completion])
async def test_hook_that_ran_forbids_a_replay(register, db, drive, caplog):
    """G16: a hook that heard of the rollback may have told somebody."""
    ran: list[int] = []

    async def app(scope, receive, send):
        register(ran.append, 1) if register is on_rollback else register(ran.append)
        await lose(db, send)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 1 == len(ran)
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert ["a hook ran"] == fences(caplog)


async def test_hook_that_waits_for_the_response_forbids_a_replay(db, drive, caplog):
    """G16: an on-rollback hook that runs after the response is to hear of this rollback."""
    ran: list[int] = []

    async def app(scope, receive, send):
        db.on_rollback(lambda: ran.append(1), when="after_response")
        await lose(db, send)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == ran
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert ["a hook ran"] == fences(caplog)


async def test_hook_that_runs_at_once_forbids_a_replay(engine, drive, caplog):
    """G16: outside of any transaction a hook runs at once, and is done."""
    db = Database(engine, mode="autocommit")
    ran: list[int] = []

    async def app(scope, receive, send):
        on_commit(ran.append, 1)
        async with db.transactional() as session:
            await session.execute(sa.insert(Item).values(id=1))

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == ran
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert ["a hook ran"] == fences(caplog)


async def test_on_commit_hooks_of_a_lost_attempt_are_forgotten(db, drive, rows):
    """G16: hooks that wait for the COMMIT run once, for the attempt that was committed."""
    ran = []

    async def app(scope, receive, send):
        attempt = current_scope().attempt
        db.on_commit(lambda: ran.append(attempt))
        db.on_commit(lambda: ran.append(-attempt), when="after_response")
        await lose(db, send)

    with inject_conflicts(db, times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 200 == exchange.status
    assert [3, -3] == ran
    assert [1] == await rows()


async def test_effect_while_the_app_is_unwound_forbids_the_replay(db, drive, caplog):
    """G16: what the app commits after it was told that it lost is durable as well."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        try:
            await lose(db, send)
        finally:
            current_scope().fence("told somebody")

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [] == exchange.messages


async def test_hook_registered_while_the_app_is_unwound_forbids_the_replay(db, drive, rows, caplog):
    """G16: such a hook is told of the rollback, though it waits for the response."""
    attempts: list[int] = []
    told: list[int] = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        try:
            await lose(db, send)
        finally:
            db.on_rollback(told.append, attempts[-1], when="after_response")

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert ([1], [1]) == (attempts, told)
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert "and was the last one after all: a hook ran" in caplog.text
    assert [] == await rows()


@pytest.mark.parametrize("answers", [True, False])
async def test_task_of_a_lost_attempt_can_not_answer(answers, db, drive):
    """G16: what an attempt that is over still sends is refused: the answer is the winner's."""
    left: list[asyncio.Task[None]] = []
    is_over = asyncio.Event()

    async def app(scope, receive, send):
        async def answer_late():
            await is_over.wait()
            await respond(send, 418)

        await db.session.execute(sa.insert(Item).values(id=1))
        if current_scope().attempt == 1:
            left.append(asyncio.create_task(answer_late()))
            await db.session.execute(sa.update(Item).values(note="lost"))
        is_over.set()
        await asyncio.wait(left)
        await respond(send, 201)

    async def raising(scope, receive, send):
        try:
            await app(scope, receive, send)
        except sa.exc.DBAPIError:
            if not answers:
                raise
            await respond(send, 500)

    with inject_conflicts(db, at="UPDATE"):
        exchange = await drive(DBSessionMiddleware(raising, database=db, retry=AT_ONCE))

    assert 201 == exchange.status
    assert 2 == len(exchange.messages)
    assert left[0].exception() is not None


async def test_several_databases_are_replayed_as_long_as_none_has_committed(
    engine, make_engine, drive, rows
):
    """G16: a conflict of the database that commits first is replayed, of a later one not."""
    driver = {"aiosqlite": "sqlite"}.get(engine.dialect.driver, engine.dialect.driver)
    first, second = Database(engine, name="first"), Database(make_engine(driver), name="second")
    attempts = []

    async def app(scope, receive, send):
        attempts.append(first.scope.attempt)
        assert first.scope.attempt == second.scope.attempt
        first.session.add(Item(id=len(attempts)))
        await first.session.flush()
        if engine.dialect.name == "postgresql":  # SQLite has one writer at a time
            second.session.add(Item(id=-len(attempts)))
        else:
            await second.session.execute(sa.text("SELECT 1"))
        await respond(send)

    app = DBSessionMiddleware(app, databases=[first, second], retry=AT_ONCE)
    with inject_conflicts(first):
        exchange = await drive(app)
    assert 200 == exchange.status
    assert [1, 2] == attempts
    attempts.clear()
    with inject_conflicts(second):
        exchange = await drive(app)

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    await second.session_factory.kw["bind"].dispose()


class Client:
    """A client that leaves when a test says so."""

    def __init__(self):
        self.messages = []
        self.waiting = messages_of(b"")
        self.leaves = asyncio.Event()
        self.is_waited_for = asyncio.Event()

    async def receive(self):
        """Its messages, and then its leaving."""
        if self.waiting:
            return self.waiting.pop(0)
        self.is_waited_for.set()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        """What it gets."""
        self.messages.append(message)


async def test_client_that_leaves_during_the_pause_ends_it(db, caplog):
    """G16: nobody waits for an answer any more: no other attempt, and the error surfaces."""
    attempts = []
    client = Client()

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await lose(db, send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=NEVER_MIND)
        request = asyncio.create_task(middleware(http_scope(), client.receive, client.send))
        await client.is_waited_for.wait()
        client.leaves.set()
        with pytest.raises(sa.exc.DBAPIError):
            await request

    assert [1] == attempts
    assert [] == client.messages
    assert "the client has left before the next attempt" in caplog.text


async def test_client_that_has_left_before_is_not_served_again(db, caplog):
    """G16: where the app has heard that the client left, its conflict is the end."""
    seen = []
    client = Client()
    client.leaves.set()

    async def app(scope, receive, send):
        seen.append(current_scope().is_last_attempt)
        while (await receive())["type"] != "http.disconnect":
            pass
        seen.append(current_scope().is_last_attempt)
        await lose(db, send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=NEVER_MIND)
        with pytest.raises(sa.exc.DBAPIError):
            await middleware(http_scope(), client.receive, client.send)

    assert [False, True] == seen
    assert ["the client has left"] == fences(caplog)


async def test_client_that_stays_is_served_again_after_the_pause(db):
    """G16: the wait for the client's leaving is given up when the pause is over."""
    client = Client()

    async def app(scope, receive, send):
        assert b"" == (await receive())["body"]
        await lose(db, send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=Retry(base=0.01))
        await middleware(http_scope(), client.receive, client.send)

    assert [200, None] == [each.get("status") for each in client.messages]


async def test_pause_reads_no_more_of_a_body_than_is_kept(db):
    """G16: a body that comes during the pause is kept up to its limit, and each byte is read."""
    received = []
    client = Client()
    client.waiting = messages_of(b"1234", b"5678", b"90")

    async def app(scope, receive, send):
        if current_scope().attempt == 2:
            is_more = True
            while is_more:
                message = await receive()
                received.append(message["body"])
                is_more = message["more_body"]
            assert current_scope().is_last_attempt
        await lose(db, send)

    retry = Retry(base=0.01, max_body=6)
    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=retry)
        await middleware(http_scope(), client.receive, client.send)

    assert [b"1234", b"5678", b"90"] == received
    assert 200 == client.messages[0]["status"]


async def test_websocket_has_no_replay(db):
    """G16: a websocket's scopes end one by one, and its messages can't be had again."""
    seen = []

    async def app(scope, receive, send):
        async with db.session_scope():
            seen.append((current_scope().attempt, current_scope().is_last_attempt))

    async def nothing(*args):
        return {}

    middleware = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
    await middleware({"type": "websocket", "path": "/"}, nothing, nothing)

    assert [(1, True)] == seen


async def test_retry_that_comes_with_a_request_is_for_later_ones(db, drive, forget_endpoints):
    """G16: an endpoint's retry that nobody knew of before has no body to give a second time."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await session_options(retry=AT_ONCE).apply()
        await lose(db, send)

    app = DBSessionMiddleware(app, database=db)
    with inject_conflicts(db):
        first = await drive(app)
    with inject_conflicts(db):
        second = await drive(app)

    assert [1, 1, 2] == attempts
    assert isinstance(first.error, sa.exc.DBAPIError)
    assert 200 == second.status
