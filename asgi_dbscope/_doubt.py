"""COMMIT without an answer: in doubt, or found out by asking the server on a fresh connection.

While the server is asked the scope stays ``COMMITTING``: the answer is not known yet. Whoever sent
the COMMIT waits, so that what follows it (hooks, the response) follows what really became of it.
"""

from __future__ import annotations

import logging
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from asgi_dbscope._driver_errors import mark_lost_commit
from asgi_dbscope._lifecycle import Event, State
from asgi_dbscope._transaction_status import TransactionStatus, find_status
from asgi_dbscope.errors import CommitInDoubtError

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._transaction_status import Transaction
    from asgi_dbscope._use import SessionUse

logger = logging.getLogger("asgi_dbscope")

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
"""Seconds between two questions: doubled each time, while the server has no answer yet."""


def miss_answer(scope: SessionScope[Any]) -> None:
    """COMMIT will get no answer on its own connection; another one may be asked."""
    use = scope.use
    if scope.transaction is not None and use is not None and use.is_committing:
        scope.is_answer_missing = True  # settle_doubt() follows, in the session's commit()
    else:
        lose_answer(scope)


def lose_answer(scope: SessionScope[Any]) -> None:
    """Nobody knows what became of the COMMIT."""
    scope.is_answer_missing = False
    scope.advance(Event.ANSWER_LOST)
    logger.error("%s", _describe(scope))


def settle_doubt(session: Session, use: SessionUse, error: BaseException) -> bool:
    """The ``commit()`` of *session* raised *error*: find out what became of the transaction.

    Returns:
        Whether it is committed; then the session has ended it so. Else *error* is the truth.

    Raises:
        CommitInDoubtError: If nobody knows.
    """
    scope = use.scope
    if scope.is_answer_missing:
        status = _find_status(scope, use, error)
        if status is TransactionStatus.COMMITTED:
            _end_as_committed(session)
            return True
        if status is TransactionStatus.ABORTED:
            scope.was_commit_lost = True
            mark_lost_commit(error)
            error.add_note(
                f"asgi_dbscope: COMMIT of {scope.label} (transaction {scope.transaction_id}) got "
                "lost on its way; the server says that nothing of it was kept."
            )
    if scope.state is not State.IN_DOUBT or isinstance(error, CommitInDoubtError):
        return False
    if not isinstance(error, Exception):  # a cancellation stays one
        return False
    doubt = doubt_of(scope)
    if scope.expiry is not None:
        scope.expiry = doubt  # the clock has said that it was rolled back
    raise doubt from error


def doubt_of(scope: SessionScope[Any]) -> CommitInDoubtError:
    """What to tell of a COMMIT of which nobody knows what became."""
    return CommitInDoubtError(_describe(scope), transaction_id=scope.transaction_id)


def _describe(scope: SessionScope[Any]) -> str:
    known = scope.transaction_id
    transaction = "its transaction" if known is None else f"transaction {known}"
    return (
        f"{scope.label}: the connection to the database {scope.database.name!r} was lost during "
        f"COMMIT, so {transaction} may or may not have been committed. Look whether the data is "
        "there before this is done again, or do it again only where doing it twice is safe."
    )


def _find_status(
    scope: SessionScope[Any], use: SessionUse, error: BaseException
) -> TransactionStatus | None:
    """Ask until the server knows; ``None`` after the deadline, and the scope is in doubt then."""
    status = None
    try:
        # A cancellation of the user's own commit() has to go on; out of grace, the driver's may
        # as well find out.
        if isinstance(error, Exception) or use.ender is not None:
            status = _ask_until_known(scope, use)
    finally:
        if scope.state is not State.COMMITTING:  # given up meanwhile, by a task that was cancelled
            status = None
        elif status is None:
            lose_answer(scope)
        scope.is_answer_missing = False
    if status is not None:
        logger.warning(
            "%s: the connection was lost during COMMIT; asked again, the server says that "
            "transaction %s is %s",
            scope.label,
            scope.transaction_id,
            status.value,
        )
    return status


def _ask_until_known(scope: SessionScope[Any], use: SessionUse) -> TransactionStatus | None:
    deadline = monotonic() + scope.database.cleanup_timeout
    (connection,) = use.connections  # invalidated by now: its place in the pool is free
    assert scope.transaction is not None
    ask = partial(_ask, connection.engine, scope.transaction)
    pause = FIRST_PAUSE
    while True:
        try:
            status: TransactionStatus | None = use.in_time(ask, deadline - monotonic())
        except Exception as error:  # noqa: BLE001 - unreachable, or starting up
            logger.debug("%s: the server can't be asked: %r", scope.label, error)
            status = TransactionStatus.IN_PROGRESS
        if status is not TransactionStatus.IN_PROGRESS:
            return status
        remaining = deadline - monotonic()
        if remaining <= 0:
            return None
        use.pause(min(pause, remaining))
        pause = min(pause * 2, LONGEST_PAUSE)


def _ask(engine: Engine, transaction: Transaction) -> TransactionStatus | None:
    """Ask the server on a connection of its own, made as the engine makes them.

    Not one of the pool: those may be as dead as the one that was lost, and all be taken.
    """
    pool = engine.pool.recreate()
    try:
        connection = pool.connect()
        try:
            return find_status(connection, transaction)
        finally:
            connection.invalidate()  # close() would first roll back, and wait for that
    finally:
        pool.dispose()


def _end_as_committed(session: Session) -> None:
    """Let SQLAlchemy's session end as after any COMMIT: events, objects, state.

    Its transaction has come as far as COMMIT; what is left is all but that. A rollback, the only
    other way on, would expire and expunge what is committed.
    """
    transaction: Any = session.get_transaction()
    connections = transaction._connections  # noqa: SLF001 - there is no other way to say that COMMIT is done
    for key, (connection, root, _, autoclose) in list(connections.items()):
        connections[key] = (connection, root, False, autoclose)
    transaction.commit()
