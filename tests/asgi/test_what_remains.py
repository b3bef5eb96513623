"""What a scope leaves behind for those that come after it: nothing, however they follow it."""

import asyncio
import gc
import weakref
from typing import Any

import pytest

from asgi_dbscope import Database, DBSessionMiddleware, current_scope
from tests.fix_asgi import http_scope, respond

GENERATIONS = 10


class ASGIScope(dict[str, Any]):
    """One that a weak reference can be made to."""


class Line:
    """Tasks, each of which starts the next one inside of a scope of its own.

    So the next one is born in a context in which that scope is the current one. A server does it,
    too: it reads a connection's next request in the context of the one before.

    Attributes:
        alive: How much of theirs there was when the last one had its own.
    """

    def __init__(self, kind: str, *, overlaps: bool) -> None:
        self.alive = 0
        self._db: Database[Any] = Database("sqlite+aiosqlite://")
        self._live = getattr(self, f"_live_in_{kind}")
        self._overlaps = overlaps
        self._left: list[weakref.ref[Any]] = []
        self._is_over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Let them follow each other."""
        self._start()
        await self._is_over.wait()
        await asyncio.gather(*self._tasks)

    def _start(self) -> asyncio.Event:
        has_begun = asyncio.Event()
        task = asyncio.create_task(self._live(has_begun))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return has_begun

    async def _go_on(self, has_begun: asyncio.Event, left: object) -> None:
        self._left.append(weakref.ref(left))
        has_begun.set()
        if len(self._left) < GENERATIONS:
            next_has_begun = self._start()
            if self._overlaps:
                await next_has_begun.wait()
            return
        for _ in range(3):  # the one before ends
            await asyncio.sleep(0)
        gc.collect()
        self.alive = sum(each() is not None for each in self._left)
        self._is_over.set()

    async def _live_in_request(self, has_begun: asyncio.Event) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self._go_on(has_begun, scope)
            await respond(send)

        async def send(message: Any) -> None:
            pass

        await DBSessionMiddleware(app, database=self._db)(ASGIScope(http_scope()), send, send)

    async def _live_in_session_scope(self, has_begun: asyncio.Event) -> None:
        async with self._db.session_scope():
            await self._go_on(has_begun, current_scope())

    async def _live_in_block(self, has_begun: asyncio.Event) -> None:
        async with self._db.session_scope(), self._db.transactional():
            await self._go_on(has_begun, current_scope())


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("kind", ["request", "session_scope", "block"])
async def test_who_follows_in_the_context_of_a_scope_keeps_nothing_of_it(kind, overlaps):
    """G9: A task started inside of a scope has that in its context, and no more of the past."""
    line = Line(kind, overlaps=overlaps)
    await line.run()

    assert 2 >= line.alive
