"""What misuse gets: an error that says what to do, nothing committed, nothing leaked."""

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.util import greenlet_spawn

from asgi_dbscope import (
    AmbiguousDatabaseError,
    CommitPolicyError,
    ConcurrentSessionUseError,
    ConfigurationError,
    Database,
    DBScopeError,
    DBSessionMiddleware,
    EventLoopMismatchError,
    NoSessionScopeError,
    Outcome,
    RollbackOnlyError,
    SessionScopeClosedError,
    State,
    current_scope,
    current_session,
    session_options,
)
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Base, Item

INSERT = sa.insert(Item).values(id=1)


async def answer(send: Any, status: int = 200) -> None:
    """Send a whole response."""
    await send(start(status))
    await send(body(b"ok"))


async def silent_app(scope: Any, receive: Any, send: Any) -> None:
    """Answer without a session."""
    await answer(send)


@pytest.fixture
async def unused() -> Any:
    """An asynchronous engine that no test connects."""
    engine = create_async_engine("sqlite+aiosqlite://")
    yield engine
    await engine.dispose()


# --------------------------------------------------------------------------------------
# Wrong options, told when the object is built
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "atomic"}, "mode must be one of 'transaction', 'autocommit', 'manual'"),
        ({"mode": ["manual"]}, "mode must be one of"),
        ({"stream": "keep"}, "stream must be one of 'release', 'hold', 'error'; got 'keep'"),
        ({"commit_policy": None}, "commit_policy must be callable with a ResponseHead; got None"),
        ({"commit_policy": silent_app}, "use a plain function of the ResponseHead"),
        ({"commit_error_response": 500}, "commit_error_response must be callable; got 500"),
        ({"exclude": "health"}, "exclude takes paths that start with '/'"),
        ({"exclude": ["/health", 1]}, "exclude takes paths that start with '/'"),
        ({"exclude": 5}, "exclude takes paths that start with '/'"),
    ],
)
def test_wrong_option_is_told_when_the_middleware_is_built(unused, options, told):
    """An option that is wrong is an error that names what is right, before any request."""
    with pytest.raises(ConfigurationError) as caught:
        DBSessionMiddleware(silent_app, engine=unused, **options)

    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ([], "got none of them"),
        (["engine", "database"], "got engine and database"),
        (["engine", "databases"], "got engine and databases"),
        (["database", "databases"], "got database and databases"),
        (["engine", "database", "databases"], "got engine and database and databases"),
    ],
)
def test_middleware_takes_just_one_source_of_sessions(unused, named, told):
    """None or two of engine, database and databases is an error that says which were named."""
    database = Database(unused)
    sources = {"engine": unused, "database": database, "databases": [database]}

    with pytest.raises(ConfigurationError, match="just one of engine=, database= and") as caught:
        DBSessionMiddleware(silent_app, **{name: sources[name] for name in named})

    assert told in str(caught.value)
    assert "add_middleware(DBSessionMiddleware, engine=engine)" in str(caught.value)


def test_source_of_the_wrong_type_is_told(unused):
    """What is handed to the wrong one of the three sources is an error that says so."""
    database = Database(unused)
    for sources, told in [
        ({"database": unused}, "database= takes asgi_dbscope.Database objects"),
        ({"databases": [unused]}, "databases= takes asgi_dbscope.Database objects"),
        ({"databases": database}, "databases= takes"),
        ({"databases": 5}, "databases= takes"),
        ({"databases": []}, "databases= is empty"),
        ({"databases": [database, Database(unused)]}, "need different names"),
        ({"engine": 5}, "takes an AsyncEngine or an Engine, a URL, an async_sessionmaker or"),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            DBSessionMiddleware(silent_app, **sources)
        assert told in str(caught.value)


def test_each_url_has_a_database_of_its_own():
    """G12: what is no engine stands for a database by itself, whatever its place in memory."""
    middlewares = [
        DBSessionMiddleware(silent_app, engine=f"sqlite+aiosqlite:///{number}.db")  # type: ignore[arg-type]
        for number in range(50)
    ]
    urls = [repr(each.databases[0]) for each in middlewares]

    assert 50 == len(set(urls))


def test_app_that_is_none_is_told(unused):
    """The app comes first, and has to be callable."""
    with pytest.raises(ConfigurationError, match="first argument is the ASGI app; 'app'"):
        DBSessionMiddleware("app", engine=unused)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("not a url", "looks like 'postgresql+asyncpg://"),
        ("", "looks like 'postgresql+asyncpg://"),
        ("postgresql+psycopg2://localhost", "No engine can be made"),
        ("postgresql+nodriver://localhost", "No engine can be made"),
        ("nodatabase://localhost", "No engine can be made"),
    ],
)
def test_url_that_makes_no_engine_is_told(url, told):
    """A URL that can't be read, or whose driver isn't there, is an error at once."""
    with pytest.raises(ConfigurationError) as caught:
        Database(url)

    assert told in str(caught.value)


def test_error_about_a_url_keeps_its_password():
    """An error about a URL, and a database's repr, never show the password."""
    for url in ("postgresql+psycopg2://me:s3cret@localhost/x", "postgres//me:s3cret@x"):
        with pytest.raises(ConfigurationError) as caught:
            Database(url)
        cause: BaseException | None = caught.value
        while cause is not None:
            assert "s3cret" not in str(cause)
            cause = cause.__cause__
    assert "s3cret" not in repr(Database("postgresql+asyncpg://me:s3cret@localhost/x"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "atomic"}, "mode must be one of"),
        ({"name": ""}, "name must be a string that is not empty"),
        ({"name": 1}, "name must be a string that is not empty"),
        ({"cleanup_timeout": 0}, "cleanup_timeout must be a number of seconds above 0"),
        ({"cleanup_timeout": float("nan")}, "cleanup_timeout must be a number of seconds"),
        (
            {"cleanup_timeout": True},
            "must be a number of seconds above 0; got True",
        ),
        (
            {"cleanup_timeout": None},
            "must be a number of seconds above 0; got None",
        ),
        ({"cleanup_timeout": float("inf")}, "got inf. The longest is 4,000,000, 46 days."),
        ({"idle_timeout": 1e12}, "got 1000000000000.0. The longest is 4,000,000, 46 days."),
        ({"cleanup_timeout": "10"}, "cleanup_timeout must be a number of seconds above 0"),
    ],
)
def test_wrong_option_of_a_database_is_told(unused, options, told):
    """An option of `Database` that is wrong is an error when it is built."""
    with pytest.raises(ConfigurationError) as caught:
        Database(unused, **options)

    assert told in str(caught.value)


def test_session_class_that_is_none_is_told(unused):
    """A session factory whose synchronous class is no `Session` is an error when it is given."""
    with pytest.raises(ConfigurationError, match="sync_session_class must be a subclass"):
        Database(async_sessionmaker(unused, sync_session_class=dict))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "atomic"}, "mode must be one of"),
        ({"stream": "keep"}, "stream must be one of"),
        ({"commit_policy": 5}, "commit_policy must be callable"),
        ({"isolation_level": 5}, "isolation_level must be a string such as 'SERIALIZABLE'"),
        ({"isolation_level": "autocommit"}, "is spelled mode='autocommit' here"),
        ({"read_only": "yes"}, "read_only must be True or False"),
        ({"mode": "autocommit", "read_only": True}, "use mode='transaction' with them"),
        ({"mode": "autocommit", "isolation_level": "SERIALIZABLE"}, "use mode='transaction'"),
    ],
)
def test_wrong_session_options_are_told_when_the_endpoint_is_decorated(unused, options, told):
    """Options of an endpoint, or of a block, that are wrong are an error before any request."""
    with pytest.raises(ConfigurationError) as caught:
        session_options(**options)
    assert told in str(caught.value)

    database = Database(unused)
    block_options = {"mode", "read_only", "isolation_level"}
    if options.keys() <= block_options:
        with pytest.raises(ConfigurationError) as caught:
            database.session_scope(**options)
        assert told in str(caught.value)


def test_session_scope_decorates_coroutine_functions_only(unused):
    """A plain function can't run in a scope, and the decorator says what can."""
    with pytest.raises(ConfigurationError, match="decorates coroutine functions"):
        Database(unused).session_scope()(print)


async def test_session_scope_is_entered_once_at_a_time(db):
    """One block object can't be entered again while it is open."""
    block = db.session_scope()
    async with block:
        with pytest.raises(ConfigurationError, match=r"call db.session_scope\(\) once per block"):
            await block.__aenter__()


async def test_unknown_isolation_level_is_an_error_of_the_first_use(db, drive, rows):
    """G9: An isolation level that the database doesn't have is told, and leaks nothing."""

    @session_options(isolation_level="NONSENSE")
    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ConfigurationError)
    assert "isolation_level='NONSENSE'" in str(exchange.error)
    assert "SERIALIZABLE" in str(exchange.error)
    assert [] == exchange.messages
    assert [] == await rows()


# --------------------------------------------------------------------------------------
# The database is not there
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://postgres@127.0.0.1:1/none",
        "postgresql+psycopg://postgres@127.0.0.1:1/none",
        "sqlite+aiosqlite:////nonexistent/directory/file.db",
    ],
)
@pytest.mark.parametrize("is_flushed_at_the_head", [False, True])
async def test_unreachable_database_is_an_error_with_a_note(drive, url, is_flushed_at_the_head):
    """G1: A database that can't be reached is its own error, with a note, and never a success."""
    database = Database(url)

    async def app(scope, receive, send):
        if is_flushed_at_the_head:
            database.session.add(Item(id=1))
        else:
            await database.session.execute(INSERT)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=database))

    assert isinstance(exchange.error, (OSError, sa.exc.DBAPIError))
    assert [] == exchange.messages
    assert any("asgi_dbscope: " in note for note in exchange.error.__notes__)
    assert isinstance(database.owned_engine, AsyncEngine)
    assert 0 == _checked_out(database.owned_engine)
    await database.dispose()
    await _threads_of_aiosqlite_end()


def _checked_out(engine: AsyncEngine) -> int:
    pool = engine.pool
    assert isinstance(pool, sa.AsyncAdaptedQueuePool)
    return pool.checkedout()


async def _threads_of_aiosqlite_end() -> None:
    """Wait for the thread of a connection that failed to open: it calls the loop once more."""
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            await asyncio.to_thread(thread.join, 10)


async def test_disposed_engine_connects_again(engine, db, drive, rows):
    """A request after `engine.dispose()` gets new connections, as SQLAlchemy has it."""

    async def app(scope, receive, send):
        db.session.add(Item(id=int(scope["path"][1:])))
        await answer(send)

    app = DBSessionMiddleware(app, database=db)
    await drive(app, http_scope("/1"))
    await engine.dispose()
    exchange = await drive(app, http_scope("/2"))

    assert exchange.error is None
    assert [1, 2] == await rows()


async def test_engine_disposed_in_mid_request_still_commits(engine, db, drive, rows):
    """G1: An engine that is disposed of under a request leaves the open transaction alone."""
    old_pool = engine.sync_engine.pool

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await engine.dispose()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    assert 1 == old_pool.checkedin()
    await greenlet_spawn(old_pool.dispose)

    assert exchange.error is None
    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# Outside of any scope
# --------------------------------------------------------------------------------------


async def test_session_outside_of_any_scope_is_told(db):
    """Every way to the current session says, outside of a scope, how to open one."""
    ways: list[Callable[[], Any]] = [
        current_session,
        current_scope,
        lambda: current_session("default"),
        lambda: db.session,
        lambda: db.scope,
        db.set_rollback_only,
        lambda: db.session_proxy.add(Item(id=1)),
    ]
    for way in ways:
        with pytest.raises(NoSessionScopeError, match=r"async with db.session_scope\(\)"):
            way()
    awaited: list[Callable[[], Any]] = [
        db.get_session,
        db.release,
        session_options(read_only=True).apply,
        lambda: db.session_proxy.execute(INSERT),
    ]
    for make in awaited:
        with pytest.raises(NoSessionScopeError, match=r"async with db.session_scope\(\)"):
            await make()


async def test_excluded_path_has_no_session(db, drive):
    """G5: A path that is excluded has no scope, and asking for the session says so."""

    async def app(scope, receive, send):
        current_session()

    exchange = await drive(
        DBSessionMiddleware(app, database=db, exclude="/health"), http_scope("/health")
    )

    assert isinstance(exchange.error, NoSessionScopeError)
    assert "the path not excluded?" in str(exchange.error)


async def test_thread_without_the_context_is_told(db, drive):
    """A thread started without a copy of the context sees no scope, and hears how to get it."""

    async def app(scope, receive, send):
        await asyncio.get_running_loop().run_in_executor(None, current_session)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, NoSessionScopeError)
    assert "run it in a copy of the context" in str(exchange.error)


# --------------------------------------------------------------------------------------
# After the end
# --------------------------------------------------------------------------------------


USES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "execute": lambda session: session.execute(INSERT),
    "scalar": lambda session: session.scalar(sa.select(Item.id)),
    "stream": lambda session: session.stream(sa.select(Item.id)),
    "get": lambda session: session.get(Item, 1),
    "flush": lambda session: session.flush(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "connection": lambda session: session.connection(),
    "begin": lambda session: session.begin().start(),
    "begin_nested": lambda session: session.begin_nested().start(),
    "run_sync": lambda session: session.run_sync(lambda sync: sync.query(Item).all()),
    "add": lambda session: asyncio.sleep(0, session.add(Item(id=2))),
    "add_all": lambda session: asyncio.sleep(0, session.add_all([Item(id=2)])),
    "merge": lambda session: session.merge(Item(id=2)),
    "delete": lambda session: session.delete(Item(id=2)),
}


@pytest.mark.parametrize("use", USES)
async def test_session_refuses_use_after_its_scope(db, drive, rows, use):
    """G9: A session that outlived its request refuses every use, and says what to do instead."""
    kept = []

    async def app(scope, receive, send):
        kept.append(db.session)
        await db.session.scalar(sa.select(sa.func.count(Item.id)))
        await answer(send)

    await drive(DBSessionMiddleware(app, database=db))

    with pytest.raises(SessionScopeClosedError, match="needs a scope of its own"):
        await USES[use](kept[0])
    assert [] == await rows()


async def test_scope_refuses_use_after_its_end(db):
    """G9: A scope that has ended refuses its verbs, and its `close()` stays harmless."""
    async with db.session_scope() as session:
        scope = db.scope

    for use in (scope.set_rollback_only, lambda: scope.configure(read_only=True)):
        with pytest.raises(SessionScopeClosedError):
            use()
    with pytest.raises(SessionScopeClosedError):
        _ = scope.session
    await session.close()
    assert State.CLOSED is scope.state
    assert "<SessionScope CLOSED session_scope()>" == repr(scope)


@pytest.mark.parametrize("use", USES)
async def test_session_closed_by_hand_refuses_a_second_use(db, drive, rows, use):
    """G9: After `session.close()` the session refuses use instead of opening again untracked."""

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await db.session.close()
        await USES[use](db.session)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, SessionScopeClosedError)
    assert "was closed by hand" in str(exchange.error)
    assert [] == exchange.messages
    assert [] == await rows()


async def test_session_left_by_its_own_context_manager_refuses_a_second_use(db, drive, rows):
    """G9: `async with session:` closes the session; the next use says who closes it otherwise."""

    async def app(scope, receive, send):
        async with db.session as session:
            await session.execute(INSERT)
            await session.commit()
        await session.execute(sa.insert(Item).values(id=2))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, SessionScopeClosedError)
    assert "await db.release()" in str(exchange.error)
    assert [1] == await rows()


async def test_session_reset_by_hand_starts_afresh(db, drive, rows):
    """G7: `session.reset()` rolls back what is open; what comes after is tracked as before."""

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await db.session.reset()
        assert Outcome.ROLLED_BACK is db.scope.outcome
        await db.session.execute(sa.insert(Item).values(id=2))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [2] == await rows()


async def test_fire_and_forget_task_is_refused_after_the_request(db, drive, rows):
    """G9: A task that outlives its request gets an error that says what it needs."""
    tasks = []
    request_is_over = asyncio.Event()

    async def late():
        await request_is_over.wait()
        await db.session.execute(INSERT)

    async def app(scope, receive, send):
        await db.session.scalar(sa.select(sa.func.count(Item.id)))
        tasks.append(asyncio.create_task(late()))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    request_is_over.set()
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert exchange.error is None
    assert isinstance(error, SessionScopeClosedError)
    assert "GET /" in str(error)
    assert "async with db.session_scope() as session:" in str(error)
    assert [] == await rows()


async def test_fire_and_forget_task_may_open_a_scope_of_its_own(db, drive, rows):
    """G9: A task that outlives its request works in a scope of its own."""
    tasks = []
    request_is_over = asyncio.Event()

    async def late():
        await request_is_over.wait()
        async with db.session_scope() as session:
            assert session is current_session()
            session.add(Item(id=1))
        with pytest.raises(SessionScopeClosedError):
            current_session()

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(late()))
        await answer(send)

    await drive(DBSessionMiddleware(app, database=db))
    request_is_over.set()
    await asyncio.gather(*tasks)

    assert [1] == await rows()


async def test_get_session_opens_a_scope_of_its_own_after_the_request(db, drive, rows):
    """G9: `async with db.get_session()` in a task that outlived its request opens a new scope."""
    tasks = []
    request_is_over = asyncio.Event()

    async def late():
        await request_is_over.wait()
        async with db.get_session() as session:
            session.add(Item(id=1))

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(late()))
        await answer(send)

    await drive(DBSessionMiddleware(app, database=db))
    request_is_over.set()
    await asyncio.gather(*tasks)

    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# Tasks that are still at it
# --------------------------------------------------------------------------------------


class Blocker:
    """Holds statements up in the database, for tests that need one to be in flight."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.running = asyncio.Event()
        self.may_go_on = asyncio.Event()
        loop = asyncio.get_running_loop()

        @sa.event.listens_for(engine.sync_engine, "before_cursor_execute")
        def hold(*args):
            if args[4].execution_options.get("held"):
                loop.call_soon(self.running.set)
                sa.util.await_only(self.may_go_on.wait())

    @staticmethod
    def held(statement: Any) -> Any:
        """Make *statement* wait."""
        return statement.execution_options(held=True)


async def test_task_in_mid_statement_is_waited_for(engine, db, drive, rows):
    """G22: A task that is in mid-statement when the head is sent is waited for, and committed."""
    blocker = Blocker(engine)
    tasks = []

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(db.session.execute(blocker.held(INSERT))))
        await blocker.running.wait()
        asyncio.get_running_loop().call_soon(blocker.may_go_on.set)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    await asyncio.gather(*tasks)

    assert exchange.error is None
    assert 200 == exchange.status
    assert [1] == await rows()


async def test_task_that_never_ends_its_statement_fails_the_response(engine, drive, rows):
    """G22: A task that keeps the session past the clean-up deadline costs the response its 200."""
    db = Database(engine, cleanup_timeout=0.1)
    blocker = Blocker(engine)
    tasks = []

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(db.session.execute(blocker.held(INSERT))))
        await blocker.running.wait()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    blocker.may_go_on.set()
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(exchange.error, ConcurrentSessionUseError)
    assert "0.1 seconds (cleanup_timeout)" in str(exchange.error)
    assert [] == exchange.messages
    assert isinstance(error, Exception)
    assert [] == await rows()


async def test_use_while_the_response_commits_waits_for_it(db, drive, rows, timeline):
    """G11: A task that uses the session while COMMIT is sent waits, and begins the next one."""
    commit_is_near = asyncio.Event()
    may_commit = asyncio.Event()

    async def child():
        await commit_is_near.wait()
        asyncio.get_running_loop().call_soon(may_commit.set)
        await db.session.execute(sa.insert(Item).values(id=2))

    async def app(scope, receive, send):
        task = asyncio.create_task(child())
        await db.session.execute(INSERT)

        @sa.event.listens_for(db.session.sync_session, "before_commit", once=True)
        def wait(session):
            commit_is_near.set()
            sa.util.await_only(may_commit.wait())

        await answer(send)
        await task

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["checkout", "begin", "commit"] == timeline[:3]
    assert 2 == timeline.count("begin") == timeline.count("commit")
    assert [1, 2] == await rows()


async def test_use_while_the_scope_closes_is_refused(db, drive, rows):
    """G9: A task that uses the session while the request's last COMMIT is sent is refused."""
    commit_is_near = asyncio.Event()
    may_commit = asyncio.Event()
    tasks = []

    async def late():
        await commit_is_near.wait()
        asyncio.get_running_loop().call_soon(may_commit.set)
        await db.session.execute(sa.insert(Item).values(id=2))

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(late()))
        await answer(send)
        await db.session.execute(INSERT)

        @sa.event.listens_for(db.session.sync_session, "before_commit", once=True)
        def wait(session):
            commit_is_near.set()
            sa.util.await_only(may_commit.wait())

    exchange = await drive(DBSessionMiddleware(app, database=db))
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert exchange.error is None
    assert isinstance(error, SessionScopeClosedError)
    assert "needs a scope of its own" in str(error)
    assert [1] == await rows()


@pytest.mark.parametrize("ending", ["close", "block", "nothing lost"])
async def test_changes_lost_by_closing_are_never_a_success(db, drive, rows, ending):
    """G1: Changes that nobody committed before `session.close()` cost the response its 200."""

    async def app(scope, receive, send):
        session = db.session
        if ending == "block":
            async with session:
                session.add(Item(id=1))
        else:
            if ending == "close":
                await session.execute(INSERT)
            await session.scalars(sa.select(Item.id))
            await session.close()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [] == await rows()
    if ending == "nothing lost":
        assert 200 == exchange.status
    else:
        assert [] == exchange.messages
        assert isinstance(exchange.error, SessionScopeClosedError)
        assert "changes that nobody had committed" in str(exchange.error)


# --------------------------------------------------------------------------------------
# Threads and event loops
# --------------------------------------------------------------------------------------


async def test_asyncio_run_in_a_thread_is_told(db, drive, rows):
    """G11: An `AsyncSession` driven by another thread's event loop gets an error, not a hang."""

    async def work():
        await db.session.execute(INSERT)

    async def app(scope, receive, send):
        await asyncio.to_thread(asyncio.run, work())
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, EventLoopMismatchError)
    assert "asyncio.run_coroutine_threadsafe(" in str(exchange.error)
    assert [] == await rows()


async def test_thread_may_add_to_the_session(db, drive, rows):
    """G11: `session.add()` from a worker thread, where a `def` endpoint runs, is committed."""

    def endpoint():
        current_session().add(Item(id=1))

    async def app(scope, receive, send):
        await asyncio.to_thread(endpoint)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


async def test_thread_may_call_back_into_the_loop(db, drive, rows):
    """G11: A worker thread that calls back into the event loop uses the request's session."""
    loop = asyncio.get_running_loop()

    def endpoint():
        future = asyncio.run_coroutine_threadsafe(_execute(current_session()), loop)
        future.result(10)

    async def _execute(session):
        await session.execute(INSERT)

    async def app(scope, receive, send):
        await asyncio.to_thread(endpoint)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


async def test_closing_in_another_thread_is_told(db, drive, rows):
    """G11: `session.close()` by another thread's event loop is refused, the request unharmed."""

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        with pytest.raises(EventLoopMismatchError):
            await asyncio.to_thread(asyncio.run, db.session.close())
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


def test_scope_of_another_event_loop_is_told(tmp_path):
    """G12: A session whose scope began in one event loop refuses to be used in another."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    context = contextvars.copy_context()
    statement = sa.text("SELECT 1")
    block = database.session_scope()
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def begin():
        session = await block.__aenter__()
        await session.execute(statement)
        return session

    async def end():
        await block.__aexit__(None, None, None)
        await database.dispose()

    try:
        session = context.run(first.run_until_complete, begin())
        with pytest.raises(EventLoopMismatchError, match="In another loop open a scope of its own"):
            context.run(second.run_until_complete, session.execute(statement))
        context.run(first.run_until_complete, end())
    finally:
        first.close()
        second.close()


# --------------------------------------------------------------------------------------
# More than one middleware, more than one database
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["engine", "database"])
async def test_second_instance_for_the_same_database_does_nothing(
    engine, drive, rows, timeline, by
):
    """G18: The middleware added twice is the middleware added once."""
    source = {"engine": engine} if by == "engine" else {"database": Database(engine)}

    async def app(scope, receive, send):
        current_session().add(Item(id=1))
        await answer(send)

    exchange = await drive(
        DBSessionMiddleware(DBSessionMiddleware(app, **source), **source),
    )

    assert exchange.error is None
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


@pytest.fixture
async def second_engine(tmp_path: Any) -> Any:
    """A second database, on SQLite, with the same schema."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'second.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    assert 0 == _checked_out(engine)
    await engine.dispose()


async def _ids(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return list(await connection.scalars(sa.select(Item.id).order_by(Item.id)))


async def test_two_databases_nested_both_work(db, second_engine, drive, rows):
    """G11: Two middlewares for two databases each give the request their own session."""
    second = Database(second_engine, name="second")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        current_session("second").add(Item(id=2))
        await answer(send)

    exchange = await drive(
        DBSessionMiddleware(DBSessionMiddleware(app, database=second), database=db)
    )

    assert exchange.error is None
    assert [1] == await rows()
    assert [2] == await _ids(second_engine)


async def test_second_instance_serves_only_what_is_not_served_yet(
    db, second_engine, drive, rows, timeline
):
    """G18: An inner instance for one known and one new database serves the new one alone."""
    second = Database(second_engine, name="second")

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        second.session.add(Item(id=2))
        await answer(send)

    exchange = await drive(
        DBSessionMiddleware(DBSessionMiddleware(app, databases=[db, second]), database=db)
    )

    assert exchange.error is None
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()
    assert [2] == await _ids(second_engine)


async def test_request_of_a_task_that_outlived_its_own_has_every_database(
    db, second_engine, drive, rows
):
    """G9, G11: What the first request left in the context serves none of the second's databases."""
    second = Database(second_engine, name="second")
    request_is_over = asyncio.Event()
    tasks = []

    async def inner(scope, receive, send):
        db.session.add(Item(id=1))
        second.session.add(Item(id=2))
        await answer(send)

    async def late():
        await request_is_over.wait()
        return await drive(layered(inner))

    async def app(scope, receive, send):
        tasks.append(asyncio.create_task(late()))
        await answer(send)

    def layered(app):
        return DBSessionMiddleware(DBSessionMiddleware(app, database=second), database=db)

    await drive(layered(app))
    request_is_over.set()
    (exchange,) = await asyncio.gather(*tasks)

    assert exchange.error is None
    assert [1] == await rows()
    assert [2] == await _ids(second_engine)


async def test_second_instance_behind_a_copy_of_the_scope_does_nothing(db, drive, rows, timeline):
    """G18: A framework that copies the ASGI scope (a mount) hides no second instance."""
    sessions = []

    async def app(scope, receive, send):
        sessions.append(db.session)
        db.session.add(Item(id=1))
        await answer(send)

    mounted = DBSessionMiddleware(app, database=db)

    async def mount(scope, receive, send):
        sessions.append(db.session)
        await mounted({**scope, "path": "/mounted"}, receive, send)

    exchange = await drive(DBSessionMiddleware(mount, database=db))

    assert exchange.error is None
    assert sessions[0] is sessions[1]
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


async def test_current_session_of_two_databases_asks_for_a_name(db, second_engine, drive):
    """With two databases and no name, `current_session()` is an error that lists them."""
    second = Database(second_engine, name="second")

    async def app(scope, receive, send):
        current_session()

    exchange = await drive(DBSessionMiddleware(app, databases=[db, second]))

    assert isinstance(exchange.error, AmbiguousDatabaseError)
    assert "'default', 'second'" in str(exchange.error)
    assert "current_session('reports')" in str(exchange.error)


async def test_unknown_name_is_told(db, drive):
    """A name that no database here has is an error that repeats it."""

    async def app(scope, receive, send):
        current_session("reports")

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, NoSessionScopeError)
    assert "for the database 'reports'" in str(exchange.error)


async def test_request_inside_a_request_has_a_scope_of_its_own(db, drive, rows):
    """G12: An ASGI call made inside a request has its own session, and commits by itself."""
    sessions = []

    async def app(scope, receive, send):
        sessions.append(current_session())
        if scope["path"] == "/inner":
            await db.session.execute(sa.insert(Item).values(id=2))
            await answer(send)
            return
        transport = httpx.ASGITransport(app=middleware)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.get("/inner")
        assert 200 == response.status_code
        assert [2] == await rows()
        assert sessions[0] is current_session()
        await db.session.execute(INSERT)
        await answer(send, 500)

    middleware = DBSessionMiddleware(app, database=db)
    exchange = await drive(middleware)

    assert exchange.error is None
    assert sessions[0] is not sessions[1]
    assert [2] == await rows()


# --------------------------------------------------------------------------------------
# Policies and rollback-only scopes
# --------------------------------------------------------------------------------------


async def test_policy_that_raises_rolls_back(db, drive, rows, timeline):
    """G3: A commit policy that raises commits nothing, and its error is the request's."""

    def policy(head):
        raise LookupError("no idea")

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_policy=policy))

    assert isinstance(exchange.error, LookupError)
    assert ["checkout", "begin", "rollback", "checkin"] == timeline
    assert [] == exchange.messages
    assert [] == await rows()


@pytest.mark.parametrize("answered", [None, 1, 0, "commit", Outcome.COMMITTED])
async def test_policy_that_answers_nonsense_rolls_back(db, drive, rows, answered):
    """G3: A commit policy that answers neither True nor False commits nothing, and is told."""

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await answer(send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, commit_policy=lambda head: answered)
    )

    assert isinstance(exchange.error, CommitPolicyError)
    kind = type(answered).__name__
    assert f"answered with a {kind} for status 200" in str(exchange.error)
    assert [] == exchange.messages
    assert [] == await rows()


async def test_policy_of_the_second_database_that_raises_commits_neither(
    db, second_engine, drive, rows
):
    """G3: Every database's policy is asked before anything is committed anywhere."""
    second = Database(second_engine, name="second")

    def policy(head):
        raise LookupError("no idea")

    @session_options(commit_policy=policy, database="second")
    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        await second.session.execute(INSERT)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[db, second]))

    assert isinstance(exchange.error, LookupError)
    assert [] == await rows()
    assert [] == await _ids(second_engine)


async def test_commit_by_hand_in_a_rollback_only_scope_is_refused(db, drive, rows):
    """G4: `session.commit()` in a rollback-only scope is refused before COMMIT is sent."""

    async def app(scope, receive, send):
        await db.session.execute(INSERT)
        db.set_rollback_only()
        await db.session.commit()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, RollbackOnlyError)
    assert "was set rollback-only" in str(exchange.error)
    assert [] == exchange.messages
    assert [] == await rows()


@pytest.mark.parametrize("way", ["session", "block", "connection"])
async def test_refused_commit_that_is_swallowed_still_rolls_back(db, drive, rows, timeline, way):
    """G4: A rollback-only scope stays one when the code swallows the refusal of its COMMIT."""
    outcomes = []

    async def app(scope, receive, send):
        db.set_rollback_only()
        with pytest.raises(RollbackOnlyError):
            if way == "block":
                async with db.session.begin():
                    await db.session.execute(INSERT)
            else:
                await db.session.execute(INSERT)
                committer = db.session if way == "session" else await db.session.connection()
                await committer.commit()
        await answer(send)
        outcomes.append(db.scope.outcome)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert Outcome.ROLLED_BACK is outcomes[0]
    assert ["checkin", "start 200", "last body"] == timeline[-3:]
    assert [] == await rows()


async def test_release_of_a_rollback_only_scope_rolls_back(db, drive, rows, timeline):
    """G4: `release()` in a rollback-only scope gives the connection back and commits nothing."""

    async def app(scope, receive, send):
        db.set_rollback_only()
        await db.session.execute(INSERT)
        await db.release()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["checkout", "begin", "rollback", "checkin", "start 200", "last body"] == timeline
    assert [] == await rows()


async def test_rollback_only_makes_no_sense_in_autocommit(db, drive, rows):
    """G4: In mode autocommit nothing could be rolled back, and `set_rollback_only()` says so."""

    async def app(scope, receive, send):
        db.set_rollback_only()

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert isinstance(exchange.error, ConfigurationError)
    assert "session_options(mode='transaction')" in str(exchange.error)


async def test_session_bound_to_a_connection_is_told_where_options_shape_it(engine, drive):
    """G20: Options that shape a transaction are refused where somebody else has begun it."""
    async with engine.connect() as connection:
        database = Database(async_sessionmaker(connection))

        @session_options(isolation_level="SERIALIZABLE")
        async def app(scope, receive, send):
            await database.session.execute(sa.select(Item.id))

        exchange = await drive(DBSessionMiddleware(app, database=database))

    assert isinstance(exchange.error, ConfigurationError)
    assert "Bind the session to an engine" in str(exchange.error)


async def test_session_proxy_can_not_be_configured(db):
    """G11: A session proxy stands for the current session, and makes none of its own."""
    async with db.session_scope() as session:
        with pytest.raises(ConfigurationError, match=r"use db.session"):
            db.session_proxy(expire_on_commit=True)
        await db.session_proxy.remove()
        assert session is db.session_proxy()


def test_every_error_is_a_dbscope_error():
    """Every error of this package can be caught as `DBScopeError`, with a documented class."""
    import asgi_dbscope

    errors = [
        each
        for each in map(asgi_dbscope.__dict__.__getitem__, asgi_dbscope.__all__)
        if isinstance(each, type) and issubclass(each, Exception)
    ]

    assert 13 <= len(errors)
    for error in errors:
        assert issubclass(error, DBScopeError)
        assert error.__doc__


@pytest.mark.parametrize("way", ["engine", "execution options"])
async def test_engine_that_is_autocommit_by_itself_is_told(make_engine, way):
    """G3: An engine with no transactions is refused where the scope promises to roll back."""
    if way == "engine":
        engine = made = make_engine("sqlite", isolation_level="AUTOCOMMIT")
    else:
        made = make_engine("sqlite")
        engine = made.execution_options(isolation_level="AUTOCOMMIT")
    database = Database(engine)

    with pytest.raises(ConfigurationError, match="Say mode='autocommit', or make the engine"):
        async with database.session_scope() as session:
            await session.execute(sa.select(1))
    async with database.session_scope(mode="autocommit") as session:
        assert 1 == await session.scalar(sa.select(1))

    assert 0 == _checked_out(made)
    await made.dispose()
