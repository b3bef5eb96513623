"""What a session's connection tells us: whoever has it can use it past the session.

Its class is exchanged, for as long as it lives, for a subclass that reports as the session's does:
where the user asked for the connection, and where a clock runs. So the clock knows who is at work,
siblings wait for each other, and a write is known to be one. No other connection pays for it.
"""

from __future__ import annotations

from asyncio import CancelledError
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import CursorResult, TextClause
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from asgi_dbscope._doubt import miss_answer
from asgi_dbscope._engine import EXPIRY, scope_on
from asgi_dbscope._fences import fence_write
from asgi_dbscope._lifecycle import State
from asgi_dbscope._reads import check_statement
from asgi_dbscope._retry import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from asgi_dbscope._use import SessionUse

STATEMENTS = ("execute", "scalar", "exec_driver_sql")
VERBS = ("begin_nested", "commit", "rollback")
ENDS = ("_release_savepoint_impl", "_rollback_to_savepoint_impl")
"""What ends the block of a savepoint; SQLAlchemy has no other way to see to it."""

REPORTED = (OSError, DBAPIError, PoolTimeoutError, CancelledError)
"""What an operation raises that may really be something else."""

_READS = frozenset({"SELECT", "VALUES", "EXPLAI", "PRAGMA", "BEGIN"})

_reporting_classes: dict[type[Connection], type[Connection]] = {}


def report_use(connection: Connection) -> None:
    """Let *connection* report what is done with it past its session."""
    base = type(connection)
    if base not in _reporting_classes.values():
        connection.__class__ = _reporting_classes.get(base) or _reporting_class(base)


def _reporting_class(base: type[Connection]) -> type[Connection]:
    namespace: dict[str, Any] = {"__module__": base.__module__}
    for name in STATEMENTS:
        namespace[name] = _reporting(_executing(getattr(base, name)))
    for name in VERBS:
        namespace[name] = _reporting(getattr(base, name))
    for name in ENDS:
        namespace[name] = _reporting(getattr(base, name), is_end=True)
    cls = _reporting_classes[base] = type(base.__name__, (base,), namespace)
    return cls


def _executing(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def executing(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        scope = scope_on(self)
        if scope is not None and scope.use is not None:
            if scope.shape.reads_at_once:
                check_statement(scope, statement, kwargs.get("execution_options"))
            if not is_read(statement):
                scope.use.has_written = True
                if Attempt.were_made:
                    fence_write(scope, statement)
        result: Any = method(self, statement, *args, **kwargs)
        watch = None if scope is None else scope.watch
        if watch is not None and isinstance(result, CursorResult):
            watch.note_result(cast("Any", result))
        return cast("Any", result)

    return executing


def _reporting(method: Callable[..., Any], *, is_end: bool = False) -> Callable[..., Any]:
    @wraps(method)
    def reporting(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = scope_on(self)
        use, session = (None, None) if scope is None else (scope.use, scope.sync_session)
        if use is None or session is None:
            expiry = self.__dict__.get(EXPIRY)
            if expiry is not None and self.closed:
                raise type(expiry)(*expiry.args)
            return method(self, *args, **kwargs)
        user = use.enter_quietly() if is_end else use.enter()
        if user is None:  # part of an operation of the session's, which reports for it
            return method(self, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except REPORTED as error:
            check_time(use, error)
            raise
        finally:
            use.leave(user, session)

    return reporting


def is_read(statement: Any) -> bool:
    """Whether *statement* looks like a read; it decides over warnings, never over a COMMIT."""
    if getattr(statement, "is_select", False):
        return True
    text = statement.text if isinstance(statement, TextClause) else statement
    return isinstance(text, str) and text.lstrip()[:6].upper() in _READS


def check_time(use: SessionUse, error: BaseException) -> None:
    """Raise what *error* really is where the time of the transaction was up."""
    real = real_error(use, error)
    if real is not error:
        raise real from error


def real_error(use: SessionUse, error: BaseException) -> BaseException:
    """What *error* really is."""
    scope = use.scope
    if scope.watch is None:
        return error
    real = scope.watch.convert(error)
    if real is not error and scope.state is State.COMMITTING and not scope.is_answer_missing:
        miss_answer(scope)  # the driver said nothing of it
    return real
