"""What became of a session's transaction, as SQLAlchemy's own events tell it."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from asgi_dbscope import _dialects
from asgi_dbscope._beginning import limit_begun, shape_begun
from asgi_dbscope._doubt import lose_answer
from asgi_dbscope._engine import refuse_if_aborted, unwatch, was_handed_out
from asgi_dbscope._fences import fence_write
from asgi_dbscope._lifecycle import OPEN, Event, Outcome
from asgi_dbscope._reads import check_untouched
from asgi_dbscope._retry import Attempt
from asgi_dbscope._transaction_status import find_transaction
from asgi_dbscope._watch import watch_transaction
from asgi_dbscope.errors import ConcurrentSessionUseError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

    from asgi_dbscope._use import SessionUse


def listen(session_class: type[Session]) -> None:
    """Have the sessions of *session_class* report what became of them; once, not per request."""
    event.listen(session_class, "after_begin", _after_begin)
    event.listen(session_class, "after_flush", _after_flush)
    event.listen(session_class, "before_commit", _before_commit)
    event.listen(session_class, "after_commit", _after_commit)
    event.listen(session_class, "after_soft_rollback", _after_soft_rollback)
    event.listen(session_class, "after_transaction_end", _after_transaction_end)


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
        shape_begun(scope, connection)
    if shape.is_timed or scope.deadline is not None:
        limit_begun(scope, connection)
    if scope.database.label_transactions == "application_name" and not shape.reads_at_once:
        _dialects.label_transaction(connection, scope.block_label or scope.label)
    if session.in_nested_transaction():
        _dialects.begin(connection)


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
