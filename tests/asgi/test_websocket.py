"""Websockets, lifespan and unknown scope types."""

import asyncio
from typing import Any, Self

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    State,
    WebSocketSessionError,
    current_scope,
    current_session,
)
from tests.fix_asgi import body, start
from tests.fix_database import Item

CONNECT = {"type": "websocket.connect"}
DISCONNECT = {"type": "websocket.disconnect", "code": 1001}


def text(content: str) -> dict[str, Any]:
    """A message of the client."""
    return {"type": "websocket.receive", "text": content}


def websocket_scope(path: str = "/feed") -> dict[str, Any]:
    """An ASGI scope of type `websocket`."""
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "subprotocols": [],
    }


async def accept(receive, send):
    """Take the connection."""
    assert CONNECT == await receive()
    await send({"type": "websocket.accept"})


# --------------------------------------------------------------------------------------
# A scope per message
# --------------------------------------------------------------------------------------


async def test_each_message_has_a_scope_of_its_own(db, drive, rows, timeline):
    """G17: Each block is a transaction of its own, committed at its end, on its own session."""
    sessions = []

    async def app(scope, receive, send):
        await accept(receive, send)
        while (message := await receive())["type"] == "websocket.receive":
            async with db.session_scope() as session:
                assert session is current_session()
                assert session is db.session
                sessions.append(session)
                session.add(Item(id=int(message["text"])))
            await send({"type": "websocket.send", "text": "saved"})

    exchange = await drive(
        DBSessionMiddleware(app, database=db),
        websocket_scope(),
        received=[CONNECT, text("1"), text("2"), DISCONNECT],
    )

    assert exchange.error is None
    assert ["accept", *["checkout", "begin", "commit", "checkin", "send"] * 2] == timeline
    assert 2 == len(set(sessions))
    assert [1, 2] == await rows()


async def test_no_connection_is_held_between_messages(engine, db, drive):
    """G17: While a websocket waits for its next message the pool has every connection."""
    waiting = asyncio.Event()
    next_message = asyncio.Event()
    messages = [CONNECT, text("1")]

    async def app(scope, receive, send):
        await accept(receive, send)
        await receive()
        async with db.session_scope() as session:
            session.add(Item(id=1))
            await session.flush()
            assert 1 == engine.pool.checkedout()
        waiting.set()
        await next_message.wait()

    task = asyncio.create_task(
        drive(DBSessionMiddleware(app, database=db), websocket_scope(), received=messages)
    )
    await waiting.wait()
    held = engine.pool.checkedout()
    next_message.set()
    exchange = await task

    assert exchange.error is None
    assert 0 == held


async def test_message_that_raises_is_rolled_back_alone(db, drive, rows):
    """G3, G17: A block that raises is rolled back; the blocks around it are not."""

    async def app(scope, receive, send):
        await accept(receive, send)
        for number in (1, 2, 3):
            try:
                async with db.session_scope() as session:
                    await session.execute(sa.insert(Item).values(id=number))
                    if number == 2:
                        raise LookupError
            except LookupError:
                await send({"type": "websocket.send", "text": "failed"})

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT]
    )

    assert exchange.error is None
    assert [1, 3] == await rows()


async def test_exception_of_a_websocket_passes(db, drive, rows):
    """G3, G18: An exception in a block rolls back, and is the app's to the server."""

    async def app(scope, receive, send):
        await accept(receive, send)
        async with db.session_scope() as session:
            await session.execute(sa.insert(Item).values(id=1))
            raise LookupError("mine")

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT]
    )

    assert isinstance(exchange.error, LookupError)
    assert ["websocket.accept"] == [each["type"] for each in exchange.messages]
    assert [] == await rows()


async def test_disconnect_leaves_the_block_to_the_app(db, drive, rows):
    """G17: A disconnect is a message: a block that is open when it is read goes on to its end."""

    async def app(scope, receive, send):
        await accept(receive, send)
        async with db.session_scope() as session:
            session.add(Item(id=1))
            assert DISCONNECT == await receive()

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT, DISCONNECT]
    )

    assert exchange.error is None
    assert [1] == await rows()


async def test_cancelled_websocket_rolls_back(engine, db, drive, rows):
    """G10, G17: A websocket that is cancelled inside a block rolls back and gives back."""
    written = asyncio.Event()

    async def app(scope, receive, send):
        await accept(receive, send)
        async with db.session_scope() as session:
            await session.execute(sa.insert(Item).values(id=1))
            written.set()
            await receive()

    task = asyncio.create_task(
        drive(DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT])
    )
    await written.wait()
    task.cancel()
    exchange = await task

    assert isinstance(exchange.error, asyncio.CancelledError)
    assert 0 == engine.pool.checkedout()
    assert [] == await rows()


async def test_get_session_in_a_block_of_a_websocket(db, drive, rows):
    """G17: Inside of a block every way to the session leads to the block's."""

    async def app(scope, receive, send):
        await accept(receive, send)
        async with db.session_scope() as session:
            assert session is await db.get_session()
            async with db.get_session() as same:
                assert session is same
            assert session is db.session_proxy()
            db.set_rollback_only()
            session.add(Item(id=1))
        async with db.session_scope() as session:
            session.add(Item(id=2))

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT]
    )

    assert exchange.error is None
    assert [2] == await rows()


# --------------------------------------------------------------------------------------
# Outside of a block
# --------------------------------------------------------------------------------------


async def test_session_outside_of_a_block_is_told(db, drive):
    """G17: A websocket's code that asks for the session outside of a block is told to open one."""
    errors = []

    async def app(scope, receive, send):
        await accept(receive, send)
        for ask in (current_session, lambda: db.session, db.session_proxy):
            try:
                ask()
            except WebSocketSessionError as error:
                errors.append(str(error))
        try:
            await db.get_session()
        except WebSocketSessionError as error:
            errors.append(str(error))

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT]
    )

    assert exchange.error is None
    assert 4 == len(errors)
    for error in errors:
        assert "WEBSOCKET /feed" in error
        assert "async with db.session_scope() as session:" in error


async def test_scope_of_a_websocket_is_there_and_ends(db, drive):
    """G17: A websocket has a scope from its first message to its last, though no session."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        assert "<SessionScope IDLE WEBSOCKET /feed>" == repr(scopes[0])
        await db.release()
        await accept(receive, send)
        assert State.IDLE is scopes[0].state

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT]
    )

    assert exchange.error is None
    assert State.CLOSED is scopes[0].state


async def test_excluded_websocket_has_no_scope(db, drive):
    """G5: A websocket whose path is excluded passes untouched."""

    async def app(scope, receive, send):
        with pytest.raises(NoSessionScopeError):
            current_scope()
        await accept(receive, send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, exclude=["/feed"]),
        websocket_scope(),
        received=[CONNECT],
    )

    assert exchange.error is None


async def test_denial_response_of_a_websocket_passes(db, drive):
    """G18: A websocket may answer with an HTTP response instead; nothing of it is changed."""
    sent = [
        {"type": "websocket.http.response.start", "status": 403, "headers": []},
        {"type": "websocket.http.response.body", "body": b"no"},
    ]

    async def app(scope, receive, send):
        assert CONNECT == await receive()
        for message in sent:
            await send(message)

    exchange = await drive(
        DBSessionMiddleware(app, database=db), websocket_scope(), received=[CONNECT]
    )

    assert exchange.error is None
    assert sent == exchange.messages


# --------------------------------------------------------------------------------------
# Lifespan and unknown types
# --------------------------------------------------------------------------------------


STARTUP = {"type": "lifespan.startup"}
SHUTDOWN = {"type": "lifespan.shutdown"}


@pytest.mark.parametrize("kind", ["lifespan", "mqtt", None])
async def test_other_scope_types_pass_untouched(db, kind):
    """G17: Lifespan and unknown types get the very same scope, receive and send, and no session."""
    scope = {"type": kind, "state": {}} if kind else {}
    before = dict(scope)
    seen: list[Any] = []

    async def receive():
        raise AssertionError

    async def send(message):
        raise AssertionError

    async def app(*given):
        seen.extend(given)
        with pytest.raises(NoSessionScopeError):
            current_scope()
        return "result"

    result = await DBSessionMiddleware(app, database=db)(scope, receive, send)

    assert "result" == result
    assert scope is seen[0]
    assert receive is seen[1]
    assert send is seen[2]
    assert before == scope


async def lifespan_app(scope, receive, send):
    """Run through a lifespan; answer requests with what is in the database."""
    if scope["type"] == "lifespan":
        assert STARTUP == await receive()
        await send({"type": "lifespan.startup.complete"})
        assert SHUTDOWN == await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    assert 1 == await current_session().scalar(sa.text("SELECT 1"))
    await send(start())
    await send(body())


class Lifespan:
    """A server's side of a lifespan."""

    def __init__(self, app: Any) -> None:
        self._received: asyncio.Queue[Any] = asyncio.Queue()
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._app = app

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(
            self._app({"type": "lifespan"}, self._received.get, self._sent.put)
        )
        await self._received.put(STARTUP)
        assert "lifespan.startup.complete" == (await self._sent.get())["type"]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._received.put(SHUTDOWN)
        assert "lifespan.shutdown.complete" == (await self._sent.get())["type"]
        await self._task


@pytest.fixture(params=["sqlite", "asyncpg"])
def url(request, tmp_path):
    """A URL for an engine of the database's own."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'own.db'}"
    return request.getfixturevalue("postgres_url")


def idle(database: Database[Any]) -> int:
    """How many connections wait in the pool of an engine of the database's own."""
    assert database.owned_engine is not None
    pool = database.owned_engine.pool
    assert isinstance(pool, sa.AsyncAdaptedQueuePool)
    return pool.checkedin()


async def test_database_made_from_a_url_is_disposed_of_at_shutdown(drive, url, timeline):
    """G17: An engine of the database's own is closed before the server hears of the shutdown."""
    database = Database(url)
    app = DBSessionMiddleware(lifespan_app, database=database)
    engine = database.owned_engine
    assert isinstance(engine, AsyncEngine)
    sa.event.listen(engine.sync_engine, "close", lambda *args: timeline.append("close"))

    for _ in range(2):
        timeline.clear()
        async with Lifespan(app):
            exchange = await drive(app)
            assert exchange.error is None
            assert 200 == exchange.status
            assert 1 == idle(database)
            assert "close" not in timeline
        assert ["start 200", "last body", "close"] == timeline
        assert 0 == idle(database)


async def test_engine_of_the_users_is_left_alone_at_shutdown(engine, db, drive):
    """G18: An engine that somebody else made is not disposed of at shutdown."""
    app = DBSessionMiddleware(lifespan_app, database=db)

    async with Lifespan(app):
        await drive(app)

    assert 1 == engine.pool.checkedin()
    await db.dispose()
    assert 1 == engine.pool.checkedin()


async def test_database_made_from_a_url_is_disposed_of_by_hand(drive, url):
    """G17: `dispose()` by hand closes an engine of the database's own, which works again."""
    database = Database(url)

    for _ in range(2):
        async with database.session_scope() as session:
            await session.execute(sa.text("SELECT 1"))
        assert 1 == idle(database)
        await database.dispose()
        assert 0 == idle(database)


@pytest.mark.parametrize("failing", ["startup", "crash"])
async def test_lifespan_that_fails_leaves_no_connection(url, failing):
    """G17: A lifespan that fails after it used the database closes the connections too."""
    database = Database(url)
    sent = []

    async def app(scope, receive, send):
        async with database.session_scope() as session:
            await session.execute(sa.text("SELECT 1"))
        if failing == "crash":
            raise LookupError
        await send({"type": "lifespan.startup.failed", "message": "no"})

    async def receive():
        return STARTUP

    async def send(message):
        sent.append(message["type"])

    middleware = DBSessionMiddleware(app, database=database)
    if failing == "crash":
        with pytest.raises(LookupError):
            await middleware({"type": "lifespan"}, receive, send)
        assert [] == sent
    else:
        await middleware({"type": "lifespan"}, receive, send)
        assert ["lifespan.startup.failed"] == sent
    assert 0 == idle(database)
