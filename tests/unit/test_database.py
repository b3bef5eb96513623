"""What a `Database` is made of, and what it keeps of it."""

import copy

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from asgi_dbscope import Database
from tests.fix_database import Item


class AuditedSession(Session):
    """A session class of the user's."""

    def audit(self) -> str:
        """Say whose it is."""
        return "audited"


class AuditedAsyncSession(AsyncSession):
    """An asynchronous session class that names its synchronous one."""

    sync_session_class = AuditedSession


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
def test_copy_of_a_database_is_itself(copying):
    """G11: A framework that copies what it is given still has the one database of the app."""
    database = Database("sqlite+aiosqlite://")

    assert database is copying(database)
    assert [database] == copying([database])


@pytest.mark.parametrize(
    "options",
    [
        {"sync_session_class": AuditedSession},
        {"sync_session_class": sessionmaker(class_=AuditedSession)},
        {"class_": AuditedAsyncSession},
    ],
    ids=["a class", "a sessionmaker", "the asynchronous class's own"],
)
async def test_synchronous_session_class_is_kept(engine, rows, options):
    """G11: The user's synchronous session class works in a scope, however it was named."""
    database = Database(async_sessionmaker(engine, **options))

    async with database.session_scope() as session:
        assert isinstance(session.sync_session, AuditedSession)
        assert "audited" == session.sync_session.audit()
        assert isinstance(session, options.get("class_", AsyncSession))
        session.add(Item(id=1))

    assert [1] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_options_of_a_sessionmaker_are_kept(engine):
    """G11: What a synchronous `sessionmaker` sets holds, unless the asynchronous one says else."""
    maker = sessionmaker(class_=AuditedSession, info={"team": "orders"}, enable_baked_queries=False)
    factory = async_sessionmaker(engine, sync_session_class=maker, autoflush=False)

    for session_factory in (factory, Database(factory).session_factory):
        async with session_factory() as session:
            assert {"team": "orders"} == session.info
            assert not session.sync_session.enable_baked_queries
            assert not session.autoflush
            assert 1 == await session.scalar(sa.select(1))


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_info_of_both_sessionmakers_is_kept(engine):
    """G11: The `info` of a synchronous and an asynchronous maker are both in the session's."""
    maker = sessionmaker(class_=AuditedSession, info={"team": "orders"})
    factory = async_sessionmaker(engine, sync_session_class=maker, info={"site": "north"})

    for session_factory in (factory, Database(factory).session_factory):
        async with session_factory() as session:
            assert {"team": "orders", "site": "north"} == session.info
