"""A request that lost to a conflict is replayed, until it wins or its attempts are used up."""

import asyncio
import contextlib
import logging

import pytest
import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.middleware import Middleware

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    ReplayedError,
    Retry,
    commit_on_success,
    current_scope,
    session_options,
)
from asgi_dbscope.testing import inject_conflicts
from tests.fix_asgi import respond
from tests.fix_database import Item

AT_ONCE = Retry(attempts=3, base=0)
"""Three attempts, without a pause."""


def headers_of(exchange):
    """The headers of the response."""
    return dict(exchange.messages[0]["headers"])


@pytest.mark.parametrize("at", ["commit", "INSERT INTO item", 1])
async def test_lost_request_is_served_again(at, db, drive, rows, timeline):
    """G16: a conflict at a statement or at COMMIT is followed by another attempt, and one head."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append((current_scope().attempt, current_scope().is_last_attempt))
        db.session.add(Item(id=1))
        await db.session.flush()
        await respond(send, 201)

    with inject_conflicts(db, at=at, times=2) as injected:
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 2 == injected.count
    assert [(1, False), (2, False), (3, True)] == attempts
    assert (201, b"ok") == (exchange.status, exchange.body)
    assert exchange.error is None
    assert ["commit", "checkin", "start 201", "last body"] == timeline[-4:]
    assert 3 == timeline.count("checkin")
    assert [1] == await rows()


async def test_without_retry_a_conflict_is_the_databases_error(db, drive, rows):
    """G16: nobody asked for it: one attempt, and the error surfaces."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append((current_scope().attempt, current_scope().is_last_attempt))
        current_scope().fence("no matter")
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [(1, True)] == attempts
    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert [] == await rows()


async def test_loser_of_the_last_attempt_is_told_to_come_back(db, drive, rows, caplog):
    """G16: after the last attempt the client gets 503 with Retry-After, and nothing of the SQL."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    retry = Retry(attempts=2, base=0, cap=2.5)
    with inject_conflicts(db, times=None) as injected, caplog.at_level(logging.INFO):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=retry))

    assert 2 == injected.count
    assert 503 == exchange.status
    assert b"3" == headers_of(exchange)[b"retry-after"]
    assert b"text/plain; charset=utf-8" == headers_of(exchange)[b"content-type"]
    assert b"Service Unavailable" == exchange.body
    assert exchange.error is None
    assert [] == await rows()
    levels = [each.levelname for each in caplog.records if each.name == "asgi_dbscope"]
    assert ["INFO", "WARNING", "WARNING"] == levels
    assert "GET /: attempt 1 of 2 has lost to a conflict (" in caplog.text
    assert "GET /: attempt 2 of 2 has lost to a conflict (" in caplog.text
    assert "and was the last one: no attempt is left" in caplog.text


async def test_log_shows_nothing_of_what_the_app_makes_of_a_conflict(db, drive, caplog):
    """G16: the text of its error may be anything, line breaks and the statement included."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await db.session.flush()
        except sa.exc.DBAPIError as error:
            msg = f"{error}\nanother line"
            raise ValueError(msg) from error

    with inject_conflicts(db, at="INSERT INTO item"), caplog.at_level(logging.WARNING):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(attempts=1)))

    assert 503 == exchange.status
    assert "GET /: answered 503: ValueError" == caplog.messages[-1]


async def test_last_loser_may_be_answered_in_the_apps_words(db, drive):
    """G16: `commit_error_response` answers the loser of the last attempt, and only that one."""
    asked = []

    async def sorry(scope, receive, send):
        await respond(send, 409, b"sorry")

    def render(scope, error):
        asked.append(error)
        return sorry

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    app = DBSessionMiddleware(app, database=db, retry=AT_ONCE, commit_error_response=render)
    with inject_conflicts(db, times=None):
        exchange = await drive(app)

    assert (409, b"sorry") == (exchange.status, exchange.body)
    [error] = asked
    assert isinstance(error, sa.exc.DBAPIError)


async def test_app_that_raises_is_replayed(db, drive, rows):
    """G16: a conflict that nobody catches is replayed though no head was sent."""

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send)

    with inject_conflicts(db, at="INSERT", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 200 == exchange.status
    assert [1] == await rows()


async def test_app_that_raises_in_the_last_attempt_is_answered(db, drive):
    """G16: the loser of the last attempt gets 503 also where the app sent no head."""

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item).values(id=1))

    with inject_conflicts(db, at="INSERT", times=None):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 503 == exchange.status
    assert exchange.error is None


async def test_app_that_returns_without_an_answer_is_replayed(db, drive, rows):
    """G16: an app that swallowed the conflict and returned without a head has lost, too."""

    async def app(scope, receive, send):
        with contextlib.suppress(sa.exc.DBAPIError):
            await db.session.execute(sa.insert(Item).values(id=1))
            await respond(send)

    with inject_conflicts(db, at="INSERT", times=1):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 200 == exchange.status
    assert [1] == await rows()


@pytest.mark.parametrize("status", [409, 500])
async def test_answer_to_a_raised_conflict_is_not_sent_before_the_last_attempt(
    status, db, drive, rows
):
    """G16: a handler's answer to the conflict waits; a replay that wins makes it unnecessary."""

    async def app(scope, receive, send):
        try:
            await db.session.execute(sa.insert(Item).values(id=1))
        except sa.exc.DBAPIError:
            await respond(send, status)
            raise
        await respond(send, 201)

    with inject_conflicts(db, at="INSERT", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 201 == exchange.status
    assert [1] == await rows()


PLAIN = b"Internal Server Error"
"""What a framework's answer says that nobody has written."""


@pytest.mark.parametrize(
    ("status", "content", "sent"), [(409, b"", 409), (500, b"mine", 500), (500, PLAIN, 503)]
)
async def test_apps_answer_to_the_last_loser_goes_out(status, content, sent, db, drive, rows):
    """G16: the app's answer to the last loser is the app's; a framework's own 500 becomes a 503."""

    async def app(scope, receive, send):
        try:
            await db.session.execute(sa.insert(Item).values(id=1))
        except sa.exc.DBAPIError:
            await respond(send, status, content)

    with inject_conflicts(db, at="INSERT", times=None) as injected:
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 3 == injected.count
    assert sent == exchange.status
    assert [] == await rows()


async def test_app_that_answers_a_failed_commit_with_500_is_overruled(db, drive):
    """G16: a framework's own 500 once COMMIT has failed becomes the loser's 503."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await respond(send)
        except sa.exc.DBAPIError:
            await respond(send, 500, PLAIN)

    with inject_conflicts(db, times=None):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(1)))

    assert 503 == exchange.status


async def test_app_that_answers_a_failed_commit_itself_is_let(db, drive):
    """G16: an error of the app's own goes out, after the last attempt."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await respond(send)
        except sa.exc.DBAPIError:
            await respond(send, 409)

    with inject_conflicts(db, times=None):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(1)))

    assert 409 == exchange.status


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_swallowed_conflict_is_replayed(db, drive, rows):
    """G16, G21: who swallows a conflict and claims a success would lose at COMMIT: replayed."""

    async def app(scope, receive, send):
        with contextlib.suppress(sa.exc.DBAPIError):
            await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send, 201)

    with inject_conflicts(db, at="INSERT", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 201 == exchange.status
    assert [1] == await rows()


async def test_failed_block_whose_error_was_swallowed_is_replayed(db, drive, rows):
    """G16, G4: a joined block that lost forbids the COMMIT: the request is replayed."""

    @db.transactional
    async def place():
        await db.session.execute(sa.insert(Item).values(id=1))

    async def app(scope, receive, send):
        with contextlib.suppress(sa.exc.DBAPIError):
            await place()
        await respond(send, 201)

    with inject_conflicts(db, at="INSERT", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 201 == exchange.status
    assert [1] == await rows()


async def test_answer_above_500_to_a_swallowed_conflict_is_replayed(db, drive, rows):
    """G16: a 503 that the app makes of a conflict is what the replay is for."""

    async def app(scope, receive, send):
        status = 201
        try:
            await db.session.execute(sa.insert(Item).values(id=1))
        except sa.exc.DBAPIError:
            status = 503
        await respond(send, status)

    with inject_conflicts(db, at="INSERT", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 201 == exchange.status
    assert [1] == await rows()


async def test_error_that_follows_a_swallowed_conflict_is_replayed(db, drive, rows):
    """G16: another error in the transaction that was lost is no reason to give up."""

    async def app(scope, receive, send):
        try:
            await db.session.execute(sa.insert(Item).values(id=1))
        except sa.exc.DBAPIError:
            raise LookupError from None
        await respond(send, 201)

    with inject_conflicts(db, at="INSERT", times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 201 == exchange.status
    assert [1] == await rows()


async def test_conflict_that_a_savepoint_healed_is_none(db, drive, rows):
    """G16: what was lost in a savepoint that was rolled back to is the app's to answer."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=2))
        await db.session.flush()
        with contextlib.suppress(sa.exc.DBAPIError):
            async with db.session.begin_nested():
                await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send, 201 if len(attempts) == 1 else 500)

    with inject_conflicts(db, at=2, times=1):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert 201 == exchange.status
    assert [2] == await rows()


async def test_error_after_a_healed_conflict_is_not_replayed(db, drive):
    """G16: a 500 that has nothing to do with the conflict that was healed goes out."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        with contextlib.suppress(sa.exc.DBAPIError):
            async with db.session.begin_nested():
                await db.session.execute(sa.insert(Item).values(id=1))
        await respond(send, 500)

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert 500 == exchange.status


@pytest.mark.parametrize("status", [409, 503])
async def test_conflict_that_the_app_rolled_back_by_hand_is_its_own_to_answer(status, db, drive):
    """G16: who calls `rollback()` has dealt with the conflict; its answer goes out."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        try:
            await db.session.execute(sa.insert(Item).values(id=1))
        except sa.exc.DBAPIError:
            await db.session.rollback()
        await respond(send, status)

    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert status == exchange.status


async def test_answer_below_500_that_a_policy_rolls_back_anyway_goes_out(db, drive):
    """G16: a 4xx that the app returned for a conflict stands where nothing was to be committed."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        status = 201
        try:
            await db.session.execute(sa.insert(Item).values(id=1))
        except sa.exc.DBAPIError:
            status = 409
        await respond(send, status)

    middleware = DBSessionMiddleware(
        app, database=db, retry=AT_ONCE, commit_policy=commit_on_success
    )
    with inject_conflicts(db, at="INSERT"):
        exchange = await drive(middleware)

    assert [1] == attempts
    assert 409 == exchange.status


async def test_commit_of_the_users_own_that_lost_is_replayed(engine, drive, rows):
    """G16: in mode "manual" the user's own COMMIT may lose, too."""
    db = Database(engine, mode="manual")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.commit()
        await respond(send)

    with inject_conflicts(db, times=2):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 200 == exchange.status
    assert [1] == await rows()


async def test_other_errors_are_not_replayed(db, drive):
    """G16: what isn't a conflict surfaces at once."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await db.session.execute(sa.insert(Item).values([{"id": 1}, {"id": 1}]))

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1] == attempts
    assert isinstance(exchange.error, sa.exc.IntegrityError)


async def test_errors_of_ones_own_may_be_conflicts(db, drive):
    """G16: `also` names what else means a conflict, such as a row's version that has changed."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        await db.session.execute(sa.select(1))
        if len(attempts) == 1:
            raise LookupError
        await respond(send)

    retry = Retry(base=0, also=LookupError)
    exchange = await drive(DBSessionMiddleware(app, database=db, retry=retry))

    assert [1, 2] == attempts
    assert 200 == exchange.status


async def test_error_out_of_send_says_that_the_request_is_replayed(db, drive):
    """G16: what unwinds the app says so, is caused by the conflict, and can't be answered."""
    seen = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        try:
            await respond(send)
        except ReplayedError as error:
            seen.append(error)
            with contextlib.suppress(ReplayedError):
                await respond(send, 500)

    with inject_conflicts(db):
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    [error] = seen
    assert isinstance(error.__cause__, sa.exc.DBAPIError)
    assert "attempt 1 has lost to a conflict with another transaction" in str(error)
    assert 200 == exchange.status


async def test_cancellation_ends_a_replay(db, drive, engine):
    """G16, G10: who is cancelled between two attempts makes no other one."""
    attempts = []
    has_lost = asyncio.Event()

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=1))
        try:
            await respond(send)
        finally:
            has_lost.set()

    retry = Retry(base=60, cap=60, max_elapsed=600)
    with inject_conflicts(db):
        task = asyncio.create_task(drive(DBSessionMiddleware(app, database=db, retry=retry)))
        await has_lost.wait()
        while engine.pool.checkedout():
            await asyncio.sleep(0)
        task.cancel()
        exchange = await task

    assert [1] == attempts
    assert isinstance(exchange.error, asyncio.CancelledError)


async def test_cancellation_while_the_loser_is_rolled_back_ends_a_replay(db, drive, engine):
    """G16, G10: it arrives also where the pause is over at once."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db, at="INSERT INTO item"):
        task = asyncio.create_task(drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE)))
        sa.event.listen(engine.sync_engine, "rollback", lambda _: task.cancel(), once=True)
        exchange = await task

    assert [1] == attempts
    assert isinstance(exchange.error, asyncio.CancelledError)


async def test_endpoint_may_have_a_retry_of_its_own(db, drive, rows, forget_endpoints):
    """G16: `session_options(retry=...)` does without a word on the middleware, body included."""
    bodies = []

    @session_options(retry=AT_ONCE)
    async def place():
        db.session.add(Item(id=1))

    async def app(scope, receive, send):
        bodies.append((await receive())["body"])
        await place()
        await respond(send)

    with inject_conflicts(db, times=2):
        exchange = await drive(
            DBSessionMiddleware(app, database=db),
            received=[{"type": "http.request", "body": b"one", "more_body": False}],
        )

    assert 200 == exchange.status
    assert [b"one"] * 3 == bodies
    assert [1] == await rows()


async def test_endpoint_without_a_retry_is_served_as_ever(db, drive, forget_endpoints):
    """G16: the retry of one endpoint makes nothing of another's conflict."""
    session_options(retry=AT_ONCE)(respond)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    with inject_conflicts(db, times=1) as injected:
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 1 == injected.count
    assert isinstance(exchange.error, sa.exc.DBAPIError)


async def test_raised_conflict_of_an_endpoint_without_a_retry_surfaces(db, drive, forget_endpoints):
    """G16: the same where the app raises."""
    session_options(retry=AT_ONCE)(respond)

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item).values(id=1))

    with inject_conflicts(db, at="INSERT", times=None) as injected:
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 1 == injected.count
    assert isinstance(exchange.error, sa.exc.DBAPIError)


async def test_endpoint_may_go_without_the_middlewares_retry(db, drive, forget_endpoints):
    """G16: `Retry(attempts=1)` on an endpoint takes the middleware's back."""

    @session_options(retry=Retry(attempts=1))
    async def place():
        db.session.add(Item(id=1))

    async def app(scope, receive, send):
        await place()
        await respond(send)

    with inject_conflicts(db, times=None) as injected:
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert 1 == injected.count
    assert 503 == exchange.status


async def test_request_without_the_database_is_served_as_ever(db, drive, timeline):
    """G16, G5: where no session is asked for nothing is settled and nothing replayed."""

    async def app(scope, receive, send):
        await respond(send)
        return "returned"

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert "returned" == exchange.result
    assert ["start 200", "last body"] == timeline


async def test_error_of_a_request_without_the_database_surfaces(db, drive):
    """G16: an error is the app's own where there was no session."""

    async def app(scope, receive, send):
        raise LookupError

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert isinstance(exchange.error, LookupError)


async def test_second_instance_does_nothing_in_each_attempt(db, drive, rows):
    """G16, G18: an instance inside for the same database stays out of it, replay or not."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=1))
        await respond(send)

    inner = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
    with inject_conflicts(db, times=1):
        exchange = await drive(DBSessionMiddleware(inner, database=db, retry=AT_ONCE))

    assert [1, 2] == attempts
    assert 200 == exchange.status


@pytest.mark.parametrize("has_block", [False, True])
@pytest.mark.parametrize("most", [1, 3])
async def test_instance_for_another_database_leaves_the_replay_to_the_outer_one(
    engine, drive, rows, most, has_block
):
    """G16: what was done in the outer instance's session is undone with the attempt, too."""
    first, second = Database(engine, name="first"), Database(engine, name="second")
    attempts = []

    async def app(scope, receive, send):
        second.scope.configure(retry=Retry(attempts=most, base=0))
        attempts.append((first.scope.attempt, second.scope.attempt))
        first.session.add(Item(id=1))
        await first.session.flush()
        await second.session.execute(sa.text("SELECT 42"))
        await respond(send)

    async def block(scope, receive, send):
        async with first.session_scope():
            await inner(scope, receive, send)

    inner = DBSessionMiddleware(app, databases=[first, second], retry=AT_ONCE)
    inside = block if has_block else inner
    with inject_conflicts(engine, at="SELECT 42"):
        exchange = await drive(DBSessionMiddleware(inside, database=first, retry=AT_ONCE))

    is_replayed = most > 1
    assert [(1, 1), (2, 2)][:most] == attempts
    assert (200 if is_replayed else 503) == exchange.status
    assert ([1] if is_replayed else []) == await rows()


def test_retry_that_nobody_would_ask_for_is_warned_of(engine):
    """G16: an instance inside of another one leaves the replay to it, so that needs the retry."""
    first, second = Database(engine, name="first"), Database(engine, name="second")
    inner = DBSessionMiddleware(respond, database=second, retry=AT_ONCE)
    planned = Starlette(
        middleware=[Middleware(DBSessionMiddleware, database=second, retry=AT_ONCE)]
    )

    for app in (inner, planned):
        with pytest.warns(UserWarning, match="only the outermost one can serve a request again"):
            DBSessionMiddleware(app, database=first)
    DBSessionMiddleware(inner, database=first, retry=AT_ONCE)
    DBSessionMiddleware(DBSessionMiddleware(respond, database=second), database=first)


async def test_no_attempt_begins_after_max_elapsed(db, drive, caplog):
    """G16: attempts end with the time they may take, though some are left."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    retry = Retry(attempts=100, base=0, max_elapsed=0)
    with inject_conflicts(db, times=None) as injected:
        exchange = await drive(DBSessionMiddleware(app, database=db, retry=retry))

    assert 1 == injected.count
    assert 503 == exchange.status
    assert "and was the last one: max_elapsed is over" in caplog.text


def test_retry_is_checked_at_once(engine):
    """G16: what is no `Retry` is refused when the app is built."""
    with pytest.raises(ConfigurationError, match=r"retry takes a Retry, such as .*; got 3"):
        DBSessionMiddleware(respond, engine=engine, retry=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="retry takes a Retry"):
        session_options(retry=True)  # type: ignore[arg-type]
