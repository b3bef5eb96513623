"""What an engine tells us of the connections that a scope's session took, and what it is spared.

G21: a transaction that the database has aborted is never taken for committed. G19: a connection
never goes back to the pool inside a transaction. The listeners are registered once per engine.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import event
from sqlalchemy.engine.base import OptionEngine

from asgi_dbscope import _dialects, _driver_errors
from asgi_dbscope._doubt import miss_answer
from asgi_dbscope._lifecycle import State
from asgi_dbscope._reads import REMEDY
from asgi_dbscope._retry import COMMITTED
from asgi_dbscope._text import ascii_line, told
from asgi_dbscope.errors import ReadOnlyError, TransactionAbortedError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

    from asgi_dbscope._scope import SessionScope

E = TypeVar("E", bound="ShapedEngine")

logger = logging.getLogger("asgi_dbscope")

DROP = 0.1
"""Seconds that each further connection has to close, once one of them was silent."""

_watched_dialects: WeakSet[Dialect] = WeakSet()
"""One per real engine: its variants by ``execution_options()`` share its dialect and its pool."""

_watching: WeakKeyDictionary[SessionScope[Any], None] = WeakKeyDictionary()
"""The scopes that a transaction was begun in."""

WATCH = "asgi_dbscope"
"""The name in a connection's ``__dict__`` of what is known of it: a weak dictionary beside it would
cost a transaction a hundredth of a SELECT."""

EXPIRY = "asgi_dbscope_expiry"
"""The name in it of the error that ended the connection's transaction before its time."""


_INSERT = re.compile(r"\s*(?:INSERT|REPLACE)\b", re.IGNORECASE)


class Watch:
    """What is known of a connection while a scope's transaction is open on it.

    Attributes:
        scopes: Whose, innermost last; more than one only where sessions share a connection, as in
            tests.

        is_handed_out: Whether the user asked for the connection: errors on the driver's own
            connection aren't heard of.

        error: The error after which the database may have aborted the transaction. It holds the
            connection, by its traceback, so :func:`unwatch` has to let go of it.
    """

    __slots__ = ("error", "is_handed_out", "scopes")

    def __init__(self, scope: SessionScope[Any]) -> None:
        self.scopes: tuple[SessionScope[Any], ...] = (scope,)
        self.is_handed_out = False
        self.error: BaseException | None = None


def _watch_of(connection: Connection) -> Watch | None:
    return connection.__dict__.get(WATCH)


def scope_on(connection: Connection) -> SessionScope[Any] | None:
    """The innermost scope that has a transaction open on *connection*."""
    watched = _watch_of(connection)
    return None if watched is None else watched.scopes[-1]


def watch(connection: Connection, scope: SessionScope[Any]) -> None:
    """Report to *scope* what goes wrong on *connection*, until :func:`unwatch`.

    Its engine is watched by then.
    """
    _watching[scope] = None
    known = _watch_of(connection)
    if known is None:
        connection.__dict__[WATCH] = Watch(scope)
    else:
        known.scopes = (*known.scopes, scope)


def unwatch(connection: Connection, scope: SessionScope[Any]) -> None:
    """The transaction of *scope* on *connection* is over."""
    if scope.expiry is not None:
        connection.__dict__[EXPIRY] = scope.expiry
    known: Watch | None = connection.__dict__.pop(WATCH, None)
    # Two that give a connection up at once, a thread and the loop, come here both.
    for other in () if known is None else known.scopes:
        if other is not scope:
            watch(connection, other)


def watch_engine(engine: Engine) -> None:
    """Listen to *engine*, once.

    Only to events of its dialect and its pool: a single listener to an event of its connections
    (``commit``, ``savepoint``) makes SQLAlchemy build the dispatch of each connection anew, a tenth
    of the cost of a SELECT.
    """
    if engine.dialect in _watched_dialects:
        return
    _watched_dialects.add(engine.dialect)
    event.listen(engine, "handle_error", _on_error)
    if _dialects.has_settings(engine.dialect):
        event.listen(engine, "reset", _dialects.undo_settings)
    event.listen(engine, "checkin", _on_checkin)


def comment_statements(engine: Engine) -> None:
    """Put the label of its transactional block behind each statement, once."""
    if not event.contains(engine, "before_cursor_execute", _comment):
        event.listen(engine, "before_cursor_execute", _comment, retval=True)


def _comment(
    connection: Connection,
    _cursor: Any,
    statement: str,
    parameters: Any,
    _context: Any,
    executemany: bool,
) -> tuple[str, Any]:
    watched = _watch_of(connection)
    # Not the request's path: each statement text would be another one to the driver's cache.
    label = None if watched is None else watched.scopes[-1].block_label
    if label is None:
        return statement, parameters
    text = ascii_line(label)
    if connection.dialect.paramstyle in {"format", "pyformat"}:
        text = text.replace("%", "%%")
    # MariaDB's drivers make one statement of many rows where they find VALUES at its very end.
    verb = _INSERT.match(statement) if executemany else None
    if verb is not None:
        return f"{verb[0]} /* {text} */{statement[verb.end() :]}", parameters
    return f"{statement} /* {text} */", parameters


def open_transactions(engine: Engine) -> list[SessionScope[Any]]:
    """The scopes whose transactions hold connections of *engine*'s pool."""
    # All keys at once: other threads begin and end their transactions meanwhile.
    scopes = filter(None, [each() for each in _watching.keyrefs()])
    return [scope for scope in scopes if _holds_one(scope, engine)]


def _holds_one(scope: SessionScope[Any], engine: Engine) -> bool:
    use = scope.use
    return use is not None and any(
        each.engine.pool is engine.pool and not each.invalidated for each in [*use.connections]
    )


def shape_engine(engine: Engine, execution_options: dict[str, Any], kind: type[E]) -> E:
    """A variant of *engine* over the same pool, which hears of events through *engine*."""
    watch_engine(engine)
    variant = kind(engine, {})
    variant.shape = execution_options
    return variant


class ShapedEngine(OptionEngine):
    """What ``Engine.execution_options()`` makes, but it gives the connection back on failure.

    SQLAlchemy applies such options in an event of the connection's making: where that fails or is
    cancelled there, nobody closes the connection.
    """

    shape: dict[str, Any]

    def connect(self) -> Connection:
        connection = super().connect()
        try:
            if self.shape:
                shape = self.shape
                if shape.get("isolation_level", "") is None:  # known since the first connection
                    shape = {**shape, "isolation_level": self.dialect.default_isolation_level}
                connection = connection.execution_options(**shape)
        except BaseException:
            connection.invalidate()  # how much of it was applied is not known
            connection.close()
            raise
        if "isolation_level" in self.shape:
            _forgive_at_checkin(connection)
        return connection


def _forgive_at_checkin(connection: Connection) -> None:
    """Throw *connection* away if its isolation level can't be taken back.

    SQLAlchemy lets that error through, and then the connection's place in the pool is lost.
    """
    record: Any = connection.connection._connection_record  # noqa: SLF001 - there is no other way
    undo = record.finalize_callback.pop()

    def undo_or_invalidate(dbapi_connection: DBAPIConnection) -> None:
        try:
            undo(dbapi_connection)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may get this connection
            record.invalidate(error)

    record.finalize_callback.append(undo_or_invalidate)


async def dispose_in_time(engine: AsyncEngine, seconds: float) -> None:
    """Close the pooled connections of *engine*; after *seconds* without waiting for the database.

    Cancelled while it waits for one connection to close, a driver drops that one; the others are
    closed by the next attempt.
    """
    while True:
        try:
            async with asyncio.timeout(seconds):
                await engine.dispose()
        except TimeoutError:
            logger.warning("%s: a connection didn't answer, and is dropped", told(engine))
            seconds = DROP
        else:
            return


def guard_commit(connection: Connection) -> None:
    """Judge also a COMMIT that is asked of *connection* itself, past its session."""
    connection.__dict__[WATCH].is_handed_out = True  # it was watched when it began
    if not event.contains(connection, "commit", _before_commit):
        event.listen(connection, "commit", _before_commit)


def was_handed_out(connection: Connection) -> bool:
    """Whether the user asked for *connection*, and may have written past its session."""
    watched = _watch_of(connection)
    return watched is not None and watched.is_handed_out


def _before_commit(connection: Connection) -> None:
    watched = _watch_of(connection)
    if watched is not None:
        refuse_if_aborted(connection)
        scope = watched.scopes[-1]
        scope.note_commit()
        if not (scope.use and scope.use.is_committing):
            scope.forbid_attempts(COMMITTED)  # past the session, which won't hear of it


def refuse_if_aborted(connection: Connection) -> None:
    """Raise if the database has aborted the transaction; a doubt is settled by asking it.

    The one extra round trip is paid only after an error that was swallowed.

    Raises:
        TransactionAbortedError: If it has.
    """
    watched: Watch = connection.__dict__[WATCH]
    error = watched.error
    if error is not None and _dialects.is_autocommit(connection):
        _refuse_after(error, connection, watched.scopes[-1])
        watched.error = None
        return
    if error is None and not (watched.is_handed_out and _driver_errors.can_ask(connection)):
        return
    try:
        is_aborted = connection.invalidated or _driver_errors.is_aborted(connection, error)
    except Exception as refusal:  # noqa: BLE001 - whatever it is, it can't be committed
        is_aborted, error = True, error or refusal
    if not is_aborted:
        watched.error = None
        return
    scope = watched.scopes[-1]
    msg = (
        f"{scope!r} can't commit: the database aborted this transaction at an "
        f"earlier error ({type(error).__name__}, this error's __cause__), which the code caught "
        "and went on from. "
        "Nothing of the transaction is kept. Let the error propagate; or, where it is expected, "
        f"{_remedy(connection, scope)}call session.rollback() and begin again."
    )
    raise TransactionAbortedError(msg) from error


def _refuse_after(error: BaseException, connection: Connection, scope: SessionScope[Any]) -> None:
    """Raise where *error* was swallowed without a transaction, and is one to be told of."""
    if _driver_errors.is_write_refused(error):
        raise ReadOnlyError(
            f"{scope!r} is read-only; the server refused a write (this error's __cause__), and the "
            f"code caught that and went on. {REMEDY}"
        ) from error
    if connection.invalidated:  # else nothing was aborted
        raise TransactionAbortedError(
            f"{scope!r} lost its connection ({type(error).__name__}, this error's __cause__), and "
            "the code caught that and went on. What its statements did before is kept, in mode "
            "'autocommit'. Let the error propagate; or, where it is expected, call "
            "session.rollback() and begin again."
        ) from error


def _remedy(connection: Connection, scope: SessionScope[Any]) -> str:
    if connection.dialect.name not in _dialects.POSTGRESQL:
        return ""  # the savepoints are gone too
    return (
        f"wrap the statement in `{scope.database.with_} session.begin_nested():` so that only this "
        "part is rolled back; or "
    )


def _on_error(context: ExceptionContext) -> BaseException | None:
    connection = context.connection
    watched = None if connection is None else _watch_of(connection)
    if watched is None or connection is None:
        return None
    scope = watched.scopes[-1]
    error = context.original_exception
    scope.note_error(context.sqlalchemy_exception or error)
    if scope.state is State.COMMITTING and _driver_errors.is_unanswered(context):
        if not context.is_disconnect:  # the driver doesn't know that its connection is of no use
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        miss_answer(scope)
    elif context.is_disconnect:
        watched.error = error
        if _driver_errors.outlives_cancellation(connection, error):
            context.is_disconnect = False
    elif scope.shape.reads_at_once and _driver_errors.is_write_refused(error):
        watched.error = error
    elif _driver_errors.may_abort(connection, error):
        if not _driver_errors.is_sure(watched.error):
            watched.error = error
        if scope.state is State.COMMITTING:  # past the session's check: a listener of the user's
            guard_commit(connection)
    is_at_work = context.execution_context is not None and isinstance(error, Exception)
    return scope.expiry if is_at_work else None  # rows may be read past everything that we see


def _on_checkin(
    dbapi_connection: DBAPIConnection | None, connection_record: ConnectionPoolEntry
) -> None:
    """Never let a connection back into the pool inside a transaction, nor one that was cut."""
    if dbapi_connection is None:
        return
    if _dialects.CUT in connection_record.info:
        connection_record.invalidate()
        return
    if not _dialects.is_in_transaction(dbapi_connection):
        return
    try:
        dbapi_connection.rollback()
    except Exception:  # noqa: BLE001 - the connection is thrown away below
        is_clean = False
    else:
        is_clean = not _dialects.is_in_transaction(dbapi_connection)
    if not is_clean:
        connection_record.invalidate()
