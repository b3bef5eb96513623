"""One entry of a transactional block: what it found, what it owns, and how that ends."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from asgi_dbscope import _current, _driver_errors
from asgi_dbscope._boundary import Boundary, conclude
from asgi_dbscope._policy import Ending
from asgi_dbscope.errors import ConcurrentSessionUseError, TransactionTimeoutError

if TYPE_CHECKING:
    from contextvars import Token

    from asgi_dbscope._blocks import OwnScope
    from asgi_dbscope._propagation import Entry
    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._transactional import TransactionalBlock


def _open_around(entered: BlockEntry | None) -> BlockEntry | None:
    """*entered*, or the next one around it that hasn't been left: the others would be kept."""
    while entered is not None and entered not in entered.block.live:
        entered = entered.outer
    return entered


class BlockEntry:
    """One entry of a transactional block.

    Attributes:
        block: The block, which may be entered many times at once.

        kind: What was done on entering.

        scope: The scope that the block's work is done in.

        joined: The boundary that it is inside of.

        outer: The entry around this one, in this context.

        task: Who entered it; ``None`` for a synchronous database.

        abandoned: How often the scope had been abandoned by then.
    """

    boundary: Boundary | None = None
    """It has nothing of its own to end."""

    __slots__ = ("abandoned", "block", "joined", "kind", "outer", "scope", "task", "token")

    def __init__(
        self, block: TransactionalBlock[Any], kind: Entry, scope: SessionScope[Any]
    ) -> None:
        self.block = block
        self.kind = kind
        self.scope = scope
        self.abandoned = scope.abandoned
        self.task = None if scope.database.is_sync else asyncio.current_task()
        self.joined: Boundary | None = None
        self.outer = _current.innermost_block.get()
        if scope.boundaries:
            self._join(scope.boundaries[-1])
        self.token: Token[BlockEntry | None] = _current.innermost_block.set(self)
        block.live.add(self)

    def _join(self, boundary: Boundary) -> None:
        """Take part in a block that is open, unless it is another task's.

        Its end would be this one's. Threads are told by the session itself, if they use it at the
        same time.
        """
        if _current.is_of_another_task(boundary):
            msg = (
                f"{self.block.label} was entered while another task has {boundary.label} open on "
                "the same session: what is done here would be rolled back with it. Run one after "
                "the other, or give this one a session of its own: `async with db.branch():`."
            )
            raise ConcurrentSessionUseError(msg)
        self.joined = boundary
        boundary.inner += 1

    def is_here(self) -> bool:
        """Whether whoever asks may be the one who entered it: no other task that is at work."""
        task = self.task
        return task is None or task is asyncio.current_task() or task.done()

    def leave(self) -> None:
        """It isn't the innermost block any more."""
        self.block.live.discard(self)
        if self.joined is not None:
            self.joined.inner -= 1
        self._leave_context()
        if self.outer is not None:
            self.outer = _open_around(self.outer)
            del self.token  # knows it, too

    def _leave_context(self) -> None:
        innermost = _current.innermost_block
        if not _current.leave_innermost(innermost, self, self.token):
            return
        outer = self.outer
        if outer is not None and outer not in outer.block.live:  # left before this one
            innermost.set(_open_around(outer))


class OwningEntry(BlockEntry):
    """The entry of a block with a scope, a transaction or a savepoint of its own.

    Attributes:
        boundary: What marks its own transaction or savepoint; ``None`` where it has a scope.

        own: Its own scope, where it has one.

        limit: The timer of an asynchronous block with a timeout.

        is_late: Whether its timeout has passed.
    """

    __slots__ = ("boundary", "is_late", "limit", "own")

    def __init__(
        self,
        block: TransactionalBlock[Any],
        kind: Entry,
        scope: SessionScope[Any],
        own: OwnScope[Any] | None,
    ) -> None:
        super().__init__(block, kind, scope)
        self.own = own
        self.limit: asyncio.Timeout | None = None
        self.is_late = False
        self.boundary: Boundary | None = None
        if own is None:
            self.boundary = Boundary(block.label, self.task)

    def ending(self, error: BaseException | None) -> Ending:
        """How the block ends that raised *error*."""
        if self.is_late:
            return Ending.ROLLBACK
        is_success = error is None or not self.block.rules.rolls_back(error)
        return Ending.COMMIT if is_success else Ending.ROLLBACK

    def look_at_the_clock(self) -> None:
        """Decide, once, whether the block's timeout has passed."""
        deadline = self.scope.deadline
        if self.block.timeout is not None and deadline is not None:
            self.is_late = monotonic() >= deadline

    def judge(self, error: BaseException | None) -> tuple[Ending, Exception | None]:
        """How a block with a transaction or savepoint of its own ends, and what it raises then."""
        assert self.boundary is not None
        ending, refusal = conclude(self.scope, self.boundary, self.ending(error))
        if error is None and self.scope.is_over:
            self.scope.refuse_late_use()
        return ending, refusal

    def timed_out(
        self, error: BaseException | None, *, is_cancelled: bool = False
    ) -> TransactionTimeoutError | None:
        """The error of a block that took too long, whoever noticed first.

        An error of another kind stays what it is.
        """
        if not (is_cancelled or self.is_late):
            return None
        if not (is_cancelled or error is None or _driver_errors.is_statement_timeout(error)):
            return None
        return TransactionTimeoutError(
            f"{self.block.label} took longer than its timeout of {self.block.timeout} seconds and "
            "was rolled back."
        )
