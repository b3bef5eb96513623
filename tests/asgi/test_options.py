"""Options that an endpoint sets on its own scope."""

import asyncio
import inspect
import itertools
from collections.abc import Coroutine, Generator
from typing import Annotated, Any

import fastapi
import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    LateOptionsError,
    NoSessionScopeError,
    StreamSessionError,
    commit_on_success,
    current_scope,
    current_session,
    session_options,
)
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Item

postgresql_only = pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
sqlite_only = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
every_driver = pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)

ISOLATION = sa.text("SHOW transaction_isolation")
READ_ONLY = sa.text("SHOW transaction_read_only")


def insert(number: int) -> Any:
    """An INSERT of one item."""
    return sa.insert(Item).values(id=number)


async def answer(send: Any, status: int = 200) -> None:
    """Send a whole response."""
    await send(start(status))
    await send(body(b"ok"))


# --------------------------------------------------------------------------------------
# The decorator
# --------------------------------------------------------------------------------------


def test_decorator_keeps_the_signature():
    """A decorated endpoint has the name, the signature and the kind of the endpoint."""

    async def coroutine(item_id: int, *, verbose: bool = False) -> str:
        """Docs."""
        return f"{item_id} {verbose}"

    def plain(item_id: int) -> str:
        return f"{item_id}"

    for endpoint in (coroutine, plain):
        decorated = session_options(read_only=True)(endpoint)
        assert inspect.signature(endpoint) == inspect.signature(decorated)
        assert inspect.iscoroutinefunction(endpoint) == inspect.iscoroutinefunction(decorated)
        assert endpoint.__name__ == decorated.__name__
        assert endpoint.__doc__ == decorated.__doc__


@pytest.fixture
async def client(db: Database[AsyncSession]) -> Any:
    """A client of a FastAPI app whose endpoints have options."""
    app = fastapi.FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db)
    session_dependency = Annotated[AsyncSession, fastapi.Depends(db.get_session)]

    @app.get("/coroutine/{item_id}")
    @session_options(mode="manual", stream="error")
    async def coroutine(item_id: int, session: session_dependency, verbose: bool = False) -> Any:
        assert session is current_session()
        return [item_id, verbose, current_scope().options.mode, current_scope().options.stream]

    @app.get("/plain/{item_id}")
    @session_options(mode="manual", stream="error")
    def plain(item_id: int, verbose: bool = False) -> Any:
        return [item_id, verbose, current_scope().options.mode, current_scope().options.stream]

    async def user(session: session_dependency) -> int:
        found = await session.scalar(sa.select(sa.func.count(Item.id)))
        return 0 if found is None else found

    @app.get("/late")
    @session_options(isolation_level="SERIALIZABLE")
    async def late(user: Annotated[int, fastapi.Depends(user)]) -> Any:
        return user

    @app.get(
        "/ahead",
        dependencies=[fastapi.Depends(session_options(isolation_level="SERIALIZABLE").apply)],
    )
    async def ahead(user: Annotated[int, fastapi.Depends(user)]) -> Any:
        return current_scope().options.isolation_level

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("kind", ["coroutine", "plain"])
async def test_decorated_endpoint_keeps_its_parameters_in_fastapi(client, kind):
    """FastAPI sees path, query and dependency parameters of a decorated endpoint, `def` or not."""
    response = await client.get(f"/{kind}/7?verbose=true")

    assert [7, True, "manual", "error"] == response.json()
    assert 422 == (await client.get(f"/{kind}/x")).status_code
    parameters = (await client.get("/openapi.json")).json()["paths"][f"/{kind}/{{item_id}}"]
    assert ["item_id", "verbose"] == [each["name"] for each in parameters["get"]["parameters"]]


async def test_options_ahead_of_a_dependency_that_uses_the_session(client):
    """G20: Options as a dependency apply before the dependencies that use the session."""
    assert "SERIALIZABLE" == (await client.get("/ahead")).json()


async def test_options_after_a_dependency_that_used_the_session_are_late(client):
    """G20: Options on an endpoint whose dependency used the database say how to set them ahead."""
    with pytest.raises(LateOptionsError, match="a dependency, a middleware") as caught:
        await client.get("/late")

    assert "dependencies=[Depends(session_options(...).apply)]" in str(caught.value)


async def test_options_outside_of_any_scope_are_told():
    """An endpoint with options needs a scope to set them on."""

    @session_options(read_only=True)
    async def endpoint() -> None: ...

    with pytest.raises(NoSessionScopeError):
        await endpoint()


async def test_options_of_one_request_are_not_the_next_ones(db, drive):
    """G12: Options that an endpoint sets end with its request."""
    seen = []

    async def app(scope, receive, send):
        if scope["path"] == "/special":
            current_scope().configure(mode="manual", read_only=True)
        seen.append(db.scope.options)
        await answer(send)

    app = DBSessionMiddleware(app, database=db)
    for path in ("/", "/special", "/"):
        await drive(app, http_scope(path))

    assert ["transaction", "manual", "transaction"] == [each.mode for each in seen]
    assert seen[0] == seen[2]


async def test_options_name_their_database(engine, drive):
    """G20: With two databases the options say which one they are for."""
    first, second = Database(engine), Database(engine, name="second")

    @session_options(isolation_level="SERIALIZABLE", database="second")
    async def app(scope, receive, send):
        assert first.scope.options.isolation_level is None
        assert "SERIALIZABLE" == second.scope.options.isolation_level
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None


# --------------------------------------------------------------------------------------
# When they come too late
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"mode": "manual"}, {"isolation_level": "SERIALIZABLE"}, {"read_only": True}]
)
@pytest.mark.parametrize("used_by", ["an open transaction", "a commit", "a rollback", "release"])
async def test_options_after_the_first_use_are_refused(db, drive, changes, used_by):
    """G20: What shapes a transaction can't be changed once the scope has used the database."""

    async def app(scope, receive, send):
        await db.session.scalars(sa.select(Item.id))
        match used_by:
            case "a commit":
                await db.session.commit()
            case "a rollback":
                await db.session.rollback()
            case "release":
                await db.release()
        await session_options(**changes).apply()

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, LateOptionsError)
    assert next(iter(changes)) in str(exchange.error)


async def test_options_before_the_first_statement_are_in_time(db, drive, rows):
    """G20: A session that was asked for, or given objects, can still get its options."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await session_options(isolation_level="SERIALIZABLE").apply()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [1] == await rows()


async def test_same_options_after_the_first_use_change_nothing(db, drive):
    """G20: Options that the scope has already are no change, so never too late."""

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        await db.session.scalars(sa.select(Item.id))
        await session_options(isolation_level="SERIALIZABLE").apply()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None


async def test_options_set_inside_a_block_leave_its_transaction_what_it_is(db, drive, rows):
    """A block in autocommit goes on as a transaction, and what was set in it holds after it."""

    @session_options(mode="autocommit")
    async def app(scope, receive, send):
        with pytest.raises(LookupError):
            async with db.transactional() as session:
                await session_options(stream="error").apply()
                await session.execute(insert(1))
                raise LookupError
        await send(start(200))
        with pytest.raises(StreamSessionError):
            await db.session.execute(insert(2))
        await send(body(b"ok"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [] == await rows()


async def test_options_that_matter_at_the_head_may_come_late(db, drive, rows):
    """G3: The commit policy can be set to the very moment of the head."""

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        await session_options(commit_policy=lambda head: False).apply()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert 200 == exchange.status
    assert [] == await rows()


# --------------------------------------------------------------------------------------
# isolation_level
# --------------------------------------------------------------------------------------


@postgresql_only
async def test_isolation_level_holds_in_every_transaction(db, drive):
    """G20: An isolation level holds in each transaction of the scope, after a commit too."""
    seen = []

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        session = db.session
        seen.append(await session.scalar(ISOLATION))
        await session.commit()
        seen.append(await session.scalar(ISOLATION))
        await session.rollback()
        async with session.begin():
            seen.append(await session.scalar(ISOLATION))
        await db.release()
        async with session.begin_nested():
            seen.append(await session.scalar(ISOLATION))
        await send(start())
        seen.append(await session.scalar(ISOLATION))
        await send(body())
        seen.append(await session.scalar(ISOLATION))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["serializable"] * 6 == seen


@postgresql_only
async def test_isolation_level_does_not_stay_on_the_connection(engine, db, drive):
    """G20: The connection's next user has the engine's own isolation level."""
    pids, levels = [], []

    async def app(scope, receive, send):
        pids.append(await db.session.scalar(sa.text("SELECT pg_backend_pid()")))
        levels.append(await db.session.scalar(ISOLATION))
        await answer(send)

    plain = DBSessionMiddleware(app, database=db)
    special = DBSessionMiddleware(
        session_options(isolation_level="REPEATABLE READ")(app), database=db
    )
    for each in (plain, special, plain, special):
        await drive(each)
    async with engine.connect() as connection:
        levels.append(await connection.scalar(ISOLATION))

    assert 1 == len(set(pids))
    assert [*("read committed", "repeatable read") * 2, "read committed"] == levels


@sqlite_only
async def test_isolation_level_on_sqlite_holds_and_goes(engine, db, drive):
    """G20: On SQLite too an isolation level holds to the scope's end and then goes."""
    pragma = sa.text("PRAGMA read_uncommitted")
    seen = []

    @session_options(isolation_level="READ UNCOMMITTED")
    async def app(scope, receive, send):
        seen.append(await db.session.scalar(pragma))
        await db.session.commit()
        seen.append(await db.session.scalar(pragma))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    async with engine.connect() as connection:
        seen.append(await connection.scalar(pragma))

    assert exchange.error is None
    assert 1 == engine.pool.checkedin()
    assert [1, 1, 0] == seen


@postgresql_only
async def test_isolation_level_of_a_block(db):
    """G20: `session_scope(isolation_level=...)` holds in each of its transactions."""
    async with db.session_scope(isolation_level="SERIALIZABLE") as session:
        assert "serializable" == await session.scalar(ISOLATION)
        await session.commit()
        assert "serializable" == await session.scalar(ISOLATION)
    async with db.session_scope() as session:
        assert "read committed" == await session.scalar(ISOLATION)


@postgresql_only
async def test_serialization_failure_is_never_a_success(db, drive, rows):
    """G2: Two SERIALIZABLE requests that exclude each other: one is answered, one fails."""
    both_have_read = asyncio.Barrier(2)

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        await db.session.scalar(sa.select(sa.func.count(Item.id)))
        await both_have_read.wait()
        await db.session.execute(insert(int(scope["path"][1:])))
        await answer(send)

    app = DBSessionMiddleware(app, database=db)
    exchanges = await asyncio.gather(drive(app, http_scope("/1")), drive(app, http_scope("/2")))

    failed = [each for each in exchanges if each.error is not None]
    assert 1 == len(failed)
    assert [] == failed[0].messages
    assert "40001" == failed[0].error.orig.sqlstate
    assert 1 == len(await rows())


# --------------------------------------------------------------------------------------
# read_only
# --------------------------------------------------------------------------------------


@every_driver
@pytest.mark.parametrize("way", ["execute", "add", "text", "savepoint", "begin", "second"])
async def test_read_only_is_enforced_by_the_database(db, drive, rows, way):
    """G20: With `read_only=True` the database refuses every write, in every transaction."""

    @session_options(read_only=True)
    async def app(scope, receive, send):
        session = db.session
        assert 0 == await session.scalar(sa.select(sa.func.count(Item.id)))
        match way:
            case "execute":
                await session.execute(insert(1))
            case "add":
                session.add(Item(id=1))
            case "text":
                await session.execute(sa.text("DELETE FROM item"))
            case "savepoint":
                async with session.begin_nested():
                    await session.execute(insert(1))
            case "begin":
                await session.commit()
                async with session.begin():
                    await session.execute(insert(1))
            case "second":
                await session.commit()
                await session.execute(insert(1))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, sa.exc.DBAPIError)
    assert "read" in str(exchange.error).lower()
    assert [] == exchange.messages
    assert [] == await rows()


@every_driver
@pytest.mark.parametrize("end", ["answer", "raise", "swallowed error"])
async def test_read_only_does_not_stay_on_the_connection(engine, db, drive, rows, end):
    """G20: The connection's next user may write again, however the read-only request ended."""

    @session_options(read_only=True)
    async def reader(scope, receive, send):
        await db.session.scalar(sa.select(sa.func.count(Item.id)))
        if end == "raise":
            raise LookupError
        if end == "swallowed error":
            with pytest.raises(sa.exc.DBAPIError):
                await db.session.execute(insert(1))
        await answer(send, 200 if end == "answer" else 500)

    async def writer(scope, receive, send):
        await db.session.execute(insert(1))
        await answer(send)

    await drive(DBSessionMiddleware(reader, database=db))
    assert 1 == engine.pool.checkedin()
    exchange = await drive(DBSessionMiddleware(writer, database=db))

    assert exchange.error is None
    assert 1 == engine.pool.checkedin()
    assert [1] == await rows()


@postgresql_only
async def test_read_only_holds_in_body_and_background(db, drive):
    """G20: With `read_only=True` a streaming body and background work may not write either."""
    seen = []

    @session_options(read_only=True)
    async def app(scope, receive, send):
        seen.append(await db.session.scalar(READ_ONLY))
        await send(start())
        seen.append(await db.session.scalar(READ_ONLY))
        await send(body())
        seen.append(await db.session.scalar(READ_ONLY))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["on"] * 3 == seen


@every_driver
async def test_read_only_block_refuses_writes(db, rows):
    """G20: `session_scope(read_only=True)` is enforced by the database too."""
    with pytest.raises(sa.exc.DBAPIError):
        async with db.session_scope(read_only=True) as session:
            session.add(Item(id=1))
    async with db.session_scope() as session:
        session.add(Item(id=2))

    assert [2] == await rows()


@postgresql_only
async def test_read_only_and_isolation_level_together(db):
    """G20: A read-only snapshot: both options hold in one transaction."""
    async with db.session_scope(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert "repeatable read" == await session.scalar(ISOLATION)
        assert "on" == await session.scalar(READ_ONLY)
        await session.commit()
        assert "repeatable read" == await session.scalar(ISOLATION)
        assert "on" == await session.scalar(READ_ONLY)


class CancelledAt:
    """Awaits a coroutine and cancels the task that does at its *n*-th suspension."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], n: int) -> None:
        self.left = n
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self._coroutine.__await__()
        try:
            waited_for = next(steps)
            while True:
                self.left -= 1
                if self.left == 0:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                try:
                    yield waited_for
                except asyncio.CancelledError as error:
                    waited_for = steps.throw(error)
                else:
                    waited_for = steps.send(None)
        except StopIteration:
            return


@every_driver
@pytest.mark.parametrize(
    "options",
    [{"mode": "autocommit"}, {"isolation_level": "SERIALIZABLE"}, {"read_only": True}],
    ids=["autocommit", "isolation_level", "read_only"],
)
async def test_cancelled_while_options_are_applied(engine, db, rows, options):
    """G10, G20: Cancelled at any suspension, a scope with options keeps no connection."""

    async def use():
        async with db.session_scope(**options) as session:
            await session.scalars(sa.select(Item.id))

    async def use_cancelled(n):
        cancelled = CancelledAt(use(), n)
        await cancelled
        return cancelled.left

    cancellations = 0
    for n in itertools.count(1):
        task = asyncio.create_task(use_cancelled(n))
        await asyncio.wait([task])
        assert 0 == engine.pool.checkedout(), f"leaked when cancelled at suspension {n}"
        if not task.cancelled() and task.result() > 0:
            break  # it had fewer suspensions
        cancellations += task.cancelled()
    assert 1 < cancellations
    async with db.session_scope() as session:
        session.add(Item(id=1))
    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# commit_policy and stream
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "expected"), [(200, [1]), (404, []), (500, [])])
async def test_commit_policy_of_an_endpoint(db, drive, rows, status, expected):
    """G3: An endpoint's commit policy goes before the app's."""

    @session_options(commit_policy=commit_on_success)
    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        await answer(send, status)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, commit_policy=lambda head: True),
    )

    assert exchange.error is None
    assert expected == await rows()


async def test_commit_policy_sees_status_headers_and_exception(db, drive, rows):
    """G3: A commit policy decides from the status, the headers and the exception being handled."""
    heads = []

    def policy(head):
        heads.append(head)
        return dict(head.headers).get(b"x-commit") == b"yes"

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        try:
            raise LookupError
        except LookupError:
            await send(start(409, headers=[(b"x-commit", b"yes")]))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db, commit_policy=policy))

    assert exchange.error is None
    assert [409] == [each.status for each in heads]
    assert isinstance(heads[0].exception, LookupError)
    assert heads[0].raised
    assert [1] == await rows()


async def test_stream_of_an_endpoint_is_refused(db, drive, rows):
    """G7: An endpoint's `stream="error"` refuses the session to its body, not to what follows."""
    errors = []

    @session_options(stream="error")
    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        await send(start())
        try:
            await db.session.execute(insert(2))
        except StreamSessionError as error:
            errors.append(str(error))
        await send(body())
        await db.session.execute(insert(3))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert "stream='hold'" in errors[0]
    assert [1, 3] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_stream_of_an_endpoint_is_held(db, drive, rows, timeline):
    """G7: An endpoint's `stream="hold"` keeps a server-side cursor open across the head."""

    @session_options(stream="hold")
    async def app(scope, receive, send):
        await db.session.execute(sa.insert(Item), [{"id": number} for number in range(1, 6)])
        found = await db.session.stream_scalars(
            sa.select(Item.id).order_by(Item.id), execution_options={"yield_per": 2}
        )
        await send(start())
        async for number in found:
            await send(body(b"%d" % number, more=True))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert b"12345" == exchange.body
    assert 1 == timeline.count("commit")
    assert ["commit", "checkin", "last body"] == timeline[-3:]
    assert [1, 2, 3, 4, 5] == await rows()


# --------------------------------------------------------------------------------------
# exclude
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "excluded", "served"),
    [
        ("/health", ["/health"], ["/", "/health/", "/healthy", "/x/health"]),
        ("/static/*", ["/static/", "/static/a/b"], ["/static", "/statics", "/x/static/"]),
        (["/health", "/a*"], ["/health", "/a", "/abc"], ["/", "/b", "/health/a"]),
        (("/health",), ["/health"], ["/"]),
        (lambda scope: scope["method"] == "GET", ["/", "/health"], []),
    ],
    ids=["path", "prefix", "both", "tuple", "callable"],
)
async def test_exclude_takes_paths_prefixes_and_a_callable(db, drive, exclude, excluded, served):
    """G5: What `exclude` names gets no session scope; everything else has one."""
    seen: dict[str, str | None] = {}

    async def app(scope, receive, send):
        try:
            seen[scope["path"]] = current_scope().label
        except NoSessionScopeError:
            seen[scope["path"]] = None
        await answer(send)

    middleware = DBSessionMiddleware(app, database=db, exclude=exclude)
    for path in (*excluded, *served):
        exchange = await drive(middleware, http_scope(path))
        assert exchange.error is None

    assert dict.fromkeys(excluded) | {path: f"GET {path}" for path in served} == seen
