"""Branches: sessions of their own for what is to run at the same time."""

from __future__ import annotations

import asyncio
import inspect
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import _current
from asgi_dbscope._blocks import OwnScope, check_with
from asgi_dbscope._completion import redeliver
from asgi_dbscope._policy import Cause
from asgi_dbscope.errors import ConfigurationError, PoolTooSmallError

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import TracebackType

    from asgi_dbscope._database import Database

S = TypeVar("S", bound=AsyncSession)
R = TypeVar("R")

UNLIMITED = 10
"""How many branches of one ``gather()`` run at once where the pool has no limit."""

_depth: ContextVar[int] = ContextVar("asgi_dbscope_gather_depth", default=0)
"""How many ``gather()`` calls this code is inside of."""


class Branch(Generic[S]):
    """What ``db.branch()`` returns: a context manager over a session of its own.

    It begins its transactions as the scope around it does, and commits or rolls back by itself.
    """

    __slots__ = ("_database", "_own")

    def __init__(self, database: Database[S]) -> None:
        self._database = database
        self._own: OwnScope[S] | None = None

    async def __aenter__(self) -> S:
        database = self._database
        check_with(database, is_async=True, call="db.branch() as session:")
        if self._own is not None:
            msg = "This branch() is entered already; call db.branch() once per block."
            raise ConfigurationError(msg)
        scope = _current.find_scope(database)
        options = database.options if scope is None else scope.options
        own = OwnScope(database, options.changed({"mode": "transaction"}), "branch()")
        try:
            session: S = own.scope.session
        except BaseException:
            own.leave()
            raise
        self._own = own
        return session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        own, self._own = self._own, None
        assert own is not None
        cause = Cause.COMPLETED if exc is None else Cause.RAISED
        cancellation = await own.close(cause, is_failing=exc is not None)
        if exc is None and cancellation is not None:
            raise cancellation
        redeliver(cancellation)


class Places:
    """How many branches of a database may run at once, by the depth of their ``gather()``.

    Each level of nesting has places of its own, a half of what is left: so a branch waits only for
    deeper ones, the deepest wait for nobody, and no circle of waiting can come about.
    """

    def __init__(self) -> None:
        self._by_loop: WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]
        ] = WeakKeyDictionary()

    def at(self, depth: int, capacity: float, *, is_held: bool) -> asyncio.Semaphore:
        """The places at *depth*, in a pool of *capacity*.

        Raises:
            PoolTooSmallError: If the pool has none left for that depth.
        """
        levels = self._by_loop.setdefault(asyncio.get_running_loop(), {})
        known = levels.get(depth)
        if known is None:
            count = _places(depth, capacity, is_held=is_held)
            if count == 0:
                msg = (
                    f"db.gather() at depth {depth + 1} needs more connections than the pool has: "
                    f"{capacity:.0f} (pool_size + max_overflow), of which those around it hold "
                    "one each. Enlarge the pool, or gather in fewer levels."
                )
                raise PoolTooSmallError(msg)
            known = levels[depth] = asyncio.Semaphore(count)
        return known


def _places(depth: int, capacity: float, *, is_held: bool) -> int:
    if capacity == inf:
        return UNLIMITED
    remaining = int(capacity) - (1 if is_held or capacity > 1 else 0)
    for _ in range(depth):
        remaining -= (remaining + 1) // 2
    return (remaining + 1) // 2


async def gather(
    database: Database[Any], awaitables: tuple[Awaitable[Any], ...], limit: int | None
) -> list[Any]:
    """See :meth:`.Database.gather`."""
    try:
        _check(database, awaitables, limit)
        gathering = _Gathering(database, limit or len(awaitables) or 1)
    except BaseException:
        _discard(awaitables)
        raise
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(gathering.run(each)) for each in awaitables]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    finally:
        _discard(awaitables)
    return [task.result() for task in tasks]


class _Gathering:
    """One ``gather()``: its place in the nesting, and whether one of its branches has failed."""

    def __init__(self, database: Database[Any], limit: int) -> None:
        self._database = database
        self._depth = _depth.get()
        self._scope = scope = _current.find_scope(database)
        is_held = scope is not None and not scope.is_settled()
        source = database.source_of(database.options if scope is None else scope.options)
        self._second_connections = source.second_connections
        capacity = self._second_connections.capacity
        self._places = source.places.at(self._depth, capacity, is_held=is_held)
        self._own_places = asyncio.Semaphore(limit)
        self._has_failed = False

    async def run(self, awaitable: Awaitable[R]) -> R | None:
        """Wait for a place, and run *awaitable* in a branch."""
        _depth.set(self._depth + 1)
        async with self._own_places:
            with self._second_connections.queued(self._scope):
                await self._places.acquire()
            try:
                if self._has_failed:
                    return None  # the error of another is raised
                async with self._database.branch():
                    return await awaitable
            except BaseException:
                self._has_failed = True
                raise
            finally:
                self._places.release()


def _check(database: Database[Any], awaitables: tuple[Any, ...], limit: object) -> None:
    check_with(database, is_async=True, call="db.branch() as session:")
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        msg = f"limit must be a whole number above 0; got {limit!r}."
        raise ConfigurationError(msg)
    for each in awaitables:
        if isinstance(each, asyncio.Future):
            msg = (
                f"{each!r} runs already, outside of any branch. Give db.gather() the coroutine "
                "itself."
            )
            raise ConfigurationError(msg)
        if not inspect.isawaitable(each):
            msg = f"db.gather() takes coroutines; got {each!r}. Call the function: find(1)."
            raise ConfigurationError(msg)


def _discard(awaitables: tuple[Any, ...]) -> None:
    """Close what was never awaited."""
    for each in awaitables:
        if inspect.iscoroutine(each) and inspect.getcoroutinestate(each) == inspect.CORO_CREATED:
            each.close()
