"""Transactional blocks: ``db.transactional()``, a context manager and a decorator.

One entry's way: find the scope, decide by the table of :mod:`._propagation`, open; at the end
decide by the exception, close. The ends themselves are the scope's and its driver's.
"""

from __future__ import annotations

import asyncio
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbscope import _current, _driver_errors
from asgi_dbscope._blocks import OwnScope, check_with
from asgi_dbscope._boundary import (
    Boundary,
    begin_block,
    begin_savepoint,
    begin_savepoint_here,
    check_can_begin,
    conclude,
    end_savepoint,
    end_savepoint_here,
    ending_before,
    leave_block,
)
from asgi_dbscope._completion import redeliver
from asgi_dbscope._current import find_scope
from asgi_dbscope._decorate import decorate, refuse_retry
from asgi_dbscope._lifecycle import State
from asgi_dbscope._options import ScopeOptions, check_time_limit
from asgi_dbscope._policy import Cause, Ending
from asgi_dbscope._propagation import (
    ENTRIES,
    Entry,
    Propagation,
    PropagationName,
    RollbackRules,
    Situation,
    check_propagation,
)
from asgi_dbscope._retry import Retry, check_retry
from asgi_dbscope._text import one_line
from asgi_dbscope.errors import (
    ConcurrentSessionUseError,
    ConfigurationError,
    RollbackOnlyError,
    TransactionForbiddenError,
    TransactionMismatchError,
    TransactionRequiredError,
    TransactionTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextvars import Token
    from types import TracebackType

    from asgi_dbscope._database import Database
    from asgi_dbscope._scope import SessionScope

F = TypeVar("F", bound="Callable[..., Any]")
S = TypeVar("S", bound="AsyncSession | Session")
AS = TypeVar("AS", bound=AsyncSession)
SS = TypeVar("SS", bound=Session)

JOIN, IN_TRANSACTION, CLOSED = Entry.JOIN, Situation.IN_TRANSACTION, State.CLOSED
"""Looked up once: joining should cost nothing."""


def _open_around(entered: _Entered | None) -> _Entered | None:
    """*entered*, or the next one around it that hasn't been left: the others would be kept."""
    while entered is not None and entered not in entered.block.live:
        entered = entered.outer
    return entered


class _Entered:
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
        self.token: Token[_Entered | None] = _current.innermost_block.set(self)
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


class _Owning(_Entered):
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


class TransactionalBlock(Generic[S]):
    """What ``db.transactional()`` returns: a context manager and a decorator.

    One object may be entered again inside itself, and in many tasks at once: what an entry needs
    to know is never kept on it, but for the list of its open entries.
    """

    __slots__ = (
        "_changes",
        "_database",
        "_name",
        "demands_something",
        "entries",
        "label",
        "live",
        "propagation",
        "retry",
        "rules",
        "timeout",
    )

    def __init__(
        self,
        database: Database[S] | None,
        *,
        name: str | None = None,
        propagation: Propagation | PropagationName = Propagation.REQUIRED,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        rollback_for: type[Exception] | Iterable[type[Exception]] = (),
        no_rollback_for: type[Exception] | Iterable[type[Exception]] = (),
        label: str | None = None,
    ) -> None:
        self.propagation = check_propagation(propagation)
        self.entries = ENTRIES[self.propagation]
        self.rules = RollbackRules(rollback_for, no_rollback_for)
        self.timeout = check_time_limit("timeout", timeout)
        if label is not None and not (isinstance(label, str) and label):
            msg = f"label must be a string that is not empty; got {label!r}."
            raise ConfigurationError(msg)
        given: dict[str, Any] = {"isolation_level": isolation_level, "read_only": read_only}
        self._changes = {key: value for key, value in given.items() if value is not None}
        self.demands_something = bool(self._changes) or self.timeout is not None
        self.retry = retry
        ScopeOptions(**self._changes)
        if self._changes and database is not None:
            database.check_shape(isolation_level, read_only)
        if self._changes and self.propagation in {Propagation.NOT_SUPPORTED, Propagation.NEVER}:
            msg = (
                f"propagation={self.propagation.value!r} never has a transaction that "
                f"{' and '.join(self._changes)} could apply to; leave them out."
            )
            raise ConfigurationError(msg)
        self._check_retry()
        self._database = database
        self._name = name
        self.label = one_line(label) if label else self._default_label
        self.live: set[_Entered] = set()

    def __repr__(self) -> str:
        return f"<{self.label}>"

    @property
    def _default_label(self) -> str:
        return f"transactional({self.propagation.value})"

    def _check_retry(self) -> None:
        check_retry(self.retry)
        if self.retry is not None and Entry.NEW_SCOPE not in self.entries.values():
            msg = (
                f"propagation={self.propagation.value!r} never has a transaction of its own, and "
                "only that could be done again; leave retry out, or give it to whoever begins."
            )
            raise ConfigurationError(msg)

    def __call__(self, function: F) -> F:
        """Decorate a function: each call runs in an entry of its own."""
        block = copy(self)
        block.live = set()
        block.retry = None  # the function's, not the entries'
        if self.label == self._default_label:
            named = getattr(function, "__func__", function)
            block.label = f"{getattr(named, '__qualname__', named)}()"
        return decorate(function, self._database, "db.transactional()", lambda: block, self.retry)

    def owned_scope(self) -> SessionScope[Any] | None:
        """The scope whose transaction its innermost entry here ends; ``None`` if it joined."""
        entered = _current.innermost_block.get()
        if not isinstance(entered, _Owning):
            return None
        is_savepoint = entered.boundary is not None and entered.boundary.savepoint is not None
        return None if is_savepoint else entered.scope

    # ---------------------------------------------------------------- what an entry asks

    def find_database(self) -> Database[Any]:
        """The database it is for."""
        if self._database is not None:
            return self._database
        return _current.find_database(self._name)

    def own_options(self, enclosing: SessionScope[Any] | None, kind: Entry) -> ScopeOptions:
        """The options of a scope of its own."""
        options = self.find_database().options
        if enclosing is not None and enclosing.is_websocket:
            options = enclosing.options  # the middleware's, for this connection
        if kind is Entry.AUTOCOMMIT_SCOPE:
            return options.changed(
                {"mode": "autocommit", "isolation_level": None, "read_only": False}
            )
        changes = {"mode": "transaction", "stream": "release", "is_in_block": True}
        return options.changed({**changes, **self._changes})

    def begin_options(self, scope: SessionScope[Any]) -> ScopeOptions:
        """The options of a transaction that it begins on the scope's own session."""
        return scope.options.changed({"mode": "transaction", "is_in_block": True, **self._changes})

    def check_demands(self, scope: SessionScope[Any]) -> None:
        """Refuse to join a transaction that isn't what this block demands.

        Raises:
            TransactionMismatchError: If it isn't.
        """
        if self.timeout is not None:
            msg = (
                f"{self.label} demands timeout={self.timeout} and joins the transaction of "
                f"{scope!r}, which isn't its own to end. Use propagation='REQUIRES_NEW', "
                "or mode='autocommit' (there the outermost block is the transaction)."
            )
            raise TransactionMismatchError(msg)
        shape = scope.shape
        for name, wanted in self._changes.items():
            has = getattr(shape, name)
            is_free = not (scope.has_begun or has or name in scope.demands)
            if not is_free and _normal(has) != _normal(wanted):
                self._mismatch(scope, name)
        if not scope.has_begun:
            scope.configure(**self._changes, is_in_block=True)
            scope.shaped_by = self.label
            scope.demands |= self._changes.keys()

    def _mismatch(self, scope: SessionScope[Any], name: str) -> NoReturn:
        wanted = self._changes[name]
        msg = (
            f"{self.label} demands {name}={wanted!r} and joins the transaction of "
            f"{scope!r}, which has {name}={getattr(scope.shape, name)!r}. Begin it that way, "
            f"with session_options({name}={wanted!r}) on the endpoint or the same on the "
            "outer block; or use propagation='REQUIRES_NEW', or mode='autocommit', where "
            "the outermost block is the transaction."
        )
        raise TransactionMismatchError(msg)

    # ---------------------------------------------------------------- asynchronous

    async def __aenter__(self: TransactionalBlock[AS]) -> AS:
        entered = self._enter(True)  # noqa: FBT003 - by position, for speed
        scope = entered.scope
        if entered.kind is JOIN or not isinstance(entered, _Owning):
            joined: AS = scope.session
            return joined
        try:
            if entered.boundary is not None:
                await self._begin(entered, entered.boundary)
            session: AS = scope.session
            if self.timeout is not None:
                scope.deadline = monotonic() + self.timeout
                entered.limit = asyncio.timeout(self.timeout)
                await entered.limit.__aenter__()
        except BaseException:
            entered.leave()
            if entered.own is not None:
                redeliver(await entered.own.close(Cause.RAISED))
            raise
        return session

    async def _begin(self, entered: _Owning, boundary: Boundary) -> None:
        scope = entered.scope
        if entered.kind is Entry.BEGIN:
            cancellation = await scope.settle(ending_before(scope))
            if cancellation is not None:
                raise cancellation
            begin_block(scope, boundary, self.begin_options(scope))
            return
        cancellation = await begin_savepoint(scope, boundary)
        if cancellation is not None:
            redeliver(await end_savepoint(scope, boundary, Ending.ROLLBACK))
            leave_block(scope, boundary)
            raise cancellation

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered = self._leave(exc)
        if entered is None:
            return
        error, late = exc, None
        if entered.limit is not None:
            is_cancelled = await _stop(entered.limit, exc_type, exc, traceback)
            entered.look_at_the_clock()
            late = entered.timed_out(exc, is_cancelled=is_cancelled)
            error = late or exc
        cancellation = await self._end(entered, error)
        if late is not None:
            redeliver(cancellation)
            raise late from exc
        if cancellation is None:
            return
        if exc is None:
            raise cancellation
        redeliver(cancellation)

    async def _end(
        self, entered: _Owning, error: BaseException | None
    ) -> asyncio.CancelledError | None:
        scope, boundary = entered.scope, entered.boundary
        if entered.own is not None:
            is_success = entered.ending(error) is Ending.COMMIT
            cause = Cause.COMPLETED if is_success else Cause.RAISED
            return await entered.own.close(cause, is_failing=error is not None)
        assert boundary is not None
        ending, refusal = entered.judge(error)
        try:
            if scope.is_over:
                return None
            if boundary.savepoint is None:
                cancellation = await scope.settle(ending, is_failing=error is not None)
            else:
                cancellation = await end_savepoint(scope, boundary, ending, error)
        finally:
            if self.timeout is not None:  # a savepoint inside leaves it alone
                scope.deadline = None
            leave_block(scope, boundary)
        if refusal is not None:
            redeliver(cancellation)
            if error is None:
                raise refusal
        return cancellation

    # ---------------------------------------------------------------- synchronous

    def __enter__(self: TransactionalBlock[SS]) -> SS:
        entered = self._enter(False)  # noqa: FBT003 - by position, for speed
        scope = entered.scope
        if not isinstance(entered, _Owning):
            joined: SS = scope.session
            return joined
        boundary = entered.boundary
        try:
            if entered.kind is Entry.BEGIN and boundary is not None:
                scope.settle_here(ending_before(scope))
                begin_block(scope, boundary, self.begin_options(scope))
            elif boundary is not None:
                begin_savepoint_here(scope, boundary)
            if self.timeout is not None:
                scope.deadline = monotonic() + self.timeout
            session: SS = scope.session
        except BaseException:
            entered.leave()
            if entered.own is not None:
                entered.own.close_here(Cause.RAISED)
            raise
        return session

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered = self._leave(exc)
        if entered is None:
            return
        entered.look_at_the_clock()
        late = entered.timed_out(exc)
        self._end_here(entered, late or exc)
        if late is not None:
            raise late from exc

    def _end_here(self, entered: _Owning, error: BaseException | None) -> None:
        scope, boundary = entered.scope, entered.boundary
        if entered.own is not None:
            is_success = entered.ending(error) is Ending.COMMIT
            cause = Cause.COMPLETED if is_success else Cause.RAISED
            entered.own.close_here(cause, is_failing=error is not None)
            return
        assert boundary is not None
        ending, refusal = entered.judge(error)
        try:
            if scope.is_over:
                return
            if self.timeout is not None:  # a savepoint inside leaves it alone
                scope.deadline = None
            if boundary.savepoint is None:
                scope.settle_here(ending, is_failing=error is not None)
            else:
                end_savepoint_here(scope, boundary, ending, error)
        finally:
            leave_block(scope, boundary)
        if refusal is not None and error is None:
            raise refusal

    # ---------------------------------------------------------------- entries

    def _enter(self, is_async: bool) -> _Entered:
        if self.retry is not None:
            refuse_retry("db.transactional(retry=...)")
        database = self._database or self.find_database()
        if database.is_sync is is_async:
            check_with(database, is_async=is_async, call=f"{self.label}:")
        scope = find_scope(database)
        is_join = (  # the most frequent case, by the shortest way
            scope is not None
            and scope.shape.is_transaction
            and self.entries[IN_TRANSACTION] is JOIN
            and not scope.is_websocket
        )
        if scope is None or not is_join:
            return self._enter_otherwise(database, scope)
        if scope.state is CLOSED:
            scope.refuse_late_use()
        if self.demands_something:
            self.check_demands(scope)
        return _Entered(self, JOIN, scope)

    def _enter_otherwise(
        self, database: Database[Any], scope: SessionScope[Any] | None
    ) -> _Entered:
        if scope is None or scope.is_websocket:
            situation = Situation.NO_SCOPE
        elif scope.is_in_transaction:
            situation = Situation.IN_TRANSACTION
        else:
            situation = Situation.NO_TRANSACTION
        kind = self.entries[situation]
        if kind is Entry.REFUSE_WITHOUT or kind is Entry.REFUSE_WITHIN:
            self._refuse(kind, scope)
        if kind is Entry.AS_IS or kind is Entry.AUTOCOMMIT_SCOPE:
            self._check_demands_nothing(kind)
        if scope is None or kind is Entry.NEW_SCOPE or kind is Entry.AUTOCOMMIT_SCOPE:
            options = self.own_options(scope, kind)
            own = OwnScope(database, options, self.label, has_own_time=self.timeout is not None)
            return _Owning(self, kind, own.scope, own)
        scope.check_open()
        if kind is Entry.BEGIN:
            check_can_begin(scope)
            if scope.options.reads_at_once and self._changes.get("read_only") is False:
                self._mismatch(scope, "read_only")
            return _Owning(self, kind, scope, None)
        if kind is not Entry.AS_IS and self.demands_something:
            self.check_demands(scope)
        if kind is Entry.SAVEPOINT:
            return _Owning(self, kind, scope, None)
        return _Entered(self, kind, scope)

    def _check_demands_nothing(self, kind: Entry) -> None:
        """Refuse demands of a transaction where there is none."""
        demands = dict(self._changes)
        if self.timeout is not None and kind is Entry.AS_IS:
            demands["timeout"] = self.timeout
        if demands:
            wanted = ", ".join(f"{name}={value!r}" for name, value in demands.items())
            msg = (
                f"{self.label} demands {wanted}, and goes without a transaction here, which that "
                "could apply to. Use propagation='REQUIRED', which begins one; or leave it out."
            )
            raise TransactionMismatchError(msg)

    def _refuse(self, kind: Entry, scope: SessionScope[Any] | None) -> NoReturn:
        if kind is Entry.REFUSE_WITHOUT:
            msg = (
                f"{self.label} has propagation='MANDATORY' and there is no transaction to join"
                f"{'' if scope is None else f' in {scope!r}'}. Call it inside `db.transactional()` "
                "or `db.session_scope()`, or leave the propagation out."
            )
            raise TransactionRequiredError(msg)
        msg = (
            f"{self.label} has propagation='NEVER' and there is the transaction of {scope!r}. "
            "Call it outside of that, or use propagation='NOT_SUPPORTED' to run beside it."
        )
        raise TransactionForbiddenError(msg)

    def _leave(self, error: BaseException | None) -> _Owning | None:
        """Leave the innermost entry of this context; returns it if there is something to end."""
        entered = _current.innermost_block.get()
        if entered is None or entered.block is not self or len(self.live) > 1:
            entered = self._find_entry(entered)
        entered.leave()
        if entered.kind is JOIN:
            scope = entered.scope
            if error is not None and self.rules.rolls_back(error):
                scope.note_failure(error)
            elif entered.abandoned != scope.abandoned:
                msg = (
                    f"{self.label} was rolled back in its middle: the client of its body has left."
                )
                scope.note_failure(RollbackOnlyError(msg))
            return None
        return entered if isinstance(entered, _Owning) else None

    def _find_entry(self, entered: _Entered | None) -> _Entered:
        """The entry that ends now, out of several; never that of another task that is at work."""
        while entered is not None:
            if entered.block is self and entered.is_here():
                return entered
            entered = entered.outer
        # Left in another context than entered: a fixture's exit, a generator that was dropped.
        left = [each for each in self.live if each.is_here()] or list(self.live)
        if len(left) == 1:
            return left[0]
        msg = f"{self.label} was left in a context in which it was not entered."
        raise ConfigurationError(msg)


async def _stop(
    limit: asyncio.Timeout,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> bool:
    """Stop the timer; whether it cancelled the block."""
    try:
        await limit.__aexit__(exc_type, exc, traceback)
    except TimeoutError:
        return True
    return False


def _normal(value: object) -> object:
    return value.replace("_", " ").upper() if isinstance(value, str) else value
