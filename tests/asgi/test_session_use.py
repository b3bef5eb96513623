"""Several tasks and threads at one session: who is let in, and who clears up."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    EventLoopMismatchError,
    Outcome,
    current_scope,
)
from tests.fix_asgi import body, start
from tests.fix_database import Item


async def test_operation_outside_of_any_loop_is_told(db):
    """G9: the synchronous session in a worker thread has no loop to wait in."""
    async with db.session_scope() as session:
        with pytest.raises(EventLoopMismatchError, match=r"anyio\.from_thread"):
            await asyncio.to_thread(session.sync_session.execute, sa.select(sa.literal(1)))


async def test_session_that_is_asked_for_twice_at_once_is_made_once(db):
    """G11: whoever comes second gets the first one's."""
    async with db.session_scope() as session:
        assert session is current_scope()._make_session()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_scope_waits_for_the_last_of_several_tasks(db, drive):
    """G22: two child tasks are inside; the end comes after both, and nothing leaks."""
    order: list[str] = []

    async def child(seconds: float, name: str) -> None:
        try:
            await db.session.execute(sa.select(sa.func.pg_sleep(seconds)))
        except sa.exc.SQLAlchemyError:
            order.append(f"{name} refused")
        else:
            order.append(name)

    tasks: list[asyncio.Task[None]] = []

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(child(0.2, "first")))
        tasks.append(asyncio.create_task(child(0, "second")))
        await asyncio.sleep(0)  # both have begun
        raise ValueError

    exchange = await drive(DBSessionMiddleware(app, database=db))
    await asyncio.gather(*tasks)

    assert isinstance(exchange.error, ValueError)
    assert 2 == len(order)


async def test_two_releases_at_once_commit_once(db, rows, timeline):
    """G10: the second waits for the first, and finds nothing left to do."""
    async with db.session_scope() as session:
        session.add(Item(id=1))
        await asyncio.gather(db.release(), db.release())
        assert [1] == await rows()

    assert 1 == timeline.count("commit")


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_connection_that_cannot_be_thrown_away_is_left_to_the_last_one_out(engine, drive):
    """G22: the scope doesn't wait for ever; the child task's own exit clears up."""

    class Stuck(AsyncSession):
        async def invalidate(self):
            raise RuntimeError("not now")

    db = Database(async_sessionmaker(engine, class_=Stuck), cleanup_timeout=0.1)
    tasks: list[asyncio.Task[None]] = []
    outcomes: list[Outcome] = []
    begun = asyncio.Event()

    async def child() -> None:
        session = db.session
        await session.execute(sa.insert(Item).values(id=1))
        begun.set()
        await session.execute(sa.select(sa.func.pg_sleep(0.5)))

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(child()))
        session_scope = current_scope()
        await begun.wait()
        try:
            await send(start(500))
            await send(body())
        finally:
            outcomes.append(session_scope.outcome)

    await drive(DBSessionMiddleware(app, database=db))
    await asyncio.gather(*tasks, return_exceptions=True)

    assert Outcome.COMMITTED not in outcomes
    assert 0 == engine.pool.checkedout()
