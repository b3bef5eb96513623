"""What a session tells us: a session class that reports its use, and what became of it.

Everything here reports facts to the session's use and scope; it decides nothing. The listeners are
registered once per session class, not per request.
"""

from __future__ import annotations

import warnings
from asyncio import CancelledError
from functools import wraps
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, TextClause, event
from sqlalchemy.exc import SAWarning
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin
from sqlalchemy.util import await_only

from asgi_dbscope import _dialects
from asgi_dbscope._checkout import is_exhausted, note_pool, pool_note
from asgi_dbscope._connection import REPORTED, check_time, is_read, real_error, report_use
from asgi_dbscope._doubt import lose_answer, settle_doubt
from asgi_dbscope._engine import guard_commit, refuse_if_aborted, unwatch, was_handed_out
from asgi_dbscope._fences import fence_connection, fence_write
from asgi_dbscope._lifecycle import OPEN, Event, Outcome
from asgi_dbscope._reads import (
    REMEDY,
    check_held,
    check_statement,
    check_untouched,
    options_on,
    refuse_write,
)
from asgi_dbscope._retry import Attempt
from asgi_dbscope._transaction_status import find_transaction
from asgi_dbscope._watch import SLACK, watch_transaction
from asgi_dbscope.errors import (
    ConcurrentSessionUseError,
    ConfigurationError,
    OverloadedError,
    PoolExhaustedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from asgi_dbscope._scope import SessionScope
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
    event.listen(cls, "after_begin", _after_begin)
    event.listen(cls, "after_flush", _after_flush)
    event.listen(cls, "before_commit", _before_commit)
    event.listen(cls, "after_commit", _after_commit)
    event.listen(cls, "after_soft_rollback", _after_soft_rollback)
    event.listen(cls, "after_transaction_end", _after_transaction_end)
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
        return _shaped_bind(use.scope, self, bind)

    return shaping


def _beginning(begin: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(begin)
    def beginning(self: Any, nested: bool = False) -> Any:
        use = self.use
        if use is not None:
            if use.scope.shape.is_autocommit:
                _leave_autocommit(self, nested=nested)
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
                _explain(use, error)
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
            _explain(use, error)
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


_NO_PLACE = (PoolTimeoutError, PoolExhaustedError)


def _explain(use: SessionUse, error: BaseException) -> None:
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
    if scope.shape.uses_reads and _dialects.is_write_refused(error):
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


def _shaped_bind(
    scope: SessionScope[Any], session: Session, bind: Engine | Connection
) -> Engine | Connection:
    """The variant of *bind* that begins transactions as the scope's options say."""
    shape = scope.shape
    if shape.is_admitted and scope.state not in OPEN:
        _ask_for_admission(scope)
    mode = shape.mode
    if shape.is_autocommit:
        mode = "autocommit"
        transaction = session.get_transaction()
        if transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN:
            mode = "transaction"  # the user's own `async with session.begin()`: a real one
    execution_options = _dialects.begin_options(
        bind.dialect.name,
        mode=mode,
        isolation_level=shape.isolation_level,
        read_only=shape.read_only,
    )
    if shape.uses_reads:
        bind = scope.database.engine_for_reads(bind)
        execution_options = options_on(bind, execution_options)
    if not isinstance(bind, Engine):
        if not execution_options:
            return bind
        msg = (
            f"{scope!r} asks for {execution_options}, but its session is bound to a connection "
            "that somebody else has begun a transaction on. Bind the session to an engine."
        )
        raise ConfigurationError(msg)
    if not execution_options and shape.checkout_timeout is None:
        return bind
    return scope.database.shaped_engine(bind, execution_options)


def _ask_for_admission(scope: SessionScope[Any]) -> None:
    """Let the request wait for its turn, if it has had none; a connection is taken after that."""
    request, use = scope.admitted_request, scope.use
    if request is None or use is None or use.is_free:
        return  # nobody has to ask, or somebody only wants to know the engine
    try:
        await_only(request.enter(scope))
    except OverloadedError as error:
        scope.meet(error)
        raise


def _leave_autocommit(session: Session, *, nested: bool) -> None:
    """Make room for a real transaction: what autobegan is nobody's transaction."""
    transaction = session.get_transaction()
    is_real = transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN
    if nested and not is_real:
        with_ = session.use.scope.database.with_  # type: ignore[attr-defined]
        msg = (
            "begin_nested() needs a transaction to set a savepoint in, and here is none: the mode "
            "is 'autocommit', or the scope reads in one round trip. "
            f"Begin one first: `{with_} session.begin(): ...`, or a transactional block."
        )
        raise ConfigurationError(msg)
    if transaction is not None and not is_real:
        session.commit()


def _after_begin(session: Any, transaction: SessionTransaction, connection: Connection) -> None:
    use: SessionUse | None = session.use
    if use is None or transaction.parent is not None:
        return
    scope = use.scope
    scope.check_open()
    use.connections.append(connection)
    scope.database.watch(connection, scope)
    scope.advance(Event.BEGUN)
    shape = scope.shape
    if scope.holder is not None:
        scope.got_second_connection()
    if shape.is_timed:
        scope.begun_at = monotonic()
        watch_transaction(scope, use)
    if use.is_committing:  # the first change was made by a listener of the user's
        scope.note_commit()
    if shape.shapes_nothing:
        scope.database.check_transactional(connection)
    else:
        _shape_begun(scope, connection)
    if shape.is_timed or scope.deadline is not None:
        _limit(scope, connection)
    if scope.database.label_transactions == "application_name" and not shape.reads_at_once:
        _dialects.label_transaction(connection, scope.block_label or scope.label)
    if session.in_nested_transaction():
        _dialects.begin(connection)


def _shape_begun(scope: SessionScope[Any], connection: Connection) -> None:
    shape = scope.shape
    if not (shape.is_autocommit or shape.uses_reads):
        scope.database.check_transactional(connection)
    if not shape.is_autocommit:
        _dialects.shape_transaction(
            connection, isolation_level=shape.isolation_level, read_only=shape.read_only
        )
    elif shape.reads_at_once and _dialects.is_autocommit(connection):
        check_held(scope, connection)


def _limit(scope: SessionScope[Any], connection: Connection) -> None:
    """Tell the server how long it may take; and let our clock see what is done past the session."""
    watch = scope.watch
    if scope.deadline is not None:
        slack = 0.0 if scope.database.is_sync else SLACK  # a thread has no clock of its own here
        _dialects.limit_transaction(connection, scope.deadline - monotonic(), slack=slack)
    elif (
        watch is not None
        and watch.timeout is not None
        and not (watch.is_over or scope.shape.is_autocommit)
    ):
        _dialects.limit_transaction(connection, watch.timeout, slack=SLACK)
    if watch is not None:
        report_use(connection)


def _after_flush(session: Any, context: Any) -> None:
    use: SessionUse | None = session.use
    if use is None:
        return
    use.has_written = True
    if Attempt.were_made:
        fence_write(use.scope)
    if use.has_several_users:
        # What another task changed while this one was flushing is forgotten when the flush ends.
        changed = session.identity_map._modified  # noqa: SLF001 - session.dirty has those it flushed
        lost = [each for each in changed if each not in context.states]
        if lost:
            raise ConcurrentSessionUseError(use.overwritten_message([each.obj() for each in lost]))


def _before_commit(session: Any) -> None:
    """Refuse the COMMIT that would be a lie; the last moment before it is sent."""
    use: SessionUse | None = session.use
    if use is None:
        return
    if session.in_nested_transaction():
        for connection in use.connections:
            refuse_if_aborted(connection)  # a RELEASE that is refused could not be rolled back to
        return
    session.flush()  # what goes wrong here goes wrong before COMMIT
    use.is_committing = True
    if not use.connections:
        use.scope.check_can_commit()
        return
    for connection in use.connections:
        refuse_if_aborted(connection)
    if use.scope.shape.reads_at_once:
        check_untouched(use.scope, use.connections)
    if use.scope.database.resolve_in_doubt:
        _note_transaction(session, use)
    use.scope.note_commit()


def _note_transaction(session: Session, use: SessionUse) -> None:
    """Ask for the transaction's number, in case that its COMMIT gets no answer.

    A round trip, so only where something was written; and only where one transaction is one COMMIT.
    """
    connection, *others = use.connections
    has_written = use.has_written or was_handed_out(connection)
    is_one = not (others or session.twophase or _dialects.is_autocommit(connection))
    is_worth_it = has_written and is_one
    use.scope.transaction = find_transaction(connection) if is_worth_it else None


def _after_commit(session: Any) -> None:
    use: SessionUse | None = session.use
    if use is None or session.in_nested_transaction():
        return
    if use.connections:
        use.scope.advance(Event.COMMITTED)
        if use.scope.watch is not None:
            use.scope.watch.note_commit()
    else:
        use.scope.note_end(Outcome.COMMITTED)


def _after_soft_rollback(session: Any, previous_transaction: SessionTransaction) -> None:
    use: SessionUse | None = session.use
    if use is None or use.scope.agenda is None:
        return
    if previous_transaction.parent is None:
        use.scope.note_end(Outcome.ROLLED_BACK)
        return
    boundary = previous_transaction  # a flush that failed: the savepoint around it is gone
    while not boundary.nested and boundary.parent is not None:
        boundary = boundary.parent
    if boundary.nested:
        use.scope.agenda.roll_back_to(boundary)


def _after_transaction_end(session: Any, transaction: SessionTransaction) -> None:
    use: SessionUse | None = session.use
    if use is None or transaction.parent is not None:
        return
    use.has_written = False
    use.is_begun_by_hand = False
    use.is_committing = False
    for connection in use.connections:
        unwatch(connection, use.scope)
    use.connections.clear()
    if use.scope.watch is not None:
        use.scope.watch.end()
    if use.scope.state in OPEN:
        if use.scope.is_answer_missing:  # whoever heard of it kept it to himself
            lose_answer(use.scope)
        else:
            use.scope.advance(Event.ROLLED_BACK)
