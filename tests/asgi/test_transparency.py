"""Nothing else about the app changes: messages, their order, exceptions, context, other loops."""

import asyncio
import contextvars
import sys
import traceback
from typing import Any

import pytest
import sqlalchemy as sa
import trio
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asgi_dbscope import Database, DBSessionMiddleware, current_scope, current_session
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import Child, Item

TRANSACTION = ["checkout", "begin", "commit", "checkin"]
DISCONNECT = {"type": "http.disconnect"}


class Wire:
    """The server's side: what it hands in, and just what it was handed."""

    def __init__(self, *received: dict[str, Any]) -> None:
        self.waiting = list(received)
        self.messages: list[Any] = []

    async def receive(self):
        return self.waiting.pop(0)

    async def send(self, message):
        self.messages.append(message)


class Counted(AsyncSession):
    """A session class that counts its sessions."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        type(self).made += 1
        super().__init__(*args, **kwargs)


# ------------------------------------------------------------------ without the session


async def test_request_without_the_session_costs_nothing(engine, timeline):
    """G5: a request that doesn't use the session costs no session, no connection and no task."""
    Counted.made = 0
    db = Database(async_sessionmaker(engine, class_=Counted))
    tasks: list[str] = []
    wire = Wire({"type": "http.request", "body": b""}, DISCONNECT)

    async def app(scope, receive, send):
        await receive()
        await send(start(200))
        await send(body(b"chunk", more=True))
        await send(body())
        await receive()

    def counting(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        tasks.append(repr(coro))
        return asyncio.Task(coro, loop=loop, **options)

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(counting)
    try:
        await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, wire.send)
    finally:
        loop.set_task_factory(before)

    assert 0 == Counted.made
    assert [] == tasks
    assert [] == timeline
    assert 3 == len(wire.messages)


async def test_app_under_trio_that_uses_no_session_notices_nothing(db):
    """G5, G18: under Trio requests, streams, disconnects and errors go through untouched."""
    wire = Wire({"type": "http.request", "body": b""}, DISCONNECT)

    async def app(scope, receive, send):
        await receive()
        await send(start(200))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, body(b"chunk", more=True))
        await receive()
        await send(body())
        if scope["path"] == "/raise":
            raise ZeroDivisionError
        return "returned"

    wrapped = DBSessionMiddleware(app, database=db)

    async def main() -> object:
        result = await wrapped(http_scope(), wire.receive, wire.send)
        wire.waiting = [{"type": "http.request", "body": b""}, DISCONNECT]
        with pytest.raises(ZeroDivisionError):
            await wrapped(http_scope("/raise"), wire.receive, wire.send)
        return result

    assert "returned" == await asyncio.to_thread(trio.run, main)
    assert 6 == len(wire.messages)


@pytest.mark.parametrize("kind", ["lifespan", "webtransport"])
async def test_other_scope_types_are_passed_on_untouched(db, kind):
    """G17: lifespan and unknown scope types get the very same scope, receive and send."""
    wire = Wire()
    scope = {"type": kind}
    receive, send = wire.receive, wire.send
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))
        return "returned"

    assert "returned" == await DBSessionMiddleware(app, database=db)(scope, receive, send)
    assert [(scope, receive, send)] == seen
    assert scope is seen[0][0]
    assert {"type": kind} == scope


# ------------------------------------------------------------------ what is passed on


async def test_return_value_of_the_app_is_returned(db, drive):
    """G18: servers object to a return value, so they have to see it."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)
        return "returned"

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert "returned" == exchange.result


async def test_app_gets_the_very_same_scope(db, drive):
    """G18: the scope that the app gets is the server's object, and is as before when it is done."""
    seen = []
    scope = http_scope(state={"pool": 1})
    before = dict(scope)

    async def app(scope, receive, send):
        seen.append(scope)
        scope["app"] = "mine"
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db), scope)

    assert scope is seen[0]
    assert {**before, "app": "mine"} == scope


async def test_scope_that_is_used_again_is_served_again(db, rows):
    """G18: an outer layer may run the app twice with one scope: each run has its own session."""
    sessions: list[object] = []
    wire = Wire()

    async def app(scope, receive, send):
        db.session.add(Item(id=len(sessions)))
        sessions.append(current_session())
        await respond(send, 500 if len(sessions) == 1 else 200)

    wrapped = DBSessionMiddleware(app, database=db)

    async def retrying(scope, receive, send):
        await wrapped(scope, receive, send)
        await wrapped(scope, receive, send)

    await retrying(http_scope(), wire.receive, wire.send)

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


async def test_request_messages_reach_the_app_as_they_are(db):
    """G18: `receive` hands on each message, the same object, when the server has it."""
    received: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"one", "more_body": True},
        {"type": "http.request", "body": b"two", "more_body": False},
        DISCONNECT,
        {"type": "unheard-of"},
    ]
    wire = Wire(*received)
    seen = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        seen.extend([await receive(), await receive()])
        await send(start(200))
        seen.extend([await receive(), await receive()])
        await send(body())

    await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, wire.send)

    assert [id(each) for each in received] == [id(each) for each in seen]


async def test_error_of_the_servers_receive_comes_through(db):
    """G18: what the server's `receive` raises the app gets, the same object."""
    error = OSError()
    caught = []

    async def receive():
        raise error

    async def app(scope, receive, send):
        for head_sent in (False, True):
            try:
                await receive()
            except OSError as raised:
                caught.append(raised)
            if not head_sent:
                await send(start(200))
        await send(body())

    wire = Wire()
    await DBSessionMiddleware(app, database=db)(http_scope(), receive, wire.send)

    assert [error, error] == caught


async def test_response_messages_reach_the_server_as_the_same_objects(db):
    """G18: messages are not copied, so what the app puts into them is what the server gets."""
    wire = Wire()
    content = bytearray(b"first")
    sent = [
        {"type": "http.response.start", "status": 200, "headers": [[b"x", b"y"]], "mine": object()},
        {"type": "http.response.body", "body": content, "more_body": True},
        {"type": "http.response.body", "body": memoryview(b"last"), "more_body": False},
    ]

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(sent[0])
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(sent[1])
        await send(sent[2])

    await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, wire.send)

    assert [id(each) for each in sent] == [id(each) for each in wire.messages]


async def test_no_message_is_kept(db):
    """G18: an app may use its buffer again once `send` has returned: nobody holds the message."""
    counts = []
    wire = Wire()

    async def send(message):
        wire.messages.append(bytes(message.get("body", b"")))

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        buffer = bytearray(b"aaaa")
        message = {"type": "http.response.body", "body": buffer, "more_body": True}
        await send(start(200))
        for letter in b"bcd":
            references = sys.getrefcount(message)
            await send(message)
            counts.append(sys.getrefcount(message) - references)
            buffer[:] = bytes([letter]) * 4
        await send(body())

    await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, send)

    assert [b"", b"aaaa", b"bbbb", b"cccc", b""] == wire.messages
    assert [0, 0, 0] == counts


async def test_head_goes_out_before_the_first_body_message_is_there(db, drive, timeline):
    """G18: the head isn't held until the body begins: a client waits for it."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        timeline.append("the app goes on")
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [*TRANSACTION, "start 200", "the app goes on", "last body"] == timeline


@pytest.mark.parametrize(
    "message",
    [
        {"type": "http.response.debug", "info": {"template": "x"}},
        {"type": "http.response.push", "path": "/style.css", "headers": []},
        {"type": "http.response.early_hint", "links": [b"</style.css>; rel=preload"]},
        {"type": "http.response.informational", "status": 103, "headers": []},
        {"type": "unheard-of"},
    ],
    ids=lambda message: message["type"],
)
async def test_messages_before_the_head_go_out_at_once(db, drive, timeline, message):
    """G18: an extension's message is forwarded at once, and ends no transaction."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(message)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    kind = message["type"].rpartition(".")[2]
    expected = ["checkout", "begin", kind, "commit", "checkin", "start 200", "last body"]
    assert expected == timeline
    assert message == exchange.messages[0]


@pytest.mark.parametrize(
    "last",
    [
        {"type": "http.response.pathsend", "path": "/a/file"},
        {"type": "http.response.zerocopysend", "file": 3, "more_body": False},
    ],
    ids=lambda message: message["type"],
)
async def test_body_is_ended_by_the_extensions_that_end_it(db, drive, rows, timeline, last):
    """G7, G18: a path or a file that is the whole rest of the body is its last message."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        await send(last)
        db.session.add(Item(id=2))

    await drive(DBSessionMiddleware(app, database=db), http_scope(extensions={last["type"]: {}}))

    kind = last["type"].rpartition(".")[2]
    assert ["start 200", *TRANSACTION, kind, *TRANSACTION] == timeline
    assert [1, 2] == await rows()


async def test_file_with_more_to_come_is_not_the_end(db, drive, timeline):
    """G7, G18: a zero-copy message that announces more leaves the body's transaction open."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        await db.session.flush()
        await send({"type": "http.response.zerocopysend", "file": 3, "more_body": True})
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    begun = ["checkout", "begin"]
    assert ["start 200", *begun, "zerocopysend", "commit", "checkin", "last body"] == timeline


async def test_trailers_are_the_end_where_the_head_announced_them(db, drive, timeline):
    """G7, G18: with trailers the last body message is not the end; the last trailers are."""

    def trailers(*, more):
        return {"type": "http.response.trailers", "headers": [], "more_trailers": more}

    async def app(scope, receive, send):
        await send(start(200, trailers=True))
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(body())
        await send(trailers(more=True))
        await send(trailers(more=False))

    scope = http_scope(extensions={"http.response.trailers": {}})
    await drive(DBSessionMiddleware(app, database=db), scope)

    expected = ["start 200", "checkout", "begin", "last body", "trailers"]
    assert [*expected, "commit", "checkin", "trailers"] == timeline


@pytest.mark.parametrize(
    "messages",
    [
        [body(b"first"), start(200)],
        [start(200), start(204), body()],
        [start(200), body(), body(b"again")],
        [start(200), body(), start(200)],
        [{"type": "http.response.trailers"}],
        [{"status": 200}],
        [None],
        ["http.response.start"],
    ],
    ids=[
        *("body before head", "two heads", "two ends", "head after the end"),
        *("trailers alone", "no type", "nothing", "no message"),
    ],
)
async def test_illegal_messages_reach_the_server(db, messages):
    """G18: what the app must not send is the server's to object to, with or without a session."""
    for uses_session in (False, True):
        wire = Wire()

        async def app(scope, receive, send, uses_session=uses_session):
            for message in messages:
                if uses_session:
                    await db.session.scalar(sa.select(1))
                await send(message)

        await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, wire.send)

        assert messages == wire.messages


async def test_servers_objection_comes_through(db, rows):
    """G18: what the server's `send` raises the app gets, the same object; the commit stands."""
    error = OSError("client gone")
    caught = []

    async def send(message):
        raise error

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await send(start(200))
        except OSError as raised:
            caught.append(raised)
            raise

    with pytest.raises(OSError, match="client gone") as raised:
        await DBSessionMiddleware(app, database=db)(http_scope(), Wire().receive, send)

    assert error is raised.value
    assert [error] == caught
    assert [1] == await rows()


# ------------------------------------------------------------------ tasks and context


async def test_message_of_another_task_waits_while_the_head_is_committed(db, rows):
    """G18, G1: a message sent while COMMIT is awaited does not overtake the head."""
    wire = Wire()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await asyncio.gather(
            send(start(200)), send(body(b"chunk", more=True)), send({"type": "unheard-of"})
        )
        await send(body())

    await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, wire.send)

    kinds = [each["type"].rpartition(".")[2] for each in wire.messages]
    assert ["start", "body", "unheard-of", "body"] == kinds
    assert [1] == await rows()


async def test_message_of_another_task_after_a_failed_commit_is_not_sent(db):
    """G2, G18: what waited behind a head that failed does not go out."""
    wire = Wire()

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await asyncio.gather(
            send(start(200)), send(body(b"chunk", more=True)), return_exceptions=True
        )

    with pytest.raises(sa.exc.IntegrityError):
        await DBSessionMiddleware(app, database=db)(http_scope(), wire.receive, wire.send)

    assert [] == wire.messages


async def test_context_of_the_app_is_the_servers(db):
    """G18: what the app sets in its context its server sees in `send`, and its caller after it."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []

    async def send(message):
        seen.append(variable.get())
        variable.set("by the server")

    async def app(scope, receive, send):
        variable.set("by the app")
        db.session.add(Item(id=1))
        await send(start(200))
        seen.append(variable.get())
        await send(body())

    await DBSessionMiddleware(app, database=db)(http_scope(), Wire().receive, send)

    assert ["by the app", "by the server", "by the server"] == seen
    assert "by the server" == variable.get()


async def test_app_runs_in_the_servers_task(db, drive):
    """G18: the app runs in the task that the server made for it, before and after a commit."""
    tasks = []

    async def app(scope, receive, send):
        tasks.append(asyncio.current_task())
        db.session.add(Item(id=1))
        await send(start(200))
        tasks.append(asyncio.current_task())
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [asyncio.current_task()] * 2 == tasks


async def test_exception_of_the_app_comes_out_unchanged(db, drive):
    """G18: the same exception, its traceback down to the app, no note and no context added."""
    error = ZeroDivisionError("mine")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        raise error

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert error is exchange.error
    assert error.__context__ is None
    assert error.__cause__ is None
    assert not hasattr(error, "__notes__")
    assert "app" == traceback.extract_tb(error.__traceback__)[-1].name


async def test_second_instance_for_the_same_database_does_nothing(db, drive, rows, timeline):
    """G18: installed twice, the outer one serves, and there is one session and one commit."""
    sessions = []

    async def app(scope, receive, send):
        sessions.append(current_session())
        db.session.add(Item(id=1))
        await respond(send)

    def between(scope, receive, send):
        sessions.append(current_session())
        return inner(scope, receive, send)

    inner = DBSessionMiddleware(app, database=db)

    await drive(DBSessionMiddleware(between, database=db))

    assert sessions[0] is sessions[1]
    assert [*TRANSACTION, "start 200", "last body"] == timeline
    assert [1] == await rows()


# ------------------------------------------------------------------ concurrent requests


async def test_concurrent_requests_share_nothing(db, engine, drive, rows):
    """G12: two hundred requests at once have two hundred sessions, and each keeps its own."""
    everyone = asyncio.Barrier(200)
    sessions = []
    scopes = []

    async def app(scope, receive, send):
        session = current_session()
        own = current_scope()
        await everyone.wait()
        number = int(scope["path"][1:])
        session.add(Item(id=number))
        await session.flush()
        assert [number] == list(await session.scalars(sa.select(Item.id).where(Item.id == number)))
        assert current_session() is session
        sessions.append(session)
        scopes.append(own)
        await respond(send, 500 if number % 2 else 200)

    wrapped = DBSessionMiddleware(app, database=db)
    exchanges = await asyncio.gather(
        *(drive(wrapped, http_scope(f"/{number}")) for number in range(200))
    )

    assert [None] * 200 == [each.error for each in exchanges]
    assert 200 == len(set(map(id, sessions)))
    assert 200 == len(set(map(id, scopes)))
    assert list(range(0, 200, 2)) == await rows()
    assert 0 == engine.pool.checkedout()
