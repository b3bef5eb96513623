"""Rollback-only: a dry run or a preview, that never commits."""

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware, Outcome, State, current_scope
from asgi_dbscope.errors import ConfigurationError, RollbackOnlyError, SessionScopeClosedError
from tests.fix_asgi import body, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Child, Item

pytestmark = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)


async def test_dry_run_answers_as_it_is_after_the_rollback(db, drive, rows, timeline):
    """G4: the response of a dry run goes out unchanged, and nothing is committed."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        db.set_rollback_only()
        assert current_scope().is_rollback_only
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["checkout", "begin", "rollback", "checkin", "start 201", "last body"] == timeline
    assert [] == await rows()


async def test_dry_run_may_be_asked_for_before_the_first_statement(db, drive, rows):
    """G4: a scope may be set rollback-only before it has a session."""
    scopes = []

    async def app(scope, receive, send):
        db.set_rollback_only()
        scopes.append(current_scope())
        assert State.ROLLBACK_ONLY_IDLE is current_scope().state
        db.session.add(Item(id=1))
        await db.session.flush()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert Outcome.ROLLED_BACK is scopes[0].outcome
    assert [] == await rows()


async def test_dry_run_needs_no_commit_to_succeed(db, drive, rows):
    """G4: what only COMMIT would have refused does not disturb a dry run."""

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        db.set_rollback_only()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 200 == exchange.status


async def test_commit_by_hand_in_a_dry_run_is_refused(db, drive, rows, timeline):
    """G4: the user's own `session.commit()` raises before COMMIT is sent."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        db.set_rollback_only()
        with pytest.raises(RollbackOnlyError, match="set rollback-only"):
            await db.session.commit()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 200 == exchange.status
    assert [] == await rows()


async def test_commit_by_hand_of_nothing_in_a_dry_run_is_no_commit_for_its_hooks(db, drive):
    """G4: A commit() before any statement has nothing to refuse, and no on-commit hook runs."""
    calls: list[object] = []

    async def app(scope, receive, send):
        db.scope.set_rollback_only()
        db.on_commit(calls.append, "committed")
        db.on_rollback(calls.append, "rolled back")
        await db.session.commit()
        assert [] == calls
        await send(start(200))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (200, None) == (exchange.status, exchange.error)
    assert ["rolled back"] == calls


async def test_begin_block_in_a_dry_run_is_refused_its_commit(db, drive, rows):
    """G4: the end of the user's own `session.begin()` block commits nothing either."""

    async def app(scope, receive, send):
        db.set_rollback_only()
        with pytest.raises(RollbackOnlyError):
            async with db.session.begin():
                db.session.add(Item(id=1))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [] == await rows()


async def test_connection_of_a_dry_run_is_refused_its_commit(db, drive, rows):
    """G4: COMMIT through the session's connection is refused like any other."""

    async def app(scope, receive, send):
        db.set_rollback_only()
        connection = await db.session.connection()
        await connection.execute(sa.insert(Item).values(id=1))
        with pytest.raises(RollbackOnlyError):
            await connection.commit()
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [] == await rows()


async def test_release_in_a_dry_run_rolls_back(db, drive, rows, timeline):
    """G4: `release()` gives the connection back by rolling back."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        db.set_rollback_only()
        await db.release()
        db.session.add(Item(id=2))
        await db.session.flush()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    transaction = ["checkout", "begin", "rollback", "checkin"]
    assert [*transaction, *transaction, "start 200", "last body"] == timeline
    assert exchange.error is None
    assert [] == await rows()


async def test_what_was_committed_before_stays(db, drive, rows):
    """G4: rollback-only holds from now on; it does not reach back behind a COMMIT."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.commit()
        db.set_rollback_only()
        db.session.add(Item(id=2))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [1] == await rows()


async def test_stream_of_a_dry_run_is_rolled_back_too(db, drive, rows, timeline):
    """G4, G7: the body of a dry run completes, and its transaction is rolled back."""

    async def app(scope, receive, send):
        db.set_rollback_only()
        await send(start(200))
        db.session.add(Item(id=1))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.is_complete
    assert [
        "start 200",
        "checkout",
        "begin",
        "body",
        "rollback",
        "checkin",
        "last body",
    ] == timeline


async def test_job_of_a_dry_run_is_rolled_back(db, rows):
    """G4: a session scope outside a request may be set rollback-only as well."""
    async with db.session_scope() as session:
        session.add(Item(id=1))
        await session.flush()
        db.set_rollback_only()

    assert [] == await rows()


async def test_autocommit_has_no_dry_run(db, drive):
    """G4: in mode autocommit a dry run can't be had, and asking for it says so."""

    async def app(scope, receive, send):
        with pytest.raises(ConfigurationError, match="autocommit"):
            db.set_rollback_only()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None


async def test_scope_that_has_ended_is_past_a_dry_run(db, drive):
    """G4, G9: setting an ended scope rollback-only is refused: it would promise what can't be."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    with pytest.raises(SessionScopeClosedError):
        scopes[0].set_rollback_only()
