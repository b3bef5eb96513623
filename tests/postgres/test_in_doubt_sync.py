"""A COMMIT without an answer in a synchronous session: asked for in the thread that sent it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    CommitInDoubtError,
    Database,
    DBSessionMiddleware,
    Outcome,
    State,
    current_scope,
)
from bench.proxy import Proxy, after_commit, before_commit
from tests.fix_database import Item
from tests.fix_in_doubt import ENOUGH
from tests.sync_apps import endpoint

pytestmark = pytest.mark.parametrize("engine", ["psycopg"], indirect=True)

LOST = pytest.mark.parametrize(
    ("place", "committed"), [(before_commit, []), (after_commit, [1])], ids=["commit", "answer"]
)

MakeDatabase = Callable[..., Database[Any]]


@pytest.fixture
async def make_sync_db(proxy: Proxy) -> AsyncIterator[MakeDatabase]:
    """Make a synchronous database with one connection, by the proxy, that asks what became."""
    engines: list[sa.Engine] = []

    def make(*, cleanup_timeout: float = ENOUGH) -> Database[Any]:
        url = proxy.url.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, pool_size=1, max_overflow=0, pool_timeout=2)
        engines.append(engine)
        return Database(engine, cleanup_timeout=cleanup_timeout, resolve_in_doubt=True)

    yield make
    proxy.disarm()
    proxy.is_down = False
    proxy.cut()  # what a thread still waits for
    for engine in engines:
        async with asyncio.timeout(ENOUGH):
            while engine.pool.checkedout():  # type: ignore[attr-defined]
                await asyncio.sleep(0.001)  # a thread that nobody waits for clears up
        await asyncio.to_thread(engine.dispose)


def in_loop(function):
    """A call of the proxy's from a thread: it lives in the event loop."""
    loop = asyncio.get_running_loop()

    def call():
        async def called():
            return function()

        return asyncio.run_coroutine_threadsafe(called(), loop).result()

    return call


@LOST
@pytest.mark.parametrize("way", ["scope", "commit", "begin", "release", "new"])
async def test_script_ends_as_its_lost_commit_did(make_sync_db, proxy, rows, place, committed, way):
    """G15: in a thread, too, whoever commits hears what became of it."""
    db = make_sync_db()
    lose = in_loop(lambda: proxy.arm("cut", place))
    scopes: list[Any] = []

    def write(session):
        scopes.append(db.scope)
        session.add(Item(id=1))
        session.flush()
        lose()

    def script():
        if way == "begin":
            with db.session_scope(mode="manual") as session, session.begin():
                write(session)
        elif way == "new":
            with db.session_scope(), db.transactional("REQUIRES_NEW") as session:
                write(session)
        else:
            with db.session_scope() as session:
                write(session)
                if way == "commit":
                    session.commit()
                elif way == "release":
                    db.release()

    if committed:
        await asyncio.to_thread(script)
        assert Outcome.COMMITTED is scopes[0].outcome
    else:
        with pytest.raises(sa.exc.OperationalError) as raised:
            await asyncio.to_thread(script)
        assert "nothing of it was kept" in raised.value.__notes__[0]
        assert Outcome.ROLLED_BACK is scopes[0].outcome

    assert committed == await rows()


def request_of(db, drive, scopes, lose):
    """A request whose `def` endpoint writes a row and loses its COMMIT."""

    def work():
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        db.session.flush()
        lose()

    return drive(DBSessionMiddleware(endpoint(work), database=db))


@LOST
async def test_endpoint_ends_as_its_lost_commit_did(
    make_sync_db, proxy, drive, rows, place, committed
):
    """G15, G1: the response of a `def` endpoint goes out if its COMMIT was done."""
    scopes: list[Any] = []
    lose = in_loop(lambda: proxy.arm("cut", place))

    exchange = await request_of(make_sync_db(), drive, scopes, lose)

    assert committed == await rows()
    if committed:
        assert (201, b"done") == (exchange.status, exchange.body)
    else:
        assert [] == exchange.messages
        assert isinstance(exchange.error, sa.exc.OperationalError)
        assert scopes[0].was_commit_lost


@pytest.mark.parametrize("is_silent", [True, False])
async def test_deadline_leaves_it_in_doubt(make_sync_db, proxy, drive, rows, is_silent):
    """G15: a server that is gone, or takes the connection and says nothing, is left in time."""
    scopes: list[Any] = []

    def go_down():
        proxy.arm("cut", after_commit)
        if is_silent:
            proxy.arm("swallow", lambda message: not message.kind, times=None)
        else:
            proxy.is_down = True

    began = time.monotonic()
    exchange = await request_of(make_sync_db(cleanup_timeout=0.3), drive, scopes, in_loop(go_down))

    assert 0.3 <= time.monotonic() - began < ENOUGH
    assert isinstance(exchange.error, CommitInDoubtError)
    assert isinstance(exchange.error.transaction_id, int)
    assert Outcome.IN_DOUBT is scopes[0].outcome
    assert [1] == await rows()


async def test_thread_that_finds_out_too_late_claims_nothing(make_sync_db, proxy, drive, rows):
    """G15, G10: out of grace a cancelled request is in doubt, whatever its thread hears after."""
    db = make_sync_db(cleanup_timeout=0.1)
    scopes: list[Any] = []
    fault = proxy.arm("stall", after_commit)
    request = asyncio.create_task(request_of(db, drive, scopes, lambda: None))
    await fault.wait()
    db.cleanup_timeout = ENOUGH  # the thread has longer than the request waits for it
    asked = proxy.arm("stall", lambda message: not message.kind)
    proxy.cut()
    await asked.wait()
    request.cancel()
    exchange = await request
    outcome = scopes[0].outcome
    asked.resume()
    async with asyncio.timeout(ENOUGH):
        while proxy.links:
            await asyncio.sleep(0.001)  # the thread asks, and ends

    assert [] == exchange.messages
    assert State.CLOSED is scopes[0].state
    assert Outcome.IN_DOUBT is outcome is scopes[0].outcome
    assert [1] == await rows()
