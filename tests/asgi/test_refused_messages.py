"""Messages that the server refuses, and an app that goes on after that."""

import asyncio
import contextlib

import pytest

from asgi_dbscope import DBSessionMiddleware, MalformedMessageError
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import Item

UNWELCOME = start(200, headers=[(b"content-length", b"-1")])


def is_unwelcome(message):
    """Whether the server below refuses *message*."""
    return message == UNWELCOME or not isinstance(message.get("status", 200), int)


async def strict(message):
    """A server that objects."""
    if is_unwelcome(message):
        raise ValueError("can't send this")


@pytest.fixture
def refusing(db, drive):
    """Run an app below a server that refuses; the messages that it took are returned as well."""

    async def refusing(app):
        exchange = await drive(DBSessionMiddleware(app, database=db), on_send=strict)
        return exchange, [each for each in exchange.messages if not is_unwelcome(each)]

    return refusing


@pytest.mark.parametrize(("status", "expected"), [(500, [1]), (201, [1, 2])])
async def test_head_that_was_refused_is_followed_by_another(db, refusing, rows, status, expected):
    """G1, G3: the response begins with the head that the server took, and that one decides."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        with contextlib.suppress(ValueError):
            await send(UNWELCOME)
        db.session.add(Item(id=2))
        await respond(send, status)

    exchange, taken = await refusing(app)

    assert [status] == [each["status"] for each in taken if "status" in each]
    assert exchange.error is None
    assert expected == await rows()


@pytest.mark.parametrize("status", [500, 201])
async def test_second_head_in_an_open_transaction_is_refused(db, refusing, rows, status):
    """G1, G3: where nothing was open nobody looked what became of the first head."""

    async def app(scope, receive, send):
        with contextlib.suppress(ValueError):
            await send(start(200) | {"status": "200"})
        db.session.add(Item(id=1))
        await respond(send, status)

    exchange, taken = await refusing(app)

    assert isinstance(exchange.error, MalformedMessageError)
    assert "a second response head" in str(exchange.error)
    assert [] == taken
    assert [] == await rows()


async def test_body_that_was_refused_is_not_the_end(db, drive, rows):
    """G7: what the app writes after that belongs to the body, which never ends."""

    async def objecting(message):
        if message.get("body"):
            raise ValueError("too long")

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        with contextlib.suppress(ValueError):
            await send(body(b"too long"))
        db.session.add(Item(id=2))

    await drive(DBSessionMiddleware(app, database=db), on_send=objecting)

    assert [1] == await rows()


async def test_trailers_after_a_body_that_was_refused_are_no_end(db, drive, rows):
    """G7: without the end of the body there is none of its trailers."""

    async def objecting(message):
        if message["type"] == "http.response.body":
            raise ValueError("too long")

    async def app(scope, receive, send):
        await send(start(200, trailers=True))
        db.session.add(Item(id=1))
        with contextlib.suppress(ValueError):
            await send(body(b"too long"))
        await send({"type": "http.response.trailers", "headers": []})

    scope = http_scope(extensions={"http.response.trailers": {}})
    await drive(DBSessionMiddleware(app, database=db), scope, on_send=objecting)

    assert [] == await rows()


@pytest.mark.parametrize(
    "last",
    [
        {"type": "http.response.pathsend", "path": "/a/file"},
        {"type": "http.response.zerocopysend", "file": 3},
    ],
    ids=lambda message: message["type"],
)
async def test_file_that_the_server_has_not_offered_to_send_commits_nothing(db, drive, rows, last):
    """G7: the server would refuse it, and the body end torn."""

    async def app(scope, receive, send):
        await send(start(200))
        db.session.add(Item(id=1))
        await send(last)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, MalformedMessageError)
    assert [] == await rows()


async def test_head_that_may_have_gone_out_counts_as_sent(db, drive, rows):
    """G7, G10: cancelled in the middle of sending, a head is followed by its body."""
    is_sending = asyncio.Event()

    async def slow(message):
        if message["type"] == "http.response.start":
            is_sending.set()
            await asyncio.Event().wait()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await send(start(200))
        except asyncio.CancelledError:
            db.session.add(Item(id=2))
            await db.session.flush()
            await send(body())

    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db), on_send=slow))
    await is_sending.wait()
    request.cancel()
    exchange = await request

    assert exchange.error is None
    assert [1, 2] == await rows()


async def test_late_refusal_takes_nothing_back_that_came_after(db, drive, rows):
    """G7: a head that is refused when another task has ended the body leaves it ended."""
    is_sending, may_fail = asyncio.Event(), asyncio.Event()

    async def slow(message):
        if message["type"] == "http.response.start":
            is_sending.set()
            await may_fail.wait()
            raise ValueError("can't send this")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        head = asyncio.create_task(send(start(200)))
        await is_sending.wait()
        await send(body())
        may_fail.set()
        await asyncio.wait([head])
        assert isinstance(head.exception(), ValueError)
        db.session.add(Item(id=2))

    await drive(DBSessionMiddleware(app, database=db), on_send=slow)

    assert [1, 2] == await rows()
