"""A COMMIT without an answer, and PostgreSQL asked what became of it."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    Outcome,
    current_scope,
)
from tests.fix_asgi import body, start
from tests.fix_database import POSTGRES_DRIVERS, Item
from tests.fix_proxy import Proxy, after_commit, before_commit

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)

LOST = pytest.mark.parametrize(
    ("place", "committed"), [(before_commit, []), (after_commit, [1])], ids=["commit", "answer"]
)
"""What gets lost: COMMIT itself, or its answer; and what is committed then."""

COUNT = int(os.environ.get("DBSCOPE_TEST_LOST_COMMITS", "40"))
"""How many COMMITs get lost in one test."""

MakeDatabase = Callable[..., Database[Any]]


@pytest.fixture
async def make_db(proxy: Proxy) -> AsyncIterator[MakeDatabase]:
    """Make a database that is reached by the proxy, and asks what became of a COMMIT."""
    engines = []

    def make(
        *, cleanup_timeout: float = 10.0, resolve_in_doubt: bool = True, **options: Any
    ) -> Any:
        engine = create_async_engine(proxy.url, **options)
        engines.append(engine)
        return Database(engine, cleanup_timeout=cleanup_timeout, resolve_in_doubt=resolve_in_doubt)

    yield make
    leaked = [engine.pool.checkedout() for engine in engines]  # type: ignore[attr-defined]
    for engine in engines:
        await engine.dispose()
    assert [0] * len(engines) == leaked


@pytest.fixture
def db(make_db: MakeDatabase) -> Database[Any]:
    """One whose pool has a single connection: the lost one has to be given back first."""
    return make_db(pool_size=1, max_overflow=0, pool_timeout=2)


async def write(session, number=1):
    """Write a row."""
    session.add(Item(id=number))
    await session.flush()


async def respond(send, status=200):
    """Answer."""
    await send(start(status))
    await send(body(b"ok"))


def told(caplog, level):
    """What the log says, at this level."""
    return [each.message for each in caplog.records if each.levelno == level]


class Hooks(list[Any]):
    """Which hooks have run."""

    def register(self, db):
        """One of each."""
        db.on_commit(self.append, "committed")
        db.on_rollback(self.append, "rolled back")
        db.on_completion(self.append)


AS_COMMITTED = ["committed", Outcome.COMMITTED]
AS_ROLLED_BACK = ["rolled back", Outcome.ROLLED_BACK]


@LOST
async def test_request_ends_as_its_lost_commit_did(
    db, proxy, drive, rows, place, committed, caplog
):
    """G15, G1: asked on another connection, the server says what became; so goes the response."""
    scopes, hooks = [], Hooks()

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await write(db.session)
        hooks.register(db)
        proxy.arm("cut", place)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert committed == await rows()
    [warning] = told(caplog, logging.WARNING)
    assert str(scopes[0].transaction_id) in warning
    if committed:
        assert exchange.error is None
        assert (201, b"ok") == (exchange.status, exchange.body)
        assert Outcome.COMMITTED is scopes[0].outcome
        assert AS_COMMITTED == hooks
        assert "is committed" in warning
        assert not scopes[0].was_commit_lost
    else:
        assert isinstance(exchange.error, sa.exc.DBAPIError)
        assert [] == exchange.messages
        assert Outcome.ROLLED_BACK is scopes[0].outcome
        assert AS_ROLLED_BACK == hooks
        assert "is aborted" in warning
        assert "nothing of it was kept" in exchange.error.__notes__[0]
        assert scopes[0].was_commit_lost


async def lose_many(make_db, proxy, place, count):
    """Lose as many COMMITs, ten at a time; which requests say that they are committed, or not."""
    db = make_db(pool_size=10, max_overflow=0)
    scopes = {}
    places = asyncio.Semaphore(10)

    async def job(number):
        async with places:
            with contextlib.suppress(sa.exc.DBAPIError):
                async with db.session_scope() as session:
                    scopes[number] = db.scope
                    await write(session, number)

    fault = proxy.arm("cut", place, times=None)
    await asyncio.gather(*(job(number) for number in range(count)))
    assert count == len(fault.struck)
    return {number: scope.outcome for number, scope in sorted(scopes.items())}


@pytest.mark.parametrize(
    ("place", "outcome"),
    [(before_commit, Outcome.ROLLED_BACK), (after_commit, Outcome.COMMITTED)],
    ids=["commit", "answer"],
)
async def test_every_lost_commit_is_resolved_rightly(make_db, proxy, rows, place, outcome):
    """G15: of many COMMITs that get lost, or whose answers do, each is resolved, none wrongly."""
    outcomes = await lose_many(make_db, proxy, place, COUNT)

    assert dict.fromkeys(range(COUNT), outcome) == outcomes
    assert ([] if outcome is Outcome.ROLLED_BACK else list(range(COUNT))) == await rows()
