"""The response's transaction, message by message."""

import asyncio
import sys

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    DBSessionMiddleware,
    ResponseHead,
    commit_on_success,
    current_session,
    session_options,
)
from tests.fix_asgi import body, start
from tests.fix_database import POSTGRES_DRIVERS, Child, Item

pytestmark = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)


class MissingError(Exception):
    """What a framework turns into a 404."""


async def test_commits_before_the_head(db, drive, rows, timeline):
    """G1, G6: COMMIT is answered and the connection is back before the head goes out."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await send(body(b"ok"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()
    assert exchange.error is None


async def test_failed_commit_is_never_a_success(db, drive, rows, timeline):
    """G2: a COMMIT that fails is rolled back, the head isn't sent, the error surfaces."""
    ran = []

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await send(start(200))
        await send(body(b"ok"))
        ran.append("background")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert [] == ran
    assert "was rolled back" in exchange.error.__notes__[0]


async def test_reads_are_ended_before_the_head_too(db, drive, timeline):
    """G6: a request that only reads gives its connection back before the first byte as well."""

    async def app(scope, receive, send):
        await db.session.scalar(sa.select(sa.func.count(Item.id)))
        await send(start(200))
        await send(body(b"ok"))

    await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline


async def test_commits_before_each_kind_of_head(db, drive, rows, timeline):
    """G1, G3: a redirect and a 4xx that the handler returned commit like a 200."""
    for number, status in enumerate((201, 204, 303, 404, 422, 499), start=1):
        timeline.clear()

        async def app(scope, receive, send, number=number, status=status):
            db.session.add(Item(id=number))
            await send(start(status))
            await send(body())

        await drive(DBSessionMiddleware(app, database=db))

        head = f"start {status}"
        assert ["checkout", "begin", "commit", "checkin", head, "last body"] == timeline
    assert [1, 2, 3, 4, 5, 6] == await rows()


async def test_server_error_rolls_back_before_its_head(db, drive, rows, timeline):
    """G3: a 5xx that the handler returned is rolled back before its head goes out."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(start(503))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "rollback", "checkin", "start 503", "last body"] == timeline
    assert [] == await rows()
    assert exchange.error is None


async def test_client_error_that_was_raised_rolls_back(db, drive, rows, timeline):
    """G3: a 404 sent from inside the `except` block of an exception is rolled back."""

    async def app(scope, receive, send):
        try:
            db.session.add(Item(id=1))
            await db.session.flush()
            raise MissingError
        except MissingError:
            await send(start(404))
            await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "rollback", "checkin", "start 404", "last body"] == timeline
    assert [] == await rows()


async def test_success_sent_while_an_exception_is_handled_rolls_back(db, drive, rows):
    """G3: what counts is that an exception was raised, whatever status it was turned into."""

    async def app(scope, receive, send):
        try:
            db.session.add(Item(id=1))
            raise MissingError
        except MissingError:
            await send(start(200))
            await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [] == await rows()


async def test_exception_that_was_handled_before_the_head_commits(db, drive, rows):
    """G3: an exception that the app dealt with before it answered is none of ours."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            raise MissingError
        except MissingError:
            status = 404
        await send(start(status))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [1] == await rows()


async def test_exception_that_the_server_was_handling_is_not_the_apps(db, drive, rows):
    """G3: an exception that was being handled around the whole request counts for nothing."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await send(body())

    try:
        raise MissingError
    except MissingError:
        await drive(DBSessionMiddleware(app, database=db))

    assert [1] == await rows()


async def test_policy_sees_the_head_and_its_exception(db, drive, rows):
    """G3: a commit policy decides from status, headers and the exception being handled."""
    seen: list[ResponseHead] = []

    def keep(head: ResponseHead) -> bool:
        seen.append(head)
        return True

    error = MissingError()

    async def app(scope, receive, send):
        try:
            db.session.add(Item(id=1))
            raise error
        except MissingError:
            await send(start(404, headers=[(b"x-keep", b"yes")]))
            await send(body())

    await drive(DBSessionMiddleware(app, database=db, commit_policy=keep))

    assert [ResponseHead(404, ((b"x-keep", b"yes"),), error, True)] == seen
    assert [1] == await rows()


async def test_headers_that_are_an_iterator_reach_policy_and_server(db, drive, rows):
    """G18, G3: headers that can be read only once are read by the policy, and sent all the same."""
    seen: list[ResponseHead] = []
    headers = [(b"x-keep", b"yes"), (b"x-more", b"1")]

    def keep(head: ResponseHead) -> bool:
        seen.append(head)
        return True

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200, headers=iter(headers)))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_policy=keep))

    assert [ResponseHead(200, tuple(headers), None, raised=False)] == seen
    assert headers == list(exchange.messages[0]["headers"])
    assert [1] == await rows()


async def test_policy_of_an_endpoint_goes_before_the_apps(db, drive, rows):
    """G3: an endpoint's own commit policy replaces the middleware's."""

    @session_options(commit_policy=commit_on_success)
    async def endpoint(send):
        current_session().add(Item(id=1))
        await send(start(404))
        await send(body())

    async def app(scope, receive, send):
        await endpoint(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [] == await rows()


@pytest.mark.parametrize("answer", [None, 1, "yes"])
async def test_policy_that_does_not_decide_rolls_back(db, drive, rows, answer):
    """G3: a policy that answers neither True nor False is an error, and commits nothing."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_policy=lambda _: answer))

    assert "must return True" in str(exchange.error)
    assert [] == exchange.messages
    assert [] == await rows()


async def test_policy_that_raises_rolls_back(db, drive, rows, timeline):
    """G3: a policy's own error surfaces in place of the head, after the rollback."""

    def fail(head: ResponseHead) -> bool:
        raise ZeroDivisionError

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(start(200))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_policy=fail))

    assert isinstance(exchange.error, ZeroDivisionError)
    assert ["checkout", "begin", "rollback", "checkin"] == timeline


async def test_app_that_returns_without_a_head_rolls_back(db, drive, rows, timeline):
    """G3: without a head the server answers 500, so nothing is committed."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "rollback", "checkin"] == timeline
    assert [] == await rows()
    assert exchange.error is None


async def test_app_that_raises_before_the_head_rolls_back(db, drive, rows, timeline):
    """G3: the app's exception comes out as it is, after the rollback."""
    error = MissingError()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        raise error

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert error is exchange.error
    assert ["checkout", "begin", "rollback", "checkin"] == timeline
    assert [] == await rows()


async def test_app_that_raises_after_the_head_keeps_what_the_head_claimed(db, drive, rows):
    """G1: what was committed before the head stays, whatever happens to the body."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        raise MissingError

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, MissingError)
    assert 200 == exchange.status
    assert [1] == await rows()


async def test_connection_is_back_while_a_slow_client_reads_the_head(db, drive, engine):
    """G6: no connection is held while the server waits to write the first byte."""
    held = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        await send(body(b"x" * 1000, more=True))
        await send(body())

    async def on_send(message):
        await asyncio.sleep(0)
        held.append(engine.pool.checkedout())

    await drive(DBSessionMiddleware(app, database=db), on_send=on_send)

    assert [0, 0, 0] == held


async def test_app_sees_its_own_exception_while_the_head_is_settled(db, drive):
    """G3, G18: the exception that is being handled is the same before and after the head."""
    seen = []

    async def app(scope, receive, send):
        try:
            db.session.add(Item(id=1))
            raise MissingError
        except MissingError as error:
            await send(start(404))
            seen.append(sys.exception() is error)
            await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [True] == seen
