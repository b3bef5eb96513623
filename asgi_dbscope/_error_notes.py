"""What an error of a session doesn't say by itself, as notes on it."""

from __future__ import annotations

from asyncio import CancelledError
from typing import TYPE_CHECKING

from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from asgi_dbscope import _driver_errors
from asgi_dbscope._checkout import is_exhausted, note_pool, pool_note
from asgi_dbscope._lifecycle import OPEN
from asgi_dbscope._reads import REMEDY
from asgi_dbscope.errors import PoolExhaustedError

if TYPE_CHECKING:
    from asgi_dbscope._use import SessionUse

_NO_PLACE = (PoolTimeoutError, PoolExhaustedError)


def explain(use: SessionUse, error: BaseException) -> None:
    """Tell whoever reads *error* that it is the connection that failed, where it is."""
    scope = use.scope
    if isinstance(error, CancelledError):
        return
    scope.meet(error)
    if scope.shaped_by is not None and scope.shape.read_only:
        error.add_note(
            f"asgi_dbscope: the transaction of {scope.label} was begun read-only by "
            f"{scope.shaped_by}, which joined it first."
        )
    if scope.shape.uses_reads and _driver_errors.is_write_refused(error):
        error.add_note(f"asgi_dbscope: {scope.label} is read-only (Database(reads=...)). {REMEDY}")
    notes = [each for each in getattr(error, "__notes__", ()) if each != pool_note(error)]
    if scope.state not in OPEN and not notes:
        error.add_note(
            f"asgi_dbscope: {scope.label} got no connection to the database {scope.database.name!r}"
            "; no transaction was begun."
        )
        source = scope.database.source_of(scope.shape)
        bind = source.engine
        if isinstance(error, PoolTimeoutError) and isinstance(bind, Engine) and is_exhausted(bind):
            note_pool(bind, error)
        if scope.database.is_sync and isinstance(error, _NO_PLACE):
            error.add_note(
                "asgi_dbscope: requests that hold a connection may wait for a worker thread, and "
                "the threads for connections: give the framework's thread limiter more places than "
                "requests run at once, or let one `def` function use the session per request."
            )
        if scope.holder is not None:
            error.add_note(source.second_connections.explain(scope))
