"""The ends of transactional blocks that have a transaction or a savepoint of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgi_dbscope._driver import end_transaction, is_ended
from asgi_dbscope._lifecycle import OPEN, Event
from asgi_dbscope._policy import Ending
from asgi_dbscope.errors import ConcurrentSessionUseError, ConfigurationError, RollbackOnlyError

if TYPE_CHECKING:
    import asyncio

    from sqlalchemy.orm import Session, SessionTransaction

    from asgi_dbscope._options import ScopeOptions
    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._use import SessionUse


class Boundary:
    """A transactional block with a transaction or a savepoint of its own.

    Attributes:
        label: What messages call it.

        task: Who entered it, if it was a task.

        savepoint: Its savepoint; ``None`` where it has the transaction.

        is_rollback_only: Whether it is to be rolled back at its end.

        inner: How many blocks that joined it, or have a savepoint in it, are open.
    """

    __slots__ = ("inner", "is_rollback_only", "label", "savepoint", "task")

    def __init__(self, label: str, task: asyncio.Task[Any] | None) -> None:
        self.label = label
        self.task = task
        self.savepoint: SessionTransaction | None = None
        self.is_rollback_only = False
        self.inner = 0


def check_can_begin(scope: SessionScope[Any]) -> None:
    """Refuse to begin a block's transaction over changes that nobody has decided about."""
    session, use = scope.sync_session, scope.use
    if scope.options.mode != "manual" or session is None or use is None:
        return
    if use.has_changes(session) or session.in_nested_transaction():
        msg = (
            f"{scope!r} has mode='manual' and open changes or a savepoint that nobody has ended: "
            "the transaction of a transactional block would end them with its own. Commit or roll "
            "back first."
        )
        raise ConfigurationError(msg)


def ending_before(scope: SessionScope[Any]) -> Ending:
    """How what autobegan before a block ends: it is nobody's transaction."""
    return Ending.ROLLBACK if scope.is_rollback_only else Ending.COMMIT


def begin_block(scope: SessionScope[Any], boundary: Boundary, options: ScopeOptions) -> None:
    """What is done from now on belongs to the transaction of a block."""
    scope.shape = options
    scope.boundaries = (*scope.boundaries, boundary)


async def begin_savepoint(
    scope: SessionScope[Any], boundary: Boundary
) -> asyncio.CancelledError | None:
    """Set the savepoint of a block.

    Returns:
        A cancellation that arrived meanwhile; the savepoint is set all the same.
    """
    scope.session  # noqa: B018 - makes it
    return await scope.run(_begin_savepoint, boundary)


def begin_savepoint_here(scope: SessionScope[Any], boundary: Boundary) -> None:
    """:meth:`begin_savepoint` of a synchronous session, in this thread."""
    scope.session  # noqa: B018 - makes it
    session, use = scope.in_use()
    _begin_savepoint(scope, session, use, boundary)


def _begin_savepoint(
    scope: SessionScope[Any],
    session: Session,
    use: SessionUse,  # noqa: ARG001 - as the driver's functions
    boundary: Boundary,
) -> None:
    boundary.savepoint = session.begin_nested()
    scope.boundaries = (*scope.boundaries, boundary)


def conclude(
    scope: SessionScope[Any], boundary: Boundary, ending: Ending
) -> tuple[Ending, Exception | None]:
    """How a block ends that asks for *ending*, and what it has to raise after that."""
    if ending is Ending.ROLLBACK or scope.is_over:
        return ending, None
    if boundary.is_rollback_only or (boundary.savepoint is None and scope.is_rollback_only):
        return Ending.ROLLBACK, None
    if boundary.inner:
        msg = (
            f"{boundary.label} ends while a block that joined it is open in another task. It "
            "was rolled back. Await child tasks inside the block, or give them a session of "
            "their own."
        )
        return Ending.ROLLBACK, ConcurrentSessionUseError(msg)
    savepoint, agenda = boundary.savepoint, scope.agenda
    if agenda is None:
        return ending, None
    failure = agenda.failure if savepoint is None else agenda.failure_under(savepoint)
    if failure is not None:
        try:
            scope.refuse_after(failure)
        except RollbackOnlyError as error:
            return Ending.ROLLBACK, error
    return ending, None


async def end_savepoint(
    scope: SessionScope[Any], boundary: Boundary, ending: Ending, error: BaseException | None = None
) -> asyncio.CancelledError | None:
    """Release the savepoint of a block that ended with *error*, or roll back to it."""
    if _has_lost(scope, boundary, ending, error):
        return None
    return await scope.run(end_transaction, ending, boundary.savepoint)


def end_savepoint_here(
    scope: SessionScope[Any], boundary: Boundary, ending: Ending, error: BaseException | None
) -> None:
    """:meth:`end_savepoint` of a synchronous session, in this thread."""
    if not _has_lost(scope, boundary, ending, error):
        end_transaction(scope, *scope.in_use(), ending, boundary.savepoint)


def _has_lost(
    scope: SessionScope[Any], boundary: Boundary, ending: Ending, error: BaseException | None
) -> bool:
    """Whether the savepoint is gone, with a transaction that the user's own code ended.

    What a failed block did after that can't be undone by itself any more.
    """
    savepoint = boundary.savepoint
    if savepoint is not None and not is_ended(savepoint):
        return False
    if ending is Ending.ROLLBACK and scope.state in OPEN:
        if error is not None:
            scope.note_failure(error)
        else:
            _forbid_around(scope, boundary)
    return True


def _forbid_around(scope: SessionScope[Any], boundary: Boundary) -> None:
    """What a block asked to be rolled back is part of the transaction around it by now."""
    outer = [each for each in scope.boundaries if each is not boundary]
    if outer:
        outer[-1].is_rollback_only = True
    else:
        scope.advance(Event.SET_ROLLBACK_ONLY)


def leave_block(scope: SessionScope[Any], boundary: Boundary) -> None:
    """A block has ended; what is done from now on belongs to what is around it."""
    scope.boundaries = tuple(each for each in scope.boundaries if each is not boundary)
    if boundary.savepoint is None:
        scope.shape = scope.options
