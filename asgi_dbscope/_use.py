"""Who is inside a session: one at a time, and what the last one out has to do.

The two kinds differ only in how they wait: :mod:`._task_use` for tasks on an event loop,
:mod:`._thread_use` for threads.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from asgi_dbscope._current import get_innermost
from asgi_dbscope._doubt import doubt_of
from asgi_dbscope._lifecycle import Outcome, State
from asgi_dbscope._policy import Ending
from asgi_dbscope.errors import (
    ConcurrentSessionUseError,
    SessionScopeClosedError,
    SessionScopeMismatchError,
    StreamSessionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from asgi_dbscope._scope import SessionScope

T = TypeVar("T")

logger = logging.getLogger("asgi_dbscope")


class SessionUse(ABC):
    """The use of one scope's session, reported by the session at each operation's ends.

    Everything but :meth:`run` is called from inside an operation: in SQLAlchemy's greenlet for an
    asynchronous session, in whichever thread for a synchronous one.

    Attributes:
        scope: The session's scope.

        connections: Those that the open transaction has taken.

        user: The task or thread that is inside an operation of the session.

        ender: The task or thread that is ending the transaction now; nobody else may use it.

        failed_commit: The error of the last COMMIT of an ending, if that failed.

        has_several_users: Whether more than one task has been inside.

        is_begun_by_hand: Whether the open transaction is of a ``begin()`` of the user's own.

        has_written: Whether something other than a read was asked of the open transaction.

        is_committing: Whether the session is inside its COMMIT.

        has_lost: Whether the session was closed by hand with changes that nobody committed.

        is_closed: Whether the session was closed before its scope ended.

        is_torn: Whether the transaction is to be rolled back when the session is free: the client
            of a streaming body has left.

        has_late_body: Whether what is open, in the database or only in the session, is of a body
            whose client had left.

        is_abandoned: Whether the scope gave up waiting for the session to be free; the last one
            out throws the connection away.
    """

    # Few transactions need another value: a default of the class costs them nothing.
    ender: Any = None
    failed_commit: BaseException | None = None
    has_late_body = False
    has_lost = False
    has_several_users = False
    has_written = False
    is_abandoned = False
    is_begun_by_hand = False
    is_closed = False
    is_committing = False
    is_torn = False
    user: Any = None

    def __init__(self, scope: SessionScope[Any]) -> None:
        self.scope = scope
        self.connections: list[Connection] = []

    @property
    def is_free(self) -> bool:
        """Whether nobody is inside the session, nor ends its transaction."""
        return self.user is None and self.ender is None

    @property
    def is_busy(self) -> bool:
        """Whether somebody is inside an operation of the session."""
        return self.user is not None

    # ---------------------------------------------------------------- how it waits

    @property
    @abstractmethod
    def is_held_by_another(self) -> bool:
        """Whether somebody is inside or ends the transaction now, and it isn't this very code.

        What runs inside of an ending (a ``commit()`` of the user's own class, a listener) would
        wait for itself.
        """

    @abstractmethod
    def run(self, function: Callable[..., None], *arguments: Any) -> Coroutine[Any, Any, None]:
        """Run *function*, which may do I/O on the session, from the event loop."""

    @abstractmethod
    def check_place(self) -> object:
        """Refuse an operation that comes from where the session can't be used.

        Raises:
            EventLoopMismatchError: If it does.
        """

    @abstractmethod
    def enter(self) -> object:
        """An operation begins; while somebody ends the transaction it waits for its turn.

        So what a child task gets doesn't depend on whether its statement came a moment before, in
        or after the COMMIT of the response: after it, it begins the next transaction.

        Returns:
            What :meth:`leave` is to be told; ``None`` where nobody waits for it to leave: it is
            ending the transaction, or part of another operation (a flush in a query).

        Raises:
            ConcurrentSessionUseError: If somebody else is inside.
        """

    @abstractmethod
    def enter_quietly(self) -> object:
        """An end begins that must not be refused (a rollback); see :meth:`enter`.

        Where somebody is inside already it is theirs, or as good as lost with what they do.
        """

    @abstractmethod
    def enter_registration(self) -> object:
        """An object is about to be added or deleted, without I/O; see :meth:`enter`."""

    @abstractmethod
    def leave(self, user: object, session: Session) -> None:
        """An operation has ended; clear up what the last one out was told to."""

    @abstractmethod
    def begin_ending(self, ending: Ending, timeout: float) -> bool:
        """Let nobody else in; after another ending, if there is one.

        Args:
            ending: How. A COMMIT waits as long as the other one takes: that is the database's time.

            timeout: Seconds that anything else waits at most.

        Returns:
            Whether this is the ending now; else the other one goes on and on.

        Raises:
            BaseException: See :meth:`check_commit_before`.
        """

    @abstractmethod
    def end_ending(self, session: Session) -> None:
        """Let the others in again."""

    @abstractmethod
    def wait_until_free(self, timeout: float) -> bool:
        """Wait for the others to come out of the session, *timeout* seconds at most."""

    @abstractmethod
    def roll_back(self, session: Session, timeout: float) -> None:
        """Roll back, in *timeout* seconds if it can be interrupted."""

    def commit(self, session: Session) -> None:
        """Commit, in an ending: inside the session since :meth:`begin_ending`."""
        self.scope.check_can_commit()
        session.commit_inside()  # type: ignore[attr-defined]  # of the reporting class

    def invalidate(self, session: Session) -> None:
        """Throw its connections away."""
        session.invalidate()

    @abstractmethod
    def in_time(self, function: Callable[[], T], timeout: float) -> T:
        """What *function* returns, which does I/O of its own, within *timeout* seconds.

        Raises:
            TimeoutError: If it takes longer.
        """

    @abstractmethod
    def pause(self, seconds: float) -> None:
        """Wait."""

    @abstractmethod
    def run_hooks(self) -> None:
        """Run the hooks of a transaction that the user has ended."""

    # ---------------------------------------------------------------- what it knows

    def check_commit_before(self, ending: Ending, known: BaseException | None = None) -> None:
        """Refuse to claim a success where another ending has failed to commit the same work.

        Args:
            ending: What is asked for, now that the other ending is over.

            known: The failed COMMIT that was known before.

        Raises:
            Exception: What the database said to that COMMIT.
            CommitInDoubtError: If it was given up, and nobody knows what became of it.
            ConcurrentSessionUseError: If it was given up before it was sent.
        """
        failure = self.failed_commit
        if failure is known or ending is not Ending.COMMIT:
            return
        if isinstance(failure, Exception):
            raise failure
        if self.scope.outcome is Outcome.IN_DOUBT:
            raise doubt_of(self.scope) from failure
        msg = (
            f"{self.scope!r}: another task was cancelled while it committed the open transaction, "
            "which was rolled back. Await child tasks before the response is sent."
        )
        raise ConcurrentSessionUseError(msg) from failure

    def check_registration(self) -> None:
        """Refuse objects and operations that come too late."""
        scope = self.scope
        if scope.state is State.CLOSED:
            scope.refuse_late_use()
        gate = scope.gate
        if gate is not None and get_innermost() is not gate:
            self._check_request(gate)
        if self.is_closed and not scope.is_rolling_back:
            if scope.expiry is not None:
                scope.refuse_expired()
            release = "db.release()" if scope.database.is_sync else "await db.release()"
            msg = (
                f"The session of {scope!r} was closed by hand (session.close(), or the end of "
                f"`{scope.database.with_} session:`), or its connection had to be thrown away. The "
                f"scope closes it by itself; to give the connection back early use `{release}`."
            )
            raise SessionScopeClosedError(msg)
        if scope.options.stream == "error" and scope.is_in_body:
            msg = (
                f"{scope!r} has stream='error': its body may not use the session. Read what it "
                "needs before the response, or use stream='release' or stream='hold'."
            )
            raise StreamSessionError(msg)

    def _check_request(self, gate: object) -> None:
        """Refuse a session that an object of another request kept.

        Nothing of what it does would be settled at the head of the request that it does it in.
        """
        holder = get_innermost()
        other = None
        while holder is not None:
            if holder is gate:
                return
            if holder.is_request and not holder.is_over and other is None:
                other = holder.find(self.scope.database)
            holder = holder.outer
        if other is not None:
            msg = (
                f"The session of {self.scope!r} was used in {other.label}. An object that outlives "
                "its request keeps it: one that a DI container builds once (a Singleton, a "
                "Resource), a cache, a module's variable. Give such an object db.session_proxy, "
                "which stands for the session of whichever request uses it."
            )
            raise SessionScopeMismatchError(msg)

    @property
    def is_overtaking(self) -> bool:
        """Whether an object is being added while somebody else is inside, who doesn't mind."""
        return False

    def overwritten_message(self, objects: list[object]) -> str:
        """What to tell a user whose tasks change and flush the same session at the same time."""
        kinds = sorted({type(each).__name__ for each in objects})
        return (
            f"{self.scope!r}: {', '.join(kinds)} changed in one task while another flushed the "
            "session; the change would have been lost, so the flush was rolled back. Let one task "
            "write, or give each a session of its own: `async with db.branch() as session:`."
        )

    def has_changes(self, session: Session) -> bool:
        """Whether something would be lost if the open transaction were rolled back."""
        is_durable = self.scope.shape.is_autocommit
        is_pending = bool(session.new or session.dirty or session.deleted)
        return is_pending or (self.has_written and not is_durable and session.in_transaction())

    def note_loss(self, session: Session) -> None:
        """The session is being closed by hand, in a transaction."""
        self.has_lost = self.has_lost or self.has_changes(session)

    def busy_message(self, timeout: float) -> str:
        """What to tell a user whose child task holds up the end."""
        is_committing = self.scope.state is State.COMMITTING
        became = "its COMMIT is in doubt" if is_committing else "nothing is committed"
        return (
            f"{self.scope!r} ends, and after {timeout} seconds (cleanup_timeout) another task is "
            "still running a statement on its session. Its connection is thrown away and "
            f"{became}. Await child tasks before the response is sent."
        )

    def concurrent_message(self, inside: str, entering: str) -> str:
        """What to tell a user who shares one session between two."""
        own = (
            "`with db.session_scope() as session:`"
            if self.scope.database.is_sync
            else "`async with db.branch() as session:`, `await db.gather(...)`"
        )
        return (
            f"{self.scope!r}: {entering} uses the session while {inside} is inside it. A session, "
            "like its connection, does one thing at a time. Do one after the other; or give each a "
            f"session of its own ({own}); or let them queue with Database(..., "
            "concurrency='serialize')."
        )


class IdleNotes(SessionUse):
    """What a use notes besides, where it matters whether a transaction idles.

    Attributes:
        left_at: When somebody was last seen inside, by :func:`time.monotonic`.

        left_by: Who was.
    """

    left_at: float
    left_by: Any

    def note_begin(self, moment: float) -> None:
        """A transaction has begun."""
        self.left_at = moment
        self.left_by = None

    def leave(self, user: object, session: Session) -> None:
        """Note who was inside, and until when."""
        if user is not None:
            self.left_at = monotonic()
            self.left_by = user
        super().leave(user, session)  # type: ignore[safe-super]  # of the kind that it notes for
