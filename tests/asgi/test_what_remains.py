"""What a scope leaves behind for those that come after it: nothing, however they follow it."""

import asyncio
import gc
import itertools
import weakref
from collections import Counter
from typing import Any

import pytest

import asgi_dbscope
from asgi_dbscope import Database, DBSessionMiddleware, SessionScopeClosedError, current_scope
from bench.calls import count_calls
from tests.fix_asgi import Drive, http_scope, respond
from tests.fix_database import Item

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
@pytest.mark.once
async def test_who_follows_in_the_context_of_a_scope_keeps_nothing_of_it(kind, overlaps):
    """G9: A task started inside of a scope has that in its context, and no more of the past."""
    line = Line(kind, overlaps=overlaps)
    await line.run()

    assert 2 >= line.alive


# --------------------------------------------------------------------------------------
# The cost of a request
# --------------------------------------------------------------------------------------


REQUESTS = 12


class Past:
    """An app that has been at work for a while, with all that a request may leave behind.

    Args:
        drive: Sends it a request.

        db: Its database.
    """

    def __init__(self, drive: Drive, db: Database[Any]) -> None:
        self._drive = drive
        self._app = DBSessionMiddleware(self._answer, database=db)
        self._db = db
        self._ids = itertools.count(1)
        self._is_over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.hooks = 0
        self.has_tasks = False

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        self._db.session.add(Item(id=next(self._ids)))
        for _ in range(self.hooks):
            self._db.on_commit(self._hear)
            self._db.on_completion(self._hear, when="after_response")
        if self.has_tasks:
            self._tasks.append(asyncio.create_task(self._outlive()))
        await respond(send)

    async def _hear(self, *outcome: object) -> None:
        pass

    async def _outlive(self) -> None:
        await self._is_over.wait()
        with pytest.raises(SessionScopeClosedError):
            self._db.session  # noqa: B018 - asked for

    async def serve(self, requests: int) -> None:
        """Serve so many, one after the other."""
        for _ in range(requests):
            exchange = await self._drive(self._app)
            assert 200 == exchange.status

    async def calls(self) -> int:
        """Serve one; how many calls the package makes for it, its own and Python's."""
        return await count_calls(asgi_dbscope, self.serve(1))

    async def end(self) -> None:
        """Let the tasks end that outlived their requests."""
        self._is_over.set()
        await asyncio.gather(*self._tasks)
        self._tasks.clear()


def ours() -> Counter[str]:
    """How many objects of the package there are, by their class."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    return Counter(
        kind.__name__ for kind in kinds if str(kind.__module__).startswith("asgi_dbscope")
    )


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.once
async def test_a_request_costs_the_same_whatever_came_before(db, drive):
    """G9: Requests, hooks and tasks that outlive theirs leave nothing that others pay for."""
    past = Past(drive, db)
    await past.serve(3)
    calls, objects = await past.calls(), ours()

    await past.serve(REQUESTS)
    assert calls == await past.calls()

    past.hooks = 3
    await past.serve(REQUESTS)
    past.hooks = 0
    assert calls == await past.calls()

    past.has_tasks = True
    await past.serve(REQUESTS)
    past.has_tasks = False
    assert calls == await past.calls()

    await past.end()
    assert (calls, objects) == (await past.calls(), ours())
