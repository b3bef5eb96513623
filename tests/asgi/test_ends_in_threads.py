"""A thread that nobody waits for uses a synchronous session in the moment its scope ends."""

import asyncio
import threading
from contextvars import copy_context
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Outcome,
    SessionScope,
    SessionScopeClosedError,
    State,
    current_scope,
)
from tests.fix_asgi import Drive, respond
from tests.fix_cancel import ENOUGH
from tests.fix_database import Child, Item
from tests.sync_apps import Rows, checked_in, held, write

pytest_plugins = ["tests.fix_sync"]

SyncDatabase = Database[Session]


def write_orphan(db: SyncDatabase) -> None:
    """Write an item, and a row that only COMMIT refuses."""
    write(db, 1)
    db.session.execute(sa.insert(Child).values(id=1, item_id=404))


@pytest.mark.parametrize("is_late", [False, True])
async def test_head_that_waits_for_a_commit_that_fails_claims_no_success(
    drive: Drive,
    sync_db: SyncDatabase,
    sync_engine: sa.Engine,
    sync_rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    is_late: bool,
) -> None:
    """G1, G2: the error is the head's too, also where its own thread comes after that COMMIT."""
    limiter = anyio.CapacityLimiter(1)
    monkeypatch.setattr(sync_db, "limiter", lambda work: limiter)
    releasing: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(write_orphan, sync_db)
        releasing.append(asyncio.create_task(asyncio.to_thread(sync_db.release)))
        await hold.reached.wait()
        if is_late:
            limiter.acquire_on_behalf_of_nowait(monkeypatch)
        meanwhile = asyncio.create_task(let_go(current_scope().use))
        try:
            await respond(send)
        finally:
            await meanwhile

    async def let_go(use: Any) -> None:
        if is_late:
            hold.let_go()
            await asyncio.wait(releasing)
            limiter.release_on_behalf_of(monkeypatch)
            return
        while not use._changed._waiters:
            await asyncio.sleep(0)
        hold.let_go()

    with held(sync_engine, "commit") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=sync_db))
        await asyncio.wait(releasing)

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert releasing[0].exception() is exchange.error
    assert ([], []) == (exchange.messages, sync_rows())


async def test_head_waits_until_the_connection_of_a_threads_own_rollback_is_back(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine
) -> None:
    """G6: the transaction is over by then, but its connection is still on its way to the pool."""
    tasks: list[asyncio.Task[None]] = []
    checked_out: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(write, sync_db, 1)
        tasks.append(asyncio.create_task(asyncio.to_thread(sync_db.session.rollback)))
        await hold.reached.wait()
        tasks.append(asyncio.create_task(let_go()))
        await respond(send)

    async def let_go() -> None:
        hold.let_go()

    async def on_send(message: Any) -> None:
        checked_out.append(sync_engine.pool.checkedout())  # type: ignore[attr-defined]

    with held(sync_engine, "checkin") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=sync_db), on_send=on_send)
        await asyncio.wait(tasks)

    assert exchange.error is None
    assert [0, 0] == checked_out


async def test_request_that_fails_waits_no_longer_than_its_deadline_for_a_threads_commit(
    drive: Drive, sync_engine: sa.Engine
) -> None:
    """G10: what the thread's `release()` came to is in doubt then; it clears up when it is back."""
    db = Database(sync_engine, cleanup_timeout=0.05)
    scopes: list[SessionScope[Any]] = []
    releasing: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(current_scope())
        await asyncio.to_thread(write, db, 1)
        releasing.append(asyncio.create_task(asyncio.to_thread(db.release)))
        await hold.reached.wait()
        raise ZeroDivisionError

    with held(sync_engine, "commit") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=db))
        assert Outcome.IN_DOUBT is scopes[0].outcome
        hold.let_go()
        await asyncio.wait(releasing)

    assert isinstance(exchange.error, ZeroDivisionError)
    assert isinstance(releasing[0].exception(), Exception)
    assert await checked_in(sync_engine)


# --------------------------------------------------------------------------------------
# A thread that outlives its request
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_connecting", [False, True])
@pytest.mark.parametrize("has_session", [False, True])
async def test_thread_that_begins_in_the_moment_of_the_end_is_refused(
    drive: Drive,
    sync_db: SyncDatabase,
    sync_engine: sa.Engine,
    sync_rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    has_session: bool,
    is_connecting: bool,
) -> None:
    """G9: nobody would commit what it writes, nor give its connection back."""
    has_stopped, may_go_on = threading.Event(), threading.Event()
    close = SessionScope.close_settled
    threads: list[threading.Thread] = []
    scopes: list[SessionScope[Any]] = []
    errors: list[type[BaseException]] = []

    def work() -> None:
        try:
            write(sync_db, 1)
        except Exception as error:
            errors.append(type(error))
        has_stopped.set()

    def connecting(*args: object) -> None:
        if scopes and is_connecting:
            has_stopped.set()
            assert may_go_on.wait(ENOUGH)

    def close_settled(self: SessionScope[Any]) -> None:
        threads.append(threading.Thread(target=copy_context().run, args=[work]))
        threads[0].start()
        assert has_stopped.wait(ENOUGH)
        close(self)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if has_session:
            await asyncio.to_thread(sync_db.session.execute, sa.select(1))
        await respond(send)
        scopes.append(current_scope())

    monkeypatch.setattr(SessionScope, "close_settled", close_settled)
    sa.event.listen(sync_engine, "checkout", connecting)
    exchange = await drive(DBSessionMiddleware(app, database=sync_db))
    may_go_on.set()
    threads[0].join()
    sa.event.remove(sync_engine, "checkout", connecting)

    assert exchange.error is None
    assert [SessionScopeClosedError] == errors
    assert State.CLOSED is scopes[0].state
    assert [] == sync_rows()


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
async def test_end_waits_for_a_thread_that_is_about_to_begin(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G8, G22: a thread that is inside by then is let finish, and its work is committed."""
    loop = asyncio.get_running_loop()
    is_inside = asyncio.Event()
    may_begin = threading.Event()
    writing: list[asyncio.Task[None]] = []

    def before_it_begins(_: object) -> None:
        loop.call_soon_threadsafe(is_inside.set)
        assert may_begin.wait(ENOUGH)

    def insert() -> None:
        session = sync_db.session
        sa.event.listen(session, "do_orm_execute", before_it_begins)
        session.execute(sa.insert(Item).values(id=1))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        writing.append(asyncio.create_task(asyncio.to_thread(insert)))
        await is_inside.wait()
        loop.call_soon(may_begin.set)

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))
    await asyncio.gather(*writing)

    assert exchange.error is None
    assert [1] == sync_rows()
