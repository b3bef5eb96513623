"""Who is inside a session: in which loop, how many at once, and what the last one out has to do."""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbscope._completion import redeliver, run_to_completion
from asgi_dbscope._policy import Ending
from asgi_dbscope.errors import (
    EventLoopMismatchError,
    SessionScopeClosedError,
    StreamSessionError,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from asgi_dbscope._scope import SessionScope

logger = logging.getLogger("asgi_dbscope")

GRACE = 1.0
"""Seconds for throwing away a connection that its scope has given up already."""


_ending: ContextVar[SessionUse | None] = ContextVar("asgi_dbscope_ending", default=None)
"""The use of the session that this task, or the one that started it, is ending."""


class SessionUse:
    """The use of one scope's session, reported by the session at each operation's ends.

    Attributes:
        scope: The session's scope.

        connections: Those that the open transaction has taken.

        ender: The task that is ending the session's transaction now; nobody else may use it.

        has_written: Whether something other than a read was asked of the open transaction.

        is_committing: Whether the session is inside its COMMIT.

        has_lost: Whether the session was closed by hand with changes that nobody committed.

        is_closed: Whether the session was closed before its scope ended.

        is_closing: Whether the scope is ending for good: no operation begins any more.

        is_torn: Whether the transaction is to be rolled back when the session is free: the client
            of a streaming body has left.

        is_abandoned: Whether the scope gave up waiting for the session to be free; the last one
            out throws the connection away.
    """

    __slots__ = (
        "_becomes_free",
        "_users",
        "connections",
        "ender",
        "has_lost",
        "has_written",
        "is_abandoned",
        "is_closed",
        "is_closing",
        "is_committing",
        "is_torn",
        "scope",
    )

    def __init__(self, scope: SessionScope[Any]) -> None:
        self.scope = scope
        self.connections: list[Connection] = []
        self.ender: asyncio.Task[Any] | None = None
        self.has_written = False
        self.has_lost = False
        self.is_closed = False
        self.is_closing = False
        self.is_committing = False
        self.is_torn = False
        self.is_abandoned = False
        self._users: set[asyncio.Task[Any]] = set()
        self._becomes_free: asyncio.Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a task is inside an operation of the session."""
        return bool(self._users)

    def check_registration(self) -> None:
        """Refuse objects and operations that come too late."""
        scope = self.scope
        if scope.is_over:
            scope.refuse_late_use()
        if self.is_closed:
            msg = (
                f"The session of {scope!r} was closed by hand (session.close(), or the end of "
                "`async with session:`), or its connection had to be thrown away. The scope "
                "closes it by itself; to give the connection back early use `await db.release()`."
            )
            raise SessionScopeClosedError(msg)
        if scope.options.stream == "error" and scope.is_in_body:
            msg = (
                f"{scope!r} has stream='error': its body may not use the session. Read what it "
                "needs before the response, or use stream='release' or stream='hold'."
            )
            raise StreamSessionError(msg)

    def current_task(self) -> asyncio.Task[Any] | None:
        """The task that asks for an operation.

        Raises:
            EventLoopMismatchError: If it is in another thread or event loop than the scope's.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not None and loop is self.scope.loop:
            return asyncio.current_task(loop)
        msg = (
            f"The AsyncSession of {self.scope!r} was used outside of the asyncio event loop that "
            "its scope was opened in. From a worker thread (a `def` endpoint) call back into the "
            "loop: `anyio.from_thread.run(session.execute, statement)`. In another loop open a "
            "scope of its own: `async with db.session_scope() as session:`."
        )
        raise EventLoopMismatchError(msg)

    def enter(self) -> asyncio.Task[Any] | None:
        """An operation begins; while another task ends the transaction it waits for its turn.

        So what a child task gets doesn't depend on whether its statement came a moment before, in
        or after the COMMIT of the response: after it, it begins the next transaction.

        Returns:
            The task that :meth:`leave` is to be told; ``None`` where nobody waits for it to leave:
            it is ending the transaction, or part of another operation (a flush in a query).
        """
        task = self.current_task()
        if task in self._users:
            return None
        self.check_registration()
        if task is None or task is self.ender:
            return None
        if self.ender is not None and _ending.get() is self:
            return None  # a task that the user's own commit() or rollback() started
        while self.ender is not None:
            await_only(asyncio.wait([self.ender]))
            self.check_registration()
        if self.is_closing:
            self.scope.refuse_late_use()
        self._users.add(task)
        return task

    def leave(self, task: asyncio.Task[Any] | None, session: Session) -> None:
        """An operation has ended; the last one out clears up what it was told to."""
        if task is None:
            return
        self._users.remove(task)
        if self._users:
            return
        if self.is_torn and self.ender is None:
            # In a task of its own: this one is most likely being cancelled.
            self.is_torn = False
            redeliver(await_only(self.scope.settle(Ending.ROLLBACK)))
        if self.is_abandoned:
            throwing_away = greenlet_spawn(session.invalidate)
            redeliver(await_only(run_to_completion(throwing_away, grace=GRACE)))
        if self._becomes_free is not None and not self._becomes_free.done():
            self._becomes_free.set_result(None)

    def has_changes(self, session: Session) -> bool:
        """Whether something would be lost if the open transaction were rolled back."""
        is_durable = self.scope.options.mode == "autocommit"
        is_pending = bool(session.new or session.dirty or session.deleted)
        return is_pending or (self.has_written and not is_durable)

    def note_loss(self, session: Session) -> None:
        """The session is being closed by hand, in a transaction."""
        self.has_lost = self.has_changes(session)

    async def begin_ending(self) -> None:
        """Let nobody but this task in; after a ``release()`` of another task, if there is one."""
        while self.ender is not None:
            await asyncio.wait([self.ender])
        self.ender = asyncio.current_task()
        _ending.set(self)  # in the context of the ending's task, and so of those it starts

    async def wait_until_free(self, timeout: float) -> bool:  # noqa: ASYNC109 - the answer is False, not an error
        """Wait for other tasks to come out of the session, *timeout* seconds at most."""
        self._becomes_free = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._becomes_free
        except TimeoutError:
            logger.warning("%s", self.busy_message(timeout))
            return False
        finally:
            self._becomes_free = None
        return True

    def busy_message(self, timeout: float) -> str:
        """What to tell a user whose child task holds up the end."""
        return (
            f"{self.scope!r} ends, and after {timeout} seconds (cleanup_timeout) another task is "
            "still running a statement on its session. Its connection is thrown away and nothing "
            "is committed. Await child tasks before the response is sent."
        )
