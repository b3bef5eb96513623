"""`asgi_dbscope.testing`: conflicts that a test asks for."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import oracle
from sqlalchemy.ext.asyncio import async_sessionmaker

from asgi_dbscope import ConfigurationError, Database
from asgi_dbscope._driver_errors import find_conflict
from asgi_dbscope.testing import inject_conflicts
from tests.fix_database import Item


async def write(session, number):
    """Write one row."""
    await session.execute(sa.insert(Item).values(id=number))


async def test_commit_fails_and_nothing_is_kept(db, rows):
    """G16: what was written is gone, and the error is the driver's own."""
    with inject_conflicts(db) as injected, pytest.raises(sa.exc.DBAPIError) as caught:
        async with db.session_scope() as session:
            await write(session, 1)

    assert 1 == injected.count
    assert find_conflict(caught.value) in {"40001", "SQLITE_BUSY"}
    assert [] == await rows()


async def test_statement_is_chosen_by_its_text(db, rows):
    """G16: others pass."""
    with inject_conflicts(db, at="UPDATE item"):
        async with db.session_scope() as session:
            await write(session, 1)
        with pytest.raises(sa.exc.DBAPIError):
            async with db.session_scope() as session:
                await session.execute(sa.update(Item).values(note="changed"))

    assert [1] == await rows()


async def test_statement_is_chosen_by_its_number(db, rows):
    """G16: counted in each transaction anew; savepoints don't count."""
    with inject_conflicts(db, at=2, times=None) as injected:
        for number in (1, 2):
            async with db.session_scope() as session, session.begin_nested():
                await write(session, number)
        with pytest.raises(sa.exc.DBAPIError):
            async with db.session_scope() as session:
                await write(session, 3)
                await write(session, 4)

    assert 1 == injected.count
    assert [1, 2] == await rows()


async def test_executions_of_every_kind_are_met(db):
    """G16: without parameters, with one set and with many."""
    many = [{"i": 1}, {"i": 2}]
    executions = [
        lambda session: session.execute(sa.text("DELETE FROM item")),
        lambda session: session.execute(sa.delete(Item).where(Item.id == 1)),
        lambda session: session.execute(sa.delete(Item).where(Item.id == sa.bindparam("i")), many),
    ]
    for execute in executions:
        with inject_conflicts(db, at="DELETE") as injected, pytest.raises(sa.exc.DBAPIError):
            async with db.session_scope() as session:
                connection = await session.connection()
                await execute(connection)

        assert 1 == injected.count


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_transaction_is_really_aborted(db):
    """G16: PostgreSQL itself refuses what comes after."""
    async with db.session_scope() as session:
        with inject_conflicts(db, at="INSERT"), pytest.raises(sa.exc.DBAPIError):
            await write(session, 1)
        with pytest.raises(sa.exc.DBAPIError, match="current transaction is aborted"):
            await write(session, 2)
        await session.rollback()


async def test_as_many_transactions_lose_as_were_asked_for(db, rows):
    """G16: then the others win, and after the block all of them."""
    with inject_conflicts(db, times=1):
        results = await asyncio.gather(
            *(_place(db, number) for number in (1, 2)), return_exceptions=True
        )
    with inject_conflicts(db, times=None):
        pass
    await _place(db, 3)

    [lost] = [each for each in results if each is not None]
    assert find_conflict(lost) is not None
    assert 2 == len(await rows())


async def _place(db, number):
    async with db.session_scope() as session:
        await write(session, number)


async def test_engine_does_as_well(engine, rows):
    """G16: for code that has no `Database` at hand."""
    with inject_conflicts(engine), pytest.raises(sa.exc.DBAPIError):
        async with engine.begin() as connection:
            await write(connection, 1)

    assert [] == await rows()


def test_synchronous_engine_does_as_well(sync_engine, sync_rows):
    """G16: the same, without `await`."""
    for source in (sync_engine, Database(sync_engine)):
        injecting = inject_conflicts(source, at="INSERT")
        with injecting, pytest.raises(sa.exc.DBAPIError), sync_engine.begin() as connection:
            connection.execute(sa.insert(Item).values(id=1))

    assert [] == sync_rows()


def test_what_has_no_engine_is_refused():
    """G16: a factory may be bound to anything, and only engines have events."""
    with pytest.raises(ConfigurationError, match="takes a Database bound to an engine"):
        inject_conflicts(Database(async_sessionmaker())).__enter__()


def test_unknown_databases_are_refused():
    """G16: how a conflict looks elsewhere is not known."""

    def refuse():
        raise AssertionError

    engine = sa.Engine(sa.NullPool(refuse), oracle.dialect(), sa.make_url("oracle://"))
    with pytest.raises(ConfigurationError, match="can't be injected into oracle, only into Postg"):
        inject_conflicts(engine).__enter__()
