"""What a session tells us: a session class that reports its use.

It reports facts to the session's use and scope, and decides nothing. What became of its
transactions is told by :mod:`._session_events`.
"""

from __future__ import annotations

import warnings
from functools import wraps
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, TextClause
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm import Session, SessionTransaction

from asgi_dbscope import _dialects
from asgi_dbscope._beginning import leave_autocommit, shaped_bind
from asgi_dbscope._connection import REPORTED, check_time, is_read, real_error, report_use
from asgi_dbscope._doubt import settle_doubt
from asgi_dbscope._engine import guard_commit
from asgi_dbscope._error_notes import explain
from asgi_dbscope._fences import fence_connection, fence_write
from asgi_dbscope._lifecycle import Outcome
from asgi_dbscope._reads import check_statement, refuse_write
from asgi_dbscope._retry import Attempt
from asgi_dbscope._session_events import listen

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from asgi_dbscope._use import SessionUse

STATEMENTS = ("execute", "scalar", "scalars")
OPERATIONS = ("get", "get_one", "merge", "refresh", "begin_nested")
BULKS = ("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings")
REGISTRATIONS = ("add", "delete")


def reporting_session_class(base: type[Session]) -> type[Session]:
    """A subclass of *base* whose sessions report what they do to their ``use`` attribute."""
    known = _reporting_classes.get(base)
    if known is not None:
        return known
    commit_inside = _committing_inside(base.commit)
    namespace: dict[str, Any] = {
        "use": None,
        "__module__": base.__module__,
        "get_bind": _shaping(base.get_bind),
        "begin": _reporting(_beginning(base.begin)),
        "connection": _reporting(_connecting(base.connection)),
        "begin_on_database": _beginning_on_database(base.connection),
        "reset": _reporting(base.reset, explains=False),
        "flush": _flushing(base.flush),
        "close": _closing(base.close),
        "close_inside": _closing_inside(base.close),
        "commit": _committing(commit_inside, base.commit),
        "commit_inside": commit_inside,
        "rollback": _rolling_back(base.rollback),
    }
    for name in STATEMENTS:
        namespace[name] = _reporting_statement(getattr(base, name))
    for name in OPERATIONS:
        namespace[name] = _reporting(getattr(base, name))
    for name in BULKS:
        namespace[name] = _reporting(getattr(base, name), writes=True)
    for name in REGISTRATIONS:
        namespace[name] = _checked(getattr(base, name))
    cls = type(base.__name__, (base,), namespace)
    listen(cls)
    _reporting_classes[base] = cls
    return cls


_reporting_classes: dict[type[Session], type[Session]] = {}


def _shaping(get_bind: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(get_bind)
    def shaping(self: Any, *args: Any, **kwargs: Any) -> Engine | Connection:
        bind: Engine | Connection = get_bind(self, *args, **kwargs)
        use = self.use
        if use is None or use.scope.shape.shapes_nothing:
            return bind
        return shaped_bind(use.scope, self, bind)

    return shaping


def _beginning(begin: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(begin)
    def beginning(self: Any, nested: bool = False) -> Any:
        use = self.use
        if use is not None:
            if use.scope.shape.is_autocommit:
                leave_autocommit(self, nested=nested)
            if nested:
                for connection in use.connections:
                    _dialects.begin(connection)
        transaction = begin(self, nested=nested)
        if use is not None:
            use.is_begun_by_hand = use.is_begun_by_hand or not nested
            transaction.__class__ = _TransactionByHand
        return transaction

    return beginning


def _beginning_on_database(connection: Callable[..., Any]) -> Callable[..., Any]:
    def begin_on_database(self: Any) -> None:
        # Python's sqlite3 begins only before what starts with INSERT, UPDATE, DELETE or REPLACE:
        # not before WITH, a comment or SAVEPOINT, which would be durable at once.
        _dialects.begin(connection(self))

    return begin_on_database


def _connecting(connection: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(connection)
    def connecting(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = connection(self, *args, **kwargs)
        if self.use is not None:  # who asks for the connection may use its verbs
            _dialects.begin(found)
            guard_commit(found)
            report_use(found)
            if Attempt.were_made:
                fence_connection(self.use.scope, found)
        return found

    return connecting


def _flushing(flush: Callable[..., Any]) -> Callable[..., Any]:
    reporting = _reporting(flush)

    @wraps(flush)
    def flushing(self: Any, *args: Any, **kwargs: Any) -> None:
        use: SessionUse | None = self.use
        # Before each query SQLAlchemy flushes, and before each COMMIT; mostly nothing.
        if use is None or use.is_free or not self._is_clean():
            if use is not None and use.scope.shape.uses_reads:
                refuse_write(use.scope, self)
            reporting(self, *args, **kwargs)

    return flushing


def _closing(close: Callable[..., Any]) -> Callable[..., Any]:
    reporting = _reporting(close)

    @wraps(close)
    def closing(self: Any) -> None:
        use = self.use
        if use is not None and self.in_transaction() and not use.scope.is_over:
            use.check_place()
            use.note_loss(self)
            reporting(self)
        else:  # nothing to roll back, so no I/O: it may be closed from anywhere
            close(self)
        if use is not None:
            use.is_closed = True

    return closing


def _closing_inside(close: Callable[..., Any]) -> Callable[..., Any]:
    is_plain = close is Session.close

    def close_inside(self: Any) -> None:
        """Close for good. Where nothing is in the session there is nothing to detach from it."""
        is_empty = self._is_clean() and not len(self.identity_map)
        if not (is_plain and is_empty and self.use.is_free and not self.in_transaction()):
            close(self)

    return close_inside


def _committing(commit: Callable[..., Any], base: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(base)
    def committing(self: Any) -> None:
        use: SessionUse | None = self.use
        if use is None:
            base(self)
            return
        use.scope.check_can_commit()
        user = use.enter()
        try:
            commit(self)
        finally:
            use.leave(user, self)
        if use.ender is None and use.scope.agenda is not None:
            use.scope.note_end(Outcome.COMMITTED)
            use.run_hooks()

    return committing


def _committing_inside(commit: Callable[..., Any]) -> Callable[..., Any]:
    def commit_inside(self: Any) -> None:
        use: SessionUse = self.use
        try:
            commit(self)
        except BaseException as error:  # noqa: BLE001 - raised again, mostly
            _settle(self, use, error)

    return commit_inside


def _settle(session: Session, use: SessionUse, error: BaseException) -> None:
    """A COMMIT of *session* raised *error*: raise what it really is, if it didn't succeed."""
    real = real_error(use, error)
    if not settle_doubt(session, use, real):
        raise real


class _TransactionByHand(SessionTransaction):
    """That of a block of the user's own, which ends past the session's ``commit()``."""

    def commit(self, _to_root: bool = False) -> None:
        session: Any = self.session
        self._end(super().commit, session.use.enter(), _to_root)

    def rollback(self, _capture_exception: bool = False, _to_root: bool = False) -> None:
        session: Any = self.session
        self._end(super().rollback, session.use.enter_quietly(), _capture_exception, _to_root)

    def close(self, invalidate: bool = False) -> None:
        session: Any = self.session
        self._end(super().close, session.use.enter_quietly(), invalidate)

    def _end(self, end: Callable[..., Any], user: object, *arguments: Any) -> None:
        session: Any = self.session
        use: SessionUse = session.use
        try:
            end(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised again, mostly
            _settle(session, use, error)
        finally:
            use.leave(user, session)
            if user is not None and not self.nested and use.scope.agenda is not None:
                use.run_hooks()


def _rolling_back(rollback: Callable[..., Any]) -> Callable[..., Any]:
    reporting = _reporting(rollback, explains=False)

    @wraps(rollback)
    def rolling_back(self: Any) -> None:
        reporting(self)
        use: SessionUse | None = self.use
        if use is not None and use.ender is None and use.scope.agenda is not None:
            use.scope.note_end(Outcome.ROLLED_BACK)
            use.run_hooks()

    return rolling_back


def _reporting(
    method: Callable[..., Any], *, explains: bool = True, writes: bool = False
) -> Callable[..., Any]:
    @wraps(method)
    def reporting(self: Any, *args: Any, **kwargs: Any) -> Any:
        use: SessionUse | None = self.use
        if use is None:
            return method(self, *args, **kwargs)
        user = use.enter()
        try:
            if writes:
                use.has_written = True
                fence_write(use.scope)
            return method(self, *args, **kwargs)
        except REPORTED as error:
            check_time(use, error)
            if explains:
                explain(use, error)
            raise
        finally:
            use.leave(user, self)

    return reporting


def _reporting_statement(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def reporting_statement(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        use: SessionUse | None = self.use
        if use is None:
            return method(self, statement, *args, **kwargs)
        user = use.enter()
        try:
            if use.scope.shape.reads_at_once:
                check_statement(use.scope, statement, kwargs.get("execution_options"))
            if not is_read(statement):
                use.has_written = True
                if Attempt.were_made:
                    fence_write(use.scope, statement)
                if use.scope.database.begins_late and not _is_outside(statement):
                    self.begin_on_database()
            return method(self, statement, *args, **kwargs)
        except REPORTED as error:
            check_time(use, error)
            explain(use, error)
            raise
        finally:
            use.leave(user, self)

    return reporting_statement


def _is_outside(statement: Any) -> bool:
    """Whether *statement* is one that SQLite refuses inside a transaction."""
    return isinstance(statement, TextClause) and (
        statement.text.lstrip()[:6].upper() in {"VACUUM", "ATTACH", "DETACH"}
    )


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        use: SessionUse | None = self.use
        if use is None:
            return method(self, *args, **kwargs)
        user = use.enter_registration()
        try:
            use.has_written = True
            if use.is_overtaking:
                with warnings.catch_warnings():
                    # Another task's flush is under way; the next one takes what is added now.
                    warnings.simplefilter("ignore", SAWarning)
                    return method(self, *args, **kwargs)
            return method(self, *args, **kwargs)
        finally:
            use.leave(user, self)

    return checked
