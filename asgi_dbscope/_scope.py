"""A session scope, and the one driver: only this file ends a session's transaction."""

from __future__ import annotations

import asyncio
import logging
from threading import RLock
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope._completion import run_to_completion
from asgi_dbscope._lifecycle import OPEN, ROLLBACK_ONLY, Event, Lifecycle, Outcome, State
from asgi_dbscope._options import SHAPES_TRANSACTION, ScopeOptions
from asgi_dbscope._policy import Cause, Ending, decide_ending
from asgi_dbscope._use import SessionUse
from asgi_dbscope.errors import (
    ConcurrentSessionUseError,
    ConfigurationError,
    LateOptionsError,
    RollbackOnlyError,
    SessionScopeClosedError,
    WebSocketSessionError,
)

if TYPE_CHECKING:
    from asgi_dbscope._asgi import ResponseHead, Scope
    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._database import Database
    from asgi_dbscope._gate import ResponseGate

S = TypeVar("S", bound=AsyncSession)

logger = logging.getLogger("asgi_dbscope")

_creation = RLock()
"""Held while a scope makes its session: two worker threads may ask for it at the same time."""


class SessionScope(Lifecycle, Generic[S]):
    """The span that one session serves: a request, a job, a block.

    You don't make one yourself: the middleware does, or ``async with db.session_scope()``.
    Get the current one with :func:`.current_scope`.

    Attributes:
        state: Where the scope is in its life.

        outcome: What became of its last transaction.

        database: Whose session it is.

        outer: What is around it: a request, or a scope by itself.

        options: How it treats its transactions.

        loop: The event loop it was opened in; ``None`` outside of asyncio.

        use: Who is inside the session; ``None`` as long as there is no session.

    """

    __slots__ = (
        "__weakref__",
        "_asgi_scope",
        "_gate",
        "_session",
        "database",
        "loop",
        "options",
        "outer",
        "use",
    )

    def __init__(
        self,
        database: Database[S],
        outer: ScopeHolder | None,
        options: ScopeOptions,
        asgi_scope: Scope | None = None,
        gate: ResponseGate | None = None,
    ) -> None:
        super().__init__()
        self.database = database
        self.outer = outer
        self.options = options
        self._asgi_scope = asgi_scope
        self._gate = gate
        self._session: S | None = None
        self.use: SessionUse | None = None
        self.loop = asyncio.get_running_loop() if gate is None else gate.loop

    # ---------------------------------------------------------------- what users see

    @property
    def is_over(self) -> bool:
        """Whether the scope has ended."""
        return self.state is State.CLOSED

    @property
    def databases(self) -> tuple[Database[S]]:
        """Its one database."""
        return (self.database,)

    def find(self, database: Database[Any]) -> SessionScope[S] | None:
        """Itself, if it is a scope of *database*."""
        return self if database is self.database else None

    @property
    def is_in_body(self) -> bool:
        """Whether the response's head has been sent, and its last body message not."""
        return self._gate is not None and self._gate.is_in_body

    @property
    def has_session(self) -> bool:
        """Whether there is a session to be had: not after the end, nor in a websocket."""
        return not self.is_over and not self.is_websocket

    @property
    def is_rollback_only(self) -> bool:
        """Whether :meth:`set_rollback_only` was called."""
        return self.state in ROLLBACK_ONLY

    @property
    def label(self) -> str:
        """What the scope serves, for logs and errors: ``GET /orders``."""
        asgi_scope = self._asgi_scope
        if asgi_scope is None:
            return "session_scope()"
        method = asgi_scope.get("method", "WEBSOCKET")
        return f"{method} {asgi_scope.get('path', '?')}"

    def __repr__(self) -> str:
        return f"<SessionScope {self.state.name} {self.label}>"

    @property
    def session(self) -> S:
        """The scope's one session, made at its first use.

        Raises:
            SessionScopeClosedError: If the scope has ended.
            WebSocketSessionError: If the scope is a websocket's.
        """
        return self._session or self._make_session()

    def set_rollback_only(self) -> None:
        """Forbid this scope to commit anything from now on; the response goes out as it is.

        For a dry run or a preview. It holds to the end of the scope, streams and background work
        included. What was committed before stays.

        Raises:
            SessionScopeClosedError: If the scope has ended.
            ConfigurationError: If the mode is ``"autocommit"``: nothing could be rolled back.
        """
        self._check_has_session()
        if self.options.mode == "autocommit":
            msg = (
                f"{self!r} is in mode 'autocommit': its statements are durable one by one, and "
                "nothing could be rolled back. Use session_options(mode='transaction') here."
            )
            raise ConfigurationError(msg)
        self.advance(Event.SET_ROLLBACK_ONLY)

    def configure(self, **changes: Any) -> None:
        """Change the options of this scope, as :class:`.session_options` does.

        Raises:
            ConfigurationError: If an option is unknown or wrong.
            LateOptionsError: If it shapes transactions and one has begun already.
            SessionScopeClosedError: If the scope has ended.
        """
        self._check_has_session()
        options = self.options.changed(changes)
        if options == self.options:
            return
        if options.mode == "autocommit" and self.is_rollback_only:
            msg = (
                f"{self!r} was set rollback-only, and in mode 'autocommit' its statements would be "
                "durable one by one. Leave one of the two out."
            )
            raise ConfigurationError(msg)
        late = SHAPES_TRANSACTION & changes.keys()
        if late and (self.outcome is not Outcome.NOT_BEGUN or self.state in OPEN):
            msg = (
                f"{self!r} has used the database already, so {', '.join(sorted(late))} can't be "
                "changed. Something before this point (a dependency, a middleware) ran a "
                "statement: set the options ahead of it, for instance with "
                "dependencies=[Depends(session_options(...).apply)] on the route."
            )
            raise LateOptionsError(msg)
        self.options = options

    def check_open(self) -> None:
        """Refuse use after the end."""
        if self.is_over:
            self.refuse_late_use()

    def refuse_late_use(self) -> NoReturn:
        """Say what a task that outlives its request has to do."""
        msg = (
            f"{self!r} has ended, and its session with it. A task that outlives its request needs "
            "a scope of its own: `async with db.session_scope() as session:`."
        )
        raise SessionScopeClosedError(msg)

    # ---------------------------------------------------------------- what the database reports

    def note_commit(self) -> None:
        """COMMIT is about to be sent.

        Raises:
            RollbackOnlyError: If the scope never commits.
        """
        if self.state in ROLLBACK_ONLY:
            msg = (
                f"{self!r} was set rollback-only, and COMMIT was asked for. Nothing was committed; "
                "leave the ending to the scope, or don't call set_rollback_only()."
            )
            raise RollbackOnlyError(msg)
        self.advance(Event.COMMIT_SENT)

    def advance(self, event: Event) -> State:
        """Take note of *event*, with a line in the debug log."""
        before = super().advance(event)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s -> %s", self.label, before.name, self.state.name)
        return before

    # ---------------------------------------------------------------- the driver

    def is_settled(self) -> bool:
        """Whether there is no open transaction to end."""
        session, use = self._session, self.use
        if session is None or use is None:
            return True
        return not (session.sync_session.in_transaction() or use.has_lost)

    def decide(self, cause: Cause, head: ResponseHead | None = None) -> Ending:
        """How the open transaction would end for *cause*."""
        options = self.options
        return decide_ending(
            cause, self.state, mode=options.mode, policy=options.commit_policy, head=head
        )

    async def settle(self, ending: Ending) -> asyncio.CancelledError | None:
        """End the open transaction, if there is one; the connection goes back to the pool.

        Returns:
            A cancellation that arrived meanwhile, which the caller has to pass on.

        Raises:
            Exception: What the database said to COMMIT. The transaction is rolled back by then.
            ConcurrentSessionUseError: If another task went on using the session, so that COMMIT
                could not be sent.
        """
        session, use = self._session, self.use
        if session is None or use is None:
            return None
        if use.has_lost:
            self._tell_of_loss(use, ending)
        if not session.sync_session.in_transaction():
            return None
        return await run_to_completion(
            self._end(session, use, ending), grace=self.database.cleanup_timeout
        )

    async def abandon_body(self) -> None:
        """Roll back what a body began that nobody reads any more.

        A statement that is under way is about to be cancelled by the framework, and isn't waited
        for: the rollback follows it.
        """
        if self.use is not None and self.use.is_busy:
            self.use.is_torn = True
        elif not self.is_settled():
            await self.settle(Ending.ROLLBACK)

    async def close(self, ending: Ending) -> asyncio.CancelledError | None:
        """End what is open and the session with it. Nothing can be done with the scope after.

        Returns:
            A cancellation that arrived meanwhile, which the caller has to pass on.
        """
        if self.use is not None:
            self.use.is_closing = True
        try:
            return await self.settle(ending)
        finally:
            self.close_settled()

    def close_settled(self) -> None:
        """Close a scope whose transaction is over: no I/O, so nothing to wait for."""
        session, self._session = self._session, None
        use, self.use = self.use, None
        if self.state in OPEN:
            # Abandoned: whoever still has the connection throws it away; the server rolls back,
            # unless it has had the COMMIT already.
            is_sent = self.state is State.COMMITTING
            self.advance(Event.ANSWER_LOST if is_sent else Event.ROLLED_BACK)
        self.advance(Event.CLOSED)
        if session is not None and use is not None and not use.is_abandoned:
            session.sync_session.close()

    async def _end(self, session: AsyncSession, use: SessionUse, ending: Ending) -> None:
        timeout = self.database.cleanup_timeout
        await use.begin_ending()
        try:
            if use.is_busy and not await use.wait_until_free(timeout):
                await self._invalidate(session, use)
                if ending is Ending.COMMIT and not use.is_torn:
                    raise ConcurrentSessionUseError(use.busy_message(timeout))
            elif ending is Ending.COMMIT and not use.is_torn:
                await self._commit(session, use)
            else:
                self._warn_of_loss(session, use)
                await self._roll_back(session, use)
        except asyncio.CancelledError:  # out of grace
            await self._invalidate(session, use)
            if ending is Ending.COMMIT:
                raise
        finally:
            use.is_torn = False
            use.ender = None

    async def _commit(self, session: AsyncSession, use: SessionUse) -> None:
        try:
            await session.commit()
        except BaseException as error:
            if self.state is State.COMMITTING and not isinstance(error, Exception):
                self.advance(Event.ANSWER_LOST)  # cancelled, and the driver said nothing of it
            await self._roll_back(session, use)
            became = (
                "may or may not have been committed: the connection was lost during COMMIT"
                if self.outcome is Outcome.IN_DOUBT
                else "was rolled back"
            )
            error.add_note(f"asgi_dbscope: the transaction of {self.label} {became}.")
            raise

    async def _roll_back(self, session: AsyncSession, use: SessionUse) -> None:
        """Roll back quietly: whatever goes wrong here must not hide why we roll back."""
        try:
            async with asyncio.timeout(self.database.cleanup_timeout):
                await session.rollback()
        except Exception:
            logger.warning(
                "%s: ROLLBACK failed; the connection is thrown away", self.label, exc_info=True
            )
            await self._invalidate(session, use)

    async def _invalidate(self, session: AsyncSession, use: SessionUse) -> None:
        use.is_closed = True
        try:
            await session.invalidate()
        except Exception:  # noqa: BLE001 - SQLAlchemy refuses while another task is connecting
            use.is_abandoned = True
            logger.warning("%s: the connection will be thrown away when it is free", self.label)

    def _tell_of_loss(self, use: SessionUse, ending: Ending) -> None:
        """A session that was closed by hand rolled back: a success must not be claimed."""
        use.has_lost = False
        if ending is Ending.COMMIT:
            msg = (
                f"The session of {self!r} was closed by hand (session.close(), or the end of "
                "`async with session:`) with changes that nobody had committed, and they were "
                "rolled back. Leave closing to the scope, or commit before."
            )
            raise SessionScopeClosedError(msg)

    def _warn_of_loss(self, session: AsyncSession, use: SessionUse) -> None:
        if self.options.mode == "manual" and use.has_changes(session.sync_session):
            logger.warning(
                "%s: mode is 'manual' and nobody committed: open changes are rolled back",
                self.label,
            )

    # ---------------------------------------------------------------- the session

    @property
    def is_websocket(self) -> bool:
        """Whether it is a websocket's, which has sessions only by blocks of their own."""
        return self._asgi_scope is not None and self._gate is None

    def _check_has_session(self) -> None:
        self.check_open()
        if self.is_websocket:
            msg = (
                f"{self!r}: a websocket's session is open for one message at a time, so that it "
                "holds no connection in between. Use `async with db.session_scope() as session:`, "
                "and give it what is for this message: mode=, read_only=, isolation_level=."
            )
            raise WebSocketSessionError(msg)

    def _make_session(self) -> S:
        self._check_has_session()
        with _creation:
            if self._session is None:
                self.use = SessionUse(self)
                self._session = self.database.make_session(self.use)
            return self._session
