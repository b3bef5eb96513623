"""Synchronous sessions in threads: several at one session, cancelled requests, and busy pools."""

import asyncio
import contextvars
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from asgi_dbscope import (
    ConcurrentSessionUseError,
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    Outcome,
    PoolTooSmallError,
    SessionScope,
    SessionScopeClosedError,
    State,
    _gate,
    current_scope,
    current_session,
)
from tests.fix_asgi import Drive, body, http_scope, start
from tests.fix_cancel import ENOUGH, KINDS, MOMENTS, Cut, Kind, Moment
from tests.fix_database import Item
from tests.sync_apps import Hold, Rows, checked_in, committed, endpoint, held, narrow_threads, write

pytest_plugins = ["tests.fix_sync"]

LOCK = 4714

SyncDatabase = Database[Session]
MakeEngine = Callable[..., sa.Engine]
in_thread = anyio.to_thread.run_sync


@asynccontextmanager
async def cancelled(task: asyncio.Future[Any]) -> AsyncIterator[None]:
    """Cancel *task*; what is done inside is done before it has ended."""
    task.cancel()
    await asyncio.sleep(0)
    yield
    await asyncio.wait([task], timeout=ENOUGH)
    assert task.done(), "the cancellation was lost"


# --------------------------------------------------------------------------------------
# One session, many threads
# --------------------------------------------------------------------------------------


async def test_thread_that_asks_while_another_opens_the_scope_gets_that_one(
    drive: Drive, sync_engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5, G22: the lock was another thread's, which has opened the scope meanwhile."""
    db = Database(sync_engine)
    opened: list[object] = []

    class Overtaken:
        """What is done before the lock is had."""

        def __enter__(self) -> None:
            if not opened:
                opened.append(None)
                opened[0] = db.scope

        def __exit__(self, *_: object) -> None:
            """It is free."""

    monkeypatch.setattr(_gate, "_creation", Overtaken())

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        assert db.scope is opened[0]
        await send(start())
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status


async def test_every_thread_of_a_request_sees_one_session(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G11: worker threads of anyio's and asyncio's, and a thread with a copied context."""
    seen: list[Session] = []

    def look(number: int) -> None:
        write(sync_db, number)
        session: Any = current_session()
        seen.append(session)

    def in_plain_thread() -> None:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(look, 3))
        thread.start()
        thread.join()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(look, 1)
        await asyncio.to_thread(look, 2)
        await in_thread(in_plain_thread)
        await asyncio.create_task(asyncio.to_thread(look, 4))
        await endpoint()(scope, receive, send)

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, [1, 2, 3, 4]) == (exchange.status, sync_rows())
    assert 1 == len(set(map(id, seen)))


async def test_thread_without_the_context_is_told(drive: Drive, sync_db: SyncDatabase) -> None:
    """G9: a thread that was started without a copy of the context has no session to lose."""
    errors: list[BaseException] = []

    def look() -> None:
        with pytest.raises(NoSessionScopeError) as caught:
            sync_db.session.scalar(sa.select(1))
        errors.append(caught.value)

    def start_thread() -> None:
        thread = threading.Thread(target=contextvars.Context().run, args=(look,))
        thread.start()
        thread.join()

    await drive(DBSessionMiddleware(endpoint(start_thread), database=sync_db))

    assert 1 == len(errors)


async def test_threads_that_ask_at_once_get_the_same_session(
    drive: Drive, sync_db: SyncDatabase
) -> None:
    """G11: the first use, by eight threads at the same moment, makes one session."""
    barrier = threading.Barrier(8)
    seen: list[Session] = []

    def look() -> None:
        barrier.wait(ENOUGH)
        seen.append(sync_db.session)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.gather(*(in_thread(look) for _ in range(8)))
        await endpoint()(scope, receive, send)

    await drive(DBSessionMiddleware(app, database=sync_db))

    assert (8, 1) == (len(seen), len(set(map(id, seen))))


async def test_concurrent_requests_never_share_a_session(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G12: two hundred requests at once: two hundred sessions, two hundred rows."""
    numbers = itertools.count(1)
    kept: list[Session] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = next(numbers)

        def work() -> None:
            write(sync_db, number)
            kept.append(sync_db.session)

        await endpoint(work)(scope, receive, send)

    asgi = DBSessionMiddleware(app, database=sync_db)
    exchanges = await asyncio.gather(*(drive(asgi) for _ in range(200)))

    assert {201} == {exchange.status for exchange in exchanges}
    assert list(range(1, 201)) == sync_rows()
    assert 200 == len(set(map(id, kept)))


async def test_second_thread_in_the_session_is_refused(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G13: a thread that comes while another is inside is told both names; the first goes on."""
    messages: list[str] = []

    def name_thread(name: str, function: Callable[[], None]) -> None:
        threading.current_thread().name = name
        function()

    def intrude() -> None:
        with pytest.raises(ConcurrentSessionUseError) as caught:
            sync_db.session.scalar(sa.select(1))
        messages.append(str(caught.value))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with held(sync_engine, "before_cursor_execute") as hold:
            first = asyncio.create_task(
                asyncio.to_thread(name_thread, "first", lambda: write(sync_db, 1))
            )
            await hold.reached.wait()
            await asyncio.to_thread(name_thread, "second", intrude)
            hold.let_go()
            await first
        await endpoint()(scope, receive, send)

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, [1]) == (exchange.status, sync_rows())
    assert "thread 'second' uses the session while thread 'first' is inside" in messages[0]


async def test_serialized_threads_wait_for_their_turn(
    drive: Drive, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G13: with concurrency="serialize" the second thread waits for the first to come out."""
    db = Database(sync_engine, concurrency="serialize")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with held(sync_engine, "before_cursor_execute") as hold:
            writing = [asyncio.create_task(in_thread(write, db, number)) for number in range(1, 9)]
            await hold.reached.wait()
            hold.let_go()
            await asyncio.gather(*writing)
        await endpoint()(scope, receive, send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (None, 201, list(range(1, 9))) == (exchange.error, exchange.status, sync_rows())


# --------------------------------------------------------------------------------------
# Threads at the end of their scope
# --------------------------------------------------------------------------------------


async def test_head_waits_for_the_thread_that_is_inside(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G22: a thread in mid-statement at the head is waited for, and its write committed."""
    writing: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        writing.append(asyncio.create_task(asyncio.to_thread(write, sync_db, 1)))
        await hold.reached.wait()
        asyncio.get_running_loop().call_later(0.05, hold.let_go)
        await endpoint()(scope, receive, send)

    with held(sync_engine, "before_cursor_execute") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=sync_db))
        await writing[0]

    assert (201, [1]) == (exchange.status, sync_rows())


async def test_thread_that_stays_inside_too_long_makes_the_head_an_error(
    drive: Drive, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G22: after the deadline nothing is committed, no success claimed, no connection leaked."""
    db = Database(sync_engine, cleanup_timeout=0.05)
    writing: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        writing.append(asyncio.create_task(asyncio.to_thread(write, db, 1)))
        await hold.reached.wait()
        await endpoint()(scope, receive, send)

    with held(sync_engine, "after_cursor_execute") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=db))
        hold.let_go()
        await asyncio.wait(writing)

    assert isinstance(exchange.error, ConcurrentSessionUseError)
    assert isinstance(writing[0].exception(), (sa.exc.SQLAlchemyError, SessionScopeClosedError))
    assert ([], []) == (exchange.messages, sync_rows())
    assert await checked_in(sync_engine)


async def test_statement_during_the_commit_begins_the_next_transaction(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G8: a thread that comes while the COMMIT runs waits for it, and is settled after."""
    later: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(write, sync_db, 1)
        later.append(asyncio.create_task(write_meanwhile()))
        await endpoint()(scope, receive, send)
        await later[0]

    async def write_meanwhile() -> None:
        await hold.reached.wait()
        asyncio.get_running_loop().call_later(0.05, hold.let_go)
        await asyncio.to_thread(write, sync_db, 2)

    with held(sync_engine, "commit") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, [1, 2]) == (exchange.status, sync_rows())


async def test_release_during_the_commit_waits_for_it(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G22: two endings of one session, in two threads, come one after the other."""
    releasing: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(write, sync_db, 1)
        releasing.append(asyncio.create_task(release_meanwhile()))
        await endpoint()(scope, receive, send)
        await releasing[0]

    async def release_meanwhile() -> None:
        await hold.reached.wait()
        asyncio.get_running_loop().call_later(0.05, hold.let_go)
        await asyncio.to_thread(sync_db.release)

    with held(sync_engine, "commit") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, None, [1]) == (exchange.status, exchange.error, sync_rows())


# --------------------------------------------------------------------------------------
# Cancelled
# --------------------------------------------------------------------------------------


async def test_request_cancelled_while_its_thread_works_is_rolled_back(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G10, G22: the thread's statement is waited for and rolled back; its next use is refused."""
    refused = threading.Event()

    def work() -> None:
        write(sync_db, 1)
        with pytest.raises(SessionScopeClosedError):
            write(sync_db, 2)
        refused.set()

    with held(sync_engine, "after_cursor_execute") as hold:
        task = asyncio.ensure_future(drive(DBSessionMiddleware(endpoint(work), database=sync_db)))
        await hold.reached.wait()
        async with cancelled(task):
            assert not task.done()
            hold.let_go()

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert await asyncio.to_thread(refused.wait, ENOUGH)
    assert ([], []) == (task.result().messages, sync_rows())


async def test_cancelled_between_two_statements_the_thread_is_told(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G9, G10: a thread that is elsewhere keeps no connection from the pool."""
    hold, refused = Hold(), threading.Event()

    def work() -> None:
        write(sync_db, 1)
        hold()
        with pytest.raises(SessionScopeClosedError):
            write(sync_db, 2)
        refused.set()

    task = asyncio.ensure_future(drive(DBSessionMiddleware(endpoint(work), database=sync_db)))
    await hold.reached.wait()
    async with cancelled(task):
        pass
    left = sync_engine.pool.checkedout()  # type: ignore[attr-defined]
    hold.let_go()

    assert (0, []) == (left, sync_rows())
    assert await asyncio.to_thread(refused.wait, ENOUGH)


async def test_commit_that_runs_in_its_thread_is_waited_for(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G10: cancelled during its COMMIT a request ends committed, and then cancelled."""
    scopes: list[SessionScope[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(current_scope())
        await endpoint(lambda: write(sync_db, 1))(scope, receive, send)
        await asyncio.Event().wait()

    with held(sync_engine, "commit") as hold:
        task = asyncio.ensure_future(drive(DBSessionMiddleware(app, database=sync_db)))
        await hold.reached.wait()
        async with cancelled(task):
            assert not task.done()
            hold.let_go()

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert (Outcome.COMMITTED, [1]) == (scopes[0].outcome, sync_rows())


async def test_commit_that_outlasts_its_grace_is_in_doubt(
    drive: Drive, sync_engine: sa.Engine
) -> None:
    """G10: out of grace the outcome is in doubt; the thread clears up when it comes back."""
    db = Database(sync_engine, cleanup_timeout=0.05)
    scopes: list[SessionScope[Any]] = []
    told: list[Outcome] = []

    def work() -> None:
        write(db, 1)
        db.on_completion(told.append)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(current_scope())
        await endpoint(work)(scope, receive, send)

    with held(sync_engine, "commit") as hold:
        task = asyncio.ensure_future(drive(DBSessionMiddleware(app, database=db)))
        await hold.reached.wait()
        async with cancelled(task):
            pass
        (scope,) = scopes
        assert (State.CLOSED, Outcome.IN_DOUBT) == (scope.state, scope.outcome)
        hold.let_go()
        assert await checked_in(sync_engine)

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert [] == task.result().messages
    assert (Outcome.IN_DOUBT, [Outcome.IN_DOUBT]) == (scope.outcome, told)
    assert await asyncio.to_thread(is_usable, sync_engine)


def is_usable(engine: sa.Engine) -> bool:
    """Whether the pool's connections are whole, and outside of any transaction."""
    with engine.connect() as connection:
        connection.execute(sa.select(1))
    return True


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
async def test_statement_that_outlasts_its_grace_is_cut_off_in_the_driver(
    drive: Drive, sync_engine: sa.Engine
) -> None:
    """G10, G22: a cancelled request waits no longer than its deadline for a long statement."""
    db = Database(sync_engine, cleanup_timeout=0.05)
    loop = asyncio.get_running_loop()
    inside, left = asyncio.Event(), asyncio.Event()

    def work() -> None:
        session = db.session
        session.scalar(sa.select(1))
        loop.call_soon_threadsafe(inside.set)
        try:
            session.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        finally:
            loop.call_soon_threadsafe(left.set)

    with sync_engine.connect() as holder:  # whom the statement waits for
        holder.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        task = asyncio.ensure_future(drive(DBSessionMiddleware(endpoint(work), database=db)))
        await inside.wait()
        async with cancelled(task):
            pass
    await left.wait()

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert await checked_in(sync_engine)
    assert await asyncio.to_thread(is_usable, sync_engine)


async def test_ending_that_found_no_thread_in_its_grace_leaves_nothing_behind(
    drive: Drive, sync_engine: sa.Engine, sync_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: a COMMIT that is given up before a thread took it up is followed by a rollback."""
    db = Database(sync_engine, cleanup_timeout=0.05)
    limiter = anyio.CapacityLimiter(1)
    limiter.acquire_on_behalf_of_nowait(monkeypatch)
    asked, again = asyncio.Event(), asyncio.Event()

    def ask(work: object) -> anyio.CapacityLimiter:
        (again if asked.is_set() else asked).set()
        return limiter

    monkeypatch.setattr(db, "limiter", ask)
    asgi = DBSessionMiddleware(endpoint(lambda: write(db, 1)), database=db)
    task = asyncio.ensure_future(drive(asgi))
    await asked.wait()
    async with cancelled(task):
        await again.wait()
        limiter.release_on_behalf_of(monkeypatch)

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert ([], []) == (task.result().messages, sync_rows())


@pytest.mark.parametrize("driver", ["sqlite", "psycopg"])
async def test_thread_that_gets_its_connection_too_late_leaks_nothing(
    drive: Drive, make_sync_engine: MakeEngine, driver: str
) -> None:
    """G10, G14: cancelled while its thread waits for the pool, a request keeps no connection."""
    engine = make_sync_engine(driver, pool_size=1, max_overflow=0, pool_timeout=ENOUGH)
    db = Database(engine, cleanup_timeout=0.05)
    loop = asyncio.get_running_loop()
    inside = asyncio.Event()
    refused = threading.Event()

    def tell(*_: object) -> None:
        loop.call_soon_threadsafe(inside.set)

    def work() -> None:
        sa.event.listen(db.session, "before_flush", tell)
        with pytest.raises(SessionScopeClosedError):
            write(db, 1)
        refused.set()

    with engine.connect():
        task = asyncio.ensure_future(drive(DBSessionMiddleware(endpoint(work), database=db)))
        await inside.wait()
        async with cancelled(task):
            pass

    assert isinstance(task.result().error, asyncio.CancelledError)
    assert await asyncio.to_thread(refused.wait, ENOUGH)
    assert await checked_in(engine)
    assert [] == committed(engine)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", [*KINDS, "shutdown"])
@pytest.mark.parametrize("sync_engine", ["sqlite"], indirect=True)
async def test_cancelled_at_each_suspension_it_ends_truly(
    sync_engine: sa.Engine, sync_db: SyncDatabase, kind: Kind, moment: Moment
) -> None:
    """G10: swept over handler, body and background: what was claimed is there, nothing is open."""
    for at in itertools.count(1):
        cut = Cut(kind, moment, at)
        swept = Swept(sync_db, cut, first=at * 10)

        assert "cancelled" == await cut.run(swept.run)
        assert await checked_in(sync_engine)

        rows = await asyncio.to_thread(committed, sync_engine)
        own = [row - swept.first for row in rows if row >= swept.first]
        assert swept.has_head <= (0 in own)
        assert swept.has_whole_body <= (1 in own)
        assert swept.scope is not None
        assert State.CLOSED is swept.scope.state
        if cut.was_over:
            assert [0, 1, 2] == own
            break


class Swept:
    """A request that writes in handler, body and background, and what was seen of it."""

    def __init__(self, db: SyncDatabase, cut: Cut, first: int) -> None:
        self.first = first
        self.scope: SessionScope[Any] | None = None
        self._db = db
        self._cut = cut
        self._messages: list[dict[str, Any]] = []

    @property
    def has_head(self) -> bool:
        """Whether a head went out."""
        return bool(self._messages)

    @property
    def has_whole_body(self) -> bool:
        """Whether the last body message went out."""
        return self.has_head and not self._messages[-1].get("more_body", True)

    async def run(self) -> None:
        """Send the request."""
        await DBSessionMiddleware(self._app, database=self._db)(http_scope(), None, self._send)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = current_scope()
        self._cut.arm()
        await in_thread(write, self._db, self.first)
        await send(start(200))
        await in_thread(write, self._db, self.first + 1)
        await send(body(b"piece", more=True))
        await send(body())
        await in_thread(write, self._db, self.first + 2)

    async def _send(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        await asyncio.sleep(0)


# --------------------------------------------------------------------------------------
# Pools that are busy
# --------------------------------------------------------------------------------------


async def rush(drive: Drive, db: SyncDatabase, count: int) -> list[int | None]:
    """Send *count* requests at once, each of which writes in a worker thread."""
    numbers = itertools.count(1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = next(numbers)
        await endpoint(lambda: write(db, number))(scope, receive, send)

    asgi = DBSessionMiddleware(app, database=db)
    return [each.status for each in await asyncio.gather(*(drive(asgi) for _ in range(count)))]


@pytest.mark.parametrize("driver", ["sqlite", "psycopg"])
@pytest.mark.once
async def test_two_connections_serve_two_hundred_threads(
    drive: Drive, make_sync_engine: MakeEngine, driver: str
) -> None:
    """G14: pool_size=2, 40 worker threads, 200 writing requests at once: all are committed."""
    engine = make_sync_engine(driver, pool_size=2, max_overflow=0, pool_timeout=30)

    statuses = await rush(drive, Database(engine), 200)

    assert [201] * 200 == statuses
    assert list(range(1, 201)) == committed(engine)


@pytest.mark.parametrize("driver", ["sqlite", "psycopg"])
@pytest.mark.parametrize("shared", [False, True])
async def test_endings_wait_for_no_thread_of_the_endpoints(
    drive: Drive,
    make_sync_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    shared: bool,
) -> None:
    """G14: all threads wait for the connections that endings give back; *shared* is the control."""
    timeout = 0.5 if shared else ENOUGH
    engine = make_sync_engine(driver, pool_size=2, max_overflow=0, pool_timeout=timeout)
    db = Database(engine)
    loop = asyncio.get_running_loop()
    narrow_threads(monkeypatch, db, 4, shared=shared)
    holding, waiting = asyncio.Semaphore(0), asyncio.Semaphore(0)
    go_on = asyncio.Event()

    async def hold_then_end(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(db.session.scalar, sa.select(1))
        holding.release()
        await go_on.wait()
        await endpoint()(scope, receive, send)

    def work() -> None:
        loop.call_soon_threadsafe(waiting.release)
        db.session.scalar(sa.select(1))

    asgi = DBSessionMiddleware(hold_then_end, database=db)
    holders = [asyncio.ensure_future(drive(asgi)) for _ in range(2)]
    for _ in holders:
        await holding.acquire()
    asgi = DBSessionMiddleware(endpoint(work), database=db)
    waiters = [asyncio.ensure_future(drive(asgi)) for _ in range(4)]
    for _ in waiters:
        await waiting.acquire()
    go_on.set()
    ended = [exchange.status for exchange in await asyncio.gather(*holders, *waiters)]

    assert [201] * 2 == ended[:2]
    assert shared == (503 in ended[2:])  # QueuePool's TimeoutError


@pytest.mark.parametrize("driver", ["sqlite", "psycopg"])
async def test_second_connections_beside_held_ones_are_refused_quickly(
    drive: Drive, make_sync_engine: MakeEngine, driver: str
) -> None:
    """G14: where all connections are held by requests that wait for another, one is told so."""
    engine = make_sync_engine(driver, pool_size=2, max_overflow=0, pool_timeout=ENOUGH)
    db = Database(engine)
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []

    def work() -> None:
        db.session.scalar(sa.select(1))
        barrier.wait(ENOUGH)
        try:
            with db.transactional("REQUIRES_NEW") as session:
                session.scalar(sa.select(1))
        except PoolTooSmallError as error:
            errors.append(error)
            raise

    asgi = DBSessionMiddleware(endpoint(work), database=db)

    exchanges = await asyncio.gather(drive(asgi), drive(asgi))

    assert 1 == len(errors)
    assert {201, None} == {exchange.status for exchange in exchanges}
    assert "2 * n" in str(errors[0])


async def test_same_block_object_serves_many_threads(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G12: one decorated function a hundred times at once: no entry knows of another."""

    @sync_db.transactional
    def place(number: int) -> None:
        write(sync_db, number)
        nested(number)

    @sync_db.transactional("NESTED")
    def nested(number: int) -> None:
        sync_db.session.execute(sa.update(Item).where(Item.id == number).values(note=str(number)))
        if number % 10 == 0:
            raise ValueError("boom")

    results = await asyncio.gather(
        *(asyncio.to_thread(place, number) for number in range(1, 101)), return_exceptions=True
    )

    assert 10 == sum(isinstance(result, ValueError) for result in results)
    assert [number for number in range(1, 101) if number % 10] == sync_rows()


async def test_endings_that_need_a_connection_keep_none_from_being_given_back(
    drive: Drive, make_sync_engine: MakeEngine
) -> None:
    """G14: commits that wait for a connection, to flush, occupy no thread of the others."""
    engine = make_sync_engine("sqlite", pool_size=2, max_overflow=0, pool_timeout=ENOUGH)
    db = Database(engine)
    loop = asyncio.get_running_loop()
    holding, flushing = asyncio.Semaphore(0), asyncio.Semaphore(0)
    go_on = asyncio.Event()

    @sa.event.listens_for(db.session_factory.class_, "before_flush")
    def see(session: Session, *_: object) -> None:
        if session.get_bind() is engine:
            loop.call_soon_threadsafe(flushing.release)

    async def hold_then_end(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(db.session.scalar, sa.select(1))
        holding.release()
        await go_on.wait()
        await endpoint()(scope, receive, send)

    adding = DBSessionMiddleware(
        endpoint(lambda: db.session.add(Item(id=id(current_scope())))), database=db
    )
    requests = [
        asyncio.ensure_future(drive(DBSessionMiddleware(hold_then_end, database=db)))
        for _ in range(2)
    ]
    for _ in range(2):
        await holding.acquire()
    requests += [asyncio.ensure_future(drive(adding)) for _ in range(2)]
    for _ in range(2):
        await flushing.acquire()
    go_on.set()
    exchanges = await asyncio.gather(*requests)
    sa.event.remove(db.session_factory.class_, "before_flush", see)

    assert [201] * 4 == [exchange.status for exchange in exchanges]


async def test_hooks_wait_for_no_thread_of_the_endpoints(
    drive: Drive, make_sync_engine: MakeEngine
) -> None:
    """G14: one database's hooks run while its request holds the other's only connection."""
    first = Database(make_sync_engine("sqlite", pool_size=50), name="first")
    narrow = make_sync_engine(
        "sqlite", file="narrow.db", pool_size=1, max_overflow=0, pool_timeout=ENOUGH
    )
    second = Database(narrow, name="second")
    calls: list[int] = []

    def work() -> None:
        second.session.scalar(sa.select(1))
        first.on_commit(calls.append, 1)

    asgi = DBSessionMiddleware(endpoint(work), databases=[first, second])
    limiter = anyio.to_thread.current_default_thread_limiter()
    tokens, limiter.total_tokens = limiter.total_tokens, 2
    try:
        exchanges = await asyncio.gather(*(drive(asgi) for _ in range(10)))
    finally:
        limiter.total_tokens = tokens

    assert ([201] * 10, 10) == ([exchange.status for exchange in exchanges], len(calls))
