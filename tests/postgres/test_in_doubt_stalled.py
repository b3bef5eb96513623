"""COMMIT gets no answer, and its connection does not end: who gives up, and what follows."""

import asyncio
from typing import Any

import pytest

from asgi_dbscope import (
    CommitInDoubtError,
    DBSessionMiddleware,
    Outcome,
    current_scope,
)
from bench.proxy import after_commit
from tests.fix_asgi import start
from tests.fix_database import Item
from tests.fix_in_doubt import ENOUGH, app_of, run_job

# Psycopg waits five seconds for a server that it has asked to cancel.
pytestmark = pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)


@pytest.mark.parametrize("resolve", [True, False])
async def test_stalled_answer_is_asked_for_when_the_request_is_cancelled(
    make_db, proxy, drive, rows, resolve
):
    """G15, G10: no answer and no end of the connection: out of grace the server is asked."""
    db = make_db(cleanup_timeout=1.0, resolve_in_doubt=resolve)
    scopes: list[Any] = []
    faults: list[Any] = []
    request = asyncio.create_task(
        drive(app_of(db, scopes, lambda: faults.append(proxy.arm("swallow", after_commit))))
    )
    async with asyncio.timeout(ENOUGH):
        while not faults:
            await asyncio.sleep(0.001)
    await faults[0].wait()
    request.cancel()
    exchange = await request

    assert [1] == await rows()
    if resolve:
        assert Outcome.COMMITTED is scopes[0].outcome
        assert 201 == exchange.status
    else:
        assert Outcome.IN_DOUBT is scopes[0].outcome
        assert [] == exchange.messages
        assert isinstance(exchange.error, asyncio.CancelledError)


async def test_own_commit_that_is_cancelled_is_in_doubt(make_db, proxy, rows, caplog):
    """G15, G10: who cancels a commit() of the user's own isn't kept waiting for an answer."""
    db = make_db()
    async with db.session_scope() as session:
        session.add(Item(id=1))
        await session.flush()
        fault = proxy.arm("swallow", after_commit)
        committing = asyncio.create_task(session.commit())
        await fault.wait()
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        assert Outcome.IN_DOUBT is db.scope.outcome
        await session.rollback()

    assert "may or may not have been committed" in caplog.text
    assert [1] == await rows()


@pytest.mark.parametrize("resolve", [True, False])
async def test_drivers_timeout_is_no_answer(make_db, proxy, rows, resolve):
    """G15: a driver that gave up waiting knows nothing of the COMMIT, which was done."""
    db = make_db(resolve_in_doubt=resolve, connect_args={"command_timeout": 1})

    outcome, error = await run_job(db, lambda: proxy.arm("swallow", after_commit))

    assert [1] == await rows()
    if resolve:
        assert (Outcome.COMMITTED, None) == (outcome, error)
    else:
        assert Outcome.IN_DOUBT is outcome
        assert isinstance(error, CommitInDoubtError)
        assert isinstance(error.__cause__, TimeoutError)


async def test_commit_in_a_task_that_outlives_its_request_is_in_doubt(make_db, proxy, drive, rows):
    """G15, G22: the request gives up a task that is inside COMMIT, and nobody knows the answer."""
    db = make_db(cleanup_timeout=0.1)
    faults: list[Any] = []
    scopes: list[Any] = []
    tasks: list[Any] = []

    async def app(scope, receive, send):
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        faults.append(proxy.arm("stall", after_commit))
        tasks.append(asyncio.create_task(db.session.commit()))
        await faults[0].wait()
        await send(start(201))

    exchange = await drive(DBSessionMiddleware(app, database=db))
    assert [] == exchange.messages
    assert Outcome.IN_DOUBT is scopes[0].outcome
    faults[0].resume()
    await asyncio.wait(tasks)

    assert [1] == await rows()
