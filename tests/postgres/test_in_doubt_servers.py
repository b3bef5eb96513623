"""Whether the server that is asked what became of a COMMIT is still the one that got it."""

import asyncio
import contextlib
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import (
    CommitInDoubtError,
    Database,
    Outcome,
)
from asgi_dbscope._transaction_status import Server
from bench.postgres import PostgresUnavailable, WheelServer
from bench.proxy import Proxy, after_commit, before_commit
from tests.fix_database import POSTGRES_DRIVERS, Base, Item
from tests.fix_in_doubt import ENOUGH, run_job

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


def of_another_server(transaction):
    """The one that is asked has another history."""
    return transaction._replace(server=Server("another", "1970-01-01"))


def of_a_server_unknown(transaction):
    """Which server it was couldn't be told."""
    return transaction._replace(server=None)


def before_a_crash(transaction):
    """The one that is asked has lost what it hadn't written to disk, and gives numbers again."""
    return transaction._replace(server=transaction.server._replace(unbroken_since="1970-01-01"))


def lost_in_a_crash(transaction):
    """The one that is asked hasn't given this number, or not again."""
    return before_a_crash(transaction)._replace(number=2**40 + 5)


def long_ago(transaction):
    """The one that is asked has forgotten."""
    return transaction._replace(number=0)


@pytest.mark.parametrize(
    ("place", "change", "outcome"),
    [
        (after_commit, of_another_server, Outcome.IN_DOUBT),
        (before_commit, of_another_server, Outcome.IN_DOUBT),
        (after_commit, of_a_server_unknown, Outcome.IN_DOUBT),
        (after_commit, before_a_crash, Outcome.IN_DOUBT),
        (before_commit, before_a_crash, Outcome.ROLLED_BACK),
        (before_commit, lost_in_a_crash, Outcome.ROLLED_BACK),
        (after_commit, long_ago, Outcome.IN_DOUBT),
    ],
)
async def test_servers_word_counts_as_far_as_it_knows(make_db, proxy, place, change, outcome):
    """G15: a number means what it meant on the server that gave it, until that has crashed."""
    db = make_db()
    scopes: list[Any] = []

    def be_changed(connection):
        scopes[0].transaction = change(scopes[0].transaction)

    sa.event.listen(db.session_factory.kw["bind"].sync_engine, "commit", be_changed)
    proxy.arm("cut", place)
    with pytest.raises((CommitInDoubtError, sa.exc.DBAPIError)):
        async with asyncio.timeout(ENOUGH / 2), db.session_scope() as session:
            scopes.append(db.scope)
            session.add(Item(id=1))

    assert outcome is scopes[0].outcome


async def test_server_that_cant_be_told_from_others_is_told_in_the_log(proxy, engine, rows, caplog):
    """G15: a role that may not see which server it is on gets the old doubt, and a warning."""
    blind = create_async_engine(proxy.url)

    @sa.event.listens_for(blind.sync_engine, "connect")
    def be_blind(connection, record):
        cursor = connection.cursor()
        cursor.execute("SET search_path = blind, pg_catalog, public")
        cursor.close()
        connection.commit()

    db = Database(blind, resolve_in_doubt=True)
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE SCHEMA blind"))
        await connection.execute(sa.text("CREATE VIEW blind.pg_stat_bgwriter AS SELECT 1 AS one"))
    try:
        outcome, error = await run_job(db, lambda: proxy.arm("cut", after_commit))
    finally:
        await blind.dispose()
        async with engine.begin() as connection:
            await connection.execute(sa.text("DROP SCHEMA blind CASCADE"))

    assert Outcome.IN_DOUBT is outcome
    assert isinstance(error, CommitInDoubtError)
    assert "can't be told from another one" in caplog.text
    assert [1] == await rows()


@pytest.fixture(scope="module")
def own_server():
    """A server of its own, that keeps what it has answered to a COMMIT."""
    server = WheelServer(synchronous_commit="on", fsync="off")
    try:
        server.url()
    except PostgresUnavailable as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@contextlib.asynccontextmanager
async def on_its_own(server, driver):
    """A proxy before this server, and an engine that reaches it by that."""
    url = server.url().set(drivername=f"postgresql+{driver}")
    async with Proxy(url) as proxy:
        engine = create_async_engine(proxy.url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()  # the next connection is one that the database knows
        yield proxy, engine
        await engine.dispose()


async def ids(engine):
    """What is there."""
    async with engine.connect() as connection:
        return list(await connection.scalars(sa.select(Item.id).order_by(Item.id)))


async def struck(faults):
    """Wait until the one fault that is armed some time has struck."""
    async with asyncio.timeout(ENOUGH):
        while not faults:
            await asyncio.sleep(0.001)
    await faults[0].wait()


@pytest.mark.parametrize(
    ("mode", "place", "outcome"),
    [
        ("fast", before_commit, Outcome.ROLLED_BACK),
        ("fast", after_commit, Outcome.COMMITTED),
        ("immediate", before_commit, Outcome.ROLLED_BACK),
        # The number may have been given again: nothing proves that it is ours that is committed.
        ("immediate", after_commit, Outcome.IN_DOUBT),
    ],
)
async def test_server_that_restarts_during_commit_is_asked_when_it_is_back(
    engine, own_server, mode, place, outcome
):
    """G15: after a shutdown the server knows all; after a crash, what was certainly lost."""
    faults: list[Any] = []
    async with on_its_own(own_server, engine.dialect.driver) as (proxy, own):
        db = Database(own, resolve_in_doubt=True, cleanup_timeout=ENOUGH)
        job = asyncio.create_task(run_job(db, lambda: faults.append(proxy.arm("stall", place))))
        await struck(faults)
        await asyncio.to_thread(own_server.restart, mode)
        found, error = await job
        assert ([1] if place is after_commit else []) == await ids(own)

    assert outcome is found
    if outcome is Outcome.ROLLED_BACK:
        assert isinstance(error, sa.exc.DBAPIError)
    elif outcome is Outcome.IN_DOUBT:
        assert isinstance(error, CommitInDoubtError)


async def test_number_that_is_given_again_after_a_crash_claims_nothing(engine, own_server):
    """G15: a server that crashed may give a lost transaction's number to one that is committed."""
    faults: list[Any] = []
    async with on_its_own(own_server, engine.dialect.driver) as (proxy, own):
        db = Database(own, resolve_in_doubt=True, cleanup_timeout=ENOUGH)
        scopes: list[Any] = []

        def stall():
            scopes.append(db.scope)
            faults.append(proxy.arm("stall", before_commit))

        job = asyncio.create_task(run_job(db, stall))
        await struck(faults)
        lost = scopes[0].transaction_id
        proxy.is_down = True
        await asyncio.to_thread(own_server.restart, "immediate")
        direct = create_async_engine(own_server.url().set(drivername="postgresql+asyncpg"))
        given, item = 0, 1
        while given < lost:  # one of them is committed under the lost one's number
            item += 1
            async with direct.begin() as connection:
                await connection.execute(sa.insert(Item).values(id=item))
                given = await connection.scalar(sa.text("SELECT pg_current_xact_id()::text::int8"))
        async with direct.connect() as connection:
            status = await connection.scalar(sa.text(f"SELECT pg_xact_status('{lost}')"))
        await direct.dispose()
        proxy.is_down = False
        found, error = await job

    assert "committed" == status
    assert Outcome.IN_DOUBT is found
    assert isinstance(error, CommitInDoubtError)
