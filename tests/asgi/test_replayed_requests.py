"""What each attempt finds of its request: its messages, and its ASGI scope."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware, Retry, current_scope, session_options
from asgi_dbscope.testing import inject_conflicts
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import Item

AT_ONCE = Retry(attempts=3, base=0)
"""Three attempts, without a pause."""

on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


class Session(dict[str, Any]):
    """A session that notes what is done to it, as Starlette's does since 1.0."""

    accessed = modified = False

    def __setitem__(self, key, value):
        """Note it."""
        self.accessed = self.modified = True
        super().__setitem__(key, value)

    def __delitem__(self, key):
        """Note it."""
        self.accessed = self.modified = True
        super().__delitem__(key)

    def clear(self):
        """Note it."""
        self.accessed = self.modified = True
        super().clear()

    def update(self, *args, **kwargs):
        """Note it."""
        self.accessed = self.modified = True
        super().update(*args, **kwargs)


def messages_of(*contents):
    """The messages of a body that comes in pieces."""
    last = len(contents) - 1
    return [
        {"type": "http.request", "body": content, "more_body": number < last}
        for number, content in enumerate(contents)
    ]


async def read_body(receive):
    """The rest of the body."""
    content = b""
    is_more = True
    while is_more:
        message = await receive()
        content += message["body"]
        is_more = message["more_body"]
    return content


async def test_each_attempt_has_a_session_and_a_scope_of_its_own(db, drive):
    """G16: nothing of an attempt that lost is found in the next one, nor in its ASGI scope."""
    asgi_scopes, sessions, found, new = [], [], [], []
    scope = http_scope(state={"shared": []}, extensions={"x": {}})

    async def app(scope, receive, send):
        asgi_scopes.append(scope)
        sessions.append(db.session)
        new.append(list(db.session.new))
        found.append((scope["state"].keys(), scope["headers"], scope.get("mine"), scope["path"]))
        scope["state"]["user"] = "me"
        scope["state"]["shared"].append(1)
        scope["headers"].append((b"x-mine", b"1"))
        scope["extensions"]["mine"] = {}
        scope["mine"] = len(sessions)
        scope["path"] = "/rewritten"
        db.session.add(Item(id=1))
        await respond(send)

    headers = list(scope["headers"])
    with inject_conflicts(db, times=1):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE), scope)

    first, second = asgi_scopes
    assert 200 == exchange.status
    assert first is scope
    assert second is not scope
    assert sessions[0] is not sessions[1]
    assert [[], []] == new
    assert ({"shared"}, [*headers, (b"x-mine", b"1")]) == ({"shared"}, second["headers"])
    assert (2, "/rewritten") == (scope["mine"], scope["path"])  # for who looks at it afterwards
    assert [1, 1] == scope["state"]["shared"]
    assert [(None, "/")] * 2 == [each[2:] for each in found]
    assert "asgi_dbscope" not in scope


async def test_middleware_around_ours_sees_the_attempt_that_won(db, drive):
    """G16, G18: a cookie that is made when the head goes out holds what that attempt wrote."""
    seen = []

    async def app(scope, receive, send):
        scope["session"]["attempt"] = current_scope().attempt
        if current_scope().attempt == 1:
            scope["session"]["is_lost"] = scope["lost"] = True
        db.session.add(Item(id=1))
        await respond(send)

    inner = DBSessionMiddleware(app, database=db, retry=AT_ONCE)

    async def outer(scope, receive, send):
        async def look(message):
            seen.append((dict(scope["session"]), "lost" in scope))
            await send(message)

        await inner(scope, receive, look)

    with inject_conflicts(db, times=1):
        await drive(outer, http_scope(session={}))

    assert [({"attempt": 2}, False)] * 2 == seen


@pytest.mark.parametrize("more_body", [False, True])
async def test_server_that_always_has_a_message_is_no_endless_wait(db, drive, more_body):
    """G16: a `receive` that never waits, as tests have it, doesn't keep the next attempt away."""
    sent = []
    calls = 0

    async def receive():
        nonlocal calls
        calls += 1
        assert 100_000 > calls
        return {"type": "http.request", "body": b"", "more_body": more_body}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await receive()
        db.session.add(Item(id=1))
        await respond(send)

    retry = Retry(base=0.01)
    with inject_conflicts(db, times=1):
        await DBSessionMiddleware(app, database=db, retry=retry)(http_scope(), receive, send)

    assert [200, None] == [each.get("status") for each in sent]


async def test_body_that_is_none_is_the_apps_to_object_to(db, drive):
    """G16, G18: what a server shouldn't send reaches each attempt as it is."""
    received = []

    async def app(scope, receive, send):
        received.append(await receive())
        db.session.add(Item(id=1))
        await respond(send)

    message = {"type": "http.request", "body": "text"}
    with inject_conflicts(db, times=1):
        wrapped = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
        exchange = await drive(wrapped, received=[message])

    assert 200 == exchange.status
    assert [message] * 2 == received


async def test_body_is_given_to_each_attempt(db, drive, rows):
    """G16: a body that came in pieces is read anew, whether it was read as a whole or not."""
    bodies = []
    pieces = [
        {"type": "http.request", "body": b"one", "more_body": True},
        {"type": "http.request", "body": bytearray(b"two"), "more_body": True},
        {"type": "http.request", "body": b"three", "more_body": False},
    ]

    async def app(scope, receive, send):
        attempt = current_scope().attempt
        received = []
        for _ in range(attempt):  # more of it each time
            message = await receive()
            received.append(message["body"])
            message["body"] = b"changed by the app"
        bodies.append(received)
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db, times=2):
        app = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
        exchange = await drive(app, received=pieces)

    assert 200 == exchange.status
    assert [[b"one"], [b"one", b"two"], [b"one", b"two", b"three"]] == bodies


@on_sqlite
@pytest.mark.parametrize("read_before", [0, 1, 2])
async def test_body_that_is_read_after_the_head_is_given_to_the_attempt_that_won(
    read_before, engine, drive
):
    """G16, G18: what the lost attempt, or the pause, has read is there after the head, too."""
    db = Database(engine)
    bodies = []

    async def app(scope, receive, send):
        if current_scope().attempt == 1:
            for _ in range(read_before):
                await receive()
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(start())
        content = await read_body(receive)
        bodies.append(content)
        assert {"type": "http.disconnect"} == await receive()
        await send(body(content))

    middleware = DBSessionMiddleware(app, database=db, retry=AT_ONCE)

    async def at_server(scope, receive, send):
        waiting = messages_of(b"one", b"two")

        async def told():
            if waiting:
                return waiting.pop(0)
            if not bodies:
                await asyncio.get_running_loop().create_future()
            return {"type": "http.disconnect"}

        await middleware(scope, told, send)

    with inject_conflicts(db):
        exchange = await drive(at_server)

    assert [b"onetwo"] == bodies
    assert (200, b"onetwo") == (exchange.status, exchange.body)


@on_sqlite
async def test_task_of_a_lost_attempt_takes_no_message_from_the_next(engine, drive):
    """G16: a task that is left waiting for a message gets the client's leaving, and keeps none."""
    db = Database(engine)
    waiting = messages_of(b"one", b"two")
    second_reads = asyncio.Event()
    is_waiting = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []
    bodies = []

    async def told():
        if len(waiting) == 2:
            return waiting.pop(0)
        is_waiting.set()
        await second_reads.wait()
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def app(scope, receive, send):
        assert b"one" == (await receive())["body"]
        if current_scope().attempt == 1:
            tasks.extend(asyncio.create_task(receive()) for _ in range(2))
            await is_waiting.wait()
        else:
            asyncio.get_running_loop().call_soon(second_reads.set)
            bodies.append(await read_body(receive))
        db.session.add(Item(id=1))
        await respond(send)

    middleware = DBSessionMiddleware(app, database=db, retry=AT_ONCE)

    async def at_server(scope, receive, send):
        await middleware(scope, told, send)

    with inject_conflicts(db):
        exchange = await drive(at_server)

    assert [b"two"] == bodies
    assert 200 == exchange.status
    assert [{"type": "http.disconnect"}] * 2 == await asyncio.gather(*tasks)


@on_sqlite
async def test_two_tasks_of_an_attempt_wait_for_messages_as_ever(engine, drive):
    """G16, G18: each message is one task's; who is cancelled leaves his to the other."""
    db = Database(engine)
    waiting = messages_of(b"one", b"two")
    comes = asyncio.Event()
    is_waiting = asyncio.Event()

    async def told():
        is_waiting.set()
        await comes.wait()
        return waiting.pop(0)

    async def app(scope, receive, send):
        await db.session.execute(sa.select(1))
        tasks = [asyncio.create_task(receive()) for _ in range(3)]
        await is_waiting.wait()
        await asyncio.sleep(0)
        tasks[0].cancel()
        comes.set()
        await asyncio.wait(tasks[1:])
        await respond(send, content=b" ".join(each.result()["body"] for each in tasks[1:]))

    middleware = DBSessionMiddleware(app, database=db, retry=AT_ONCE)

    async def at_server(scope, receive, send):
        await middleware(scope, told, send)

    exchange = await drive(at_server)

    assert b"one two" == exchange.body


@on_sqlite
async def test_error_of_receive_in_the_pause_is_nobodys(engine, drive):
    """G16: who looks for the client's leaving, and isn't told, goes on without."""
    db = Database(engine)
    attempts: list[int] = []

    async def told():
        if attempts:
            raise LookupError
        return messages_of(b"one")[0]

    async def app(scope, receive, send):
        assert b"one" == (await receive())["body"]
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=1))
        await respond(send)

    middleware = DBSessionMiddleware(app, database=db, retry=Retry(base=0.01))

    async def at_server(scope, receive, send):
        await middleware(scope, told, send)

    with inject_conflicts(db):
        exchange = await drive(at_server)

    assert [1, 2] == attempts
    assert 200 == exchange.status


@on_sqlite
@pytest.mark.parametrize("retry", [None, Retry(base=0, max_body=4), Retry(attempts=1)])
async def test_endpoints_limit_for_the_body_is_the_one_that_counts(
    retry, engine, drive, forget_endpoints
):
    """G16: where the framework has read the body before the endpoint says how much it may be."""
    db = Database(engine)
    attempts = []

    @session_options(retry=Retry(base=0, max_body=8))
    async def place():
        attempts.append((current_scope().attempt, current_scope().is_last_attempt))
        db.session.add(Item(id=1))

    async def app(scope, receive, send):
        await read_body(receive)
        await place()
        await respond(send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=retry)
        exchange = await drive(middleware, received=messages_of(b"1234", b"5678"))

    assert [(1, False), (2, False)] == attempts
    assert 200 == exchange.status


@on_sqlite
async def test_endpoint_may_allow_less_of_a_body_than_the_middleware(engine, drive, caplog):
    """G16: a body that is kept, but longer than the endpoint's `max_body`, is not given twice."""
    db = Database(engine)
    seen = []

    async def app(scope, receive, send):
        await read_body(receive)
        seen.append(current_scope().is_last_attempt)
        current_scope().configure(retry=Retry(base=0, max_body=7))
        seen.append(current_scope().is_last_attempt)
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
        exchange = await drive(middleware, received=messages_of(b"1234", b"5678"))

    assert [False, True] == seen
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert "and was the last one: the body is larger than max_body" in caplog.text


@on_sqlite
async def test_body_that_was_not_kept_is_not_waited_for(engine, drive, forget_endpoints, caplog):
    """G16: a retry that comes when a part of the body is gone comes too late for it."""
    db = Database(engine)
    session_options(retry=Retry(max_body=4))
    seen = []

    async def app(scope, receive, send):
        await read_body(receive)
        current_scope().configure(retry=Retry(base=0, max_body=100))
        seen.append(current_scope().is_last_attempt)
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db)
        exchange = await drive(middleware, received=messages_of(b"1234", b"5678"))

    assert [True] == seen
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert "and was the last one: the body is larger than max_body" in caplog.text


@on_sqlite
async def test_endpoint_in_process_that_goes_without_a_retry_leaves_its_callers_alone(
    engine, drive, forget_endpoints
):
    """G16: what an endpoint says of its own request isn't said of the one that calls it."""
    db = Database(engine)
    attempts = []

    @session_options(retry=Retry(attempts=1))
    async def place():
        await db.session.execute(sa.select(1))

    async def inner(scope, receive, send):
        await place()
        await respond(send, 500)

    inside = DBSessionMiddleware(inner, database=db)

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await drive(inside, http_scope("/inner"))
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 2] == attempts
    assert 200 == exchange.status


@on_sqlite
async def test_request_in_process_that_was_answered_is_no_fence_for_its_caller(engine, drive):
    """G16: that its response went out, or its client left, is nothing that happened to ours."""
    db = Database(engine)
    attempts = []

    async def inner(scope, receive, send):
        assert [b"", "http.disconnect"] == [(await receive())["body"], (await receive())["type"]]
        await db.session.execute(sa.select(1))
        await respond(send, 500)

    async def ignore(message):
        """Take no notice."""

    inside = DBSessionMiddleware(inner, database=db, retry=AT_ONCE)

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=1))
        waiting = messages_of(b"")

        async def told():
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        await inside(http_scope("/inner"), told, ignore)
        await respond(send)

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 2] == attempts
    assert 200 == exchange.status


@on_sqlite
@pytest.mark.parametrize("conflicts", [0, 1])
async def test_session_that_nobody_touched_is_not_taken_for_changed(conflicts, engine, drive):
    """G16, G18: a session may note each access (Starlette's does); that of a copy is none."""
    db = Database(engine)
    session = Session({"user": 1})
    seen = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    inner = DBSessionMiddleware(app, database=db, retry=AT_ONCE)

    async def outer(scope, receive, send):
        async def look(message):
            seen.append((scope["session"] is session, session.accessed, session.modified))
            await send(message)

        await inner(scope, receive, look)

    with inject_conflicts(db, times=conflicts):
        await drive(outer, http_scope(session=session))

    assert [(True, False, False)] * 2 == seen
    assert {"user": 1} == session


@on_sqlite
async def test_session_that_the_winner_has_changed_is_changed(engine, drive):
    """G16, G18: a cookie is made of what the attempt wrote that won, and that it did."""
    db = Database(engine)
    session = Session({"user": 1})

    async def app(scope, receive, send):
        if current_scope().attempt == 1:
            scope["session"]["lost"] = True
        else:
            del scope["session"]["user"]
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db):
        middleware = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
        await drive(middleware, http_scope(session=session))

    assert ({}, True) == (dict(session), session.modified)


@on_sqlite
async def test_what_is_put_into_the_scope_after_the_head_stays(engine, drive):
    """G16, G18: a middleware around ours may go on once the head is out, as may the app."""
    db = Database(engine)
    state = {"mine": 1}
    scope = http_scope(state=state, headers=[], extensions={})

    async def app(scope, receive, send):
        scope["state"]["attempt"] = scope["attempt"] = current_scope().attempt
        scope["headers"].append((b"x-attempt", b"%d" % current_scope().attempt))
        scope["extensions"] = {"replaced": True}
        scope["dropped"] = 1
        db.session.add(Item(id=1))
        await respond(send)
        scope["headers"].append((b"x-late", b"1"))
        scope["late"] = 1
        del scope["dropped"]

    inner = DBSessionMiddleware(app, database=db, retry=AT_ONCE)

    async def outer(scope, receive, send):
        async def look(message):
            await send(message)
            if message["type"] == "http.response.start":
                state["theirs"] = scope["theirs"] = 1

        await inner(scope, receive, look)

    with inject_conflicts(db):
        await drive(outer, scope)

    assert state is scope["state"]
    assert {"mine": 1, "attempt": 2, "theirs": 1} == state
    assert [(b"x-attempt", b"2"), (b"x-late", b"1")] == scope["headers"]
    assert {"replaced": True} == scope["extensions"]
    assert [(2, 1, 1)] == [(scope["attempt"], scope["theirs"], scope["late"])]
    assert "dropped" not in scope
