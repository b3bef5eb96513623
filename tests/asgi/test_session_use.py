"""Several tasks and threads at one session: who is let in, and who clears up."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asgi_dbscope import (
    ConcurrentSessionUseError,
    Database,
    DBSessionMiddleware,
    EventLoopMismatchError,
    Outcome,
    SessionScopeClosedError,
    current_scope,
)
from tests.fix_asgi import Exchange, body, respond, start
from tests.fix_database import Item

LOCK = 4713


async def test_operation_outside_of_any_loop_is_told(db):
    """G9: the synchronous session in a worker thread has no loop to wait in."""
    async with db.session_scope() as session:
        with pytest.raises(EventLoopMismatchError, match="run_coroutine_threadsafe"):
            await asyncio.to_thread(session.sync_session.execute, sa.select(sa.literal(1)))


async def test_callback_of_the_loop_finds_what_the_session_has_loaded(db):
    """G9: A callback runs in no task: it may look objects up as long as the scope is open."""
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[object] = asyncio.Queue()

    def look_up(session):
        try:
            found.put_nowait(session.sync_session.get(Item, 1))
        except SessionScopeClosedError as error:
            found.put_nowait(error)

    async with db.session_scope() as session:
        item = Item(id=1)
        session.add(item)
        await session.flush()
        loop.call_soon(look_up, session)
        assert item is await found.get()
    loop.call_soon(look_up, session)

    assert isinstance(await found.get(), SessionScopeClosedError)


async def test_session_that_is_asked_for_twice_at_once_is_made_once(db):
    """G11: whoever comes second gets the first one's."""
    async with db.session_scope() as session:
        assert session is current_scope()._make_session()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_scope_waits_for_the_task_that_is_inside(db, drive):
    """G13, G22: the second child task is refused; the end comes after the first."""
    order: list[str] = []

    async def child(seconds: float, name: str) -> None:
        try:
            await db.session.execute(sa.select(sa.func.pg_sleep(seconds)))
        except ConcurrentSessionUseError:
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
    assert ["second refused", "first"] == order


async def test_two_releases_at_once_commit_once(db, rows, timeline):
    """G10: the second waits for the first, and finds nothing left to do."""
    async with db.session_scope() as session:
        session.add(Item(id=1))
        await asyncio.gather(db.release(), db.release())
        assert [1] == await rows()

    assert 1 == timeline.count("commit")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_connection_that_is_still_awaited_is_left_to_who_waits_for_it(
    make_engine, driver, drive
):
    """G22: the scope doesn't wait for ever; the child task's own exit clears up."""
    engine = make_engine(driver, pool_size=1, max_overflow=0)
    db = Database(engine, cleanup_timeout=0.1)
    tasks: list[asyncio.Task[None]] = []
    outcomes: list[Outcome] = []

    async def child() -> None:
        await db.session.execute(sa.insert(Item).values(id=1))

    async def app(scope, receive, send):
        session_scope = current_scope()
        tasks.append(asyncio.create_task(child()))
        await asyncio.sleep(0)
        try:
            await send(start(500))
            await send(body())
        finally:
            outcomes.append(session_scope.outcome)

    async with engine.connect():  # the only one there is
        await drive(DBSessionMiddleware(app, database=db))
        assert not tasks[0].done()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(tasks[0].exception(), SessionScopeClosedError)
    assert Outcome.COMMITTED not in outcomes
    assert 0 == engine.pool.checkedout()
    await engine.dispose()


async def fail_beside_a_child(
    db: Database[Any],
    drive: Callable[..., Awaitable[Exchange]],
    its_turn: Callable[[], Awaitable[object]],
) -> None:
    """Let a request fail, and a child task of it write when it is *its_turn*: it is refused."""
    tasks: list[asyncio.Task[None]] = []

    async def child(session: AsyncSession) -> None:
        await its_turn()
        with pytest.raises(SessionScopeClosedError):
            await session.execute(sa.insert(Item).values(id=2))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = db.session
        await session.execute(sa.insert(Item).values(id=1))
        tasks.append(asyncio.create_task(child(session)))
        raise LookupError

    exchange = await drive(DBSessionMiddleware(app, database=db))
    await asyncio.gather(*tasks)

    assert isinstance(exchange.error, LookupError)


async def test_child_that_comes_between_the_rollback_and_the_close_is_refused(
    engine, db, drive, rows
):
    """G9, G22: the transaction is over and the scope not yet; nothing begins any more."""
    is_free = asyncio.Event()
    sa.event.listen(engine.sync_engine, "checkin", lambda *args: is_free.set())

    await fail_beside_a_child(db, drive, is_free.wait)

    assert [] == await rows()


async def test_child_that_waits_for_the_end_is_refused_after_it(engine, drive, rows):
    """G9, G22: its statement came while the scope rolled back for good."""
    is_rolling_back = asyncio.Event()
    may_end = asyncio.Event()

    class Slow(AsyncSession):
        async def rollback(self):
            is_rolling_back.set()
            await may_end.wait()
            await super().rollback()

    db = Database(async_sessionmaker(engine, class_=Slow), cleanup_timeout=5.0)

    async def is_its_turn() -> None:
        await is_rolling_back.wait()
        asyncio.get_running_loop().call_soon(may_end.set)

    await fail_beside_a_child(db, drive, is_its_turn)

    assert [] == await rows()


async def test_commit_of_the_users_own_may_release_what_it_has_committed(engine, drive, rows):
    """G10: what runs inside of an ending does not wait for itself."""

    class Releasing(AsyncSession):
        async def commit(self):
            await super().commit()
            await db.release()

    db = Database(async_sessionmaker(engine, class_=Releasing), cleanup_timeout=0.1)

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    async with asyncio.timeout(20):
        exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()


async def test_rollback_that_the_loops_end_cancels_throws_the_connection_away(engine, drive):
    """G10: whoever cancels the ending's own task gets a clean pool all the same."""
    is_rolling_back = asyncio.Event()

    class Hanging(AsyncSession):
        async def rollback(self):
            is_rolling_back.set()
            await asyncio.Event().wait()

    db = Database(async_sessionmaker(engine, class_=Hanging), cleanup_timeout=30.0)

    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item).values(id=1))
        raise LookupError

    before = asyncio.all_tasks()
    request = asyncio.create_task(drive(DBSessionMiddleware(app, database=db)))
    await is_rolling_back.wait()
    for task in asyncio.all_tasks() - before - {request}:
        task.cancel()
    exchange = await request

    assert isinstance(exchange.error, LookupError)
    assert 0 == engine.pool.checkedout()
