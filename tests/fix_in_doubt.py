"""Pytest plugin: databases that ask what became of a COMMIT, behind a proxy that loses it."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import Database, DBSessionMiddleware, Outcome, current_scope
from bench.proxy import Proxy
from tests.fix_asgi import App, Message, body, start
from tests.fix_database import Item

ENOUGH = 30.0
"""Seconds for what takes a moment, before a test gives up."""

MakeDatabase = Callable[..., Database[Any]]


@pytest.fixture
async def make_db(proxy: Proxy) -> AsyncIterator[MakeDatabase]:
    """Make a database that is reached by the proxy, and asks what became of a COMMIT.

    Its pool has one connection, unless told otherwise: the lost one has to be given back first.
    """
    engines = []

    def make(
        *, cleanup_timeout: float = ENOUGH, resolve_in_doubt: bool = True, **options: Any
    ) -> Database[Any]:
        options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 2, **options}
        engine = create_async_engine(proxy.url, **options)
        engines.append(engine)
        return Database(engine, cleanup_timeout=cleanup_timeout, resolve_in_doubt=resolve_in_doubt)

    yield make
    proxy.disarm()
    proxy.is_down = False
    leaked = [engine.pool.checkedout() for engine in engines]  # type: ignore[attr-defined]
    for engine in engines:
        await engine.dispose()
    assert [0] * len(engines) == leaked


def app_of(
    db: Database[Any],
    scopes: list[Any],
    before_answer: Callable[[], object] | None = None,
    **options: Any,
) -> DBSessionMiddleware:
    """An app that writes a row, does *before_answer*, and answers; *options* are its requests'."""

    async def app(scope: Message, receive: App, send: App) -> None:
        scopes.append(current_scope())
        db.session.add(Item(id=1))
        await db.session.flush()
        if before_answer is not None:
            before_answer()
        await send(start(201))
        await send(body(b"ok"))

    return DBSessionMiddleware(app, database=db, **options)


async def run_job(
    db: Database[Any], before_commit: Callable[[], object] | None = None
) -> tuple[Outcome, Exception | None]:
    """A job that writes a row; its outcome, and what it raised."""
    scopes: list[Any] = []
    error = None
    try:
        async with db.session_scope() as session:
            scopes.append(db.scope)
            session.add(Item(id=1))
            await session.flush()
            if before_commit is not None:
                before_commit()
    except Exception as raised:
        error = raised
    return scopes[0].outcome, error
