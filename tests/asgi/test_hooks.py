"""Hooks: what runs after a transaction's real end, when, in which order, and what it sees."""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    AmbiguousDatabaseError,
    CommitInDoubtError,
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    Outcome,
    RollbackOnlyError,
    SessionScopeClosedError,
    _current,
    on_commit,
    on_completion,
    on_rollback,
)
from tests.fix_asgi import body, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Child, Item

ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


class ServiceError(Exception):
    """What a service raises."""


class HookError(Exception):
    """What a hook raises."""


class Calls(list[Any]):
    """What was called, in order; its methods are hooks."""

    def note(self, *args, **kwargs):
        """Be a plain hook."""
        self.append((*args, *kwargs.values()) if args or kwargs else "called")

    async def note_later(self, *args, **kwargs):
        """Be a hook that waits."""
        await asyncio.sleep(0)
        self.note(*args, **kwargs)

    def fail(self, *args):
        """Be a hook that raises."""
        self.append("failed")
        raise HookError(*args)

    async def fail_later(self, *args):
        """Be a hook that waits, and raises."""
        await asyncio.sleep(0)
        self.fail(*args)

    def on_each(self, database, name=""):
        """Register all three."""
        database.on_commit(self.note, f"{name}commit")
        database.on_rollback(self.note, f"{name}rollback")
        database.on_completion(self.note)


COMMITTED = [("commit",), (Outcome.COMMITTED,)]
ROLLED_BACK = [("rollback",), (Outcome.ROLLED_BACK,)]


@pytest.fixture
def calls():
    """No call yet."""
    return Calls()


async def write(session, row):
    """Write a row, in the database."""
    session.add(Item(id=row))
    await session.flush()


# --------------------------------------------------------------------------------------
# How they are registered
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_options", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
async def test_hook_is_a_function_or_a_coroutine_function_called_or_decorated(
    db, calls, has_options, is_async
):
    """Plain call or decorator, function or coroutine function: it runs once, and is kept."""
    hook = calls.note_later if is_async else calls.note

    async with db.session_scope() as session:
        await write(session, 1)
        if has_options:
            assert hook == db.on_commit(when="before_response", on_error="raise")(hook)
        else:
            assert hook == db.on_commit(hook)
        assert [] == calls

    assert ["called"] == calls


async def test_hook_gets_its_arguments_and_a_completion_hook_the_outcome_first(db, calls):
    """Arguments are given with the hook; `on_completion()` puts the outcome before them."""
    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(calls.note, 1, key="x")
        db.on_completion(calls.note_later, 2, key="y")
        db.on_commit(when="before_response", key="z")(calls.note)

    assert [(1, "x"), (Outcome.COMMITTED, 2, "y"), ("z",)] == calls


async def test_hook_may_be_any_callable_that_returns_an_awaitable(db, calls):
    """A partial, a lambda and an object with an asynchronous `__call__` are awaited."""

    class Sender:
        async def __call__(self, text):
            await calls.note_later(text)

    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(partial(calls.note_later, "partial"))
        db.on_commit(lambda: calls.note_later("lambda"))
        db.on_commit(Sender(), "object")

    assert [("partial",), ("lambda",), ("object",)] == calls


async def test_hooks_of_the_module_are_those_of_the_one_database(engine, calls, monkeypatch):
    """`on_commit()` and the others of the module find the database whose scope is open."""
    monkeypatch.setattr(_current, "known", WeakSet())
    db = Database(engine)

    async with db.session_scope() as session:
        await write(session, 1)
        on_commit(calls.note, "commit")
        on_rollback(calls.note, "rollback")
        on_completion(calls.note)
    on_commit(calls.note, "at once")

    assert [*COMMITTED, ("at once",)] == calls


async def test_hook_of_the_module_outside_of_a_scope_asks_which_database(calls, monkeypatch):
    """Outside of any scope `on_commit()` doesn't choose between several databases."""
    monkeypatch.setattr(_current, "known", WeakSet())
    databases = [Database("sqlite+aiosqlite://", name=name) for name in ("orders", "reports")]

    with pytest.raises(AmbiguousDatabaseError, match="'orders', 'reports'"):
        on_commit(calls.note)

    assert 2 == len(databases)
    assert [] == calls


async def test_hook_of_the_module_says_where_there_is_no_database(calls, monkeypatch):
    """Where no database can be meant, `on_commit()` is an error and the hook doesn't run."""
    monkeypatch.setattr(_current, "known", WeakSet())

    with pytest.raises(NoSessionScopeError):
        on_commit(calls.note)
    assert [] == calls


@ON_SQLITE
@pytest.mark.parametrize("function", [5, "send", object()])
async def test_hook_that_is_not_callable_is_told_at_once(db, function):
    """Something that can't be called is refused where it is registered."""
    async with db.session_scope():
        for register in (db.on_commit, db.on_rollback, db.on_completion):
            with pytest.raises(ConfigurationError, match="A hook is a function"):
                register(function)


@ON_SQLITE
async def test_coroutine_given_as_a_hook_is_told_at_once(db, calls, rows):
    """`on_commit(send())` says to pass the function; the coroutine is closed, the rest stays."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(ConfigurationError, match=r"db\.on_commit\(send_mail, order\.id\)"):
            db.on_commit(calls.note_later())

    assert [1] == await rows()


@ON_SQLITE
@pytest.mark.parametrize("options", [{"when": "later"}, {"on_error": "ignore"}])
async def test_wrong_option_of_a_hook_is_told_at_once(db, calls, options):
    """`when` and `on_error` know two values each, called or as a decorator."""
    [name] = options
    async with db.session_scope():
        with pytest.raises(ConfigurationError, match=f"{name} must be"):
            db.on_commit(calls.note, **options)
        with pytest.raises(ConfigurationError, match=f"{name} must be"):
            db.on_commit(**options)


@ON_SQLITE
async def test_hook_in_a_scope_that_has_ended_is_refused(engine, calls):
    """G9: A task that outlives its scope can't wait for an end that was."""
    for mode in ("transaction", "autocommit"):
        db = Database(engine, mode=mode)
        has_ended = asyncio.Event()

        async def work(db, has_ended):
            await has_ended.wait()
            for when in ("before_response", "after_response"):
                with pytest.raises(SessionScopeClosedError):
                    db.on_commit(calls.note_later, when=when)

        async with db.session_scope():
            task = asyncio.create_task(work(db, has_ended))
        has_ended.set()
        await task

    assert [] == calls


async def test_coroutine_function_as_a_hook_of_a_synchronous_database_is_told(tmp_path, calls):
    """A synchronous database's hooks run in threads, where nothing can be awaited."""
    db = Database(f"sqlite:///{tmp_path / 'sync.db'}")

    with (
        db.session_scope(),
        pytest.raises(ConfigurationError, match="is a coroutine function, and the hooks of"),
    ):
        db.on_commit(calls.note_later)
    await db.dispose()


# --------------------------------------------------------------------------------------
# When they run
# --------------------------------------------------------------------------------------


async def test_hooks_run_after_the_commit_in_order_of_registration(db, calls, timeline):
    """Hooks see a COMMIT that was answered, and a connection that is back."""
    async with db.session_scope() as session:
        await write(session, 1)
        for name in ("first", "second", "third"):
            db.on_commit(timeline.append, name)

    assert ["checkout", "begin", "commit", "checkin", "first", "second", "third"] == timeline


@pytest.mark.parametrize("has_begun", [True, False])
async def test_hooks_of_a_success_run_whether_or_not_a_statement_has(db, calls, has_begun):
    """A scope that ends well counts as committed for its hooks, used or not."""
    async with db.session_scope() as session:
        if has_begun:
            await write(session, 1)
        calls.on_each(db)

    assert COMMITTED == calls


@pytest.mark.parametrize("has_begun", [True, False])
@pytest.mark.parametrize("way", ["raised", "rollback only", "session.rollback()"])
async def test_hooks_of_a_rollback_run_whether_or_not_a_statement_has(db, calls, way, has_begun):
    """After a rollback, however it came, only `on_rollback` and `on_completion` run."""
    with suppress(ServiceError):
        async with db.session_scope() as session:
            if has_begun:
                await write(session, 1)
            calls.on_each(db)
            if way == "raised":
                raise ServiceError
            if way == "rollback only":
                db.set_rollback_only()
            else:
                await session.rollback()
                assert ROLLED_BACK == calls

    assert ROLLED_BACK == calls


async def test_hooks_of_a_commit_that_failed_are_those_of_a_rollback(db, calls):
    """G2: Where the database refuses the COMMIT, no on-commit hook runs."""
    with pytest.raises(sa.exc.IntegrityError):
        async with db.session_scope() as session:
            session.add(Child(id=1, item_id=99))
            calls.on_each(db)

    assert ROLLED_BACK == calls


async def test_hooks_of_a_swallowed_failure_are_those_of_a_rollback(db, calls):
    """G4: Where the scope's end becomes RollbackOnlyError, no on-commit hook runs."""
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            await write(session, 1)
            calls.on_each(db)
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError

    assert ROLLED_BACK == calls


async def test_hooks_run_at_a_commit_of_the_users_own(db, calls):
    """`session.commit()` in mid-scope is the end of a transaction: its hooks run then."""
    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(calls.note, "first")
        await session.commit()
        assert [("first",)] == calls
        await write(session, 2)
        db.on_commit(calls.note, "second")
        await db.release()
        assert [("first",), ("second",)] == calls
        db.on_commit(calls.note, "third")

    assert [("first",), ("second",), ("third",)] == calls


@pytest.mark.parametrize("mode", ["transaction", "autocommit", "manual"])
async def test_hooks_follow_a_begin_block_of_the_users_own(db, calls, mode):
    """`async with session.begin()` is a transaction in each mode, and its hooks follow it."""
    async with db.session_scope(mode=mode) as session:
        async with session.begin():
            await write(session, 1)
            calls.on_each(db)
        with suppress(ServiceError):
            async with session.begin():
                await write(session, 2)
                calls.on_each(db)
                raise ServiceError

    assert [*COMMITTED, *ROLLED_BACK] == calls


@pytest.mark.parametrize("writes", [True, False])
async def test_hooks_of_a_begin_block_that_raised_run_at_its_end(db, calls, writes):
    """A `begin()` block that is rolled back is over there, also where it asked for nothing."""
    async with db.session_scope() as session:
        calls.on_each(db)
        with suppress(ServiceError):
            async with session.begin():
                if writes:
                    await write(session, 1)
                raise ServiceError
        assert ROLLED_BACK == calls


@pytest.mark.parametrize("has_begun", [True, False])
async def test_hooks_in_manual_mode_wait_for_the_users_commit(db, calls, has_begun):
    """In mode manual the hooks belong to the transaction that the user commits."""
    async with db.session_scope(mode="manual") as session:
        if has_begun:
            await write(session, 1)
        calls.on_each(db)
        assert [] == calls
        await session.commit()
        assert COMMITTED == calls
        calls.clear()
        calls.on_each(db)  # nobody commits

    assert ROLLED_BACK == calls


@pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
async def test_in_doubt_only_completion_hooks_run(db, engine, calls):
    """G15: Where nobody knows what became of the COMMIT, only `on_completion` is told: IN_DOUBT."""
    function = """
        CREATE OR REPLACE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$
    """
    trigger = """
        CREATE CONSTRAINT TRIGGER die AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION die()
    """
    async with engine.begin() as connection:
        await connection.execute(sa.text(function))
        await connection.execute(sa.text(trigger))
    try:
        with pytest.raises(CommitInDoubtError):
            async with db.session_scope() as session:
                await write(session, 1)
                calls.on_each(db)
    finally:
        async with engine.begin() as connection:
            await connection.execute(sa.text("DROP TRIGGER die ON item"))

    assert [(Outcome.IN_DOUBT,)] == calls


async def test_hooks_of_a_cancelled_scope_are_those_of_a_rollback(db, calls):
    """G10: A scope that was cancelled runs its hooks to their end, then is cancelled."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout, db.session_scope() as session:
            await write(session, 1)
            db.on_commit(calls.note_later, "commit")
            db.on_rollback(calls.note_later, "rollback")
            timeout.reschedule(0)
            await asyncio.Event().wait()

    assert [("rollback",)] == calls


async def test_scope_cancelled_in_its_hooks_finishes_them(db, calls, rows):
    """G10: A cancellation that meets the hooks lets them end, and is then passed on."""
    is_running, may_end = asyncio.Event(), asyncio.Event()

    async def hook():
        is_running.set()
        await may_end.wait()
        await write(db.session, 2)

    async def work():
        async with db.session_scope() as session:
            await write(session, 1)
            db.on_commit(hook)

    task = asyncio.create_task(work())
    await is_running.wait()
    task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# Savepoints, and transactions inside
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_block", [True, False])
async def test_hook_under_a_savepoint_that_rolls_back_is_dropped(db, calls, is_block):
    """Its on-commit hook never runs; the others hear ROLLED_BACK when the whole is over."""
    async with db.session_scope() as session:
        await write(session, 1)
        calls.on_each(db, "outer ")
        around = db.transactional("NESTED") if is_block else session.begin_nested()
        with suppress(ServiceError):
            async with around:
                await write(session, 2)
                calls.on_each(db, "inner ")
                raise ServiceError
        assert [] == calls
        db.on_commit(calls.note, "after")

    assert [
        ("outer commit",),
        (Outcome.COMMITTED,),
        ("inner rollback",),
        (Outcome.ROLLED_BACK,),
        ("after",),
    ] == calls


@pytest.mark.parametrize("is_block", [True, False])
async def test_hook_under_a_savepoint_that_is_released_follows_the_transaction(db, calls, is_block):
    """A savepoint that ended well is part of the transaction around it, for good or ill."""
    for is_failing in (False, True):
        with suppress(ServiceError):
            async with db.session_scope() as session:
                around = db.transactional("NESTED") if is_block else session.begin_nested()
                async with around:
                    calls.on_each(db)
                if is_failing:
                    raise ServiceError

    assert [*COMMITTED, *ROLLED_BACK] == calls


async def test_hook_under_an_inner_savepoint_goes_with_the_outer_one(db, calls):
    """A savepoint that was released goes when the one around it is rolled back to."""
    async with db.session_scope() as session:
        await write(session, 1)
        async with db.transactional("NESTED"):
            with suppress(ServiceError):
                async with db.transactional("NESTED"):
                    async with session.begin_nested():
                        calls.on_each(db)
                    raise ServiceError

    assert ROLLED_BACK == calls


async def test_hook_in_requires_new_follows_that_transaction(db, calls):
    """A REQUIRES_NEW block's hooks run at its own end, whatever becomes of the outer."""
    with suppress(ServiceError):
        async with db.session_scope() as session:
            calls.on_each(db, "outer ")
            async with db.transactional("REQUIRES_NEW"):
                calls.on_each(db, "inner ")
            assert [("inner commit",), (Outcome.COMMITTED,)] == calls
            await write(session, 1)
            raise ServiceError

    assert [("outer rollback",), (Outcome.ROLLED_BACK,)] == calls[2:]


async def test_hook_in_a_joined_block_follows_the_whole_transaction(db, calls):
    """A joined block has no end of its own, so its hooks wait for the outer one's."""
    async with db.transactional():
        async with db.transactional():
            calls.on_each(db)
        assert [] == calls

    assert COMMITTED == calls


async def test_hook_in_a_block_of_an_autocommit_scope_runs_at_its_end(db, calls):
    """In mode autocommit the outermost block is the transaction."""
    async with db.session_scope(mode="autocommit") as session:
        async with db.transactional():
            calls.on_each(db)
        assert COMMITTED == calls
        with suppress(ServiceError):
            async with db.transactional():
                await write(session, 1)
                calls.on_each(db)
                raise ServiceError

    assert [*COMMITTED, *ROLLED_BACK] == calls


# --------------------------------------------------------------------------------------
# Outside of a transaction
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", ["no scope", "autocommit", "websocket", "NOT_SUPPORTED"])
async def test_hook_outside_of_a_transaction_runs_at_once_or_never(db, drive, calls, situation):
    """What was done is durable: `on_commit` runs now, `on_rollback` never."""

    async def register(*_):
        calls.on_each(db)
        assert [("commit",), (Outcome.NOT_BEGUN,)] == calls

    if situation == "no scope":
        await register()
    elif situation == "websocket":
        app = DBSessionMiddleware(register, database=db)
        exchange = await drive(app, {"type": "websocket", "path": "/"})
        assert None is exchange.error
    elif situation == "autocommit":
        async with db.session_scope(mode="autocommit"):
            await register()
    else:
        async with db.session_scope(), db.transactional("NOT_SUPPORTED"):
            await register()

    assert [("commit",), (Outcome.NOT_BEGUN,)] == calls


async def test_coroutine_hook_outside_of_a_transaction_is_done_when_its_scope_is(db, rows):
    """A coroutine function that runs at once has a session of its own; the scope waits for it."""

    async def hook():
        await asyncio.sleep(0)
        await write(db.session, 1)

    async with db.session_scope(mode="autocommit"):
        db.on_commit(hook)

    assert [1] == await rows()


async def test_coroutine_hook_outside_of_any_scope_runs_by_itself(db, rows):
    """Outside of any scope it is a task, with a session of its own."""
    is_done = asyncio.Event()

    async def hook():
        await write(db.session, 1)

    async def tell():
        is_done.set()

    db.on_commit(hook)
    before = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(before)
    db.on_commit(tell)
    await is_done.wait()

    assert [1] == await rows()


async def test_error_of_a_hook_that_runs_at_once_is_logged_or_raised(db, calls, caplog):
    """`on_error="raise"` raises where the hook is registered; a coroutine's error is logged."""
    async with db.session_scope(mode="autocommit"):
        db.on_commit(calls.fail, "logged")
        with pytest.raises(HookError, match="raised"):
            db.on_commit(calls.fail, "raised", on_error="raise")
        db.on_commit(calls.fail_later, "logged later")

    assert ["failed", "failed", "failed"] == calls
    assert ["logged", "logged later"] == [
        str(each.exc_info[1]) for each in caplog.records if each.levelname == "ERROR"
    ]


async def test_late_hook_outside_of_a_transaction_waits_for_the_end_of_its_scope(db, calls):
    """`when="after_response"` in mode autocommit: after the scope, not at once."""
    async with db.session_scope(mode="autocommit"):
        db.on_commit(calls.note, "commit", when="after_response")
        db.on_completion(calls.note, when="after_response")
        db.on_rollback(calls.note, "rollback", when="after_response")
        assert [] == calls

    assert [("commit",), (Outcome.NOT_BEGUN,)] == calls


# --------------------------------------------------------------------------------------
# Before or after the response
# --------------------------------------------------------------------------------------


async def test_hook_of_a_request_runs_between_the_commit_and_the_head(db, drive, timeline):
    """By default a hook runs after the COMMIT and before the head goes out."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(timeline.append, "hook")
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [
        *("checkout", "begin", "commit", "checkin"),
        *("hook", "start 200", "last body"),
    ] == timeline


async def test_hook_of_a_request_that_used_no_database_runs_before_the_head(db, drive, timeline):
    """A request without a statement that answers well counts as committed."""

    async def app(scope, receive, send):
        db.on_commit(timeline.append, "hook")
        db.on_rollback(timeline.append, "rolled back")
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["hook", "start 200", "last body"] == timeline


async def test_late_hook_of_a_request_does_not_delay_the_client(db, drive, timeline):
    """`when="after_response"`: it runs after the last body message and the app's return."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(timeline.append, "late", when="after_response")
        db.on_commit(timeline.append, "hook")
        await respond(send)
        timeline.append("background work")

    await drive(DBSessionMiddleware(app, database=db))

    assert ["hook", "start 200", "last body", "background work", "late"] == timeline[4:]


async def test_late_hooks_of_a_job_run_after_its_scope(db, calls):
    """In a job a late hook runs when the scope has closed, after the other hooks."""
    async with db.session_scope() as session:
        await write(session, 1)
        scope = db.scope

        @db.on_commit(when="after_response")
        async def late():
            calls.append(("late", scope.is_over))

        db.on_commit(calls.note, "hook")

    assert [("hook",), ("late", True)] == calls


@pytest.mark.parametrize("kind", ["REQUIRES_NEW", "session_scope"])
async def test_late_hook_of_a_scope_inside_a_request_waits_for_the_response(
    db, drive, timeline, kind
):
    """A late hook of another transaction in the request doesn't delay the client either."""

    async def app(scope, receive, send):
        inner = db.session_scope() if kind == "session_scope" else db.transactional(kind)
        async with inner as session:
            await write(session, 1)
            db.on_commit(timeline.append, "late", when="after_response")
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["start 200", "last body", "late"] == timeline[4:]


async def test_late_hook_of_a_job_that_outlives_its_request_runs_at_the_job_s_end(
    db, drive, timeline
):
    """A late hook waits for no response that is over: it runs when the job's scope has closed."""
    is_answered = asyncio.Event()
    jobs = []

    async def job():
        await is_answered.wait()
        async with db.session_scope():
            db.on_commit(timeline.append, "late", when="after_response")
            timeline.append("job")

    async def app(scope, receive, send):
        jobs.append(asyncio.create_task(job()))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))
    is_answered.set()
    await asyncio.gather(*jobs)

    assert ["start 200", "last body", "job", "late"] == timeline


async def test_late_hook_of_the_body_and_of_background_work_runs_at_the_end(db, drive, timeline):
    """G7, G8: Each of a request's three transactions has hooks of its own."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(timeline.append, "late of the response", when="after_response")
        await send(start())
        await write(db.session, 2)
        db.on_commit(timeline.append, "hook of the body")
        await send(body(b"x", more=True))
        await send(body())
        await write(db.session, 3)
        db.on_commit(timeline.append, "hook of the background")
        db.on_commit(timeline.append, "late of the background", when="after_response")

    await drive(DBSessionMiddleware(app, database=db))

    events = [each for each in timeline if each not in {"checkout", "begin", "checkin"}]
    assert [
        *("commit", "start 200", "body"),
        *("commit", "hook of the body", "last body"),
        *("commit", "hook of the background"),
        *("late of the response", "late of the background"),
    ] == events


@pytest.mark.parametrize(("status", "expected"), [(404, COMMITTED), (500, ROLLED_BACK)])
async def test_hooks_of_a_request_follow_its_ending(db, drive, calls, status, expected):
    """G3: A returned 404 commits, a 5xx rolls back; the hooks follow."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        calls.on_each(db)
        await respond(send, status)

    await drive(DBSessionMiddleware(app, database=db))

    assert expected == calls


@pytest.mark.parametrize("has_begun", [True, False])
async def test_hooks_of_a_request_that_raised_are_those_of_a_rollback(db, drive, calls, has_begun):
    """G3: An endpoint that raises rolls back, and so do its hooks hear."""

    async def app(scope, receive, send):
        if has_begun:
            await write(db.session, 1)
        calls.on_each(db)
        db.on_rollback(calls.note, "late", when="after_response")
        raise ServiceError

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ServiceError)
    assert [*ROLLED_BACK, ("late",)] == calls


# --------------------------------------------------------------------------------------
# Hooks that fail
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
async def test_error_of_a_hook_is_logged_and_the_others_run(db, rows, calls, caplog, is_async):
    """What a hook raises stops nobody; the log has the hook and the traceback."""
    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(calls.fail_later if is_async else calls.fail, "no mail")
        db.on_commit(calls.note)

    assert ["failed", "called"] == calls
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert "the hook" in record.message
    assert "failed; the others run" in record.message
    assert isinstance(record.exc_info[1], HookError)
    assert [1] == await rows()


async def test_error_of_a_hook_is_raised_if_asked_for_once_the_others_have_run(
    db, rows, calls, caplog
):
    """`on_error="raise"`: the first comes out, noting what stands; others are logged."""
    with pytest.raises(HookError, match="first") as caught:
        async with db.session_scope() as session:
            await write(session, 1)
            db.on_commit(calls.fail, "first", on_error="raise")
            db.on_commit(calls.fail, "second", on_error="raise")
            db.on_commit(calls.note)

    assert ["failed", "failed", "called"] == calls
    assert "whose transaction was over by then: COMMITTED" in "\n".join(caught.value.__notes__)
    assert "second" == str(caplog.records[-1].exc_info[1])
    assert [1] == await rows()


async def test_error_of_a_request_s_hook_becomes_the_response_if_asked_for(db, drive, rows, calls):
    """`on_error="raise"` in a request: no 200 goes out; what was committed stays."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(calls.fail, on_error="raise")
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, HookError)
    assert [] == exchange.messages
    assert [1] == await rows()


async def test_error_of_a_hook_does_not_replace_the_error_under_way(db, calls, caplog):
    """An `on_rollback` hook that is to raise is logged where the scope has raised already."""
    with pytest.raises(ServiceError):
        async with db.session_scope() as session:
            await write(session, 1)
            db.on_rollback(calls.fail, on_error="raise")
            raise ServiceError

    assert ["failed"] == calls
    assert "a hook failed" in caplog.text


async def test_error_of_a_late_hook_is_logged_in_any_case(db, drive, calls, caplog):
    """After the response nobody is left to raise to."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(calls.fail, when="after_response", on_error="raise")
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    async with db.session_scope():
        db.on_commit(calls.fail, when="after_response", on_error="raise")

    assert (200, None) == (exchange.status, exchange.error)
    assert ["failed", "failed"] == calls
    assert 2 == len([each for each in caplog.records if each.levelname == "ERROR"])


async def test_error_of_a_hook_at_a_commit_of_the_users_own_comes_out_of_it(db, rows, calls):
    """`on_error="raise"` with `session.commit()`: raised there, and the scope goes on."""
    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(calls.fail, on_error="raise")
        with pytest.raises(HookError):
            await session.commit()
        await write(session, 2)

    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# What a hook sees
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before_response", "after_response"])
async def test_hook_has_a_session_and_a_transaction_of_its_own(db, drive, rows, when):
    """A hook sees what was committed, and what it writes is committed when it returns."""
    seen: list[Any] = []

    async def hook(outer):
        session = db.session
        seen.append(session is outer)
        seen.append(list(await session.scalars(sa.select(Item.id))))
        session.add(Item(id=2))

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(hook, db.session, when=when)
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [False, [1]] == seen
    assert [1, 2] == await rows()


@ON_SQLITE
async def test_task_that_wants_a_session_while_the_last_hooks_run_is_refused(db, drive, engine):
    """G9: a scope that had no session gets none at its end, when nobody would close it."""
    has_begun, may_end = asyncio.Event(), asyncio.Event()
    tasks = []

    async def hook():
        has_begun.set()
        await may_end.wait()

    async def outlive():
        await has_begun.wait()
        try:
            await db.session.execute(sa.select(1))
        finally:
            may_end.set()

    async def app(scope, receive, send):
        await respond(send)
        db.on_commit(hook)
        tasks.append(asyncio.create_task(outlive()))

    exchange = await drive(DBSessionMiddleware(app, database=db))
    [error] = await asyncio.gather(*tasks, return_exceptions=True)

    assert exchange.error is None
    assert isinstance(error, SessionScopeClosedError)
    assert 0 == engine.pool.checkedout()


async def test_hook_in_a_job_does_not_end_with_the_mode_of_the_scope(db, rows):
    """A hook of a manual or autocommit scope is committed as well when it returns."""

    async def hook(row):
        assert db.scope.is_in_transaction
        db.session.add(Item(id=row))

    async with db.session_scope(mode="manual") as session:
        db.on_commit(hook, 1)
        await session.commit()
    async with db.session_scope(mode="autocommit"), db.transactional():
        db.on_commit(hook, 2)

    assert [1, 2] == await rows()


async def test_hook_that_fails_is_rolled_back_by_itself(db, rows, caplog):
    """What a hook wrote goes with its error; the transaction it waited for stands."""

    async def hook():
        await write(db.session, 2)
        raise HookError

    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(hook)

    assert "HookError" in caplog.text
    assert [1] == await rows()


async def test_hook_whose_own_commit_fails_is_logged(db, rows, caplog):
    """A hook's transaction that can't be committed is an error of that hook."""

    async def hook():
        db.session.add(Child(id=1, item_id=99))

    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(hook)

    assert "IntegrityError" in caplog.text
    assert [1] == await rows()


async def test_hook_after_a_rollback_can_write_down_that_it_happened(db, rows):
    """An on-rollback hook's own work is kept."""

    async def hook():
        db.session.add(Item(id=2))

    with suppress(ServiceError):
        async with db.session_scope() as session:
            db.on_rollback(hook)
            await write(session, 1)
            raise ServiceError

    assert [2] == await rows()


async def test_hook_registered_in_a_hook_waits_for_that_hook_s_transaction(db, calls, rows):
    """A hook's own hooks run at the end of its own transaction, before the next hook."""

    async def hook():
        db.session.add(Item(id=2))
        db.on_commit(calls.note, "inner")
        calls.note("outer")

    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(hook)
        db.on_commit(calls.note, "next")

    assert [("outer",), ("inner",), ("next",)] == calls
    assert [1, 2] == await rows()


async def test_late_hook_registered_in_a_hook_runs_at_the_end_of_the_request(db, drive, timeline):
    """Late hooks keep their order, also those that a hook has registered."""

    def hook():
        db.on_commit(timeline.append, "second", when="after_response")

    async def app(scope, receive, send):
        await write(db.session, 1)
        db.on_commit(timeline.append, "first", when="after_response")
        db.on_commit(hook)
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert ["start 200", "last body", "first", "second"] == timeline[4:]


async def test_blocks_work_in_a_hook(db, rows):
    """A hook calls services with blocks of every kind."""

    @db.transactional()
    async def service(row):
        db.session.add(Item(id=row))

    async def hook():
        async with db.transactional("REQUIRES_NEW") as session:
            session.add(Item(id=4))
        await service(2)
        with suppress(ServiceError):
            async with db.transactional("NESTED") as session:
                await write(session, 3)
                raise ServiceError

    async with db.session_scope() as session:
        await write(session, 1)
        db.on_commit(hook)

    assert [1, 2, 4] == await rows()


# --------------------------------------------------------------------------------------
# Hooks that are cancelled, and hooks from threads
# --------------------------------------------------------------------------------------


@ON_SQLITE
async def test_hook_whose_own_task_was_cancelled_stops_no_other(db, caplog):
    """A hook that waits for something cancelled has failed like any other; the rest run."""
    calls = Calls()

    async def wait_for_a_cancelled_task():
        task = asyncio.create_task(asyncio.sleep(0))
        task.cancel()
        await task

    async with db.session_scope():
        db.on_commit(wait_for_a_cancelled_task)
        db.on_commit(calls.note)

    assert ["called"] == calls
    assert "the others run" in caplog.text


@ON_SQLITE
async def test_hook_that_outlasts_the_grace_is_given_up_and_told(engine, caplog):
    """G10: Cancelled, a scope waits for its hooks no longer than `cleanup_timeout`."""
    db = Database(engine, cleanup_timeout=0.05)
    is_running = asyncio.Event()

    async def hang():
        is_running.set()
        await asyncio.Event().wait()

    async def job():
        async with db.session_scope():
            db.on_commit(hang)

    task = asyncio.create_task(job())
    await is_running.wait()
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert "given up" in caplog.text


@ON_SQLITE
async def test_hook_at_once_from_a_thread_runs_on_the_scopes_loop(db):
    """A coroutine function given in a `def` endpoint runs where it can."""
    calls = Calls()
    has_run = asyncio.Event()

    async def note():
        calls.note()
        has_run.set()

    async with db.session_scope(mode="autocommit"):
        await asyncio.to_thread(db.on_commit, note)
        await has_run.wait()

    assert ["called"] == calls


@ON_SQLITE
async def test_hook_at_once_without_a_loop_is_told(db):
    """A coroutine function where nothing can run it is refused before it is called."""
    with pytest.raises(ConfigurationError, match="no event loop"):
        await asyncio.to_thread(db.on_commit, Calls().note_later)


async def test_failed_block_is_not_healed_by_an_empty_begin(db):
    """G4: A COMMIT of nothing is one all the same, where a block has failed."""
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError
            async with session.begin():
                pass


@ON_SQLITE
async def test_late_hook_of_a_block_in_a_job_runs_when_the_blocks_scope_has_closed(db):
    """Where there is no response, what waits for it waits for the end of its own scope."""
    calls = Calls()

    async with db.session_scope():
        async with db.transactional("REQUIRES_NEW"):
            db.on_commit(calls.note, when="after_response")
            assert [] == calls
        assert ["called"] == calls
