"""Transactions of the user's own inside a request: each with its result."""

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware, Outcome, RollbackOnlyError, current_scope
from tests.fix_asgi import body, respond, start
from tests.fix_database import Child, Item

TRANSACTION = ["checkout", "begin", "commit", "checkin"]
RESPONSE = ["start 200", "last body"]


async def test_begin_block_before_the_head_commits_at_its_end(db, drive, rows, timeline):
    """G1: `async with session.begin()` commits at its own end; the head has nothing left to do."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
        timeline.append("after the block")
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [*TRANSACTION, "after the block", *RESPONSE] == timeline
    assert [1] == await rows()


async def test_begin_block_that_raises_rolls_back_its_own_work(db, drive, rows, timeline):
    """G3: a `session.begin()` block that raised is rolled back; later work is a new transaction."""

    async def app(scope, receive, send):
        with pytest.raises(ZeroDivisionError):
            async with db.session.begin():
                db.session.add(Item(id=1))
                await db.session.flush()
                raise ZeroDivisionError
        db.session.add(Item(id=2))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "rollback", "checkin", *TRANSACTION, *RESPONSE] == timeline
    assert [2] == await rows()


async def test_begin_block_keeps_its_work_before_a_later_error(db, drive, rows):
    """G3: what the user's own block has committed stays, also if the response is a 5xx."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
        db.session.add(Item(id=2))
        await db.session.flush()
        await respond(send, 500)

    await drive(DBSessionMiddleware(app, database=db))

    assert [1] == await rows()


async def test_begin_block_after_a_read_is_sqlalchemys_own_error(db, drive, rows):
    """G18: a read has begun a transaction, so SQLAlchemy refuses `session.begin()` as ever."""

    async def app(scope, receive, send):
        await db.session.scalar(sa.select(1))
        with pytest.raises(sa.exc.InvalidRequestError, match="already begun"):
            await db.session.begin().start()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None


async def test_savepoint_is_part_of_the_response(db, drive, rows, timeline):
    """G1: `begin_nested()` sets a savepoint; what was released is committed before the head."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        async with db.session.begin_nested():
            db.session.add(Item(id=2))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    expected = ["checkout", "begin", "savepoint", "commit", "checkin", *RESPONSE]
    assert expected == timeline
    assert [1, 2] == await rows()


async def test_savepoint_that_was_rolled_back_leaves_the_rest(db, drive, rows, timeline):
    """G3: `begin_nested()` that raised undoes its own part, and the rest commits."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        with pytest.raises(ZeroDivisionError):
            async with db.session.begin_nested():
                db.session.add(Item(id=2))
                await db.session.flush()
                raise ZeroDivisionError
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    middle = ["savepoint", "rollback_savepoint"]
    assert ["checkout", "begin", *middle, "commit", "checkin", *RESPONSE] == timeline
    assert [1] == await rows()


async def test_savepoint_as_the_first_thing_commits_with_the_head_only(db, drive, rows):
    """G1, G3: a savepoint that comes first is inside a transaction too: a 5xx rolls it back."""

    async def app(scope, receive, send):
        async with db.session.begin_nested():
            await db.session.execute(sa.insert(Item).values(id=1))
        assert [] == await rows()
        await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [] == await rows()


async def test_savepoint_open_across_the_head_is_committed_by_it(db, drive, rows):
    """G1: a `begin_nested()` block that is still open ends with the transaction around it."""

    async def app(scope, receive, send):
        savepoint = await db.session.begin_nested()
        db.session.add(Item(id=1))
        await respond(send)
        assert not savepoint.is_active

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


async def test_commit_in_mid_request_keeps_what_came_before(db, drive, rows, timeline):
    """G1, G3: `session.commit()` is durable at once; what comes after is the response's own."""
    seen = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.commit()
        seen.append(current_scope().outcome)
        db.session.add(Item(id=2))
        await db.session.flush()
        await respond(send, 500)

    await drive(DBSessionMiddleware(app, database=db))

    assert [Outcome.COMMITTED] == seen
    assert [1] == await rows()


async def test_rollback_in_mid_request_undoes_what_came_before(db, drive, rows, timeline):
    """G3: `session.rollback()` undoes what came before; what comes after commits with the head."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        await db.session.rollback()
        db.session.add(Item(id=2))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "rollback", "checkin", *TRANSACTION, *RESPONSE] == timeline
    assert [2] == await rows()


async def test_commit_in_mid_request_that_fails_raises_where_it_is_called(db, drive, rows):
    """G2: a COMMIT that the user's own code sends fails there, and may be dealt with there."""

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        with pytest.raises(sa.exc.IntegrityError):
            await db.session.commit()
        await db.session.rollback()
        db.session.add(Item(id=2))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [2] == await rows()


async def test_begin_block_across_the_head_is_committed_by_the_head(db, drive, rows, timeline):
    """G1: a `session.begin()` block around the response is committed before the head all the same.

    A `yield` dependency that writes `async with session.begin(): yield` ends like that: nothing is
    left for its exit to commit.
    """

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
            await respond(send)
            timeline.append("exit")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [*TRANSACTION, *RESPONSE, "exit"] == timeline
    assert [1] == await rows()


async def test_begin_block_across_a_failed_head_commits_nothing(db, drive, rows, timeline):
    """G3: a `session.begin()` block around a 5xx is rolled back by it; its exit commits nothing."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
            await db.session.flush()
            await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["checkout", "begin", "rollback", "checkin", "start 500", "last body"] == timeline
    assert [] == await rows()


async def test_begin_block_across_the_head_is_closed_to_later_work(db, drive, rows):
    """G1: in the block, after the head, SQLAlchemy refuses more work: it could not be claimed."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
            await send(start(200))
            with pytest.raises(sa.exc.InvalidRequestError, match="closed transaction"):
                await db.session.execute(sa.insert(Item).values(id=2))
            await send(body(b"ok"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


async def test_commit_through_the_connection_is_durable_at_once(db, drive, rows):
    """G1, G3: `connection.commit()` ends the transaction like `session.commit()`."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        await connection.execute(sa.insert(Item).values(id=1))
        await connection.commit()
        assert [1] == await rows()
        await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


async def test_rollback_through_the_connection_is_not_claimed(db, drive, rows):
    """G1: after `connection.rollback()` behind the session's back no success is claimed."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        await connection.execute(sa.insert(Item).values(id=1))
        await connection.rollback()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.InvalidRequestError)
    assert [] == exchange.messages
    assert [] == await rows()


async def test_begin_on_the_connection_is_sqlalchemys_own_error(db, drive):
    """G18: the session's connection is in a transaction, so `connection.begin()` is refused."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        with pytest.raises(sa.exc.InvalidRequestError, match="already"):
            await connection.begin()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None


async def test_savepoint_on_the_connection_is_part_of_the_response(db, drive, rows):
    """G1: `connection.begin_nested()` sets a savepoint in the response's transaction."""

    async def app(scope, receive, send):
        connection = await db.session.connection()
        async with connection.begin_nested():
            await connection.execute(sa.insert(Item).values(id=1))
        await respond(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [] == await rows()


async def test_connection_asked_for_twice_is_judged_as_once(db, rows):
    """G4: Asking for the connection again leaves its COMMIT refused where the scope's would be."""
    async with db.session_scope() as session:
        await session.execute(sa.insert(Item).values(id=1))
        await session.connection()
        connection = await session.connection()
        db.set_rollback_only()
        with pytest.raises(RollbackOnlyError):
            await connection.commit()

    assert [] == await rows()
