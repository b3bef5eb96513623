"""Sessions that `db.session_factory` makes outside any scope: nobody's but their user's own."""

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBSessionMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import Child, Item

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]


async def test_commits_when_its_user_says_so(db, rows, timeline):
    """G9: a session of the factory's needs no scope, and its user's `commit()` commits."""
    async with db.session_factory() as session:
        session.add(Item(id=1))
        await session.execute(sa.insert(Item).values(id=2))
        await session.flush()
        assert [1, 2] == list(await session.scalars(sa.select(Item.id).order_by(Item.id)))
        await session.commit()

    assert COMMITTED == timeline
    assert [1, 2] == await rows()


async def test_rolls_back_what_its_user_leaves_open(db, rows, timeline):
    """G9: a session of the factory's that is closed in mid-transaction is rolled back."""
    async with db.session_factory() as session:
        session.add(Item(id=1))
        await session.flush()

    assert ROLLED_BACK == timeline
    assert [] == await rows()


async def test_rolls_back_when_its_user_says_so(db, rows, timeline):
    """G9: the user's `rollback()` ends the transaction, and the next one is a new one."""
    async with db.session_factory() as session:
        session.add(Item(id=1))
        await session.flush()
        await session.rollback()
        session.add(Item(id=2))
        await session.commit()

    assert [*ROLLED_BACK, *COMMITTED] == timeline
    assert [2] == await rows()


async def test_begin_of_the_factory_commits_at_its_end(db, rows, timeline):
    """G9: `async with db.session_factory.begin()` is SQLAlchemy's own."""
    async with db.session_factory.begin() as session:
        session.add(Item(id=1))

    assert COMMITTED == timeline
    assert [1] == await rows()


async def test_savepoint_is_rolled_back_to(db, rows, timeline):
    """G9: `begin()` and `begin_nested()` of a session of the factory's are SQLAlchemy's own."""
    async with db.session_factory() as session, session.begin():
        session.add(Item(id=1))
        savepoint = await session.begin_nested()
        session.add(Item(id=2))
        await session.flush()
        await savepoint.rollback()

    expected = ["checkout", "begin", "savepoint", "rollback_savepoint", "commit", "checkin"]
    assert expected == timeline
    assert [1] == await rows()


async def test_connection_may_be_committed_by_its_user(db, rows):
    """G9: nobody watches over the connection of a session of the factory's."""
    async with db.session_factory() as session:
        connection = await session.connection()
        await connection.execute(sa.insert(Item).values(id=1))
        await connection.commit()

    assert [1] == await rows()


async def test_error_of_the_database_has_no_note(db, rows):
    """G9: what fails, fails with the database's own error and no word about a scope."""
    async with db.session_factory() as session:
        session.add(Child(id=1, item_id=404))
        with pytest.raises(sa.exc.IntegrityError) as failed:
            await session.commit()

    assert [] == getattr(failed.value, "__notes__", [])
    assert [] == await rows()


async def test_request_around_it_does_not_touch_it(db, drive, rows, timeline):
    """G11: in a request it is not the scope's session, and the response does not end it."""

    async def app(scope, receive, send):
        async with db.session_factory() as session:
            session.add(Item(id=1))
            await session.commit()
            assert db.session is not session
        await send(start(500))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [*COMMITTED, "start 500", "last body"] == timeline
    assert [1] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_session_outside_of_any_scope_fails_as_its_own_does(db, rows):
    """A session that the factory gives to somebody else has nobody to report to."""
    async with db.session_factory() as session:
        with pytest.raises(sa.exc.IntegrityError):
            async with session.begin():
                session.add(Child(id=1, item_id=7))

    assert [] == await rows()
