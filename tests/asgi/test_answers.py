"""Errors that have an HTTP answer of their own: 503 with Retry-After, 504."""

import contextlib
import logging

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    OverloadedError,
    PoolExhaustedError,
    TransactionTimeoutError,
    _answers,
)
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Item

PLAIN = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"21")]


def headers(exchange):
    """The headers of the head that went out."""
    return dict(exchange.messages[0]["headers"])


@pytest.mark.parametrize(
    ("error", "status", "content"),
    [
        (PoolExhaustedError("busy"), 503, b"Service Unavailable"),
        (OverloadedError("busy"), 503, b"Service Unavailable"),
        (sa.exc.TimeoutError("QueuePool limit"), 503, b"Service Unavailable"),
        (TransactionTimeoutError("late"), 504, b"Gateway Timeout"),
        (ExceptionGroup("", [PoolExhaustedError("busy")]), 503, b"Service Unavailable"),
    ],
    ids=["exhausted", "overloaded", "pool", "timeout", "group"],
)
async def test_error_that_the_app_raised_is_answered_after_the_rollback(
    db, drive, rows, timeline, caplog, error, status, content
):
    """G14: what the app raised before its head is rolled back, then answered, and logged."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        raise error

    with caplog.at_level(logging.WARNING, "asgi_dbscope"):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (None, status, content) == (exchange.error, exchange.status, exchange.body)
    assert (b"1" if status == 503 else None) == headers(exchange).get(b"retry-after")
    assert ["checkout", "begin", "rollback", "checkin", f"start {status}", "last body"] == timeline
    told = getattr(error, "exceptions", [error])[0]
    assert [f"GET /: answered {status}: {told}"] == caplog.messages
    assert [] == await rows()


@pytest.mark.parametrize("is_settled", [False, True])
async def test_plain_500_of_a_framework_is_kept_back(db, drive, rows, is_settled):
    """G14: a framework's own 500 for such an error, sent while handling it, becomes its answer."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        if is_settled:
            await db.session.rollback()
        try:
            raise PoolExhaustedError("busy")
        except PoolExhaustedError:
            await send(start(500, headers=PLAIN))
            await send(body(b"Internal Server Error"))
            raise

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (None, 503) == (exchange.error, exchange.status)
    assert b"Service Unavailable" == exchange.body
    assert [] == await rows()


@pytest.mark.parametrize(
    ("status", "make_headers", "content"),
    [
        (500, list, b"mine"),
        (500, lambda: PLAIN, b"mine"),
        (500, lambda: iter(PLAIN), b"mine"),
        (500, lambda: [b"nothing to be understood"], b"mine"),
        (500, list, b""),
        (500, list, "Internal Server Error"),
        (500, list, b"Internal Server Error" + b"." * 1000),
        (503, list, b"Internal Server Error"),
    ],
    ids=["bare", "plain", "iterator", "malformed", "empty", "no bytes", "a page", "unavailable"],
)
async def test_answer_of_the_apps_own_goes_out(db, drive, status, make_headers, content):
    """G14: an app that answers such an error by itself, and says something, has the last word."""

    async def app(scope, receive, send):
        assert db.session
        try:
            raise PoolExhaustedError("busy")
        except PoolExhaustedError:
            await send(start(status, headers=make_headers()))
            await send(body(content))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert status == exchange.status
    assert [content] == [each["body"] for each in exchange.messages[1:]]


async def test_plain_500_without_a_body_is_kept_back(db, drive):
    """G14: what is answered to HEAD, an app that stops after the head, and one that fails."""
    ends = {"HEAD": lambda send: send(body()), "GET": lambda send: None, "POST": fail}

    async def app(scope, receive, send):
        assert db.session
        try:
            raise PoolExhaustedError("busy")
        except PoolExhaustedError:
            await send(start(500))
            end = ends[scope["method"]](send)
            if end is not None:
                await end

    exchanges = [
        await drive(DBSessionMiddleware(app, database=db), http_scope(method=method))
        for method in ends
    ]

    assert [(None, 503)] * 3 == [(each.error, each.status) for each in exchanges]


async def test_plain_500_is_followed_by_what_is_no_body(db, drive):
    """G18: a 500 whose body can't be looked at goes out as it is."""
    file = {"type": "http.response.pathsend", "path": "/a/page"}

    async def app(scope, receive, send):
        assert db.session
        try:
            raise PoolExhaustedError("busy")
        except PoolExhaustedError:
            await send(start(500))
            await send(file)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [start(500), file] == exchange.messages


def fail(send):
    """Fail."""
    raise ZeroDivisionError


@pytest.mark.parametrize(("heals", "status"), [(False, 503), (True, 500)])
async def test_error_that_the_session_met_is_known_though_nobody_sees_it(
    db, drive, engine, heals, status
):
    """G14: an app that answers outside of its `except` block; unless it could go on after all."""
    impatient = Database(engine, checkout_timeout=0.05)

    async def app(scope, receive, send):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(engine.pool.size() + engine.pool._max_overflow):
                await stack.enter_async_context(engine.connect())
            with contextlib.suppress(PoolExhaustedError):
                async with impatient.session_scope() as session:
                    await session.execute(sa.text("SELECT 1"))
        if heals:
            await impatient.session.execute(sa.text("SELECT 1"))
        await send(start(500))
        await send(body(b"Internal Server Error"))

    exchange = await drive(DBSessionMiddleware(app, database=impatient))

    assert (None, status) == (exchange.error, exchange.status)


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), ExceptionGroup("", [PoolExhaustedError("busy"), ZeroDivisionError()])],
    ids=["other", "several"],
)
async def test_plain_500_of_another_error_goes_out(db, drive, error):
    """G18: any other error's 500 passes as it is, and so does one of several errors together."""

    async def app(scope, receive, send):
        assert db.session
        try:
            raise error
        except Exception:
            await send(start(500, headers=PLAIN))
            await send(body(b"Internal Server Error"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (500, b"Internal Server Error") == (exchange.status, exchange.body)


async def test_error_that_is_handled_around_the_app_is_not_the_apps(db, drive):
    """G18: an app that is called while somebody handles such an error answers what it likes."""

    async def app(scope, receive, send):
        assert db.session
        await send(start(500, headers=PLAIN))
        await send(body(b"Internal Server Error"))

    guarded = DBSessionMiddleware(app, database=db)

    async def around(scope, receive, send):
        try:
            raise PoolExhaustedError("busy")
        except PoolExhaustedError:
            await guarded(scope, receive, send)

    exchange = await drive(around)

    assert (500, b"Internal Server Error") == (exchange.status, exchange.body)


async def test_commit_error_response_is_asked_first(db, drive):
    """G14: `commit_error_response` answers such an error in its own way."""

    async def render(scope, receive, send):
        await send(start(429))
        await send(body(b"later"))

    async def app(scope, receive, send):
        assert db.session
        raise PoolExhaustedError("busy")

    asked = DBSessionMiddleware(app, database=db, commit_error_response=lambda scope, error: render)
    exchange = await drive(asked)

    assert (429, b"later") == (exchange.status, exchange.body)


async def test_error_after_the_head_surfaces(db, drive):
    """G14: once a head is out nothing is answered any more."""

    async def app(scope, receive, send):
        assert db.session
        await send(start(200))
        raise PoolExhaustedError("busy")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, PoolExhaustedError)
    assert 200 == exchange.status


async def test_error_of_any_class_can_be_given_an_answer(db, drive):
    """G14: an error of a driver's class, whose meaning only its code tells, is marked."""

    async def app(scope, receive, send):
        assert db.session
        error = sa.exc.OperationalError("UPDATE", {}, Exception("deadlock detected"))
        _answers.mark(error, _answers.TRY_AGAIN)
        raise error

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 503 == exchange.status


async def test_error_in_a_failed_commit_is_answered_over_a_plain_500(db, drive, rows):
    """G14: an app that makes a plain 500 of what `send` raised is answered for."""

    def late(head):
        raise TransactionTimeoutError("late")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        try:
            await send(start(200))
        except TransactionTimeoutError:
            await send(start(500, headers=PLAIN))
            await send(body(b"Internal Server Error"))

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_policy=late))

    assert (None, 504) == (exchange.error, exchange.status)
    assert [] == await rows()
