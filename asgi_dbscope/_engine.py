"""What an engine tells us of the connections that a scope's session took, and what it is spared.

G21: a transaction that the database has aborted is never taken for committed. G19: a connection
never goes back to the pool inside a transaction. The listeners are registered once per engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import event
from sqlalchemy.engine.base import OptionEngine

from asgi_dbscope import _dialects
from asgi_dbscope._lifecycle import Event, State
from asgi_dbscope.errors import TransactionAbortedError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

    from asgi_dbscope._scope import SessionScope


class _Watch:
    """What we know of a connection while a scope's session has it.

    Attributes:
        scope: The session's scope.

        error: The error after which the database may have aborted the transaction.
    """

    __slots__ = ("error", "scope")

    def __init__(self, scope: SessionScope[Any]) -> None:
        self.scope = scope
        self.error: BaseException | None = None


_watched: WeakKeyDictionary[Connection, _Watch] = WeakKeyDictionary()


def watch_connection(connection: Connection, scope: SessionScope[Any]) -> None:
    """Report to *scope* what happens on *connection*, until its session gives it back."""
    watch_engine(connection.engine)
    _watched[connection] = _Watch(scope)


_watched_engines: WeakSet[Engine] = WeakSet()


def shape_engine(engine: Engine, execution_options: dict[str, Any]) -> Engine:
    """A variant of *engine* over the same pool, which hears of events through *engine*."""
    watch_engine(engine)
    variant = _ShapedEngine(engine, {})
    variant.shape = execution_options
    _watched_engines.add(variant)
    return variant


class _ShapedEngine(OptionEngine):
    """What ``Engine.execution_options()`` makes, but it gives the connection back on failure.

    SQLAlchemy applies such options in an event of the connection's making: where that fails or is
    cancelled there, nobody closes the connection.
    """

    shape: dict[str, Any]

    def connect(self) -> Connection:
        connection = super().connect()
        try:
            return connection.execution_options(**self.shape)
        except BaseException:
            connection.invalidate()  # how much of it was applied is not known
            connection.close()
            raise


def watch_engine(engine: Engine) -> None:
    """Listen to *engine*, once."""
    if engine in _watched_engines:
        return
    _watched_engines.add(engine)
    event.listen(engine, "commit", _before_commit_is_sent)
    event.listen(engine, "savepoint", _before_savepoint)
    event.listen(engine, "rollback_savepoint", _before_rollback_to_savepoint)
    event.listen(engine, "handle_error", _on_error)
    event.listen(engine, "reset", _dialects.undo_read_only)
    event.listen(engine, "checkin", _on_checkin)


def _before_commit_is_sent(connection: Connection) -> None:
    watch = _watched.get(connection)
    if watch is None:
        return
    if watch.error is not None:
        _refuse_aborted(connection, watch)
    watch.scope.note_commit()


def _refuse_aborted(connection: Connection, watch: _Watch) -> None:
    """Raise if the database has aborted the transaction; a doubt is settled by asking it.

    The one extra round trip is paid only after an error that was swallowed.
    """
    error = watch.error
    try:
        is_aborted = connection.invalidated or _dialects.is_aborted(connection)
    except Exception as failure:  # noqa: BLE001 - whatever it is, it can't be committed
        is_aborted, error = True, error or failure
    if not is_aborted:
        watch.error = None
        return
    msg = (
        f"{watch.scope!r} can't commit: the database aborted this transaction at an earlier error "
        f"({type(error).__name__}: {error}), which the code caught and went on from. Nothing of "
        "the transaction is kept. Let the error propagate; or, where it is expected, wrap the "
        "statement in `async with session.begin_nested():` so that only this part is rolled back; "
        "or call `await session.rollback()` and begin again."
    )
    raise TransactionAbortedError(msg) from error


def _before_savepoint(connection: Connection, name: str | None) -> None:  # noqa: ARG001 - SQLAlchemy's signature
    if connection in _watched:
        _dialects.begin_before_savepoint(connection)


def _before_rollback_to_savepoint(connection: Connection, name: str, context: None) -> None:  # noqa: ARG001 - SQLAlchemy's signature
    watch = _watched.get(connection)
    if watch is not None:
        watch.error = None


def _on_error(context: ExceptionContext) -> None:
    connection = context.connection
    watch = None if connection is None else _watched.get(connection)
    if watch is None or connection is None:
        return
    if watch.scope.state is State.COMMITTING and context.is_disconnect:
        watch.scope.advance(Event.ANSWER_LOST)
    elif context.is_disconnect or (
        not _is_autocommit(connection)
        and _dialects.may_abort(connection, context.original_exception)
    ):
        watch.error = context.original_exception


def _is_autocommit(connection: Connection) -> bool:
    # Where each statement is durable by itself there is no transaction to abort.
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def _on_checkin(
    dbapi_connection: DBAPIConnection | None, connection_record: ConnectionPoolEntry
) -> None:
    """Never let a connection back into the pool inside a transaction, whatever went before."""
    if dbapi_connection is None or not _dialects.is_in_transaction(dbapi_connection):
        return
    try:
        dbapi_connection.rollback()
    except Exception:  # noqa: BLE001 - the connection is thrown away below
        is_clean = False
    else:
        is_clean = not _dialects.is_in_transaction(dbapi_connection)
    if not is_clean:
        connection_record.invalidate()
