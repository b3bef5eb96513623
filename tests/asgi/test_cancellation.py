"""Cancelled anywhere: at each suspension of a request or job, in each way there is."""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

import asgi_dbscope
from asgi_dbscope import Database, DBSessionMiddleware, Outcome, State, current_scope
from tests.fix_asgi import body, http_scope, start
from tests.fix_cancel import ENOUGH, KINDS, MOMENTS, Cut, Kind, SlowCommit
from tests.fix_database import POSTGRES_DRIVERS, Item

ALL_DRIVERS = pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


class Run:
    """One request or job, and what was seen of it.

    Attributes:
        cut: What cancels it.

        first: The first id of its own.

        scope: Its session scope, when it has come to that.

        messages: What the server was sent.
    """

    def __init__(self, cut: Cut, first: int) -> None:
        self.cut = cut
        self.first = first
        self.scope: Any = None
        self.messages: list[dict[str, Any]] = []

    async def send(self, message: dict[str, Any]) -> None:
        """Write to the client, then wait until the socket takes more."""
        self.messages.append(message)
        await asyncio.sleep(0)

    @property
    def has_head(self) -> bool:
        """Whether a head went out."""
        return any(each["type"] == "http.response.start" for each in self.messages)

    @property
    def has_whole_body(self) -> bool:
        """Whether the last body message went out."""
        return any(
            each["type"] == "http.response.body" and not each["more_body"] for each in self.messages
        )


Window = Callable[[Database[Any], Run], Awaitable[object]]


async def request(db: Database[Any], run: Run, app: Callable[..., Awaitable[None]]) -> None:
    """Send a request through the middleware."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await DBSessionMiddleware(app, database=db)(http_scope(), receive, run.send)


async def use(db: Database[Any], row: int) -> None:
    """Write a row, and read."""
    db.session.add(Item(id=row))
    await db.session.flush()
    await db.session.scalar(sa.select(sa.func.count(Item.id)))


async def handler_window(db: Database[Any], run: Run) -> None:
    """The handler's transaction is the one that is cut."""

    async def app(scope, receive, send):
        run.scope = current_scope()
        run.cut.arm()
        await use(db, run.first)
        await send(start(200))
        await send(body(b"ok"))

    await request(db, run, app)


async def stream_window(db: Database[Any], run: Run) -> None:
    """The body's transaction is the one that is cut."""

    async def app(scope, receive, send):
        run.scope = current_scope()
        await send(start(200))
        run.cut.arm()
        await use(db, run.first)
        await send(body(b"chunk", more=True))
        await db.session.scalar(sa.select(sa.func.count(Item.id)))
        await send(body())

    await request(db, run, app)


async def background_window(db: Database[Any], run: Run) -> None:
    """The transaction of the work after the body is the one that is cut."""

    async def app(scope, receive, send):
        run.scope = current_scope()
        await send(start(200))
        await send(body(b"ok"))
        run.cut.arm()
        await use(db, run.first)

    await request(db, run, app)


async def job_window(db: Database[Any], run: Run) -> None:
    """A job's transaction is the one that is cut."""
    async with db.session_scope():
        run.scope = db.scope
        run.cut.arm()
        await use(db, run.first)


async def release_window(db: Database[Any], run: Run) -> None:
    """The release in mid-job is what is cut."""
    async with db.session_scope():
        run.scope = db.scope
        run.cut.arm()
        await use(db, run.first)
        await db.release()


async def whole_window(db: Database[Any], run: Run) -> None:
    """A request that uses the session in handler, body and background: cut anywhere."""

    async def app(scope, receive, send):
        run.scope = current_scope()
        run.cut.arm()
        await use(db, run.first)
        await send(start(200))
        await use(db, run.first + 1)
        await send(body(b"chunk", more=True))
        await send(body())
        await use(db, run.first + 2)

    await request(db, run, app)


def open_connections(engine: AsyncEngine) -> list[bool]:
    """For each connection in the pool, whether it is inside a transaction."""
    return [
        _is_in_transaction(entry.driver_connection)
        for entry in engine.pool._pool._queue._queue  # type: ignore[attr-defined]
        if entry.driver_connection is not None
    ]


def _is_in_transaction(driver: Any) -> bool:
    if hasattr(driver, "is_in_transaction"):
        return bool(driver.is_in_transaction())
    if hasattr(driver, "in_transaction"):
        return bool(driver.in_transaction)
    if hasattr(driver, "server_status"):  # MariaDB's: SERVER_STATUS_IN_TRANS
        return bool(driver.server_status & 1)
    return driver.info.transaction_status.name not in {"IDLE", "UNKNOWN"}


OTHERS = sa.text(
    "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
    "AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle'"
)
"""Who is at work on PostgreSQL besides the one who asks."""


class Observer:
    """Sees what is committed, and who is in a transaction, by a connection of its own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = create_async_engine(engine.url, pool_size=1, isolation_level="AUTOCOMMIT")
        self.watched = engine

    async def wait_until_quiet(self) -> None:
        """Wait until the server has ended what was cut off; fail if a transaction stays open."""
        if self.engine.dialect.name == "sqlite":
            return
        async with asyncio.timeout(ENOUGH), self.engine.connect() as connection:
            while await self._others(connection):
                await asyncio.sleep(0.001)  # another process ends them

    async def _others(self, connection: AsyncConnection) -> list[str]:
        if self.engine.dialect.name == "postgresql":
            return list(await connection.scalars(OTHERS))
        # Not information_schema.innodb_trx: whoever asks it again within 0.1 seconds is told the
        # same again, and for as long as he goes on asking.
        answer = await connection.exec_driver_sql("SHOW ENGINE INNODB STATUS")
        transactions = r"^---TRANSACTION [^,]*, (?!not started)(.*)"
        return re.findall(transactions, answer.one().Status, re.MULTILINE)

    async def rows(self, first: int, last: int) -> list[int]:
        """The committed ids of a range."""
        statement = sa.select(Item.id).where(Item.id.between(first, last)).order_by(Item.id)
        async with self.engine.connect() as connection:
            return list(await connection.scalars(statement))


async def sweep(
    db: Database[Any],
    window: Window,
    kind: Kind,
    *,
    check: Callable[[Run, list[int]], None],
    is_cold: bool = False,
) -> int:
    """Run *window* again and again, cut at the next suspension each time; check after each.

    Returns:
        How many suspensions were cut, both as they begin and as they end.
    """
    engine: AsyncEngine = db.session_factory.kw["bind"]
    observer = Observer(engine)
    first = 0
    swept = 0
    try:
        for moment in MOMENTS:
            for at in itertools.count(1):
                first += 10
                run = Run(Cut(kind, moment, at), first)
                where = f"{window.__name__}, {kind}, {moment}, suspension {at}"
                await (engine.dispose() if is_cold else warm_up(engine))
                before = asyncio.all_tasks()
                assert "cancelled" == await run.cut.run(partial(window, db, run)), where
                try:
                    await check_g10(observer, run, before, check)
                except AssertionError as error:
                    error.add_note(where)
                    raise
                if run.cut.was_over:
                    break
                swept += 1
        await warm_up(engine)
    finally:
        await observer.engine.dispose()
    return swept


async def warm_up(engine: AsyncEngine) -> None:
    """See to it that the pool has a connection, and that it works."""
    async with engine.connect() as connection:
        assert 1 == await connection.scalar(sa.text("SELECT 1"))


async def check_g10(
    observer: Observer,
    run: Run,
    before: set[asyncio.Task[Any]],
    check: Callable[[Run, list[int]], None],
) -> None:
    """One of four outcomes, and it is true; nothing is left."""
    others = asyncio.all_tasks() - before
    assert [] == [each for each in others if is_ours(each)]
    if others:  # the driver's own: asyncpg's request to the server to cancel a query
        _, others = await asyncio.wait(others, timeout=ENOUGH)
    assert not others
    assert 0 == observer.watched.pool.checkedout()  # type: ignore[attr-defined]
    assert True not in open_connections(observer.watched)
    await observer.wait_until_quiet()
    rows = await observer.rows(run.first, run.first + 9)
    if run.scope is not None:
        assert State.CLOSED is run.scope.state
    check(run, rows)


def is_ours(task: asyncio.Task[Any]) -> bool:
    """Whether the package has made this task."""
    coro: Any = task.get_coro()
    return Path(asgi_dbscope.__file__).parent in Path(coro.cr_code.co_filename).parents


def check_one_transaction(run: Run, rows: list[int]) -> None:
    """The scope's one transaction is told as it is."""
    outcome = None if run.scope is None else run.scope.outcome
    expected = [run.first] if outcome is Outcome.COMMITTED else []
    assert expected == rows, outcome
    assert Outcome.IN_DOUBT is not outcome
    if run.cut.was_over:
        assert Outcome.COMMITTED is outcome


def check_handler(run: Run, rows: list[int]) -> None:
    """A head that went out is no lie."""
    check_one_transaction(run, rows)
    if run.has_head:
        assert [run.first] == rows


def check_stream(run: Run, rows: list[int]) -> None:
    """A body that came to its end is no lie."""
    check_one_transaction(run, rows)
    if run.has_whole_body:
        assert [run.first] == rows


def check_whole(run: Run, rows: list[int]) -> None:
    """What went out is true, and what is there came in order."""
    written = [run.first, run.first + 1, run.first + 2]
    assert written[: len(rows)] == rows
    if run.has_head:
        assert len(rows) >= 1
    if run.has_whole_body:
        assert len(rows) >= 2
    if run.cut.was_over:
        assert written == rows


def check_doubt(run: Run, rows: list[int]) -> None:
    """A COMMIT that was itself cut off is in doubt, and says so."""
    if run.scope is None or run.scope.outcome is not Outcome.IN_DOUBT:
        check_handler(run, rows)
    assert not run.has_head or [run.first] == rows


@ALL_DRIVERS
@EACH_KIND
async def test_cancelled_anywhere_before_the_head_it_ends_truly(db, kind):
    """G10, G1: cancelled at any suspension up to the head, it leaves nothing and tells no lie."""
    assert await sweep(db, handler_window, kind, check=check_handler) >= 5


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
@EACH_KIND
async def test_cancelled_while_connecting_it_ends_truly(db, kind):
    """G10: cancelled at any suspension where the pool is empty, it ends as cleanly.

    Not on SQLite: cancelled twice while it connects, SQLAlchemy 2.1 stops aiosqlite's thread under
    a task of its own that then waits for ever.
    """
    assert await sweep(db, handler_window, kind, check=check_handler, is_cold=True) >= 5


@EACH_KIND
async def test_cancelled_anywhere_in_the_body_it_ends_truly(db, kind):
    """G10, G7: cancelled at any suspension of a stream, its last message is never a lie."""
    assert await sweep(db, stream_window, kind, check=check_stream) >= 5


@EACH_KIND
async def test_cancelled_anywhere_in_the_background_it_ends_truly(db, kind):
    """G10, G8: cancelled at any suspension of background work, nothing is left over."""
    assert await sweep(db, background_window, kind, check=check_one_transaction) >= 5


@EACH_KIND
async def test_cancelled_anywhere_in_all_three_windows_it_ends_truly(db, kind):
    """G10, G1, G7: of three transactions of one request, each that was answered for is there."""
    assert await sweep(db, whole_window, kind, check=check_whole) >= 15


@EACH_KIND
@pytest.mark.parametrize("window", [job_window, release_window])
async def test_job_cancelled_anywhere_ends_truly(db, window, kind):
    """G10: cancelled at any suspension, a session scope outside a request is as safe."""
    assert await sweep(db, window, kind, check=check_one_transaction) >= 5


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_tasks_all_cancelled_at_once_tell_a_doubt(db):
    """G10, G15: where a loop's end cancels the ending itself, a COMMIT cut off is in doubt."""
    assert await sweep(db, handler_window, "shutdown", check=check_doubt) >= 5


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_commit_that_was_sent_is_waited_for(db, engine, rows):
    """G10, G1: cancelled in mid-COMMIT, the head goes out with the answer, and then it is over."""
    run = Run(Cut("once", "suspending", 1), 1)

    async def app(scope, receive, send):
        run.scope = current_scope()
        await use(db, run.first)
        await send(start(200))
        await send(body(b"ok"))

    async with SlowCommit(engine) as commit:
        task = asyncio.create_task(request(db, run, app))
        await commit.wait_until_reached()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        assert not run.has_head
        await commit.let_through()
        await asyncio.wait([task])

    assert task.cancelled()
    assert run.has_head
    assert Outcome.COMMITTED is run.scope.outcome
    assert [1] == await rows()


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_commit_that_is_never_answered_is_given_up_in_doubt(engine):
    """G10, G15: cancelled in mid-COMMIT, it is waited for no longer than `cleanup_timeout`."""
    db = Database(engine, cleanup_timeout=0.05)
    run = Run(Cut("once", "suspending", 1), 1)

    async def app(scope, receive, send):
        run.scope = current_scope()
        await use(db, run.first)
        await send(start(200))
        await send(body(b"ok"))

    async with SlowCommit(engine) as commit:
        task = asyncio.create_task(request(db, run, app))
        await commit.wait_until_reached()
        task.cancel()
        async with asyncio.timeout(ENOUGH):
            await asyncio.wait([task])
        assert 1 == engine.pool.checkedout()  # the lock's own

    assert task.cancelled()
    assert not run.has_head
    assert Outcome.IN_DOUBT is run.scope.outcome


async def test_commit_that_nobody_reports_on_is_in_doubt(engine, rows):
    """G10, G15: Cancelled in a listener to COMMIT, the scope doesn't claim to know its end."""
    db = Database(engine, cleanup_timeout=0.05)
    is_reached = asyncio.Event()
    scopes = []

    def wait_for_ever(connection):
        is_reached.set()
        await_only(asyncio.Event().wait())

    async def job():
        async with db.session_scope():
            scopes.append(db.scope)
            await use(db, 1)
            sa.event.listen(engine.sync_engine, "commit", wait_for_ever)

    task = asyncio.create_task(job())
    await is_reached.wait()
    task.cancel()
    async with asyncio.timeout(ENOUGH):
        await asyncio.wait([task])
    sa.event.remove(engine.sync_engine, "commit", wait_for_ever)

    assert task.cancelled()
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert [] == await rows()


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_background_commit_that_is_never_answered_is_given_up_in_doubt(engine):
    """G10, G15: after the response too, a COMMIT is waited for no longer than `cleanup_timeout`."""
    db = Database(engine, cleanup_timeout=0.05)
    run = Run(Cut("once", "suspending", 1), 1)

    async def app(scope, receive, send):
        await send(start(200))
        await send(body(b"ok"))
        run.scope = current_scope()
        await use(db, run.first)

    async with SlowCommit(engine) as commit:
        task = asyncio.create_task(request(db, run, app))
        await commit.wait_until_reached()
        task.cancel()
        async with asyncio.timeout(ENOUGH):
            await asyncio.wait([task])
        assert 1 == engine.pool.checkedout()  # the lock's own

    assert task.cancelled()
    assert run.has_whole_body
    assert Outcome.IN_DOUBT is run.scope.outcome


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_error_under_way_comes_before_the_cancellation_of_its_rollback(db, engine, rows):
    """G10: cancelled while an error's ROLLBACK is under way, the error comes out, then that."""
    error = LookupError("no such item")
    rolling_back = asyncio.Event()
    sa.event.listen(engine.sync_engine, "rollback", lambda _: rolling_back.set())
    raised = []

    async def app(scope, receive, send):
        await use(db, 1)
        raise error

    async def serve():
        try:
            await request(db, Run(Cut("once", "suspending", 1), 1), app)
        except LookupError as seen:
            raised.append(seen)
        await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await rolling_back.wait()
    task.cancel()
    async with asyncio.timeout(ENOUGH):
        await asyncio.wait([task])

    assert [error] == raised
    assert task.cancelled()
    assert [] == await rows()
