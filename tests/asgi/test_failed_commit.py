"""A COMMIT that fails: rolled back, and an error, whatever the app makes of it."""

import contextlib
import logging

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware, Outcome, current_scope
from tests.fix_asgi import respond
from tests.fix_database import POSTGRES_DRIVERS, Child, Item

ALL_DRIVERS = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


async def orphan(db):
    """Write a row that only COMMIT refuses."""
    db.session.add(Item(id=1))
    await db.session.flush()
    await db.session.execute(sa.insert(Child).values(id=1, item_id=404))


async def failing(scope, receive, send):
    """An app that answers 503: what a `commit_error_response` may return."""
    await respond(send, 503, b"sorry")


@ALL_DRIVERS
async def test_database_error_surfaces_with_a_note(db, drive, rows, timeline):
    """G2: the database's own error comes out as it is, and a note says what became of the work."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await orphan(db)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert sa.exc.IntegrityError is type(exchange.error)
    assert ["asgi_dbscope: the transaction of GET / was rolled back."] == exchange.error.__notes__
    assert [] == exchange.messages
    assert ["checkout", "begin", "commit", "checkin"] == timeline  # at checkin the pool rolls back
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert [] == await rows()


@ALL_DRIVERS
async def test_app_that_swallows_the_error_does_not_hide_it(db, drive, rows):
    """G2: an app that catches what `send` raised and returns has answered nothing: it surfaces."""

    async def app(scope, receive, send):
        await orphan(db)
        try:
            await respond(send)
        except sa.exc.IntegrityError:
            return

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages


async def test_app_that_answers_with_an_error_of_its_own_is_let(db, drive, rows):
    """G2: an app that catches what `send` raised may answer 500 by itself."""

    async def app(scope, receive, send):
        await orphan(db)
        try:
            await respond(send)
        except sa.exc.IntegrityError:
            await respond(send, 500, b"conflict")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert (500, b"conflict") == (exchange.status, exchange.body)
    assert [] == await rows()


async def test_error_of_a_framework_about_its_own_state_is_not_what_surfaces(db, drive):
    """G2: not "response already started" comes out, but what the database said."""

    async def app(scope, receive, send):
        await orphan(db)
        try:
            await respond(send)
        except sa.exc.IntegrityError as error:
            message = "Caught handled exception, but response already started."
            raise RuntimeError(message) from error

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)


async def test_app_that_tries_another_success_is_refused(db, drive, rows):
    """G2: after a failed COMMIT no head below 400 goes out, however often the app tries."""
    refused = []

    async def app(scope, receive, send):
        await orphan(db)
        for status in (200, 204, 302):
            try:
                await respond(send, status)
            except sa.exc.IntegrityError as error:
                refused.append(error)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 3 == len(refused)
    assert 1 == len(set(map(id, refused)))
    assert refused[0] is exchange.error
    assert [] == exchange.messages


async def test_work_after_the_error_is_committed_with_the_apps_own_answer(db, drive, rows):
    """G2, G3: work done after the failure is a transaction of its own, ended by its own head."""

    async def app(scope, receive, send):
        await orphan(db)
        try:
            await respond(send)
        except sa.exc.IntegrityError:
            db.session.add(Item(id=2, note="conflict"))
        await respond(send, 409)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 409 == exchange.status
    assert [2] == await rows()


@ALL_DRIVERS
async def test_background_work_does_not_run_after_a_failed_commit(db, drive):
    """G2: what stands after the `send` that failed does not run."""
    ran = []

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)
        ran.append("background")

    await drive(DBSessionMiddleware(app, database=db))

    assert [] == ran


async def test_commit_error_response_answers_in_place_of_the_app(db, drive, rows, caplog):
    """G2: an app that `commit_error_response` returns answers, and the error is logged."""
    asked = []

    def render(scope, error):
        asked.append((scope["path"], error))
        return failing

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    with caplog.at_level(logging.ERROR, "asgi_dbscope"):
        exchange = await drive(DBSessionMiddleware(app, database=db, commit_error_response=render))

    assert exchange.error is None
    assert (503, b"sorry") == (exchange.status, exchange.body)
    [(path, error)] = asked
    assert "/" == path
    assert isinstance(error, sa.exc.IntegrityError)
    assert [error] == [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [] == await rows()


async def test_commit_error_response_may_leave_it_to_the_server(db, drive):
    """G2: where `commit_error_response` returns None the error surfaces."""

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, commit_error_response=lambda scope, error: None)
    )

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages


async def test_commit_error_response_that_raises_surfaces(db, drive, rows, timeline):
    """G2: an error in `commit_error_response` comes out; the transaction is over by then."""

    def render(scope, error):
        raise ZeroDivisionError

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_error_response=render))

    assert isinstance(exchange.error, ZeroDivisionError)
    assert isinstance(exchange.error.__cause__, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert "checkin" == timeline[-1]


async def test_commit_error_response_whose_app_raises_surfaces(db, drive):
    """G2: an error of the app that answers in place comes out."""

    async def broken(scope, receive, send):
        raise ZeroDivisionError

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, commit_error_response=lambda scope, error: broken)
    )

    assert isinstance(exchange.error, ZeroDivisionError)
    assert [] == exchange.messages


async def test_commit_error_response_is_held_to_the_same_rules(db, drive, rows):
    """G1, G2: the app that answers in place may write, and its own COMMIT goes before its head."""

    async def remember(scope, receive, send):
        db.session.add(Item(id=7, note="conflict"))
        await respond(send, 409)

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, commit_error_response=lambda scope, error: remember)
    )

    assert 409 == exchange.status
    assert [7] == await rows()


async def test_commit_error_response_that_fails_to_commit_surfaces(db, drive, rows):
    """G1, G2: there is one attempt at an answer in place, not an endless row of them."""
    asked = []

    def render(scope, error):
        asked.append(error)
        return app

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_error_response=render))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert 1 == len(asked)
    assert [] == await rows()


async def test_commit_error_response_that_swallows_its_own_failure_surfaces(db, drive, rows):
    """G2: the app that answers in place can't hide that its own COMMIT failed either."""

    async def swallow(scope, receive, send):
        await orphan(db)
        with contextlib.suppress(sa.exc.IntegrityError):
            await respond(send)

    async def app(scope, receive, send):
        await orphan(db)
        await respond(send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, commit_error_response=lambda scope, error: swallow)
    )

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert [] == await rows()


@ALL_DRIVERS
async def test_flush_that_fails_at_the_head_is_a_failed_commit(db, drive, rows):
    """G2: what is only written at the head fails there, and is treated no differently."""
    async with db.session_scope() as session:
        session.add(Item(id=1))

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert [1] == await rows()


async def test_next_request_on_the_same_connection_is_untouched(engine, make_engine, drive, rows):
    """G19: after a failed COMMIT the one pooled connection serves the next request as ever."""
    single = make_engine(
        {"aiosqlite": "sqlite"}.get(engine.dialect.driver, engine.dialect.driver),
        pool_size=1,
        max_overflow=0,
    )
    db = Database(single)

    async def failed(scope, receive, send):
        await orphan(db)
        await respond(send)

    async def good(scope, receive, send):
        db.session.add(Item(id=2))
        await respond(send)

    first = await drive(DBSessionMiddleware(failed, database=db))
    second = await drive(DBSessionMiddleware(good, database=db))

    assert isinstance(first.error, sa.exc.IntegrityError)
    assert second.error is None
    assert [2] == await rows()
    assert 0 == single.pool.checkedout()
    await single.dispose()


@ON_POSTGRES
async def test_rollback_that_fails_throws_the_connection_away(db, drive, engine, rows, caplog):
    """G19: where the server has ended the connection before ROLLBACK, it leaves the pool."""
    error = ZeroDivisionError()

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        pid = await db.session.scalar(sa.select(sa.func.pg_backend_pid()))
        async with engine.connect() as other:
            await other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5000)))
        raise error

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert error is exchange.error
    assert 0 == engine.pool.checkedout()
    async with engine.connect() as first, engine.connect() as second:
        assert 1 == await first.scalar(sa.select(1))
        assert 1 == await second.scalar(sa.select(1))
    assert [] == await rows()
