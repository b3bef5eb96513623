"""A session scope: its session, its options, and the ends of its transactions."""

from __future__ import annotations

import asyncio
import logging
from math import inf
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import _dialects, _driver_errors
from asgi_dbscope._agenda import Agenda
from asgi_dbscope._answers import find_answer
from asgi_dbscope._completion import redeliver, run_to_completion
from asgi_dbscope._current import (
    find_attempt,
    forbid_attempts,
    is_of_another_task,
    open_around,
)
from asgi_dbscope._doubt import doubt_of, lose_answer
from asgi_dbscope._driver import end_transaction
from asgi_dbscope._hook_runs import run_hooks, run_hooks_here
from asgi_dbscope._lifecycle import (
    OPEN,
    OUTCOMES,
    ROLLBACK_ONLY,
    Event,
    Lifecycle,
    Outcome,
    State,
)
from asgi_dbscope._options import SHAPES_TRANSACTION, ScopeOptions
from asgi_dbscope._policy import Cause, Ending, decide_ending
from asgi_dbscope._retry import AUTOCOMMITTED, COMMITTED, HOOK_RAN, IN_DOUBT, Attempt
from asgi_dbscope._task_use import IdleTaskUse, TaskUse
from asgi_dbscope._text import label_of, one_line
from asgi_dbscope._thread_use import IdleThreadUse, ThreadUse
from asgi_dbscope.errors import (
    ConcurrentSessionUseError,
    ConfigurationError,
    LateOptionsError,
    RollbackOnlyError,
    SessionScopeClosedError,
    TransactionTimeoutError,
    WebSocketSessionError,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from collections.abc import Set as AbstractSet

    from sqlalchemy.orm import Session, SessionTransaction

    from asgi_dbscope._admission import AdmittedRequest
    from asgi_dbscope._agenda import Hook
    from asgi_dbscope._asgi import ResponseHead, Scope
    from asgi_dbscope._boundary import Boundary
    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._database import Database
    from asgi_dbscope._gate import ResponseGate
    from asgi_dbscope._transaction_status import Transaction
    from asgi_dbscope._use import SessionUse
    from asgi_dbscope._watch import TransactionWatch
    from asgi_dbscope.errors import DBScopeError

S = TypeVar("S", bound="AsyncSession | Session")

_OUTCOMES = {Ending.COMMIT: Outcome.COMMITTED, Ending.ROLLBACK: Outcome.ROLLED_BACK}
"""What an ending comes to where it met with no error."""

_SUCCESSES = frozenset({Cause.COMPLETED, Cause.RELEASED})
"""The causes that claim that what was done is kept."""

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

        shape: How its next transaction begins: its options, or those of the block it is in.

        loop: The event loop it was opened in; ``None`` outside of asyncio.

        use: Who is inside the session; ``None`` as long as there is no session.

        agenda: What the end of the open transaction owes; ``None`` where nothing.

        boundaries: The open blocks with a transaction or savepoint of their own, innermost last.

        deadline: When its transaction has to be over, by :func:`time.monotonic`.

        begun_at: When its transaction was begun, by the same clock, where an option asks for that.

        holder: The scope around it whose connection is held meanwhile, if there is one.

        gate: The request that it serves, if it serves one.

        shaped_by: The block that made it read-only, or gave it its isolation level, by joining.

        demands: The options that such a block has named.

        current_attempt: The attempt that it was opened in, or that its transaction is, where work
            is done again after a conflict.
    """

    # What few scopes have costs the others nothing: a default of the class.
    abandoned = 0
    """How often what was open was rolled back under its blocks: their other half must not stay."""
    agenda: Agenda | None = None
    begun_at: float | None = None
    boundaries: tuple[Boundary, ...] = ()
    current_attempt: Attempt | None = None
    deadline: float | None = None
    expiry: DBScopeError | None = None
    """Why its transaction was ended before its time; nothing is done with its session after."""
    demands: frozenset[str] = frozenset()
    met: tuple[BaseException, Outcome] | None = None
    """The last error with an HTTP answer of its own, and what had become of the scope by then."""
    holder: SessionScope[Any] | None = None
    is_closing = False
    """Whether it is ending for good: hooks may still run, but no operation of its session begins,
    and no session is made, which nobody would close."""
    is_rolling_back = False
    is_answer_missing = False
    """Whether a COMMIT got no answer, and the server is being asked what became of it."""
    shaped_by: str | None = None
    shares_time = False
    """Whether its ``timeout`` is that of the scope around it, and ends with that one's."""
    watch: TransactionWatch | None = None
    """The clock of its last transaction."""
    is_websocket = False
    """Whether it is a websocket's, which has sessions only by blocks of their own."""
    transaction: Transaction | None = None
    """What is being committed, or was last, if ``resolve_in_doubt`` has asked for it."""
    was_commit_lost = False
    """Whether its last COMMIT got no answer, and the server said that nothing of it was kept.

    The connection's error is a failed COMMIT's then; as nothing was done, it may be done again.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_asgi_scope",
        "_name",
        "_session",
        "database",
        "gate",
        "loop",
        "options",
        "outer",
        "shape",
        "sync_session",
        "use",
    )

    def __init__(  # noqa: PLR0917 - by position, for speed
        self,
        database: Database[S],
        outer: ScopeHolder | None,
        options: ScopeOptions,
        asgi_scope: Scope | None = None,
        gate: ResponseGate | None = None,
        name: str | None = None,
    ) -> None:
        self.state = State.IDLE
        self.outcome = Outcome.NOT_BEGUN
        self.database = database
        self.outer = outer
        self.options = self.shape = options
        self._asgi_scope = asgi_scope
        self.gate = gate
        self._name = name
        self._session: S | None = None
        self.sync_session: Session | None = None
        self.use: SessionUse | None = None
        holder = gate or outer
        if holder is not None and Attempt.were_made:
            self.current_attempt = holder.current_attempt
        if gate is not None:
            self.loop = gate.loop
        else:
            if asgi_scope is not None:
                self.is_websocket = True
            self.loop = None if database.is_sync else asyncio.get_running_loop()

    # ---------------------------------------------------------------- what users see

    @property
    def is_over(self) -> bool:
        """Whether the scope has ended."""
        return self.state is State.CLOSED

    @property
    def databases(self) -> tuple[Database[S]]:
        """Its one database."""
        return (self.database,)

    @property
    def scopes(self) -> tuple[SessionScope[S]]:
        """Itself."""
        return (self,)

    is_request = False
    """It is a scope by itself, not a request."""

    def find(self, database: Database[Any]) -> SessionScope[S] | None:
        """Itself, if it is a scope of *database*."""
        return self if database is self.database else None

    @property
    def is_in_body(self) -> bool:
        """Whether the response's head has been sent, and its last body message not."""
        return self.gate is not None and self.gate.is_in_body

    @property
    def has_session(self) -> bool:
        """Whether there is a session to be had: not after the end, nor in a websocket."""
        return not self.is_over and not self.is_websocket

    @property
    def is_in_transaction(self) -> bool:
        """Whether what is done now belongs to a transaction, begun in the database or not yet.

        Always in mode ``"transaction"``; else inside a transactional block, or a ``begin()`` of
        the user's own. What a statement began by itself is nobody's transaction.
        """
        if self.shape.is_transaction:
            return True
        return self.use is not None and self.use.is_begun_by_hand

    @property
    def is_rollback_only(self) -> bool:
        """Whether :meth:`set_rollback_only` was called, here or in a block that is open."""
        if self.boundaries and any(each.is_rollback_only for each in self.boundaries):
            return True
        return self.state in ROLLBACK_ONLY

    @property
    def label(self) -> str:
        """What the scope serves, for logs and errors: ``GET /orders``."""
        asgi_scope = self._asgi_scope
        if asgi_scope is None:
            return self._name or "session_scope()"
        return label_of(asgi_scope)

    @property
    def transaction_id(self) -> int | None:
        """PostgreSQL's number of what is being committed, or was last.

        Only with ``Database(resolve_in_doubt=True)``, and if something was written.
        """
        return None if self.transaction is None else self.transaction.number

    @property
    def admitted_request(self) -> AdmittedRequest | None:
        """The request that it serves, or is a part of, where requests are admitted."""
        if self.gate is not None:
            return self.gate.admitted_request
        return None if self.holder is None else self.holder.admitted_request

    @property
    def block_label(self) -> str | None:
        """What the innermost block with a transaction or savepoint of its own is called."""
        return self.boundaries[-1].label if self.boundaries else self._name

    @property
    def _attempt_here(self) -> Attempt | None:
        """The attempt that whoever asks is a part of: also where the scope was opened before it."""
        return find_attempt() or self.current_attempt

    @property
    def attempt(self) -> int:
        """Which attempt this is at what a ``retry`` may do again; the first one is 1."""
        attempt = self._attempt_here
        return 1 if attempt is None else attempt.number

    @property
    def is_last_attempt(self) -> bool:
        """Whether no other attempt can follow, whatever happens."""
        attempt = self._attempt_here
        return attempt is None or attempt.is_last_of_all

    def fence(self, reason: str) -> None:
        """Say that something was done that must not be done twice: no other attempt follows.

        Call it before you do it. See :class:`.Retry`.

        Args:
            reason: What, for the log: ``"sent an e-mail"``.
        """
        self.forbid_attempts(one_line(reason))

    def forbid_attempts(self, reason: str) -> None:
        """Let nothing be done again that this is a part of, by its scope or by who does it."""
        forbid_attempts(reason, self.current_attempt)

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
        included; inside a transactional block with a transaction or a savepoint of its own, to the
        end of that. What was committed before stays.

        Raises:
            SessionScopeClosedError: If the scope has ended.
            ConfigurationError: If the mode is ``"autocommit"``: nothing could be rolled back.
        """
        self.check_has_session()
        if self.boundaries:
            self.boundaries[-1].is_rollback_only = True
            return
        if self.options.mode == "autocommit":
            msg = (
                f"{self!r} is in mode 'autocommit': its statements are durable one by one, and "
                "nothing could be rolled back. Use session_options(mode='transaction') here, or a "
                "transactional block."
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
        self.change_options(self.options.changed(changes), changes.keys())

    def change_options(self, options: ScopeOptions, names: AbstractSet[str]) -> None:
        """Have *options*, which have other values of those *names*; see :meth:`configure`."""
        self.check_has_session()
        if options == self.options:
            return
        if options.mode == "autocommit" and self.is_rollback_only:
            msg = (
                f"{self!r} was set rollback-only, and in mode 'autocommit' its statements would be "
                "durable one by one. Leave one of the two out."
            )
            raise ConfigurationError(msg)
        late = SHAPES_TRANSACTION & names
        if options.is_autocommit is not self.options.is_autocommit:
            late |= names
        if late and self.has_begun:
            msg = (
                f"{self!r} has used the database already, so {', '.join(sorted(late))} can't be "
                "changed. Something before this point (a dependency, a middleware) ran a "
                "statement: set the options ahead of it, for instance with "
                "dependencies=[Depends(session_options(...).apply)] on the route."
            )
            raise LateOptionsError(msg)
        self.options = options
        if not self.boundaries:
            self.shape = options
        if "retry" in names and self.gate is not None:
            self.gate.have_retry(options.retry)

    @property
    def has_begun(self) -> bool:
        """Whether a transaction of it has begun already, or a block of it is open."""
        return self.outcome is not Outcome.NOT_BEGUN or self.state in OPEN or bool(self.boundaries)

    def check_open(self) -> None:
        """Refuse use after the end."""
        if self.is_over:
            self.refuse_late_use()

    def refuse_late_use(self) -> NoReturn:
        """Say what a task that outlives its request has to do."""
        msg = (
            f"{self!r} has ended, and its session with it. A task that outlives its request needs "
            f"a scope of its own: `{self.database.with_} db.session_scope() as session:`. An "
            "object that is built once (a container's Singleton) needs `db.session_proxy`."
        )
        raise SessionScopeClosedError(msg)

    # ---------------------------------------------------------------- what the database reports

    def note_commit(self) -> None:
        """COMMIT is about to be sent.

        Raises:
            RollbackOnlyError: If the scope must not commit.
        """
        failure = None if self.agenda is None else self.agenda.failure
        if failure is not None:
            self.refuse_after(failure)
        if self.is_rollback_only:
            self._refuse_rollback_only()
        self.advance(Event.COMMIT_SENT)

    def advance(self, event: Event) -> State:
        """Take note of *event*, with a line in the debug log."""
        before = super().advance(event)
        if Attempt.were_made:
            self._fence_after(event)
        if self.agenda is not None and event in OUTCOMES:
            self._end_agenda(self.agenda, OUTCOMES[event])
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s -> %s", self.label, before.name, self.state.name)
        return before

    def expect_second_connection(self) -> None:
        """An operation begins that may need a connection beside the one held around it.

        Raises:
            PoolTooSmallError: If it could never get one.
        """
        if self.state not in OPEN:
            self.database.source_of(self.shape).second_connections.expect(self)

    def got_second_connection(self) -> None:
        """The operation has its connection, or has done without."""
        self.database.source_of(self.shape).second_connections.forget(self)

    def check_deadline(self) -> None:
        """Refuse to go on after the deadline.

        Raises:
            TransactionTimeoutError: If it has passed.
        """
        if self.deadline is not None and monotonic() >= self.deadline:
            msg = f"{self!r}: the transaction's timeout has passed; it is rolled back."
            raise TransactionTimeoutError(msg)

    @property
    def due_at(self) -> float:
        """When its transaction has to be over; ``inf``: whenever, ``-inf``: it was ended."""
        if self.expiry is not None:
            return -inf
        due_at = inf if self.deadline is None else self.deadline
        watch = self.watch
        if watch is None or watch.is_over or watch.deadline is None:
            return due_at
        return min(due_at, watch.deadline)

    def refuse_expired(self) -> NoReturn:
        """Say why nothing can be done any more: the transaction was ended before its time."""
        assert self.expiry is not None
        if self.state is State.COMMITTING or self.state is State.IN_DOUBT:
            raise doubt_of(self)  # also while another task commits, who hasn't heard of it yet
        raise type(self.expiry)(*self.expiry.args)

    def meet(self, error: BaseException) -> None:
        """Remember *error* for the request, if it has an HTTP answer of its own.

        Where a framework turns it into a response, it may not be seen any more.
        """
        scope: SessionScope[Any] = self
        while scope.holder is not None:
            scope = scope.holder
        if find_answer(error) is not None:
            scope.met = error, scope.outcome

    # ---------------------------------------------------------------- hooks and failures

    def add_hook(self, hook: Hook) -> None:
        """Let *hook* wait for the end of the transaction."""
        self.check_open()
        self._agenda().add_hook(hook, self.savepoint)

    def add_late_hook(self, hook: Hook) -> None:
        """Let *hook*, which waits for no transaction, run after the response."""
        self.check_open()
        agenda = self._agenda()
        agenda.late.append((hook, Outcome.NOT_BEGUN))
        self._end_agenda(agenda, self.outcome)

    def started_hooks(self) -> set[asyncio.Task[None]]:
        """The hooks that run at once; the next end waits for them."""
        self.check_open()
        return self._agenda().started

    def note_end(self, outcome: Outcome) -> None:
        """The transaction is over, also where nothing of it was begun in the database."""
        if self.agenda is None or self.state in OPEN:
            return
        if outcome is Outcome.COMMITTED and self.is_rollback_only:
            return  # nothing was asked of the database; the scope's end will roll back
        self._end_agenda(self.agenda, outcome)

    def _end_agenda(self, agenda: Agenda, outcome: Outcome) -> None:
        """Let hooks be due; those that wait for a response too go to the request, in their turn."""
        agenda.end(outcome)
        if not agenda.late:
            return
        self.forbid_attempts(HOOK_RAN)  # nothing keeps them from it any more
        if agenda.is_handed_over:
            return
        holder: ScopeHolder | None = self.gate or self.outer
        while holder is not None and not agenda.is_handed_over:
            agenda.is_handed_over = holder.take_late_hooks(self)
            holder = holder.outer

    def check_can_commit(self) -> None:
        """Refuse a ``commit()`` of the user's, before SQLAlchemy releases the savepoints.

        Raises:
            RollbackOnlyError: If nothing may be committed.
        """
        if self.expiry is not None:
            self.refuse_expired()
        failure = None if self.agenda is None else self.agenda.failure
        if failure is not None:
            self.refuse_after(failure)
        if self.is_rollback_only and self.savepoint is not None:
            self._refuse_rollback_only()

    def _refuse_rollback_only(self) -> NoReturn:
        msg = (
            f"{self!r} was set rollback-only, and COMMIT was asked for. Nothing was committed; "
            "leave the ending to the scope, or don't call set_rollback_only()."
        )
        raise RollbackOnlyError(msg)

    def note_failure(self, error: BaseException) -> None:
        """A block that has no transaction of its own failed: what it joined can't be committed."""
        if not self.is_over:
            self._agenda().add_failure(error, self.savepoint)

    def note_error(self, error: BaseException) -> None:
        """The database reports *error*: maybe the open transaction has lost to another one."""
        if self.current_attempt is None or self.is_over:
            return
        if _driver_errors.find_conflict(error) is not None:
            self._agenda().add_conflict(error, self.savepoint)

    def _fence_after(self, event: Event) -> None:
        """What is durable must not be done twice."""
        if event is Event.COMMITTED:
            if self._is_begun_by_hand or not self.shape.reads_at_once:  # there nothing is durable
                self.forbid_attempts(COMMITTED)
        elif event is Event.ANSWER_LOST:
            self.forbid_attempts(IN_DOUBT)
        elif event is Event.BEGUN and self.is_autocommitting:
            self.forbid_attempts(AUTOCOMMITTED)

    @property
    def is_autocommitting(self) -> bool:
        """Whether each statement is durable by itself."""
        return self.shape.mode == "autocommit" and not self._is_begun_by_hand

    @property
    def _is_begun_by_hand(self) -> bool:
        return self.use is not None and self.use.is_begun_by_hand

    def _agenda(self) -> Agenda:
        if self.agenda is None:
            self.agenda = Agenda()
        return self.agenda

    @property
    def savepoint(self) -> SessionTransaction | None:
        """The innermost open savepoint of the session."""
        session = self.sync_session
        return None if session is None else session.get_nested_transaction()

    def refuse_after(self, failure: BaseException) -> NoReturn:
        """Say why nothing can be committed: *failure* was swallowed."""
        msg = (
            f"{self!r} can't commit: a transactional block inside it failed with "
            f"{type(failure).__name__} (this error's __cause__), and the code caught that and went "
            "on. Nothing is kept. Let the error propagate; or, where it is expected, give that "
            "block a savepoint with propagation='NESTED', or name the error in its no_rollback_for."
        )
        raise RollbackOnlyError(msg) from failure

    # ---------------------------------------------------------------- the ends

    def is_settled(self) -> bool:
        """Whether there is no open transaction to end, and nothing to do at its end."""
        if self.agenda is not None and not self.agenda.is_empty:
            return False
        session, use = self.sync_session, self.use
        if session is None or use is None:
            return True
        if session.in_transaction() or use.has_lost:
            return False
        if use.ender is None and use.user is None:
            return True
        return not use.is_held_by_another  # who ends it, and is in it until the connection is back

    def decide(self, cause: Cause, head: ResponseHead | None = None) -> Ending:
        """How the open transaction would end for *cause*.

        Raises:
            RollbackOnlyError: If a success would be claimed of what can't be committed.
        """
        if self.use is not None and self.use.has_late_body:
            return Ending.ROLLBACK  # whoever came after the body would have parted from it
        if self.expiry is not None:
            return self._decide_expired(cause, head)
        if self.is_rollback_only:
            return Ending.ROLLBACK
        ending = decide_ending(
            cause, self.state, mode=self.shape.mode, policy=self.options.commit_policy, head=head
        )
        if ending is Ending.COMMIT and self.watch is not None:
            self.watch.strike()
            if self.expiry is not None:
                return self._decide_expired(cause, head)
        failure = None if self.agenda is None else self.agenda.failure
        if failure is None or ending is Ending.ROLLBACK:
            return ending
        if head is None or head.status < 400:  # noqa: PLR2004 - what is above tells of it itself
            self.refuse_after(failure)
        return Ending.ROLLBACK

    def _decide_expired(self, cause: Cause, head: ResponseHead | None) -> Ending:
        is_success = cause in _SUCCESSES if head is None else head.status < 400  # noqa: PLR2004 - what is above tells of it itself
        if is_success:
            self.refuse_expired()
        return Ending.ROLLBACK

    def check_blocks(self) -> None:
        """Refuse to end well while a child task is in the middle of a block.

        Raises:
            ConcurrentSessionUseError: If one is.
        """
        for boundary in self.boundaries:
            if is_of_another_task(boundary):
                msg = (
                    f"{self!r} ends while {boundary.label} is open in a child task: half of the "
                    "block would be committed. It was rolled back. Await child tasks before."
                )
                raise ConcurrentSessionUseError(msg)

    async def settle(
        self, ending: Ending, *, is_failing: bool = False
    ) -> asyncio.CancelledError | None:
        """End the open transaction, if there is one; the connection goes back to the pool.

        Args:
            ending: How.

            is_failing: Whether an error is under way, which a hook's must not replace.

        Returns:
            A cancellation that arrived meanwhile, which the caller has to pass on.

        Raises:
            Exception: What the database said to COMMIT. The transaction is rolled back by then.
            ConcurrentSessionUseError: If somebody else went on using the session, so that COMMIT
                could not be sent.
        """
        cancellation = None
        try:
            if self._is_open(ending):
                cancellation = await self.run(end_transaction, ending)
        except BaseException:
            if self.agenda is not None:
                self.note_end(Outcome.ROLLED_BACK)
                redeliver(await run_hooks(self, is_failing=True))
            raise
        if self.agenda is not None:
            self.note_end(_OUTCOMES[ending])
            cancellation = await run_hooks(self, is_failing=is_failing) or cancellation
        return cancellation

    async def end_expired(self) -> asyncio.CancelledError | None:
        """Roll back a transaction whose time is up; the head, or the block's end, is told later."""
        is_shared = self.watch is not None and self.watch.is_shared
        ending = Ending.ABANDON if is_shared else Ending.ROLLBACK
        cancellation = await self.run(end_transaction, ending)
        if self.agenda is not None:
            self.note_end(Outcome.ROLLED_BACK)
            cancellation = await run_hooks(self, is_failing=True) or cancellation
        return cancellation

    def end_expired_here(self) -> None:
        """:meth:`end_expired` of a synchronous session, in this thread."""
        session, use = self.in_use()
        is_lost = any(_dialects.is_lost_when_cut(each.dialect) for each in use.connections)
        end_transaction(self, session, use, Ending.ABANDON if is_lost else Ending.ROLLBACK)
        self.note_end(Outcome.ROLLED_BACK)
        run_hooks_here(self, is_failing=True)

    def settle_here(self, ending: Ending, *, is_failing: bool = False) -> None:
        """:meth:`settle` of a synchronous session, in this thread."""
        try:
            if self._is_open(ending):
                end_transaction(self, *self.in_use(), ending)
        except BaseException:
            self.note_end(Outcome.ROLLED_BACK)
            run_hooks_here(self, is_failing=True)
            raise
        self.note_end(_OUTCOMES[ending])
        run_hooks_here(self, is_failing=is_failing)

    def _is_open(self, ending: Ending) -> bool:
        """Whether there is a transaction to end; settles what needs no I/O."""
        session, use = self.sync_session, self.use
        if session is None or use is None:
            return False
        if use.has_lost:
            self._tell_of_loss(use, ending)
        if use.is_abandoned:
            return False  # whoever still has the connection throws it away
        # Asked again: a thread may have begun meanwhile, and left.
        return session.in_transaction() or use.is_held_by_another or session.in_transaction()

    def in_use(self) -> tuple[Session, SessionUse]:
        """The session, and who is in it."""
        assert self.sync_session is not None
        assert self.use is not None
        return self.sync_session, self.use

    def run(
        self, function: Any, *arguments: Any
    ) -> Coroutine[Any, Any, asyncio.CancelledError | None]:
        """Run a function of the driver to its end, from the event loop."""
        session, use = self.in_use()
        operation = use.run(function, self, session, use, *arguments)
        return run_to_completion(operation, grace=self.database.cleanup_timeout)

    async def abandon_body(self) -> None:
        """Roll back what a body began that nobody reads any more.

        A statement that is under way is about to be cancelled by the framework, and isn't waited
        for: the rollback follows it. What another task of the body does while this rolls back is
        the body's, too: nobody has heard of the client's leaving yet.
        """
        self.abandoned += 1
        for boundary in self.boundaries:
            boundary.is_rollback_only = True
        while not self.is_settled():
            use = self.use
            if use is not None and use.is_abandoned:
                return  # whoever still has the connection throws it away
            if use is not None and use.is_busy:
                use.is_torn = True
                return
            redeliver(await self.settle(Ending.ROLLBACK))

    def shut(self) -> bool:
        """Let no operation begin any more; whether there is nothing to end, nor anybody inside."""
        self.is_closing = True
        if self.database.is_sync:
            with _creation:  # a thread that hasn't seen it makes the session still
                use = self.use
            if isinstance(use, ThreadUse) and not use.is_left():
                return False
        return self.is_settled()

    async def close(
        self, ending: Ending, *, is_failing: bool = False
    ) -> asyncio.CancelledError | None:
        """End what is open and the session with it. Nothing can be done with the scope after.

        Args:
            ending: How.

            is_failing: Whether an error is under way, which a hook's must not replace.

        Returns:
            A cancellation that arrived meanwhile, which the caller has to pass on.
        """
        self.shut()
        try:
            cancellation = await self.settle(ending, is_failing=is_failing)
        finally:
            self.close_settled()
            if self._has_late_hooks:
                redeliver(await run_hooks(self, late=True, is_failing=True))
        return cancellation

    def close_here(self, ending: Ending, *, is_failing: bool = False) -> None:
        """:meth:`close` of a synchronous session, in this thread."""
        self.shut()
        try:
            self.settle_here(ending, is_failing=is_failing)
        finally:
            self.close_settled()
            if self._has_late_hooks:
                run_hooks_here(self, late=True, is_failing=True)

    @property
    def _has_late_hooks(self) -> bool:
        """Whether there are hooks that waited for the scope's end, and for no response."""
        agenda = self.agenda
        return agenda is not None and bool(agenda.late) and not agenda.is_handed_over

    def take_late_hooks(self, scope: SessionScope[Any]) -> bool:  # noqa: ARG002 - as a request
        """Only a request has a response that they could wait for."""
        return False

    def close_settled(self) -> None:
        """Close a scope whose transaction is over: no I/O, so nothing to wait for."""
        session, self.sync_session = self.sync_session, None
        use, self.use = self.use, None
        self._session = None
        if self.state in OPEN:
            # Abandoned: whoever still has the connection throws it away; the server rolls back,
            # unless it has had the COMMIT already.
            if self.state is State.COMMITTING:
                lose_answer(self)
            else:
                self.advance(Event.ROLLED_BACK)
        self.advance(Event.CLOSED)
        if session is not None and use is not None and not use.is_abandoned:
            session.close_inside()  # type: ignore[attr-defined]  # of the reporting class
        if self.outer is not None:  # a task that goes on in this context keeps this one alive
            self.outer, self.holder = open_around(self.outer), None

    def _tell_of_loss(self, use: SessionUse, ending: Ending) -> None:
        """A session that was closed by hand rolled back: a success must not be claimed."""
        use.has_lost = False
        if ending is Ending.COMMIT:
            if self.expiry is not None:
                self.refuse_expired()
            msg = (
                f"The session of {self!r} was closed by hand (session.close(), or the end of "
                f"`{self.database.with_} session:`) with changes that nobody had committed, and "
                "they were rolled back. Leave closing to the scope, or commit before."
            )
            raise SessionScopeClosedError(msg)

    def warn_of_loss(self, session: Session, use: SessionUse) -> None:
        """Tell the log of changes that nobody committed in mode ``"manual"``."""
        if self.shape.mode == "manual" and use.has_changes(session):
            logger.warning(
                "%s: mode is 'manual' and nobody committed: open changes are rolled back",
                self.label,
            )

    # ---------------------------------------------------------------- the session

    def check_has_session(self) -> None:
        """Refuse where there is no session to be had."""
        self.check_open()
        if self.is_websocket:
            msg = (
                f"{self!r}: a websocket's session is open for one message at a time, so that it "
                f"holds no connection in between. Use `{self.database.with_} db.session_scope() as "
                "session:`, and give it what is for this message: mode=, read_only=, "
                "isolation_level=."
            )
            raise WebSocketSessionError(msg)

    def _make_session(self) -> S:
        self.check_has_session()
        with _creation:
            if self.is_closing:
                self.refuse_late_use()
            if self._session is None:
                factory = self.database.session_factory
                session: Any = factory.class_(**factory.kw)  # what it does itself, in half the time
                use: SessionUse
                watches_idling = self.options.watches_idling
                if isinstance(session, AsyncSession):
                    use = IdleTaskUse(self) if watches_idling else TaskUse(self)
                    sync_session: Any = session.sync_session
                else:
                    use = IdleThreadUse(self) if watches_idling else ThreadUse(self)
                    sync_session = session
                sync_session.use = use
                self.use = use
                self.sync_session = sync_session
                self._session = cast("S", session)
            return self._session
