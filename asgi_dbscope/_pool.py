"""What the pool can give, and what it never can: second connections beside one that is held."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.pool import QueuePool, SingletonThreadPool, StaticPool

from asgi_dbscope._lifecycle import OPEN
from asgi_dbscope.errors import PoolTooSmallError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from asgi_dbscope._scope import SessionScope

logger = logging.getLogger("asgi_dbscope")

THREADS = 40
"""Worker threads of an ASGI framework: anyio's default limiter, unless an app changed it."""

ThreadWork = Literal["end", "begin and end", "hooks"]
"""What a worker thread of ours does: give a connection back; take one first (a flush that COMMIT
brings with it); or run hooks, which may wait for anything."""

_SHARING = (StaticPool, SingletonThreadPool)
"""Pools that hand out the same connection twice."""


def pool_capacity(engine: object) -> float:
    """How many connections *engine*'s pool can have out at once; ``inf`` where it has no limit."""
    pool = getattr(engine, "pool", None)
    if isinstance(pool, _SHARING):
        return 1
    if not isinstance(pool, QueuePool):
        return inf
    overflow: int = pool._max_overflow  # noqa: SLF001 - SQLAlchemy has no other way to ask
    size = pool.size()
    return inf if overflow < 0 or size == 0 else size + overflow


class SecondConnections:
    """The scopes that wait for a connection while the scope around them holds one.

    Where every connection of the pool is held by somebody who waits for another, nobody can go on:
    that is found here, at once, rather than by the pool's timeout.
    """

    def __init__(self, engine: object, *, of_reads: bool = False) -> None:
        self._of_reads = of_reads
        self._engine = (
            engine if isinstance(engine, Engine) else getattr(engine, "sync_engine", None)
        )
        self._lock = Lock()
        self._waiting: set[SessionScope[Any]] = set()
        self._queued: list[SessionScope[Any]] = []
        self._refused: WeakSet[SessionScope[Any]] = WeakSet()
        self._has_warned = False

    @property
    def capacity(self) -> float:
        """How many connections there can be."""
        return pool_capacity(self._engine)

    def expect(self, scope: SessionScope[Any]) -> None:
        """*scope* may need a connection now.

        Raises:
            PoolTooSmallError: If it could never get one.
        """
        capacity = self.capacity
        if capacity == inf:
            return
        with self._lock:
            held = len(self._held_by_waiting(scope))
            if held == 0:
                return
            self._refuse_if_stuck(scope)
            self._waiting.add(scope)
            is_tight = not self._has_warned and self._is_tight(held, capacity, scope)
            self._has_warned = self._has_warned or is_tight
        if is_tight:
            logger.warning("%s", self.explain(scope))

    def _refuse_if_stuck(self, scope: SessionScope[Any]) -> None:
        if len(self._held_by_waiting(scope)) < self.capacity:
            return
        msg = self.explain(scope)
        # It is about to give its connection back, and so the others can go on.
        self._refused.update((scope, *self._holders(scope)))
        raise PoolTooSmallError(msg)

    def forget(self, scope: SessionScope[Any]) -> None:
        """*scope* has its connection, or needs none."""
        with self._lock:
            self._waiting.discard(scope)

    @contextmanager
    def queued(self, scope: SessionScope[Any] | None) -> Generator[None]:
        """*scope* waits for a place to branch, and holds what it holds meanwhile.

        Raises:
            PoolTooSmallError: If it would wait for ever.
        """
        if scope is None:
            yield
            return
        with self._lock:
            self._queued.append(scope)
        try:
            with self._lock:
                self._refuse_if_stuck(scope)
            yield
        finally:
            with self._lock:
                self._queued.remove(scope)

    def explain(self, scope: SessionScope[Any]) -> str:
        """What to tell a user whose pool is too small."""
        pool = getattr(self._engine, "pool", None)
        if isinstance(pool, _SHARING):
            return (
                f"asgi_dbscope: {scope!r} needs a connection of its own, and a "
                f"{type(pool).__name__} would give it the one that is in the transaction around "
                "it. Use a file database or another pool."
            )
        held = len(self._held_by_waiting(scope))
        capacity = f"{self.capacity:.0f}"
        return (
            f"asgi_dbscope: {scope!r} needs a second connection while {scope.holder or scope!r} "
            f"holds one. The pool has {capacity} (pool_size + max_overflow), and {held} of them "
            f"are held by blocks that wait like this; at {capacity} nobody could go on. With n "
            "requests at once in such blocks the pool needs n + 1 connections for the first of "
            "them to go on, and 2 * n for none to wait: enlarge it, limit n, or use "
            "propagation='NESTED', which needs no second connection."
        )

    def _held_by_waiting(self, scope: SessionScope[Any]) -> set[SessionScope[Any]]:
        """The scopes that hold a connection while something inside them waits for another."""
        held = set(self._holders(scope))
        for waiting in self._waiting:
            held.update(self._holders(waiting))
        for queued in self._queued:
            held.update(self._holders(queued))
            if self._holds_one(queued):
                held.add(queued)
        return held - set(self._refused)

    def _holders(self, scope: SessionScope[Any]) -> Iterator[SessionScope[Any]]:
        """The scopes around *scope* that hold a connection of this pool."""
        holder = scope.holder
        while holder is not None:
            if self._holds_one(holder):
                yield holder
            holder = holder.holder

    def _holds_one(self, scope: SessionScope[Any]) -> bool:
        return scope.state in OPEN and scope.shape.uses_reads is self._of_reads

    def _is_tight(self, held: int, capacity: float, scope: SessionScope[Any]) -> bool:
        if scope.database.is_sync:  # as many at once as there are threads
            return capacity <= THREADS
        return 2 * held >= capacity
