"""Synchronous sessions: a request whose work is done in worker threads has every guarantee."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio.to_thread
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from asgi_dbscope import (
    CommitInDoubtError,
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    EventLoopMismatchError,
    NoSessionScopeError,
    Outcome,
    RollbackOnlyError,
    SessionScopeClosedError,
    TransactionAbortedError,
    TransactionRequiredError,
    TransactionTimeoutError,
    WebSocketSessionError,
    current_scope,
    current_session,
    session_options,
)
from tests.fix_asgi import Drive, body, start
from tests.fix_database import Child, Item, Timeline
from tests.sync_apps import Rows, endpoint

pytest_plugins = ["tests.fix_sync"]

SyncDatabase = Database[Session]
in_thread = anyio.to_thread.run_sync


def add(number: int) -> Callable[[], None]:
    """Write an item with the current session."""

    def write() -> None:
        session: Any = current_session()
        session.add(Item(id=number))
        session.flush()

    return write


# --------------------------------------------------------------------------------------
# The response's transaction
# --------------------------------------------------------------------------------------


async def test_commit_and_checkin_come_before_the_head(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G1, G6: the COMMIT is answered and the connection given back before the head goes out."""
    app = DBSessionMiddleware(endpoint(add(1)), database=sync_db)

    exchange = await drive(app)

    assert (201, None) == (exchange.status, exchange.error)
    assert ["checkout", "begin", "commit", "checkin", "start 201", "last body"] == timeline
    assert [1] == sync_rows()


async def test_what_was_only_added_is_flushed_and_committed(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G1: objects that nobody flushed are in the COMMIT before the head."""
    app = DBSessionMiddleware(endpoint(lambda: sync_db.session.add(Item(id=1))), database=sync_db)
    seen: list[list[int]] = []

    async def see(message: object) -> None:
        seen.append(sync_rows())

    exchange = await drive(app, on_send=see)

    assert (201, [[1], [1]]) == (exchange.status, seen)


async def test_failed_commit_becomes_the_error(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G2: a COMMIT that fails is rolled back; no head is sent, and the rest does not run."""

    def write() -> None:
        sync_db.session.add_all([Item(id=1), Child(id=1, item_id=99)])

    went_on = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(write)
        await send(start(201))
        went_on.append("after the head")

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert any("was rolled back" in note for note in exchange.error.__notes__)
    assert ([], [], []) == (exchange.messages, went_on, sync_rows())
    assert "checkin" == timeline[-1]


async def test_error_response_rolls_back_before_the_head(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G3: a 5xx rolls back first."""
    app = DBSessionMiddleware(endpoint(add(1), status=503), database=sync_db)

    exchange = await drive(app)

    assert (503, []) == (exchange.status, sync_rows())
    assert ["rollback", "checkin", "start 503", "last body"] == timeline[-4:]


async def test_exception_turned_into_a_4xx_rolls_back(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G3: what a thread raised counts, also where it became a 404; a returned 404 commits."""

    def fail() -> None:
        add(1)()
        raise LookupError("no such thing")

    async def raising(scope: Any, receive: Any, send: Any) -> None:
        try:
            await in_thread(fail)
        except LookupError:
            await send(start(404))
            await send(body())

    raised = await drive(DBSessionMiddleware(raising, database=sync_db))
    returned = await drive(DBSessionMiddleware(endpoint(add(2), status=404), database=sync_db))

    assert (404, 404) == (raised.status, returned.status)
    assert [2] == sync_rows()


async def test_exception_rolls_back(drive: Drive, sync_db: SyncDatabase, sync_rows: Rows) -> None:
    """G3: an exception that leaves the app rolls back, and goes on."""

    def fail() -> None:
        add(1)()
        raise ValueError("boom")

    exchange = await drive(DBSessionMiddleware(endpoint(fail), database=sync_db))

    assert isinstance(exchange.error, ValueError)
    assert [] == sync_rows()


async def test_dry_run_is_rolled_back_and_answered(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G4: set_rollback_only() in a thread: the response goes out as it is, after the rollback."""
    app = endpoint(add(1), sync_db.set_rollback_only)

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, b"done", []) == (exchange.status, exchange.body, sync_rows())


async def test_swallowed_failure_of_a_joined_block_becomes_an_error(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G4: a head that would claim what a failed block can't keep becomes an error."""

    @sync_db.transactional
    def fail() -> None:
        add(1)()
        raise ValueError("boom")

    def swallow() -> None:
        with pytest.raises(ValueError, match="boom"):
            fail()

    exchange = await drive(DBSessionMiddleware(endpoint(swallow), database=sync_db))

    assert isinstance(exchange.error, RollbackOnlyError)
    assert isinstance(exchange.error.__cause__, ValueError)
    assert ([], []) == (exchange.messages, sync_rows())


async def test_request_without_the_session_costs_nothing(
    drive: Drive, sync_db: SyncDatabase, timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: no session, no connection, no thread, no task."""
    tasks = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        tasks.append(len(asyncio.all_tasks()))
        await send(body())

    monkeypatch.setattr(sync_db, "limiter", lambda *_: pytest.fail("a thread was asked for"))
    before = len(asyncio.all_tasks())

    await drive(DBSessionMiddleware(app, database=sync_db))

    assert (["start 200", "last body"], [before]) == (timeline, tasks)


async def test_read_ends_in_a_thread_of_its_own(drive: Drive, sync_db: SyncDatabase) -> None:
    """G6: the event loop is free while the transaction ends; a read is settled, too."""
    places: list[bool] = []

    @sa.event.listens_for(sync_db.session_factory.kw["bind"], "commit")
    def see(connection: object) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            places.append(True)
        else:
            places.append(False)

    app = endpoint(lambda: sync_db.session.scalar(sa.select(1)))

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, [True]) == (exchange.status, places)


# --------------------------------------------------------------------------------------
# The body's, and what comes after it
# --------------------------------------------------------------------------------------


def streaming(*functions: Callable[[], Any]) -> Any:
    """An app whose body calls each function in a thread, and sends a piece after it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        for function in functions:
            await in_thread(function)
            await send(body(b"piece", more=True))
        await send(body())

    return app


async def test_stream_is_committed_before_its_last_message(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G7: what a body wrote in threads is committed before its last message."""
    app = streaming(add(1), add(2))

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert exchange.is_complete
    assert ["body", "commit", "checkin", "last body"] == timeline[-4:]
    assert [1, 2] == sync_rows()


async def test_failed_commit_of_a_stream_tears_it(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G7: a body whose COMMIT fails never ends cleanly."""
    app = streaming(add(1), lambda: sync_db.session.add(Child(id=1, item_id=99)))

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert not exchange.is_complete
    assert [] == sync_rows()


async def test_failing_stream_is_rolled_back(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G7: an exception in mid-stream rolls back what the body wrote."""

    def fail() -> None:
        raise ValueError("boom")

    exchange = await drive(DBSessionMiddleware(streaming(add(1), fail), database=sync_db))

    assert isinstance(exchange.error, ValueError)
    assert (False, []) == (exchange.is_complete, sync_rows())


async def test_stream_of_a_client_that_left_is_rolled_back(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G7: a disconnect in mid-stream rolls the body's transaction back."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start())
        await in_thread(add(1))
        await send(body(b"piece", more=True))
        assert "http.disconnect" == (await receive())["type"]

    received = [{"type": "http.request"}, {"type": "http.disconnect"}]
    await drive(DBSessionMiddleware(app, database=sync_db), received=received)

    assert [] == sync_rows()


async def test_statement_under_way_is_rolled_back_when_the_client_leaves(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G7, G22: a disconnect while a thread is inside the session: the rollback follows it."""
    inside, left = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def write() -> None:
        session = sync_db.session
        session.add(Item(id=1))
        engine = sync_db.session_factory.kw["bind"]

        @sa.event.listens_for(engine, "after_cursor_execute")
        def wait(*_: object) -> None:
            loop.call_soon_threadsafe(inside.set)
            asyncio.run_coroutine_threadsafe(left.wait(), loop).result(5)

        try:
            session.flush()
        finally:
            sa.event.remove(engine, "after_cursor_execute", wait)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        writing = asyncio.create_task(asyncio.to_thread(write))
        await inside.wait()
        assert "http.disconnect" == (await receive())["type"]
        left.set()
        await writing

    received = [{"type": "http.disconnect"}]
    exchange = await drive(DBSessionMiddleware(app, database=sync_db), received=received)

    assert (None, []) == (exchange.error, sync_rows())


async def test_background_work_is_committed_if_the_app_returns(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G8: work after the body has a transaction of its own, with the same session's objects."""
    items: list[Item] = []

    def write() -> None:
        items.append(Item(id=1))
        sync_db.session.add(items[0])

    def go_on() -> None:
        items[0].note = "sent"
        add(2)()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endpoint(write)(scope, receive, send)
        await in_thread(go_on)

    await drive(DBSessionMiddleware(app, database=sync_db))

    assert [1, 2] == sync_rows()
    assert 2 == timeline.count("commit")
    assert timeline.index("last body") < len(timeline) - timeline[::-1].index("commit")


async def test_failing_background_work_is_rolled_back(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G8: work after the body that raises is rolled back; what was answered stays."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endpoint(add(1))(scope, receive, send)
        await in_thread(add(2))
        raise ValueError("boom")

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, [1]) == (exchange.status, sync_rows())
    assert isinstance(exchange.error, ValueError)


async def test_session_refuses_use_after_its_scope(
    drive: Drive, sync_db: SyncDatabase, timeline: Timeline
) -> None:
    """G9: a thread that outlives its request is told what to do, and takes no connection."""
    kept: list[Session] = []
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def outlive() -> str:
        asyncio.run_coroutine_threadsafe(ended.wait(), loop).result(5)
        with pytest.raises(SessionScopeClosedError) as caught:
            kept[0].execute(sa.select(1))
        with pytest.raises(SessionScopeClosedError):
            current_session()
        return str(caught.value)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(lambda: kept.append(sync_db.session))
        late.append(asyncio.create_task(asyncio.to_thread(outlive)))
        await endpoint(add(1))(scope, receive, send)

    late: list[asyncio.Task[str]] = []
    await drive(DBSessionMiddleware(app, database=sync_db))
    ended.set()
    message = await late[0]

    assert "has ended" in message
    assert "with db.session_scope() as session:`" in message
    assert 1 == timeline.count("checkout")


# --------------------------------------------------------------------------------------
# What the database says
# --------------------------------------------------------------------------------------


async def test_connection_leaves_no_transaction_in_the_pool(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine
) -> None:
    """G19: after a failed COMMIT, and after a BEGIN by hand, the pooled connection is outside."""

    def break_commit() -> None:
        sync_db.session.add(Child(id=1, item_id=99))

    def begin_by_hand() -> None:
        sync_db.session.connection().exec_driver_sql("INSERT INTO item (id) VALUES (1)")
        raise ValueError("boom")

    for function in (break_commit, begin_by_hand):
        await drive(DBSessionMiddleware(endpoint(function), database=sync_db))
        with sync_engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            is_inside = (
                driver.in_transaction
                if sync_engine.name == "sqlite"
                else driver.info.transaction_status
            )
            assert not is_inside


async def test_read_only_is_enforced_and_taken_back(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G20: the database refuses writes in every transaction of the scope, and in no other."""

    @session_options(read_only=True)
    def preview() -> None:
        for _ in range(2):
            with pytest.raises(sa.exc.DBAPIError, match=r"(?i)read-?only|readonly"):
                add(1)()
            sync_db.session.rollback()

    first = await drive(DBSessionMiddleware(endpoint(preview), database=sync_db))
    second = await drive(DBSessionMiddleware(endpoint(add(2)), database=sync_db))

    assert (201, None, 201) == (first.status, first.error, second.status)
    assert [2] == sync_rows()


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
async def test_isolation_level_holds_after_a_commit_in_mid_request(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine
) -> None:
    """G20: the isolation level is that of every transaction of the scope, and of no other."""
    levels: list[str] = []
    show = sa.text("SHOW transaction_isolation")

    @session_options(isolation_level="SERIALIZABLE")
    def ask() -> None:
        levels.append(sync_db.session.scalar(show))
        sync_db.release()
        levels.append(sync_db.session.scalar(show))

    await drive(DBSessionMiddleware(endpoint(ask), database=sync_db))
    with sync_engine.connect() as connection:
        levels.append(connection.scalar(show))

    assert ["serializable", "serializable", "read committed"] == levels


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
async def test_aborted_transaction_is_not_taken_for_committed(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G21: after a swallowed SQL error the response is an error; a savepoint heals it."""

    def swallow() -> None:
        add(1)()
        with pytest.raises(sa.exc.DBAPIError):
            sync_db.session.execute(sa.text("SELECT 1/0"))

    def heal() -> None:
        add(2)()
        with pytest.raises(sa.exc.DBAPIError), sync_db.session.begin_nested():
            sync_db.session.execute(sa.text("SELECT 1/0"))

    aborted = await drive(DBSessionMiddleware(endpoint(swallow), database=sync_db))
    healed = await drive(DBSessionMiddleware(endpoint(heal), database=sync_db))

    assert isinstance(aborted.error, TransactionAbortedError)
    assert ([], 201, [2]) == (aborted.messages, healed.status, sync_rows())


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
async def test_connection_lost_before_its_commit_is_no_success(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G15: a connection that the server ended between a write and COMMIT gives no 2xx."""

    def write_and_lose() -> None:
        add(1)()
        pid = sync_db.session.scalar(sa.text("SELECT pg_backend_pid()"))
        with sync_engine.connect() as other:
            other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    exchange = await drive(DBSessionMiddleware(endpoint(write_and_lose), database=sync_db))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert isinstance(exchange.error.__cause__, sa.exc.OperationalError)
    assert ([], []) == (exchange.messages, sync_rows())


async def test_exhausted_pool_is_an_error_that_says_so(
    drive: Drive, make_sync_engine: Callable[..., sa.Engine]
) -> None:
    """G14: without a free connection 503 is the answer after pool_timeout, and notes say why."""
    engine = make_sync_engine("sqlite", pool_size=1, max_overflow=0, pool_timeout=0.05)
    db = Database(engine)
    errors: list[BaseException] = []

    def note_error(scope: Any, error: BaseException) -> None:
        errors.append(error)

    with engine.connect():
        app = endpoint(add(1))
        exchange = await drive(
            DBSessionMiddleware(app, database=db, commit_error_response=note_error)
        )

    assert 503 == exchange.status
    [error] = errors
    assert isinstance(error, sa.exc.TimeoutError)
    assert any("got no connection" in note for note in error.__notes__)
    assert any("The pool has at most 1" in note for note in error.__notes__)


# --------------------------------------------------------------------------------------
# Modes, release, hooks
# --------------------------------------------------------------------------------------


async def test_autocommit_makes_each_statement_durable(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """Mode "autocommit": what was written stays; a transactional block is one transaction."""

    def work() -> None:
        add(1)()
        with pytest.raises(ValueError, match="boom"), sync_db.transactional():
            add(2)()
            raise ValueError("boom")
        add(3)()

    app = DBSessionMiddleware(endpoint(work, status=500), database=sync_db, mode="autocommit")

    await drive(app)

    assert [1, 3] == sync_rows()


async def test_manual_mode_keeps_what_was_committed_and_warns_of_the_rest(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """Mode "manual": only session.commit() commits; what is open at the head is rolled back."""

    def work() -> None:
        add(1)()
        sync_db.session.commit()
        add(2)()

    app = DBSessionMiddleware(endpoint(work), database=sync_db, mode="manual")

    exchange = await drive(app)

    assert (201, [1]) == (exchange.status, sync_rows())
    assert "nobody committed" in caplog.text


async def test_release_commits_and_gives_the_connection_back(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G6: db.release() is a plain call, and the session goes on after it."""
    meanwhile: list[object] = []

    def work() -> None:
        add(1)()
        sync_db.release()
        meanwhile.extend([sync_engine.pool.checkedout(), sync_rows()])  # type: ignore[attr-defined]
        add(2)()

    await drive(DBSessionMiddleware(endpoint(work), database=sync_db))

    assert ([0, [1]], [1, 2]) == (meanwhile, sync_rows())


async def test_hooks_run_after_the_commit_and_before_the_head(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """Hooks of a synchronous database run in a thread, each in a scope of its own."""

    def work() -> None:
        add(1)()
        sync_db.on_commit(timeline.append, "committed")
        sync_db.on_commit(add(2))
        sync_db.on_rollback(timeline.append, "rolled back")
        sync_db.on_completion(lambda outcome: timeline.append(outcome.name))
        sync_db.on_commit(timeline.append, "late", when="after_response")
        sync_db.on_commit(add(3), when="after_response")

    await drive(DBSessionMiddleware(endpoint(work), database=sync_db))

    said = [each for each in timeline if each not in {"checkout", "begin", "checkin"}]
    assert ["commit", "committed", "commit", "COMMITTED", "start 201", "last body", "late"] == (
        said[:7]
    )
    assert [1, 2, 3] == sync_rows()


async def test_hooks_of_a_rollback_run(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """After a rollback on-commit hooks are dropped, and the others told."""
    calls: list[object] = []

    def work() -> None:
        add(1)()
        sync_db.on_commit(calls.append, "committed")
        sync_db.on_rollback(add(2))
        sync_db.on_completion(calls.append)
        raise ValueError("boom")

    await drive(DBSessionMiddleware(endpoint(work), database=sync_db))

    assert ([Outcome.ROLLED_BACK], [2]) == (calls, sync_rows())


async def test_hooks_of_a_commit_by_hand_run_in_its_thread(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """After session.commit() or rollback() its hooks run at once, each in a scope of its own."""
    calls: list[object] = []

    def work() -> None:
        add(1)()
        sync_db.on_commit(add(2))
        sync_db.session.commit()
        calls.append(sync_rows())
        add(3)()
        sync_db.on_rollback(calls.append, "rolled back")
        sync_db.session.rollback()

    exchange = await drive(DBSessionMiddleware(endpoint(work), database=sync_db))

    assert (201, [[1, 2], "rolled back"]) == (exchange.status, calls)


async def test_error_of_a_hook_is_logged_or_raised(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing hook is logged and the others run; on_error="raise" makes it the response's."""

    def fail() -> None:
        raise ValueError("boom")

    def work() -> None:
        add(1)()
        sync_db.on_commit(fail, on_error="raise")
        sync_db.on_commit(fail)
        sync_db.on_commit(add(2))

    exchange = await drive(DBSessionMiddleware(endpoint(work), database=sync_db))

    assert isinstance(exchange.error, ValueError)
    assert ([], [1, 2]) == (exchange.messages, sync_rows())
    assert "failed; the others run" in caplog.text


def test_error_of_a_hook_does_not_replace_the_error_under_way(
    sync_db: SyncDatabase, sync_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook's error, raised on request, is only logged where the scope fails already."""

    def fail() -> None:
        raise LookupError("the hook's")

    with pytest.raises(ValueError, match="the scope's"), sync_db.session_scope():
        add(1)()
        sync_db.on_rollback(fail, on_error="raise")
        raise ValueError("the scope's")

    assert ["session_scope(): a hook failed"] == caplog.messages
    assert [] == sync_rows()


async def test_coroutine_function_is_no_hook_of_threads(sync_db: SyncDatabase) -> None:
    """A coroutine function as a hook is refused, with what to do instead."""

    async def notify() -> None: ...

    with sync_db.session_scope(), pytest.raises(ConfigurationError, match="plain function"):
        sync_db.on_commit(notify)


# --------------------------------------------------------------------------------------
# Blocks by hand: scripts, jobs, websockets
# --------------------------------------------------------------------------------------


def test_script_commits_and_rolls_back_without_an_event_loop(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G9, G12: `with db.session_scope()` needs no event loop; each is a transaction of its own."""
    with sync_db.session_scope() as session:
        session.add(Item(id=1))
        current: Any = current_session()
        assert session is sync_db.session
        assert session is current
        with sync_db.session_scope() as other:
            assert other is not session
    with pytest.raises(ValueError, match="boom"), sync_db.session_scope() as failing:
        failing.add(Item(id=2))
        raise ValueError("boom")

    assert [1] == sync_rows()
    with pytest.raises(SessionScopeClosedError):
        session.execute(sa.select(1))
    with pytest.raises(NoSessionScopeError):
        current_session()


def test_swallowed_failure_of_a_joined_block_fails_the_script(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G4: a script's scope that swallowed a joined block's error is rolled back, and says so."""
    error = ValueError("boom")

    with pytest.raises(RollbackOnlyError) as caught, sync_db.session_scope():
        add(1)()
        with pytest.raises(ValueError, match="boom"), sync_db.transactional():
            raise error

    assert error is caught.value.__cause__
    assert [] == sync_rows()


def test_error_that_would_commit_rolls_back_after_a_swallowed_failure(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G4: an error named in no_rollback_for comes out as it is, and keeps nothing of a failure."""
    outer = sync_db.transactional("REQUIRES_NEW", no_rollback_for=LookupError)

    with pytest.raises(LookupError, match="known"), outer:
        add(1)()
        with pytest.raises(ValueError, match="boom"), sync_db.transactional():
            raise ValueError("boom")
        raise LookupError("known")

    assert [] == sync_rows()


def test_failed_commit_of_a_script_is_raised(sync_db: SyncDatabase, sync_rows: Rows) -> None:
    """G2: a COMMIT that fails leaves the block as the database's error, rolled back."""
    with pytest.raises(sa.exc.IntegrityError) as caught, sync_db.session_scope() as session:
        session.add_all([Item(id=1), Child(id=1, item_id=99)])

    assert any("session_scope() was rolled back" in note for note in caught.value.__notes__)
    assert [] == sync_rows()


def test_both_decorate_functions_methods_and_classmethods(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """Both are decorators for functions, methods, classmethods and staticmethods."""

    class Orders:
        start = 10

        @sync_db.transactional
        def place(self, number: int) -> Session:
            add(number)()
            return sync_db.session

        @classmethod
        @sync_db.transactional(label="restock")
        def restock(cls) -> None:
            add(cls.start)()

        @sync_db.session_scope
        def count(self) -> int | None:
            return sync_db.session.scalar(sa.select(sa.func.count(Item.id)))

        @staticmethod
        @sync_db.session_scope(read_only=True)
        def refuse() -> None:
            add(99)()

    orders = Orders()
    first, second = orders.place(1), orders.place(2)
    orders.restock()

    assert first is not second
    assert 3 == orders.count()
    with pytest.raises(sa.exc.DBAPIError):
        orders.refuse()
    assert [1, 2, 10] == sync_rows()
    assert "place" == Orders.place.__name__


def test_propagation_of_blocks(sync_db: SyncDatabase, sync_rows: Rows) -> None:
    """Each propagation means the same for `with` as for `async with`."""
    with pytest.raises(TransactionRequiredError), sync_db.transactional("MANDATORY"):
        pass
    with sync_db.transactional() as outer:
        with sync_db.transactional() as joined:
            assert joined is outer
        with pytest.raises(ValueError, match="boom"), sync_db.transactional("NESTED") as nested:
            assert nested is outer
            add(1)()
            raise ValueError("boom")
        with sync_db.transactional("NOT_SUPPORTED") as beside:
            assert beside is not outer
            assert 1 == beside.scalar(sa.select(1))
    with sync_db.session_scope(), sync_db.transactional("REQUIRES_NEW"):
        add(3)()
    with pytest.raises(ZeroDivisionError), sync_db.transactional(no_rollback_for=ArithmeticError):
        add(4)()
        raise ZeroDivisionError

    assert [3, 4] == sync_rows()


def test_savepoint_keeps_what_is_around_it(sync_db: SyncDatabase, sync_rows: Rows) -> None:
    """G21: rolling back to a savepoint undoes the NESTED block and nothing else."""
    with sync_db.transactional():
        add(1)()
        with pytest.raises(sa.exc.IntegrityError), sync_db.transactional("NESTED"):
            sync_db.session.execute(sa.insert(Item).values(id=1))
        with sync_db.transactional("NESTED"):
            add(2)()

    assert [1, 2] == sync_rows()


def test_timeout_of_a_block_rolls_it_back(sync_db: SyncDatabase, sync_rows: Rows) -> None:
    """A synchronous block that took too long is rolled back at its end or its next statement."""
    with pytest.raises(TransactionTimeoutError), sync_db.transactional(timeout=0.01) as session:
        session.add(Item(id=1))
        deadline = sync_db.scope.deadline
        assert deadline is not None
        while deadline > time.monotonic():
            pass

    assert [] == sync_rows()


def test_statement_after_the_timeout_of_a_block_is_refused(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """A statement that comes after the block's timeout isn't run; the block is rolled back."""
    with pytest.raises(TransactionTimeoutError), sync_db.transactional(timeout=0.01) as session:
        session.add(Item(id=1))
        deadline = sync_db.scope.deadline
        assert deadline is not None
        while deadline > time.monotonic():
            pass
        with pytest.raises(TransactionTimeoutError, match="timeout has passed"):
            session.execute(sa.select(1))

    assert [] == sync_rows()


def test_block_of_autocommit_with_a_timeout_gives_the_session_back_without(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """The deadline of a block that began on the scope's session ends with the block."""
    with sync_db.session_scope(mode="autocommit") as session:
        with sync_db.transactional(timeout=30.0):
            session.add(Item(id=1))
            assert sync_db.scope.deadline is not None
        assert sync_db.scope.deadline is None
        assert [1] == list(session.scalars(sa.select(Item.id)))

    assert [1] == sync_rows()


def test_savepoint_that_a_commit_by_hand_has_ended_ends_quietly(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """The user's own commit() inside a NESTED block ends its savepoint with the transaction."""
    with sync_db.session_scope() as session, sync_db.transactional("NESTED"):
        session.add(Item(id=1))
        session.commit()

    assert [1] == sync_rows()


def test_block_whose_session_cannot_be_made_leaves_no_scope(sync_db: SyncDatabase) -> None:
    """Where the session's class refuses to be made, its error is raised and no scope stays open."""

    def refuse(**options: object) -> Session:
        raise LookupError("no session")

    factory: Any = sync_db.session_factory
    factory.class_ = refuse
    with pytest.raises(LookupError, match="no session"), sync_db.transactional():
        pass

    with pytest.raises(NoSessionScopeError):
        sync_db.scope  # noqa: B018


def test_block_whose_beginning_fails_leaves_the_scope_as_it_was(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """Where the COMMIT of what autobegan fails, the block isn't entered and the scope goes on."""
    with sync_db.session_scope(mode="autocommit") as session:
        session.add_all([Item(id=1), Child(id=1, item_id=99), Child(id=1, item_id=98)])
        with pytest.raises(sa.exc.IntegrityError), sync_db.transactional():
            pass
        assert not sync_db.scope.boundaries
        with sync_db.transactional():
            session.add(Item(id=2))

    assert 2 in sync_rows()


@pytest.mark.parametrize("is_failing", [True, False])
def test_block_that_outlives_its_scope_claims_no_success(
    sync_db: SyncDatabase, is_failing: bool
) -> None:
    """G9: A block left after its scope's end raises its own error, or else says that it's late."""
    scope = sync_db.session_scope(mode="autocommit")
    block = sync_db.transactional()
    error: type[Exception] = LookupError if is_failing else SessionScopeClosedError

    scope.__enter__()
    with pytest.raises(error), block as session:
        session.add(Item(id=1))
        scope.__exit__(None, None, None)
        if is_failing:
            raise LookupError("its own")


def test_failure_swallowed_inside_a_savepoint_fails_that_block_only(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G21: A NESTED block in which a joined block failed is rolled back and says so; no other."""
    with sync_db.transactional():
        add(1)()
        with pytest.raises(RollbackOnlyError) as caught, sync_db.transactional("NESTED"):
            add(2)()
            with suppress(LookupError), sync_db.transactional():
                raise LookupError("swallowed")

    assert isinstance(caught.value.__cause__, LookupError)
    assert [1] == sync_rows()


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
def test_server_ends_a_statement_at_the_timeout(sync_db: SyncDatabase) -> None:
    """PostgreSQL itself interrupts the statement, which no thread could."""
    with (
        pytest.raises(TransactionTimeoutError),
        sync_db.transactional(timeout=0.1) as session,
    ):
        session.execute(sa.text("SELECT pg_sleep(10)"))


async def test_websocket_has_sessions_by_blocks(
    drive: Drive, sync_db: SyncDatabase, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G17: a websocket holds no connection between messages, and has a session for each."""
    between: list[int] = []

    def handle(number: int) -> None:
        with sync_db.session_scope() as session:
            session.add(Item(id=number))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(WebSocketSessionError):
            current_session()
        for number in (1, 2):
            await in_thread(handle, number)
            between.append(sync_engine.pool.checkedout())  # type: ignore[attr-defined]

    exchange = await drive(
        DBSessionMiddleware(app, database=sync_db), {"type": "websocket", "path": "/"}
    )

    assert (None, [0, 0], [1, 2]) == (exchange.error, between, sync_rows())


# --------------------------------------------------------------------------------------
# Ways to the session, and wrong ways
# --------------------------------------------------------------------------------------


class Ledger(Session):
    """A session class of the user's."""

    def count(self) -> int | None:
        return self.scalar(sa.select(sa.func.count(Item.id)))


def test_session_class_and_options_of_a_sessionmaker_are_kept(sync_engine: sa.Engine) -> None:
    """G11: a sessionmaker's class, and what it was told, is what the scope hands out."""
    db = Database(sessionmaker(sync_engine, class_=Ledger, autoflush=False, info={"a": 1}))

    with db.session_scope() as session:
        counted = session.count()
        kept = (type(session).__name__, isinstance(session, Ledger), session.autoflush)

    assert 0 == counted
    assert ("Ledger", True, False) == kept
    assert 1 == session.info["a"]


@pytest.mark.parametrize("sync_engine", ["sqlite"], indirect=True)
def test_url_of_a_synchronous_driver_makes_a_synchronous_database(sync_engine: sa.Engine) -> None:
    """A URL decides by its driver; the engine made from it is disposed of by the lifespan."""
    db: Database[Any] = Database(sync_engine.url)

    with db.session_scope() as session:
        assert isinstance(session, Session)
        assert 1 == session.scalar(sa.select(1))

    assert isinstance(db.owned_engine, sa.Engine)
    db.owned_engine.dispose()


@pytest.mark.parametrize("sync_engine", ["sqlite"], indirect=True)
async def test_lifespan_disposes_of_the_engine_made_from_a_url(sync_engine: sa.Engine) -> None:
    """G17: the end of the lifespan closes the connections of an engine of its own."""
    db: Database[Any] = Database(sync_engine.url)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_thread(ask)
        await send({"type": "lifespan.shutdown.complete"})

    def ask() -> None:
        with db.session_scope() as session:
            session.scalar(sa.select(1))

    pooled: list[int] = []

    async def send(message: object) -> None:
        assert isinstance(db.owned_engine, sa.Engine)
        pooled.append(db.owned_engine.pool.checkedin())  # type: ignore[attr-defined]

    await DBSessionMiddleware(app, database=db)({"type": "lifespan"}, None, send)

    assert [0] == pooled


def test_get_session_joins_inside_and_commits_outside(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G11: `with db.get_session()` joins the scope that is there, or opens one."""
    with sync_db.get_session() as session:
        session.add(Item(id=1))
    committed = sync_rows()
    with sync_db.session_scope() as scoped:
        with sync_db.get_session() as joined:
            assert joined is scoped
            joined.add(Item(id=2))
        assert [1] == sync_rows()

    assert ([1], [1, 2]) == (committed, sync_rows())


async def test_awaited_get_session_hands_over_a_session_for_threads(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G11: a framework that awaits db.get_session() on the loop may hand it to a thread."""
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = await sync_db.get_session()
        await in_thread(lambda: seen.append(session is sync_db.session))
        await endpoint(add(1))(scope, receive, send)

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (201, [True], [1]) == (exchange.status, seen, sync_rows())


def test_session_proxy_stands_for_the_current_session(
    sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G11: an object that was built at import uses the session of whichever scope is current."""
    proxy = sync_db.session_proxy
    with pytest.raises(NoSessionScopeError):
        proxy.scalar(sa.select(1))
    for number in (1, 2):
        with sync_db.session_scope() as session:
            proxy.add(Item(id=number))
            assert session is proxy()
            assert session is proxy.registry()
            proxy.remove()  # leaves the session to its scope

    assert [1, 2] == sync_rows()


async def test_use_on_the_event_loop_of_a_request_is_refused(
    drive: Drive, sync_db: SyncDatabase, timeline: Timeline
) -> None:
    """A statement on the loop would hold up every other request: an error that says what to do."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = sync_db.session
        session.add(Item(id=1))  # no I/O
        with pytest.raises(EventLoopMismatchError, match="`def` endpoint"):
            session.execute(sa.select(1))
        with pytest.raises(EventLoopMismatchError):
            session.flush()
        with pytest.raises(EventLoopMismatchError):
            session.commit()
        with pytest.raises(EventLoopMismatchError):
            sync_db.release()
        sync_db.set_rollback_only()
        await send(start(200))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=sync_db))

    assert (200, None) == (exchange.status, exchange.error)
    assert "commit" not in timeline


async def test_wrong_kind_of_with_is_a_clear_error(
    sync_db: SyncDatabase, make_engine: Callable[..., Any]
) -> None:
    """`async with` on a synchronous database, or `with` on the other kind, says what to write."""
    engine = make_engine("sqlite")
    other = Database(engine)
    wrong: list[Any] = [sync_db.session_scope(), sync_db.transactional(), sync_db.get_session()]
    for block in wrong:
        with pytest.raises(ConfigurationError, match=r"is synchronous: use `with "):
            await block.__aenter__()
    wrong = [other.session_scope(), other.transactional(), other.get_session()]
    for block in wrong:
        with pytest.raises(ConfigurationError, match=r"is asynchronous: use `async with "):
            block.__enter__()
    await engine.dispose()


def test_wrong_kind_of_function_is_a_clear_error(sync_db: SyncDatabase) -> None:
    """A coroutine function, or a generator, is not what a synchronous database decorates."""

    async def job() -> None: ...

    def items() -> Any:
        yield

    for decorate in (sync_db.session_scope, sync_db.transactional):
        with pytest.raises(ConfigurationError, match="plain functions"):
            decorate()(job)
        with pytest.raises(ConfigurationError, match="generator"):
            decorate()(items)


async def test_both_kinds_in_one_app(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, make_engine: Callable[..., Any]
) -> None:
    """G1, G11: a synchronous and an asynchronous database are settled at the same head."""
    engine = make_engine("sqlite")
    async with engine.begin() as connection:
        await connection.run_sync(Item.metadata.create_all)
    other = Database(engine, name="other")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        other.session.add(Item(id=2))
        await in_thread(lambda: current_session("default").add(Item(id=1)))
        assert current_session("other") is other.session
        await send(start(scope["status"]))
        await send(body())

    asgi = DBSessionMiddleware(app, databases=[sync_db, other])
    for status in (500, 201):
        await drive(asgi, {"type": "http", "method": "POST", "path": "/", "status": status})
    async with engine.connect() as connection:
        found = (await connection.scalars(sa.select(Item.id))).all()
    await engine.dispose()

    assert ([1], [2]) == (sync_rows(), found)


async def test_current_scope_tells_of_the_end(
    drive: Drive, sync_db: SyncDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    """The scope of a synchronous session shows its state, and logs each transition."""
    seen: list[str] = []

    def see() -> None:
        sync_db.session.scalar(sa.select(1))
        seen.append(repr(current_scope()))

    with caplog.at_level(logging.DEBUG, logger="asgi_dbscope"):
        await drive(DBSessionMiddleware(endpoint(see), database=sync_db))

    assert ["<SessionScope ACTIVE GET />"] == seen
    assert "COMMITTING" in caplog.text


async def test_database_in_memory_is_shared_by_all_threads(drive: Drive) -> None:
    """G1, G3: the in-memory SQLite of tests needs a StaticPool, and is committed like others."""
    engine = sa.create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    Item.metadata.create_all(engine)
    db = Database(engine)

    for number, status in ((1, 201), (2, 500), (3, 201)):
        await drive(DBSessionMiddleware(endpoint(add(number), status=status), database=db))
    with db.session_scope() as session:
        found = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
    engine.dispose()

    assert [1, 3] == found
