"""PostgreSQL by way of PgBouncer in transaction mode: each transaction on any server connection."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Outcome,
    current_scope,
    pgbouncer_options,
    read_only_options,
    session_options,
)
from asgi_dbscope.errors import CommitInDoubtError, TransactionAbortedError
from bench.proxy import Proxy, after_commit, before_commit
from tests.asgi import test_cancellation
from tests.fix_asgi import body, http_scope, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Base, Child, Item, Timeline
from tests.fix_pgbouncer import SERVER_CONNECTIONS, PgBouncer

PID = sa.select(sa.func.pg_backend_pid())
PREPARED = sa.text("SELECT count(*) FROM pg_prepared_statements")


@pytest.fixture(params=POSTGRES_DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The driver of the engine."""
    name: str = request.param
    return name


@pytest.fixture
def through(driver: str) -> Callable[..., AsyncEngine]:
    """Make an engine that reaches the database by a pooler, with the options for it."""

    def make(pooler: PgBouncer, **options: Any) -> AsyncEngine:
        url = pooler.url.set(drivername=f"postgresql+{driver}")
        return create_async_engine(url, **pgbouncer_options(url, **options))

    return make


@pytest.fixture
async def engine(
    pgbouncer: PgBouncer,
    through: Callable[..., AsyncEngine],
    timeline: Timeline,
    postgres_schema: sa.Engine,
) -> AsyncIterator[AsyncEngine]:
    """An engine on the pooler that all tests share."""
    engine = through(pgbouncer, pool_size=12, max_overflow=20)
    async with engine.connect():
        pass
    timeline.watch(engine)
    timeline.clear()
    yield engine
    leaked = engine.pool.checkedout()  # type: ignore[attr-defined]
    await engine.dispose()
    clean(postgres_schema)
    assert 0 == leaked


def clean(schema: sa.Engine) -> None:
    """Empty the tables."""
    with schema.connect() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())


async def change_servers(engine: AsyncEngine) -> tuple[int, int, int]:
    """Run one statement in two transactions of a client, on two server connections.

    Returns:
        The server connections: of the first, of somebody who takes that one, of the second.
    """
    async with engine.connect() as one, engine.connect() as other:
        pids = []
        for _ in range(8):  # psycopg prepares a statement that it has seen five times
            pids.append(await one.scalar(PID))
            await one.commit()
        taken = await other.scalar(PID)  # the pooler gives what came back last
        second = await one.scalar(PID)
        assert taken is not None
        assert second is not None
        return pids[-1] or 0, taken, second


# --------------------------------------------------------------------------------------
# Prepared statements
# --------------------------------------------------------------------------------------


async def test_without_the_options_a_prepared_statement_is_missing(pgbouncer, driver):
    """Control: an engine made without them fails as soon as its server connection changes."""
    engine = create_async_engine(pgbouncer.url.set(drivername=f"postgresql+{driver}"))

    with pytest.raises(sa.exc.DBAPIError, match="prepared statement"):
        await change_servers(engine)

    await engine.dispose()
    pgbouncer.tell("RECONNECT")  # or what it has prepared stays on the server


async def test_server_connection_may_change_between_transactions(engine):
    """With the options a client's second transaction runs on another server connection."""
    first, taken, second = await change_servers(engine)

    assert first == taken
    assert first != second


async def test_nothing_stays_prepared_on_the_server(engine, pgbouncer):
    """With the options no statement is left behind, on none of the server connections."""
    pgbouncer.tell("RECONNECT")
    await change_servers(engine)

    clients = [await engine.connect() for _ in range(SERVER_CONNECTIONS)]
    pids = {await client.scalar(PID) for client in clients}
    left = [await client.scalar(PREPARED) for client in clients]
    for client in clients:
        await client.close()

    assert SERVER_CONNECTIONS == len(pids)
    assert [0] * SERVER_CONNECTIONS == left


async def test_migration_beside_clients_that_stay_is_no_obstacle(engine, postgres_schema):
    """With the options a statement that returns something else since a migration is no error."""
    query = sa.text("SELECT * FROM migrated")
    with postgres_schema.connect() as connection:
        connection.execute(sa.text("CREATE TABLE migrated (id INTEGER)"))
        try:
            async with engine.connect() as client:
                for _ in range(8):  # as above
                    await client.execute(query)
                    await client.commit()
                connection.execute(sa.text("ALTER TABLE migrated ADD COLUMN note TEXT"))
                names = list((await client.execute(query)).keys())
        finally:
            connection.execute(sa.text("DROP TABLE migrated"))

    assert ["id", "note"] == names


async def test_autocommit_works_where_each_statement_has_another_server(engine, drive, rows):
    """In mode "autocommit" single statements go to whichever server connection is free."""
    db = Database(engine, mode="autocommit")
    # It takes a while, so that others need another server connection meanwhile.
    slow_pid = sa.text("SELECT pg_backend_pid() FROM (SELECT pg_sleep(0.02)) AS a_while")
    pids = []

    async def app(scope, receive, send):
        number = int(scope["path"][1:])
        pids.extend([await db.session.scalar(slow_pid) for _ in range(4)])
        db.session.add(Item(id=number))
        await db.session.flush()
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    exchanges = await asyncio.gather(*(drive(wrapped, http_scope(f"/{n}")) for n in range(12)))

    assert [None] * 12 == [each.error for each in exchanges]
    assert 1 < len(set(pids)) <= SERVER_CONNECTIONS
    assert list(range(12)) == await rows()


async def test_database_of_a_url_has_the_options(pgbouncer, driver):
    """`Database(url, pooler="pgbouncer")` reaches the database by the pooler."""
    db: Database[Any] = Database(
        pgbouncer.url.set(drivername=f"postgresql+{driver}"), pooler="pgbouncer"
    )

    first, taken, second = await change_servers(db.session_factory.kw["bind"])

    assert first == taken != second
    await db.dispose()


def test_synchronous_engine_has_the_options(pgbouncer):
    """`create_engine()` takes the same options, and a `def` app's server connection may change."""
    url = pgbouncer.url.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, **pgbouncer_options(url))
    db = Database(engine)
    pids = []
    for _ in range(8):
        with db.session_scope() as session:
            pids.append(session.scalar(PID))
    with engine.connect() as other, db.session_scope() as session:
        other.scalar(PID)
        pids.append(session.scalar(PID))
    engine.dispose()

    assert pids[-2] != pids[-1]


# --------------------------------------------------------------------------------------
# The guarantees
# --------------------------------------------------------------------------------------


async def test_commit_comes_before_the_head_and_the_connection_back(db, drive, rows, timeline):
    """G1, G6: committed and given back, then the head."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


async def test_commit_that_fails_is_an_error(db, drive, rows):
    """G2, G19: a COMMIT that the server refuses is no success, and the next request is served."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        if scope["path"] == "/bad":
            db.session.add(Child(id=1, item_id=2))
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    bad = await drive(wrapped, http_scope("/bad"))
    good = await drive(wrapped, http_scope("/good"))

    assert isinstance(bad.error, sa.exc.IntegrityError)
    assert [] == bad.messages
    assert 200 == good.status
    assert [1] == await rows()


async def test_exception_rolls_back(db, drive, rows):
    """G3, G4: an exception, a 5xx and a rollback-only scope leave nothing."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        if scope["path"] == "/raise":
            raise ValueError
        if scope["path"] == "/preview":
            db.set_rollback_only()
        await respond(send, 500 if scope["path"] == "/500" else 200)

    wrapped = DBSessionMiddleware(app, database=db)
    paths = ("/raise", "/preview", "/500")
    exchanges = [await drive(wrapped, http_scope(path)) for path in paths]

    assert [None, 200, 500] == [each.status for each in exchanges]
    assert [] == await rows()


async def test_swallowed_error_is_never_taken_for_committed(db, drive, rows):
    """G21: an aborted transaction is found, and one whose savepoint was rolled back commits."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        with pytest.raises(sa.exc.DBAPIError):
            if scope["path"] == "/healed":
                async with db.session.begin_nested():
                    await db.session.execute(sa.text("SELECT 1 / 0"))
            else:
                await db.session.execute(sa.text("SELECT 1 / 0"))
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    aborted = await drive(wrapped, http_scope("/aborted"))
    healed = await drive(wrapped, http_scope("/healed"))

    assert isinstance(aborted.error, TransactionAbortedError)
    assert 200 == healed.status
    assert [1] == await rows()


async def test_stream_and_background_have_transactions_of_their_own(db, drive, rows, timeline):
    """G7, G8: body and background work commit by themselves; a held stream reads on its cursor."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await send(start(200))
        db.session.add(Item(id=2))
        await db.session.flush()
        await send(body(b"chunk", more=True))
        await send(body())
        db.session.add(Item(id=3))

    @session_options(stream="hold")
    async def held(scope, receive, send):
        found = await db.session.stream_scalars(
            sa.text("SELECT n FROM generate_series(1, 200) AS n"),
            execution_options={"yield_per": 50},
        )
        await send(start(200))
        numbers = [number async for number in found]
        await send(body(str(len(numbers)).encode()))

    exchange = await drive(DBSessionMiddleware(app, database=db))
    streamed = await drive(DBSessionMiddleware(held, database=db))

    assert exchange.error is None
    assert 4 == timeline.count("commit")
    assert [1, 2, 3] == await rows()
    assert b"200" == streamed.body


async def test_more_requests_than_server_connections_are_served(db, drive, rows):
    """G12: thirty requests at once, each in a transaction of its own, share three connections."""
    inside = 0
    most = 0

    async def app(scope, receive, send):
        nonlocal inside, most
        number = int(scope["path"][1:])
        db.session.add(Item(id=number))
        await db.session.flush()
        inside += 1
        most = max(most, inside)
        assert number == await db.session.scalar(sa.select(Item.id).where(Item.id == number))
        await asyncio.sleep(0)
        inside -= 1
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    exchanges = await asyncio.gather(*(drive(wrapped, http_scope(f"/{n}")) for n in range(30)))

    assert [200] * 30 == [each.status for each in exchanges]
    assert list(range(30)) == await rows()
    assert most <= SERVER_CONNECTIONS


# psycopg does the same, five seconds later: it waits that long for the cancellation to be answered.
@pytest.mark.parametrize("driver", ["asyncpg"], indirect=True)
async def test_wait_for_a_server_connection_ends_in_time(db, engine, drive, rows):
    """A request's `timeout` bounds the wait inside the pooler, and it serves the next request."""

    async def app(scope, receive, send):
        db.session.add(Item(id=int(scope["path"][1:])))
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db, timeout=0.3)
    holders = [await engine.connect() for _ in range(SERVER_CONNECTIONS)]
    for holder in holders:
        await holder.scalar(PID)
    async with asyncio.timeout(10):
        late = await drive(wrapped, http_scope("/1"))
    for holder in holders:
        await holder.close()
    served = await drive(DBSessionMiddleware(app, database=db), http_scope("/2"))

    assert 504 == late.status
    assert 200 == served.status
    assert [2] == await rows()


async def test_settings_end_with_their_transaction(engine, drive):
    """G20: isolation, read-only, timeout and label hold, and no later client has them.

    The next transaction is another client's, on the same server connection.
    """
    db = Database(engine, label_transactions="application_name")
    settings = sa.text(
        "SELECT current_setting('transaction_isolation'), "
        "current_setting('transaction_read_only'), "
        "current_setting('statement_timeout'), current_setting('application_name'), "
        "pg_backend_pid()"
    )
    seen: list[Any] = []

    @db.transactional("REQUIRES_NEW", isolation_level="SERIALIZABLE", read_only=True, timeout=30)
    async def shaped() -> None:
        seen.append((await db.session.execute(settings)).one())

    async def app(scope, receive, send):
        await shaped()
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))
    async with engine.connect() as held, engine.connect() as other:
        await held.rollback()
        seen.append((await other.execute(settings)).one())

    (*during, pid), (*after, next_pid) = seen
    assert pid == next_pid
    assert ["serializable", "on"] == during[:2]
    assert during[2] != "0"
    assert "shaped" in during[3]
    assert ["read committed", "off", "0"] == after[:3]
    assert "shaped" not in after[3]


async def test_cancelled_anywhere_it_ends_truly(db, postgres_schema, monkeypatch):
    """G10: cancelled at any suspension, nothing is left behind, in the pooler neither."""
    direct = postgres_schema.url.set(drivername="postgresql+asyncpg")
    monkeypatch.setattr(
        test_cancellation,
        "create_async_engine",
        lambda url, **options: create_async_engine(direct, **options),
    )

    swept = await test_cancellation.sweep(
        db, test_cancellation.handler_window, "once", check=test_cancellation.check_handler
    )

    assert swept >= 5


# --------------------------------------------------------------------------------------
# Connections that are lost
# --------------------------------------------------------------------------------------


async def test_server_connection_lost_before_commit_is_no_success(db, drive, rows, postgres_schema):
    """G15: where PostgreSQL ended the connection after a write, no head claims the write."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.flush()
        pid = await db.session.scalar(PID)
        with postgres_schema.connect() as other:
            other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5000)))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages
    assert [] == await rows()


async def test_pooler_killed_in_mid_transaction_is_no_success(
    doomed_pgbouncer, through, drive, postgres_schema
):
    """G15: without the pooler COMMIT reaches nobody, and no head claims that it did."""
    engine = through(doomed_pgbouncer)
    db = Database(engine)
    outcomes = []

    async def app(scope, receive, send):
        scope_ = current_scope()
        db.session.add(Item(id=1))
        await db.session.flush()
        doomed_pgbouncer.kill()
        try:
            await respond(send)
        finally:
            outcomes.append(scope_.outcome)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages
    assert 0 == engine.pool.checkedout()
    with postgres_schema.connect() as connection:
        assert [] == list(connection.scalars(sa.select(Item.id)))
    await engine.dispose()


async def test_pooler_that_reconnects_lets_the_transaction_end(db, drive, rows, pgbouncer):
    """RECONNECT, as after a switch of the server: what is open commits, what follows too."""
    pids = []

    async def app(scope, receive, send):
        db.session.add(Item(id=int(scope["path"][1:])))
        await db.session.flush()
        pids.append(await db.session.scalar(PID))
        if scope["path"] == "/1":
            pgbouncer.tell("RECONNECT")
        await respond(send)

    wrapped = DBSessionMiddleware(app, database=db)
    exchanges = [await drive(wrapped, http_scope(path)) for path in ("/1", "/2")]

    assert [200, 200] == [each.status for each in exchanges]
    assert pids[0] != pids[1]
    assert [1, 2] == await rows()


@asynccontextmanager
async def cuttable(program: str, schema: sa.Engine) -> AsyncIterator[tuple[Proxy, PgBouncer]]:
    """A pooler whose connections to the server can be cut."""
    async with Proxy(schema.url, tcp=True) as proxy:
        pooler = await asyncio.to_thread(PgBouncer, program, proxy.url)
        yield proxy, pooler
        pooler.stop()
    clean(schema)


@pytest.mark.parametrize("resolve", [False, True])
@pytest.mark.parametrize(("cut", "committed"), [(before_commit, []), (after_commit, [1])])
async def test_commit_lost_behind_the_pooler_is_in_doubt(
    pgbouncer_program, through, drive, postgres_schema, cut, committed, resolve
):
    """G15: where the pooler loses its server during COMMIT the outcome is in doubt.

    Asked by way of the pooler, PostgreSQL tells what became of it.
    """
    scopes = []
    async with cuttable(pgbouncer_program, postgres_schema) as (proxy, pooler):
        engine = through(pooler)
        db = Database(engine, resolve_in_doubt=resolve)

        async def app(scope, receive, send):
            scopes.append(current_scope())
            db.session.add(Item(id=1))
            await db.session.flush()
            proxy.arm("cut", cut)
            await respond(send)

        exchange = await drive(DBSessionMiddleware(app, database=db))
        with postgres_schema.connect() as connection:
            found = list(connection.scalars(sa.select(Item.id)))
        await engine.dispose()

    resolved = Outcome.COMMITTED if committed else Outcome.ROLLED_BACK
    assert committed == found
    assert (resolved if resolve else Outcome.IN_DOUBT) is scopes[0].outcome
    assert (200 if resolve and committed else None) == exchange.status
    assert (exchange.error is None) == (resolve and bool(committed))


@pytest.mark.parametrize("driver", ["asyncpg"], indirect=True)
async def test_settings_that_the_pooler_takes_along_arrive(pgbouncer, through):
    """A time zone that the driver names holds in each transaction."""
    settings = {"application_name": "shop", "TimeZone": "Asia/Tokyo"}
    engine = through(pgbouncer, connect_args={"server_settings": settings})
    async with engine.connect() as connection:
        zone = await connection.scalar(sa.text("SHOW timezone"))
    await engine.dispose()

    assert "Asia/Tokyo" == zone


# --------------------------------------------------------------------------------------
# Reads in one round trip
# --------------------------------------------------------------------------------------


async def test_reads_of_a_role_that_is_read_only(engine, through, pgbouncer, postgres_schema):
    """G20: a role's setting holds a pooler's connections read-only, and reads use them."""
    readers = through(pgbouncer)
    db: Database[Any] = Database(engine, reads=readers)
    role = f"ALTER ROLE {engine.url.username} IN DATABASE {engine.url.database}"
    with postgres_schema.connect() as connection:
        connection.execute(sa.text(f"{role} SET default_transaction_read_only = on"))
    pgbouncer.tell("RECONNECT")
    try:
        async with db.session_scope(read_only=True) as session:
            pids = [await session.scalar(PID) for _ in range(3)]
            with pytest.raises(sa.exc.DBAPIError, match="read-only"):
                await session.execute(sa.insert(Item).values(id=1))
            await session.rollback()
    finally:
        await readers.dispose()
        with postgres_schema.connect() as connection:
            connection.execute(sa.text("SET default_transaction_read_only = off"))
            connection.execute(sa.text(f"{role} RESET default_transaction_read_only"))
        pgbouncer.tell("RECONNECT")

    assert all(pids)


async def test_reads_that_the_pooler_does_not_hold_are_refused(engine, through, pgbouncer, driver):
    """G1: a pooler refuses the setting at the start, and without it the connection isn't used."""
    url = pgbouncer.url.set(drivername=f"postgresql+{driver}")
    told = create_async_engine(url, **read_only_options(url))
    for readers, message in (
        (told, "unsupported startup parameter"),
        (through(pgbouncer), "doesn't hold read-only"),
    ):
        db: Database[Any] = Database(engine, reads=readers)
        # asyncpg's own error of a connection is none of SQLAlchemy's
        with pytest.raises(Exception, match=message):
            async with db.session_scope(read_only=True) as session:
                await session.scalar(PID)
        await readers.dispose()
