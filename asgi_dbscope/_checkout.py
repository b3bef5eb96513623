"""The wait for a connection, bounded: for a place in the pool, and for the database to answer."""

from __future__ import annotations

import asyncio
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbscope._engine import ShapedEngine, open_transactions
from asgi_dbscope._pool import pool_capacity
from asgi_dbscope.errors import DatabaseUnreachableError, PoolExhaustedError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

    from asgi_dbscope._scope import SessionScope

_POOL_NOTE = "asgi_dbscope: The pool has "

SHOWN = 10
"""How many of the connections' holders a message names."""


class BoundedEngine(ShapedEngine):
    """A variant of an engine, over the same pool, that doesn't wait longer than it may.

    Attributes:
        database: The database's name.

        timeout: Seconds.
    """

    database = ""
    timeout = inf

    def connect(self) -> Connection:
        """Take a connection.

        Raises:
            PoolExhaustedError: If none came free in time.
            DatabaseUnreachableError: If the database didn't answer in time.
        """
        if self.dialect.is_async:
            connection: Connection = await_only(self._connect_in_time())
            return connection
        try:
            return super().connect()
        except PoolTimeoutError as error:
            if pool_timeout(self.pool) < self.timeout:
                raise  # the pool's own limit
            self._refuse(error)

    def raw_connection(self) -> PoolProxiedConnection:
        """Take a connection of the driver's."""
        pool = self.pool
        if self.dialect.is_async or not isinstance(pool, QueuePool):
            return super().raw_connection()
        return _ImpatientPool(pool, min(self.timeout, pool_timeout(pool))).connect()

    async def _connect_in_time(self) -> Connection:
        was_exhausted = is_exhausted(self)
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                # Cancelled at whatever it waits for, the pool takes its place back by itself.
                return await greenlet_spawn(super().connect)
        except TimeoutError:
            if not limit.expired():
                raise  # the driver's own
        return self._refuse(None, is_exhausted=was_exhausted or is_exhausted(self))

    def _refuse(self, cause: BaseException | None, *, is_exhausted: bool = True) -> NoReturn:
        within = f"within {self.timeout:g} seconds (checkout_timeout)"
        if not is_exhausted:
            msg = (
                f"The database {self.database!r} gave no connection {within}, although its pool "
                "had room: it didn't answer. No transaction was begun."
            )
            raise DatabaseUnreachableError(msg) from cause
        error = PoolExhaustedError(
            f"No connection to the database {self.database!r} came free {within}. No transaction "
            "was begun."
        )
        note_pool(self, error)
        raise error from cause


def pool_timeout(pool: Pool) -> float:
    """Seconds that *pool* waits for a place by itself."""
    own: float | None = getattr(pool, "_timeout", None)
    return inf if own is None else own


def is_exhausted(engine: Engine) -> bool:
    """Whether every connection that there can be is taken."""
    pool = engine.pool
    return isinstance(pool, QueuePool) and pool.checkedout() >= pool_capacity(engine)


def note_pool(engine: Engine, error: BaseException) -> None:
    """Add to *error* what :func:`describe_pool` says.

    A note, which is for whoever reads the traceback: it names the paths of other requests, and an
    app may show a client what the error itself says.
    """
    error.add_note(f"asgi_dbscope: {describe_pool(engine)}")


def pool_note(error: BaseException) -> str:
    """What :func:`note_pool` has added to *error*; empty if nothing."""
    notes: list[str] = getattr(error, "__notes__", [])
    return next((each for each in notes if each.startswith(_POOL_NOTE)), "")


def describe_pool(engine: Engine) -> str:
    """The figures of *engine*'s pool, and who holds its connections."""
    pool = engine.pool
    assert isinstance(pool, QueuePool)  # no other can be exhausted
    capacity = pool_capacity(engine)
    limit = "no limit" if capacity == inf else f"at most {capacity:.0f}"
    figures = f"The pool has {limit} (pool_size={pool.size()}), and {pool.checkedout()} are taken"
    scopes = sorted(open_transactions(engine), key=lambda each: each.begun_at or inf)
    holders = [_describe_holder(each) for each in scopes[:SHOWN]]
    if len(scopes) > SHOWN:
        holders.append(f"{len(scopes) - SHOWN} more transactions")
    others = pool.checkedout() - len(scopes)
    if others > 0:
        holders.append(f"{others} in no transaction of a session scope, or still connecting")
    return f"{figures}: {'; '.join(holders)}." if holders else f"{figures}."


def _describe_holder(scope: SessionScope[Any]) -> str:
    block = scope.block_label
    label = scope.label if block in {None, scope.label} else f"{scope.label} in {block}"
    if scope.begun_at is None:
        return label
    return f"{label} for {monotonic() - scope.begun_at:.1f} s"


class _ImpatientPool:
    """A pool as a thread sees it that waits for a shorter time than everybody else.

    All that it has is the pool's own; a copy would count its connections twice.
    """

    def __init__(self, pool: QueuePool, timeout: float) -> None:
        self._real = pool
        self._timeout = timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def connect(self) -> PoolProxiedConnection:
        kind: Any = type(self._real)
        connection: PoolProxiedConnection = kind.connect(self)
        return connection

    def _do_get(self) -> ConnectionPoolEntry:
        kind: Any = type(self._real)
        entry: ConnectionPoolEntry = kind._do_get(self)  # noqa: SLF001 - it asks for the timeout
        return entry
