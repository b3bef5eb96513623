"""Reads in one round trip: on a connection that the server holds read-only, without a transaction.

Writes are tried in every way that we know of: none is done, or none is acknowledged.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    LateOptionsError,
    PoolTooSmallError,
    ReadOnlyError,
    Retry,
    TransactionAbortedError,
    TransactionMismatchError,
    TransactionRequiredError,
    current_scope,
    read_only_options,
    session_options,
)
from asgi_dbscope.testing import inject_conflicts
from bench.proxy import Message
from tests.fix_asgi import Drive, Exchange, body, http_scope, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Item
from tests.fix_sync import MakeEngine

READ = sa.select(Item.id)

OF_ANY_ENGINE = pytest.mark.parametrize("reads", ["AUTOCOMMIT", None], indirect=True)
"""Whether the engine for reads was made for it, or is somebody's replica."""

Serve = Callable[..., Awaitable[Exchange]]


@pytest.fixture(params=POSTGRES_DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The driver of the engines."""
    name: str = request.param
    return name


@pytest.fixture
def reads(
    request: pytest.FixtureRequest, driver: str, make_engine: Callable[..., AsyncEngine]
) -> AsyncEngine:
    """A second engine, whose connections the server holds read-only."""
    options = read_only_options(f"postgresql+{driver}://", pool_size=2)
    if getattr(request, "param", "AUTOCOMMIT") is None:
        del options["isolation_level"]
    return make_engine(driver, **options)


@pytest.fixture
async def engine(
    driver: str, make_engine: Callable[..., AsyncEngine], postgres_schema: sa.Engine
) -> AsyncIterator[AsyncEngine]:
    """The engine that may write, on a schema with one item."""
    engine = make_engine(driver)
    with postgres_schema.connect() as connection:
        connection.execute(sa.insert(Item).values(id=1, note="one"))
    yield engine
    with postgres_schema.connect() as connection:
        connection.execute(sa.delete(Item))
    await engine.dispose()


@pytest.fixture
async def db(engine: AsyncEngine, reads: AsyncEngine) -> AsyncIterator[Database[Any]]:
    """A database with an engine for reads; none of its connections is left out."""
    yield Database(engine, reads=reads)
    leaked = engine.pool.checkedout(), reads.pool.checkedout()  # type: ignore[attr-defined]
    await reads.dispose()
    assert (0, 0) == leaked


@pytest.fixture
def serve(db: Database[Any], drive: Drive) -> Serve:
    """Serve one read-only request with a handler, which answers 200 if it returns."""

    async def serve(handler: Callable[[Any], Awaitable[Any]], **options: Any) -> Exchange:
        @session_options(**{"read_only": True, **options})
        async def endpoint() -> None:
            await handler(db.session)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await endpoint()
            await respond(send)

        return await drive(DBSessionMiddleware(app, database=db))

    return serve


@contextlib.contextmanager
def sent(*engines: AsyncEngine) -> Iterator[list[str]]:
    """What is sent to the server through an engine."""
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    for each in engines:
        sa.event.listen(each.sync_engine, "before_cursor_execute", note)
    yield statements
    for each in engines:
        sa.event.remove(each.sync_engine, "before_cursor_execute", note)


# --------------------------------------------------------------------------------------
# One round trip
# --------------------------------------------------------------------------------------


@OF_ANY_ENGINE
async def test_read_is_by_itself_and_read_only(serve, db):
    """A read-only request reads on its own engine, without a transaction, and is read-only."""
    seen: list[Any] = []

    async def handler(session: Any) -> None:
        transaction = sa.text("SELECT now(), current_setting('transaction_read_only')")
        seen.append((await session.execute(transaction)).one())
        seen.append((await session.execute(transaction)).one())
        seen.append(list(await session.scalars(READ)))

    exchange = await serve(handler)

    assert 200 == exchange.status
    (first, first_is), (second, second_is), items = seen
    assert ("on", "on", [1]) == (first_is, second_is, items)
    assert first != second, "both statements were in one transaction"


@pytest.mark.parametrize(("read_only", "expected"), [(True, 1), (False, 3)])
async def test_read_is_one_round_trip(engine, proxy, driver, drive, read_only, expected):
    """A read-only request with one read waits for the server once; in a transaction three times."""
    url = proxy.url.set(drivername=f"postgresql+{driver}")
    db: Database[Any] = Database(url, reads=url)
    trips = 0

    def count(message: Message) -> bool:
        nonlocal trips
        trips += message.sender == "server" and message.kind == b"Z"  # ready for the next query
        return False

    @session_options(read_only=read_only)
    async def endpoint() -> None:
        assert [1] == list(await db.session.scalars(READ))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endpoint()
        await respond(send)

    served = DBSessionMiddleware(app, database=db)
    for _ in range(2):  # the first prepares the statement
        await drive(served)
    proxy.arm("cut", count)
    exchange = await drive(served)

    assert (200, expected) == (exchange.status, trips)
    await db.dispose()


async def test_writes_go_where_they_went(engine, db, reads, drive, rows):
    """A request that isn't read-only leaves the engine for reads alone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        db.session.add(Item(id=2))
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))

    assert [1, 2] == await rows()
    assert 0 == reads.pool.checkedin()


# --------------------------------------------------------------------------------------
# No write is acknowledged
# --------------------------------------------------------------------------------------

WRITES = [
    "INSERT INTO item (id) VALUES (2)",
    "WITH it AS (INSERT INTO item (id) VALUES (2) RETURNING id) SELECT id FROM it",
    "EXPLAIN ANALYZE INSERT INTO item (id) VALUES (2)",
    "DO $$ BEGIN INSERT INTO item (id) VALUES (2); END $$",
    "SELECT writes_an_item(2)",
    "SELECT nextval('numbers')",
    "SELECT id FROM item FOR UPDATE",
    "CREATE TABLE other (id int)",
    "TRUNCATE item CASCADE",
]


@pytest.fixture
def objects(postgres_schema: sa.Engine) -> Iterator[None]:
    """A function that writes, and a sequence."""
    with postgres_schema.connect() as connection:
        connection.execute(sa.text("CREATE SEQUENCE numbers"))
        connection.execute(
            sa.text(
                "CREATE FUNCTION writes_an_item(int) RETURNS void LANGUAGE sql "
                "AS 'INSERT INTO item (id) VALUES ($1)'"
            )
        )
    yield
    with postgres_schema.connect() as connection:
        connection.execute(sa.text("DROP SEQUENCE numbers; DROP FUNCTION writes_an_item"))


@pytest.mark.usefixtures("objects")
async def test_server_refuses_each_write(serve, rows):
    """G20: whatever writes is refused by the server, and its error says what to do."""
    for statement in WRITES:

        async def handler(session: Any, statement: str = statement) -> None:
            await session.execute(sa.text(statement))

        exchange = await serve(handler)

        assert "25006" == exchange.error.orig.sqlstate, statement
        assert "Leave read_only out" in exchange.error.__notes__[0], statement
        assert exchange.status is None
    assert [1] == await rows()


@pytest.mark.usefixtures("objects")
async def test_refusal_that_is_swallowed_is_no_success(serve, rows):
    """G1: where the code swallows the server's refusal, the response is an error all the same."""
    for statement in WRITES:

        async def handler(session: Any, statement: str = statement) -> None:
            with contextlib.suppress(sa.exc.DBAPIError):
                await session.execute(sa.text(statement))

        exchange = await serve(handler)

        assert isinstance(exchange.error, ReadOnlyError), statement
        assert "25006" == exchange.error.__cause__.sqlstate  # type: ignore[union-attr]
        assert exchange.status is None
    assert [1] == await rows()


async def test_refusal_that_was_rolled_back_is_over(serve):
    """After `session.rollback()` a refused write is nothing that the response would claim."""

    async def handler(session: Any) -> None:
        with contextlib.suppress(sa.exc.DBAPIError):
            await session.execute(sa.insert(Item).values(id=2))
        await session.rollback()
        assert [1] == list(await session.scalars(READ))

    assert 200 == (await serve(handler)).status


async def add(session: Any) -> None:
    """Leave an object to be written."""
    session.add(Item(id=2))


async def change(session: Any) -> None:
    """Leave a change to be written."""
    (await session.get(Item, 1)).note = "changed"


async def delete(session: Any) -> None:
    """Leave an object to be deleted."""
    await session.delete(await session.get(Item, 1))


async def query_after_add(session: Any) -> None:
    """Let a query flush."""
    session.add(Item(id=2))
    await session.scalars(READ)


@pytest.mark.parametrize("write", [add, change, delete, query_after_add])
async def test_flush_is_refused_before_the_server_must(serve, reads, rows, write):
    """G1: what the session would write is refused at its flush, and nothing of it is sent."""
    with sent(reads) as statements:
        exchange = await serve(write)

    assert isinstance(exchange.error, ReadOnlyError)
    assert "its session has Item to write" in str(exchange.error)
    assert exchange.status is None
    assert all(each.startswith("SELECT") for each in statements)
    assert [1] == await rows()


async def test_attribute_that_got_its_own_value_is_no_write(serve):
    """An object that is as it was in the database needs no flush."""

    async def handler(session: Any) -> None:
        item = await session.get(Item, 1)
        item.note = "one"
        await session.flush()

    assert 200 == (await serve(handler)).status


async def make_writable(connection: Any) -> None:
    """Take the connection out of its state, past the session, and write."""
    driver = (await connection.get_raw_connection()).driver_connection
    await driver.execute("SET default_transaction_read_only = off")
    await connection.execute(sa.insert(Item).values(id=2))


async def begin_by_hand(connection: Any) -> None:
    """Begin past the session, write, and leave it so."""
    driver = (await connection.get_raw_connection()).driver_connection
    await driver.execute("BEGIN READ WRITE")
    await connection.execute(sa.insert(Item).values(id=2))


@pytest.mark.parametrize(("by_hand", "kept"), [(make_writable, [1, 2]), (begin_by_hand, [1])])
async def test_connection_made_writable_by_hand_is_no_success(serve, rows, by_hand, kept):
    """G1, G19: code that makes the connection writable gets no success, nobody gets it after."""

    async def handler(session: Any) -> None:
        await by_hand(await session.connection())

    exchange = await serve(handler)

    assert isinstance(exchange.error, ReadOnlyError)
    assert exchange.status is None
    assert kept == await rows()
    assert 200 == (await serve(read)).status


async def read(session: Any) -> None:
    """Read, and nothing more."""
    assert "on" == await session.scalar(sa.text("SELECT current_setting('transaction_read_only')"))


async def test_connection_made_writable_is_not_handed_out_again(serve):
    """G20: nobody gets a connection that a request has made writable and then failed."""

    async def handler(session: Any) -> None:
        raw = await (await session.connection()).get_raw_connection()
        await raw.driver_connection.execute("SET default_transaction_read_only = off")
        raise ZeroDivisionError

    assert isinstance((await serve(handler)).error, ZeroDivisionError)
    for _ in range(3):
        assert 200 == (await serve(read)).status


async def test_connection_that_is_not_held_is_not_used(engine, make_engine, driver, drive, rows):
    """G1: an engine whose connections aren't read-only is refused, as often as it is tried."""
    other = make_engine(driver)
    db: Database[Any] = Database(engine, reads=other)
    errors: list[Exception] = []

    @session_options(read_only=True)
    async def endpoint() -> None:
        for _ in range(3):
            try:
                await db.session.execute(sa.insert(Item).values(id=2))
            except (ConfigurationError, sa.exc.SQLAlchemyError) as error:
                errors.append(error)
            if len(errors) == 2:
                await db.session.rollback()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endpoint()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))
    leaked = other.pool.checkedout()
    await other.dispose()

    refused, pending, again = errors
    assert "read_only_options" in str(refused)
    assert isinstance(pending, sa.exc.PendingRollbackError)
    assert str(refused) == str(again)
    assert exchange.status is None
    assert ([1], 0) == (await rows(), leaked)


@pytest.mark.parametrize(
    "statement",
    [
        "SET LOCAL search_path = pg_catalog",
        "  begin",
        "SELECT set_config('app.tenant', '1', true)",
        "SELECT pg_advisory_xact_lock(1)",
        "SELECT pg_try_advisory_xact_lock_shared (1)",
    ],
)
async def test_what_would_hold_for_nothing_is_refused(serve, reads, statement):
    """G20: a setting or a lock that would end with its own statement is refused, not sent."""

    async def handler(session: Any) -> None:
        await session.execute(sa.text(statement))

    async def past_the_session(session: Any) -> None:
        await (await session.connection()).exec_driver_sql(statement)

    with sent(reads) as statements:
        exchanges = [await serve(each) for each in (handler, past_the_session)]

    for exchange in exchanges:
        assert isinstance(exchange.error, ConfigurationError)
        assert "async with db.transactional()" in str(exchange.error)
    assert [] == statements


# --------------------------------------------------------------------------------------
# Where a transaction is asked for
# --------------------------------------------------------------------------------------

NOW = sa.text("SELECT now()")
IS_READ_ONLY = sa.text("SELECT current_setting('transaction_read_only')")


async def moments(session: Any) -> tuple[Any, Any]:
    """When the transactions of two statements began."""
    return await session.scalar(NOW), await session.scalar(NOW)


async def refuses_a_write(session: Any) -> bool:
    """Whether the server refuses a write."""
    try:
        await session.execute(sa.insert(Item).values(id=2))
    except sa.exc.DBAPIError as error:
        return bool(error.orig.sqlstate == "25006")  # type: ignore[union-attr]
    return False


async def in_block(db: Database[Any], session: Any) -> tuple[Any, Any]:
    """In a transactional block."""
    async with db.transactional():
        await session.execute(sa.text("SET LOCAL application_name = 'here'"))
        assert "here" == await session.scalar(sa.text("SHOW application_name"))
        return await moments(session)


async def in_begin(db: Database[Any], session: Any) -> tuple[Any, Any]:
    """In a transaction of the code's own."""
    async with session.begin():
        await session.execute(sa.text("SET LOCAL application_name = 'here'"))
        return await moments(session)


async def plain(db: Database[Any], session: Any) -> tuple[Any, Any]:
    """In whatever the options say."""
    return await moments(session)


@pytest.mark.parametrize(
    ("where", "options"),
    [
        (in_block, {}),
        (in_begin, {}),
        (plain, {"isolation_level": "REPEATABLE READ"}),
        (plain, {"stream": "hold"}),
        (plain, {"mode": "manual"}),
    ],
)
@OF_ANY_ENGINE
async def test_who_asks_for_a_transaction_has_one(serve, db, reads, where, options):
    """A block, `begin()`, an isolation level, a held stream: a real transaction, read-only too."""
    seen: list[Any] = []

    async def handler(session: Any) -> None:
        first, second = await where(db, session)
        seen.append(first == second)
        seen.append(await session.scalar(IS_READ_ONLY))

    exchange = await serve(handler, **options)

    assert 200 == exchange.status
    assert [True, "on"] == seen
    assert 1 == reads.pool.checkedin()


async def test_write_in_a_block_of_a_read_only_request_is_refused(serve, db, rows):
    """G20: a block inside is read-only as well, and its failure is no success."""

    async def handler(session: Any) -> None:
        async with db.transactional():
            assert await refuses_a_write(session)
        raise AssertionError("the block was committed")

    exchange = await serve(handler)

    assert exchange.status is None
    assert not isinstance(exchange.error, AssertionError)
    assert [1] == await rows()


async def test_block_of_its_own_writes(serve, db, rows):
    """A block with `REQUIRES_NEW` writes beside the reads, on the database's own engine."""

    async def handler(session: Any) -> None:
        assert [1] == list(await session.scalars(READ))
        async with db.transactional("REQUIRES_NEW") as other:
            other.add(Item(id=2))

    assert 200 == (await serve(handler)).status
    assert [1, 2] == await rows()


async def test_propagation_knows_that_there_is_no_transaction(serve, db):
    """`MANDATORY` finds none, `NEVER` none either, and no block may ask for writing."""

    async def handler(session: Any) -> None:
        async with db.transactional("NEVER"):
            assert [1] == list(await session.scalars(READ))
        with pytest.raises(TransactionRequiredError):
            async with db.transactional("MANDATORY"):
                pass
        with pytest.raises(TransactionMismatchError, match="read_only=False"):
            async with db.transactional(read_only=False):
                pass
        with pytest.raises(ConfigurationError, match="reads in one round trip"):
            await session.begin_nested()

    assert 200 == (await serve(handler)).status


async def test_joined_block_that_asks_for_read_only_is_a_transaction(db, reads, drive):
    """A block that makes a request read-only by joining it is one transaction, on that engine."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with db.transactional(read_only=True) as session:
            first, second = await moments(session)
            seen.append(first == second)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert ([True], 200) == (seen, exchange.status)
    assert 1 == reads.pool.checkedin()


@pytest.mark.parametrize("ask", ["stream", "yield_per"])
async def test_server_side_cursor_needs_a_transaction(serve, ask):
    """A server-side cursor is refused with what to do; with `stream="hold"` it works."""
    seen: list[int] = []

    async def handler(session: Any) -> None:
        if ask == "stream":
            result = await session.stream_scalars(READ)
            seen.extend([each async for each in result])
        else:
            seen.extend(await session.scalars(READ.execution_options(yield_per=1)))

    exchange = await serve(handler)

    assert isinstance(exchange.error, ConfigurationError)
    assert "stream='hold'" in str(exchange.error)
    if ask == "stream":
        assert 200 == (await serve(handler, stream="hold")).status
        assert [1] == seen


async def test_stream_option_comes_too_late_after_a_read(serve):
    """What would turn reads into a transaction has to come before the first of them."""

    async def handler(session: Any) -> None:
        await session.scalars(READ)
        current_scope().configure(stream="hold")

    assert isinstance((await serve(handler)).error, LateOptionsError)


# --------------------------------------------------------------------------------------
# With everything else
# --------------------------------------------------------------------------------------


async def test_hooks_wait_for_the_response(serve, db):
    """A hook on commit runs when the response is settled, and not where it failed."""
    ran: list[str] = []

    async def handler(session: Any) -> None:
        db.on_commit(ran.append, "succeeded")
        await session.scalars(READ)
        assert [] == ran

    async def failing(session: Any) -> None:
        db.on_commit(ran.append, "failed")
        await session.scalars(READ)
        raise ZeroDivisionError

    assert 200 == (await serve(handler)).status
    assert isinstance((await serve(failing)).error, ZeroDivisionError)
    assert ["succeeded"] == ran


async def test_dry_run_stays_one(serve, db):
    """A read-only request may be set rollback-only; there is nothing to roll back."""

    async def handler(session: Any) -> None:
        await session.scalars(READ)
        db.set_rollback_only()

    assert 200 == (await serve(handler)).status


async def test_timeout_is_kept_by_this_process(serve, reads):
    """A `timeout` ends a read that takes longer, though nothing of it is sent to the server."""

    async def handler(session: Any) -> None:
        await session.execute(sa.text("SELECT pg_sleep(5)"))

    with sent(reads) as statements:
        assert 504 == (await serve(handler, timeout=0.2)).status
    assert ["SELECT pg_sleep(5)"] == statements


async def test_label_needs_a_transaction(engine, reads, drive):
    """`application_name` is set where there is a transaction, and costs a read nothing."""
    db: Database[Any] = Database(engine, reads=reads, label_transactions="application_name")

    with sent(reads) as statements:
        async with db.session_scope(read_only=True) as session:
            await session.scalars(READ)
        assert 1 == len(statements)
        async with db.transactional(read_only=True, label="report") as session:
            assert "report" == await session.scalar(sa.text("SHOW application_name"))

    await reads.dispose()


async def test_read_that_lost_to_a_conflict_is_replayed(serve, db, forget_endpoints):
    """G16: nothing of a read is durable, so a conflict (as replicas have them) is replayed."""
    attempts: list[int] = []

    async def handler(session: Any) -> None:
        attempts.append(current_scope().attempt)
        await (await session.connection()).execute(READ)
        if len(attempts) == 1:
            await session.execute(
                sa.text("DO $$ BEGIN RAISE EXCEPTION 'recovery' USING ERRCODE = '40001'; END $$")
            )

    exchange = await serve(handler, retry=Retry(base=0.001))

    assert (200, [1, 2]) == (exchange.status, attempts)


async def test_block_after_a_read_that_lost_to_a_conflict_is_replayed(serve, db, forget_endpoints):
    """G16: before the block's transaction begins the read is over, and nothing was committed."""
    attempts: list[int] = []

    async def handler(session: Any) -> None:
        attempts.append(current_scope().attempt)
        await session.scalar(sa.text("SELECT 1"))
        async with db.transactional():
            await session.scalars(READ)

    with inject_conflicts(db, at="FROM item"):
        exchange = await serve(handler, retry=Retry(base=0.001))

    assert (200, [1, 2]) == (exchange.status, attempts)


async def test_transaction_by_hand_that_was_committed_forbids_a_replay(
    serve, reads, forget_endpoints
):
    """G16: who begins and commits by hand has left the reads, whatever was done there."""
    attempts: list[int] = []

    async def handler(session: Any) -> None:
        attempts.append(current_scope().attempt)
        async with session.begin():
            await session.scalar(sa.text("SELECT 1"))
        await session.scalars(READ)

    with inject_conflicts(reads, at="FROM item"):
        exchange = await serve(handler, retry=Retry(base=0.001))

    assert ([1], None) == (attempts, exchange.status)


async def test_connection_that_was_lost_is_no_write_that_was_refused(serve, postgres_schema):
    """G15: it is an error all the same, but one that says what happened."""

    async def handler(session: Any) -> None:
        pid = await session.scalar(sa.text("SELECT pg_backend_pid()"))
        with postgres_schema.connect() as connection:
            connection.execute(sa.select(sa.func.pg_terminate_backend(pid)))
        with contextlib.suppress(sa.exc.DBAPIError):
            await session.scalars(READ)

    exchange = await serve(handler)

    assert isinstance(exchange.error, TransactionAbortedError)
    assert "lost its connection" in str(exchange.error)
    assert exchange.status is None


async def test_branches_read_in_their_own_pool(engine, make_engine, driver):
    """`gather()` in a read-only scope has as many places as the pool for reads."""
    url = engine.url.render_as_string(hide_password=False)
    reads = make_engine(driver, **read_only_options(url, pool_size=4, max_overflow=0))
    narrow = make_engine(driver, pool_size=1, max_overflow=0)
    db: Database[Any] = Database(narrow, reads=reads)

    async def find() -> list[int]:
        return list(await db.session.scalars(READ))

    async with db.session_scope(read_only=True) as session:
        await session.scalars(READ)
        assert [[1]] * 5 == await db.gather(*(find() for _ in range(5)))
    await reads.dispose()
    await narrow.dispose()


async def test_read_beside_a_write_takes_none_of_its_connections(engine, make_engine, driver):
    """G14: a read-only block inside a writing one needs a connection of the other pool alone."""
    url = engine.url.render_as_string(hide_password=False)
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
    reads = make_engine(driver, **read_only_options(url, **options))
    narrow = make_engine(driver, **options)
    db: Database[Any] = Database(narrow, reads=reads)

    async with db.session_scope() as session:
        session.add(Item(id=2))
        await session.flush()
        async with db.transactional("REQUIRES_NEW", read_only=True) as other:
            assert [1] == list(await other.scalars(READ))
            with pytest.raises(PoolTooSmallError, match="pool has 1"):
                async with db.session_scope(read_only=True) as third:
                    await third.scalars(READ)
    await reads.dispose()
    await narrow.dispose()


async def test_exhausted_pool_is_told_of_by_its_own_figures(engine, make_engine, driver):
    """G14: where no connection for reads comes free, the error has the figures of that pool."""
    url = engine.url.render_as_string(hide_password=False)
    reads = make_engine(
        driver, **read_only_options(url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    )
    db: Database[Any] = Database(engine, reads=reads)

    async with reads.connect(), db.session_scope(read_only=True) as session:
        with pytest.raises(sa.exc.TimeoutError) as caught:
            await session.scalars(READ)
    assert any("pool_size=1)" in each for each in caught.value.__notes__)
    await reads.dispose()


async def test_session_with_another_engine_is_refused(db, engine, reads):
    """A session that was bound elsewhere is refused, rather than read from somewhere else."""
    async with db.session_scope(read_only=True) as session:
        session.sync_session.bind = reads.sync_engine
        with pytest.raises(ConfigurationError, match="chose another one"):
            await session.scalars(READ)
        session.sync_session.bind = engine.sync_engine
        assert [1] == list(await session.scalars(READ))


async def test_engine_made_from_a_url_goes_with_the_app(engine, driver):
    """A URL's engine is disposed of at lifespan shutdown, with its connections."""
    url = engine.url.render_as_string(hide_password=False)
    db: Database[Any] = Database(engine, reads=url)
    async with db.session_scope(read_only=True) as session:
        assert "on" == await session.scalar(IS_READ_ONLY)
    owned = db.owned_reads
    assert owned is not None
    assert 1 == owned.pool.checkedin()  # type: ignore[attr-defined]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.shutdown.complete"})

    async def ignore(message: Any) -> None: ...

    await DBSessionMiddleware(app, database=db)({"type": "lifespan"}, ignore, ignore)

    assert 0 == owned.pool.checkedin()  # type: ignore[attr-defined]


async def test_body_and_background_read_as_the_request_does(db, drive):
    """G7, G8: what comes after the head reads in one round trip as well, and is read-only."""
    seen: list[Any] = []

    @session_options(read_only=True)
    async def endpoint() -> None:
        await db.session.scalars(READ)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endpoint()
        await send(start(200))
        seen.append(len(set(await moments(db.session))))
        await send(body(b"chunk", more=True))
        await send(body())
        seen.append(await db.session.scalar(IS_READ_ONLY))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (200, [2, "on"]) == (exchange.status, seen)


def test_synchronous_session_reads_the_same_way(postgres_url, make_sync_engine: MakeEngine):
    """An `Engine` has reads too, of an engine or of a URL, and the same refusals."""
    engine = make_sync_engine("psycopg")
    url = engine.url.render_as_string(hide_password=False)
    reads = sa.create_engine(url, **read_only_options(url))
    for source in (reads, url):
        db: Database[Session] = Database(engine, reads=source)
        with db.session_scope(read_only=True) as session:
            first, second = session.scalar(NOW), session.scalar(NOW)
            assert first != second
            assert "on" == session.scalar(IS_READ_ONLY)
            with pytest.raises(sa.exc.DBAPIError, match="read-only"):
                session.execute(sa.insert(Item).values(id=2))
            session.rollback()
        with (
            pytest.raises(ReadOnlyError, match="Item"),
            db.session_scope(read_only=True) as session,
        ):
            session.add(Item(id=2))
        if db.owned_reads is not None:
            db.owned_reads.dispose()
    reads.dispose()


async def test_requests_are_read_only_by_their_method(db, drive, rows):
    """`read_only_methods` makes them so; an endpoint that writes all the same may say it."""
    middleware = {"database": db, "read_only_methods": ("GET", "HEAD")}

    async def writing(scope: Any, receive: Any, send: Any) -> None:
        db.session.add(Item(id=int(scope["path"][1:])))
        await respond(send)

    @session_options(read_only=False)
    async def allow() -> None: ...

    async def allowed(scope: Any, receive: Any, send: Any) -> None:
        await allow()
        await writing(scope, receive, send)

    refused = await drive(DBSessionMiddleware(writing, **middleware), http_scope("/2"))
    written = [
        await drive(DBSessionMiddleware(writing, **middleware), http_scope("/3", "POST")),
        await drive(DBSessionMiddleware(allowed, **middleware), http_scope("/4")),
    ]

    assert isinstance(refused.error, ReadOnlyError)
    assert [200, 200] == [each.status for each in written]
    assert [1, 3, 4] == await rows()
