"""The driver: the only code that ends a session's transaction.

Written once, as synchronous code: for an asynchronous session it runs in SQLAlchemy's greenlet, for
a synchronous one in a thread; the session's use knows how to wait in each.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm.session import SessionTransactionState

from asgi_dbscope import _dialects
from asgi_dbscope._doubt import doubt_of, lose_answer
from asgi_dbscope._lifecycle import Outcome, State
from asgi_dbscope._policy import Ending
from asgi_dbscope.errors import CommitInDoubtError, ConcurrentSessionUseError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._use import SessionUse

logger = logging.getLogger("asgi_dbscope")


def end_transaction(
    scope: SessionScope[Any],
    session: Session,
    use: SessionUse,
    ending: Ending,
    savepoint: SessionTransaction | None = None,
) -> None:
    """End the open transaction, or *savepoint* in it; waits for those who are in the session.

    Raises:
        Exception: What the database said to COMMIT. The transaction is rolled back by then.
        CommitInDoubtError: If it said nothing.
        ConcurrentSessionUseError: If somebody went on using the session, so that COMMIT could not
            be sent.
    """
    timeout = scope.database.cleanup_timeout
    if not use.begin_ending(ending, timeout):
        _throw_away(scope, session, use)
        return
    try:
        if use.is_busy and ending is not Ending.ABANDON and not use.wait_until_free(timeout):
            _give_up(scope, session, use, ending)
        elif not session.in_transaction():
            _check_ended(scope, use, ending)
        elif ending is Ending.ABANDON:
            _throw_away(scope, session, use)
        elif savepoint is not None:
            _end_savepoint(scope, savepoint, ending)
        elif ending is Ending.COMMIT and not use.is_torn:
            _commit(scope, session, use)
        else:
            scope.warn_of_loss(session, use)
            _roll_back(scope, session, use)
    except asyncio.CancelledError:  # out of grace, or of the transaction's time
        _throw_away(scope, session, use)
        if ending is Ending.COMMIT:
            if scope.expiry is not None:
                scope.refuse_expired()
            raise
    finally:
        use.is_torn = False
        use.end_ending(session)


def _give_up(scope: SessionScope[Any], session: Session, use: SessionUse, ending: Ending) -> None:
    """Throw the connection away: somebody stays inside for too long."""
    is_open = session.in_transaction()  # or that one has ended it
    is_committing = scope.state is State.COMMITTING  # by a `commit()` of that one's own
    _throw_away(scope, session, use)
    if is_open and ending is Ending.COMMIT and not use.is_torn:
        if is_committing:
            raise doubt_of(scope)
        raise ConcurrentSessionUseError(use.busy_message(scope.database.cleanup_timeout))


def _check_ended(scope: SessionScope[Any], use: SessionUse, ending: Ending) -> None:
    """Claim no success of a transaction that another ending has ended, if it came to nothing."""
    if ending is Ending.COMMIT:
        scope.check_can_commit()  # the clock may have cut it short
        if scope.outcome is not Outcome.COMMITTED:
            use.check_commit_before(ending)


def _commit(scope: SessionScope[Any], session: Session, use: SessionUse) -> None:
    try:
        use.commit(session)
    except BaseException as error:
        use.failed_commit = error
        if scope.state is State.COMMITTING and not isinstance(error, Exception):
            lose_answer(scope)  # cancelled, and the driver said nothing of it
        _roll_back(scope, session, use)
        if not isinstance(error, CommitInDoubtError):  # which says it by itself
            became = (
                "may or may not have been committed: it was given up during COMMIT"
                if scope.outcome is Outcome.IN_DOUBT
                else "was rolled back"
            )
            error.add_note(f"asgi_dbscope: the transaction of {scope.label} {became}.")
        raise


def _roll_back(scope: SessionScope[Any], session: Session, use: SessionUse) -> None:
    """Roll back quietly: whatever goes wrong here must not hide why we roll back."""
    scope.is_rolling_back = True
    try:
        use.roll_back(session, scope.database.cleanup_timeout)
    except Exception:
        logger.warning(
            "%s: ROLLBACK failed; the connection is thrown away", scope.label, exc_info=True
        )
        _throw_away(scope, session, use)
    finally:
        scope.is_rolling_back = False


def _throw_away(scope: SessionScope[Any], session: Session, use: SessionUse) -> None:
    use.is_closed = True
    try:
        for connection in use.connections:  # else the session would first roll back to savepoints
            _dialects.stop_thread(connection)
            connection.invalidate()
        use.invalidate(session)
    except Exception:  # noqa: BLE001 - SQLAlchemy refuses while another task is connecting
        use.is_abandoned = True
        logger.warning("%s: the connection will be thrown away when it is free", scope.label)


def _end_savepoint(scope: SessionScope[Any], savepoint: SessionTransaction, ending: Ending) -> None:
    if is_ended(savepoint):  # with its whole transaction, by the user's commit() or rollback()
        return
    if ending is Ending.COMMIT:
        try:
            savepoint.commit()
        except BaseException as error:
            _roll_back_to(scope, savepoint)
            error.add_note(f"asgi_dbscope: rolled back to the savepoint of {scope.label}.")
            raise
    else:
        _roll_back_to(scope, savepoint)


def _roll_back_to(scope: SessionScope[Any], savepoint: SessionTransaction) -> None:
    try:
        savepoint.rollback()
    except Exception as error:
        logger.warning("%s: ROLLBACK TO SAVEPOINT failed", scope.label, exc_info=True)
        scope.note_failure(error)  # the whole transaction can't be committed any more


def is_ended(savepoint: SessionTransaction) -> bool:
    """Whether *savepoint* was released or rolled back to already."""
    return savepoint._state is SessionTransactionState.CLOSED  # noqa: SLF001 - is_active is False too after a failed flush
