"""Apps whose work is done in worker threads, held where it matters; and what is committed."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio.to_thread
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from asgi_dbscope import Database
from tests.fix_asgi import App, body, start
from tests.fix_cancel import ENOUGH
from tests.fix_database import Item

Rows = Callable[[], list[int]]


def committed(engine: sa.Engine) -> list[int]:
    """The ids of the items that *engine*'s database has."""
    other = sa.create_engine(engine.url, poolclass=sa.NullPool)
    with other.connect() as connection:
        return list(connection.scalars(sa.select(Item.id).order_by(Item.id)))


def endpoint(*functions: Callable[[], Any], status: int = 201) -> App:
    """An app that calls each function in a worker thread, one after the other, and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for function in functions:
            await anyio.to_thread.run_sync(function)
        await send(start(status))
        await send(body(b"done"))

    return app


class Hold:
    """The next event of its kind waits, in its thread, until it is let go.

    Attributes:
        reached: Set when a thread has come to it.
    """

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._let_go = threading.Event()
        self._is_used = False

    def __call__(self, *args: object) -> None:
        if not self._is_used:
            self._is_used = True
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._let_go.wait(ENOUGH)

    def let_go(self) -> None:
        """Let the thread go on."""
        self._let_go.set()


@contextmanager
def held(engine: sa.Engine, event: str) -> Iterator[Hold]:
    """Hold the next *event* of *engine*."""
    hold = Hold()
    sa.event.listen(engine, event, hold)
    try:
        yield hold
    finally:
        hold.let_go()
        sa.event.remove(engine, event, hold)


def write(db: Database[Session], number: int) -> None:
    """Write an item with the current session."""
    db.session.add(Item(id=number))
    db.session.flush()


async def checked_in(engine: sa.Engine) -> bool:
    """Whether a thread that nobody waits for gives its connection back."""
    async with asyncio.timeout(ENOUGH):
        while engine.pool.checkedout():  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
    return True


def narrow_threads(
    patch: pytest.MonkeyPatch, db: Database[Session], count: int, *, shared: bool
) -> None:
    """Leave the endpoints *count* threads; *shared*: the endings have no others, either."""
    threads = anyio.to_thread.current_default_thread_limiter()
    if shared:
        patch.setattr(db, "limiter", lambda *_: threads)
    patch.setattr(threads, "total_tokens", count)
