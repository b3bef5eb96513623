"""The connection to MariaDB is lost: before COMMIT, during COMMIT, on its way back to the pool."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asgi_dbscope import Database, DBSessionMiddleware, Outcome, current_scope, session_options
from asgi_dbscope.errors import CommitInDoubtError
from tests.fix_asgi import http_scope, respond
from tests.fix_database import Item
from tests.fix_mariadb import Wire

pytestmark = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)


@pytest.fixture
async def wire(engine: AsyncEngine) -> AsyncIterator[Wire]:
    """What can be cut."""
    async with Wire(engine.url) as wire:
        yield wire


@pytest.fixture
async def db(wire: Wire) -> AsyncIterator[Database[Any]]:
    """A database that is reached by the wire, on two connections at most."""
    engine = create_async_engine(wire.url, pool_size=2, max_overflow=0, pool_timeout=5)
    async with engine.connect():
        pass
    yield Database(engine)
    assert 0 == engine.pool.checkedout()  # type: ignore[attr-defined]
    await engine.dispose()


async def test_connection_killed_before_commit_is_no_success(db, engine, drive, rows):
    """G15, G19: where the server killed the connection after a write, no head claims the write."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        number = await db.session.scalar(sa.text("SELECT CONNECTION_ID()"))
        async with engine.connect() as other:
            await other.exec_driver_sql(f"KILL {number}")
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages
    assert Outcome.IN_DOUBT is scopes[0].outcome  # who sends COMMIT can't know that it is too late
    assert [] == await rows()


@pytest.mark.parametrize(("is_heard", "committed"), [(False, []), (True, [1])])
async def test_connection_lost_during_commit_is_in_doubt(
    db, wire, drive, rows, is_heard, committed
):
    """G15: COMMIT without an answer is in doubt, whether it got through or not, and says so."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=int(scope["path"][1:])))
        await db.session.flush()
        if scope["path"] == "/1":
            wire.cut(b"COMMIT", is_heard=is_heard)
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    lost = await drive(wrapped, http_scope("/1"))
    served = await drive(wrapped, http_scope("/2"))

    assert isinstance(lost.error, CommitInDoubtError)
    assert isinstance(lost.error.__cause__, sa.exc.OperationalError)
    assert [] == lost.messages
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert 200 == served.status
    assert [*committed, 2] == await rows()


async def test_killed_query_that_was_swallowed_is_no_success(db, engine, drive, rows):
    """G15, G21: a connection that is lost in a read, and nobody minds: no head claims the write."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        number = await db.session.scalar(sa.text("SELECT CONNECTION_ID()"))
        async with engine.connect() as other:
            await other.exec_driver_sql(f"KILL {number}")
        with pytest.raises(sa.exc.DBAPIError):
            await db.session.scalar(sa.select(1))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is not None
    assert [] == exchange.messages
    assert [] == await rows()


@pytest.mark.parametrize(
    ("options", "statement"),
    [
        ({"mode": "autocommit"}, b"SET AUTOCOMMIT = 0"),
        ({"mode": "autocommit"}, b"SET SESSION TRANSACTION"),
        ({"isolation_level": "SERIALIZABLE"}, b"ROLLBACK"),
    ],
)
async def test_place_in_the_pool_survives_a_loss_at_checkin(db, wire, drive, options, statement):
    """G19: a connection that is lost while its settings are taken back leaves its place free."""

    @session_options(**options)
    async def app(scope, receive, send):
        await db.session.scalar(sa.select(1))
        wire.cut(statement, is_heard=False)
        await respond(send, 500)

    wrapped = DBSessionMiddleware(app, database=db)
    exchanges = [await drive(wrapped) for _ in range(4)]

    assert [500] * 4 == [each.status for each in exchanges]
    assert 0 == db.session_factory.kw["bind"].pool.checkedout()
