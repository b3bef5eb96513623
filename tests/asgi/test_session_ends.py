"""What a scope's end leaves of its session."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from asgi_dbscope import Database, DBSessionMiddleware, SessionScopeClosedError, State
from asgi_dbscope._driver import end_transaction
from asgi_dbscope._policy import Ending
from tests.fix_asgi import respond
from tests.fix_database import Item


class OwnSession(Session):
    """A session that counts how often it was closed."""

    def close(self) -> None:
        self.info["closed"] = self.info.get("closed", 0) + 1
        super().close()

    def discard(self, instance: object) -> None:
        """A verb of its own."""
        self.expunge(instance)


class UnclosableSession(Session):
    """A session whose `close()` fails."""

    def close(self) -> None:
        super().close()
        raise ZeroDivisionError


async def test_object_that_outlives_the_scope_is_detached(db):
    """G9: what was loaded belongs to no session any more."""
    async with db.session_scope() as session:
        loaded = Item(id=1)
        session.add(loaded)
        await session.commit()

    assert sa.inspect(loaded).detached


async def test_end_of_a_savepoint_that_is_gone_ends_nothing_else(db, rows):
    """G4: its whole transaction may be ended, and the next one begun, while its end waits."""
    async with db.session_scope() as session:
        session.add(Item(id=1))
        savepoint = (await session.begin_nested()).sync_transaction
        await session.commit()
        session.add(Item(id=2))
        await session.flush()
        assert None is await db.scope.run(end_transaction, Ending.ROLLBACK, savepoint)

    assert [1, 2] == await rows()


async def test_session_that_nothing_is_in_is_over_with_its_scope(db):
    """G9: an empty session refuses use after the end, as any other."""
    async with db.session_scope() as session:
        assert 1 == await session.scalar(sa.select(sa.literal(1)))

    with pytest.raises(SessionScopeClosedError):
        await session.scalar(sa.select(sa.literal(1)))


async def test_close_of_a_users_own_session_class_is_called(engine):
    """G9: a class with a `close()` of its own is closed by that, whatever is in the session."""
    db = Database(async_sessionmaker(engine, sync_session_class=OwnSession))

    async with db.session_scope() as session:
        pass

    assert 1 == session.info["closed"]


async def test_verbs_of_a_users_own_session_class_stay_its_own(engine):
    """G18: the end of the scope needs a verb of the session's, which takes none of the user's."""
    db = Database(async_sessionmaker(engine, sync_session_class=OwnSession))
    item = Item(id=1)

    async with db.session_scope() as session:
        session.add(item)
        own: Any = session.sync_session
        own.discard(item)

    assert sa.inspect(item).transient


async def test_close_that_fails_keeps_no_other_scope_open(engine, drive):
    """G9: every scope of a request ends once, and what was raised surfaces as it is."""
    factory = async_sessionmaker(engine, sync_session_class=UnclosableSession)
    databases = [Database(factory, name="first"), Database(factory, name="second")]
    scopes = []

    async def app(scope, receive, send):
        for each in databases:
            await each.session.scalar(sa.select(1))
            scopes.append(each.scope)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, databases=databases))

    assert ZeroDivisionError is type(exchange.error)
    assert [State.CLOSED, State.CLOSED] == [each.state for each in scopes]
