"""A thread that nobody waits for uses a synchronous session in the moment its scope ends."""

import asyncio
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from asgi_dbscope import Database, DBSessionMiddleware, current_scope
from tests.fix_asgi import Drive, respond
from tests.fix_database import Child
from tests.sync_apps import Rows, held, write

pytest_plugins = ["tests.fix_sync"]

SyncDatabase = Database[Session]


def write_orphan(db: SyncDatabase) -> None:
    """Write an item, and a row that only COMMIT refuses."""
    write(db, 1)
    db.session.execute(sa.insert(Child).values(id=1, item_id=404))


@pytest.mark.parametrize("is_late", [False, True])
async def test_head_that_waits_for_a_commit_that_fails_claims_no_success(
    drive: Drive,
    sync_db: SyncDatabase,
    sync_engine: sa.Engine,
    sync_rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    is_late: bool,
) -> None:
    """G1, G2: the error is the head's too, also where its own thread comes after that COMMIT."""
    limiter = anyio.CapacityLimiter(1)
    monkeypatch.setattr(sync_db, "limiter", lambda work: limiter)
    releasing: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(write_orphan, sync_db)
        releasing.append(asyncio.create_task(asyncio.to_thread(sync_db.release)))
        await hold.reached.wait()
        if is_late:
            limiter.acquire_on_behalf_of_nowait(monkeypatch)
        meanwhile = asyncio.create_task(let_go(current_scope().use))
        try:
            await respond(send)
        finally:
            await meanwhile

    async def let_go(use: Any) -> None:
        if is_late:
            hold.let_go()
            await asyncio.wait(releasing)
            limiter.release_on_behalf_of(monkeypatch)
            return
        while not use._changed._waiters:
            await asyncio.sleep(0)
        hold.let_go()

    with held(sync_engine, "commit") as hold:
        exchange = await drive(DBSessionMiddleware(app, database=sync_db))
        await asyncio.wait(releasing)

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert releasing[0].exception() is exchange.error
    assert ([], []) == (exchange.messages, sync_rows())
