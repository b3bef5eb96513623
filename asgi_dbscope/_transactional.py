"""Transactional blocks: ``db.transactional()``, a context manager and a decorator.

One entry's way: find the scope, decide by the table of :mod:`._propagation`, open; at the end
decide by the exception, close. The ends themselves are the scope's and its driver's.
"""

from __future__ import annotations

import asyncio
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbscope import _current
from asgi_dbscope._block_entry import BlockEntry, OwningEntry
from asgi_dbscope._blocks import OwnScope, check_with
from asgi_dbscope._boundary import (
    Boundary,
    begin_block,
    begin_savepoint,
    begin_savepoint_here,
    check_can_begin,
    end_savepoint,
    end_savepoint_here,
    ending_before,
    leave_block,
)
from asgi_dbscope._completion import redeliver
from asgi_dbscope._current import find_scope
from asgi_dbscope._decorate import decorate, refuse_retry
from asgi_dbscope._demands import (
    check_demands,
    check_demands_nothing,
    refuse_entry,
    refuse_mismatch,
)
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
from asgi_dbscope.errors import ConfigurationError, RollbackOnlyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from asgi_dbscope._database import Database
    from asgi_dbscope._scope import SessionScope

F = TypeVar("F", bound="Callable[..., Any]")
S = TypeVar("S", bound="AsyncSession | Session")
AS = TypeVar("AS", bound=AsyncSession)
SS = TypeVar("SS", bound=Session)

JOIN, IN_TRANSACTION, CLOSED = Entry.JOIN, Situation.IN_TRANSACTION, State.CLOSED
"""Looked up once: joining should cost nothing."""


class TransactionalBlock(Generic[S]):
    """What ``db.transactional()`` returns: a context manager and a decorator.

    One object may be entered again inside itself, and in many tasks at once: what an entry needs
    to know is never kept on it, but for the list of its open entries.
    """

    __slots__ = (
        "_database",
        "_name",
        "changes",
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
        self.changes = {key: value for key, value in given.items() if value is not None}
        self.demands_something = bool(self.changes) or self.timeout is not None
        self.retry = retry
        ScopeOptions(**self.changes)
        if self.changes and database is not None:
            database.check_shape(isolation_level, read_only)
        if self.changes and self.propagation in {Propagation.NOT_SUPPORTED, Propagation.NEVER}:
            msg = (
                f"propagation={self.propagation.value!r} never has a transaction that "
                f"{' and '.join(self.changes)} could apply to; leave them out."
            )
            raise ConfigurationError(msg)
        self._check_retry()
        self._database = database
        self._name = name
        self.label = one_line(label) if label else self._default_label
        self.live: set[BlockEntry] = set()

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
        if not isinstance(entered, OwningEntry):
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
        return options.changed({**changes, **self.changes})

    def begin_options(self, scope: SessionScope[Any]) -> ScopeOptions:
        """The options of a transaction that it begins on the scope's own session."""
        return scope.options.changed({"mode": "transaction", "is_in_block": True, **self.changes})

    # ---------------------------------------------------------------- asynchronous

    async def __aenter__(self: TransactionalBlock[AS]) -> AS:
        entered = self._enter(True)  # noqa: FBT003 - by position, for speed
        scope = entered.scope
        if entered.kind is JOIN or not isinstance(entered, OwningEntry):
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

    async def _begin(self, entered: OwningEntry, boundary: Boundary) -> None:
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
        self, entered: OwningEntry, error: BaseException | None
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
        if not isinstance(entered, OwningEntry):
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

    def _end_here(self, entered: OwningEntry, error: BaseException | None) -> None:
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

    def _enter(self, is_async: bool) -> BlockEntry:
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
            check_demands(self, scope)
        return BlockEntry(self, JOIN, scope)

    def _enter_otherwise(
        self, database: Database[Any], scope: SessionScope[Any] | None
    ) -> BlockEntry:
        if scope is None or scope.is_websocket:
            situation = Situation.NO_SCOPE
        elif scope.is_in_transaction:
            situation = Situation.IN_TRANSACTION
        else:
            situation = Situation.NO_TRANSACTION
        kind = self.entries[situation]
        if kind is Entry.REFUSE_WITHOUT or kind is Entry.REFUSE_WITHIN:
            refuse_entry(self, kind, scope)
        if kind is Entry.AS_IS or kind is Entry.AUTOCOMMIT_SCOPE:
            check_demands_nothing(self, kind)
        if scope is None or kind is Entry.NEW_SCOPE or kind is Entry.AUTOCOMMIT_SCOPE:
            options = self.own_options(scope, kind)
            own = OwnScope(database, options, self.label, has_own_time=self.timeout is not None)
            return OwningEntry(self, kind, own.scope, own)
        scope.check_open()
        if kind is Entry.BEGIN:
            check_can_begin(scope)
            if scope.options.reads_at_once and self.changes.get("read_only") is False:
                refuse_mismatch(self, scope, "read_only")
            return OwningEntry(self, kind, scope, None)
        if kind is not Entry.AS_IS and self.demands_something:
            check_demands(self, scope)
        if kind is Entry.SAVEPOINT:
            return OwningEntry(self, kind, scope, None)
        return BlockEntry(self, kind, scope)

    def _leave(self, error: BaseException | None) -> OwningEntry | None:
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
        return entered if isinstance(entered, OwningEntry) else None

    def _find_entry(self, entered: BlockEntry | None) -> BlockEntry:
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


@overload
def transactional(propagation: F, /) -> F: ...


@overload
def transactional(
    propagation: Propagation | PropagationName = ...,
    *,
    database: str | None = ...,
    isolation_level: str | None = ...,
    read_only: bool | None = ...,
    timeout: float | None = ...,
    retry: Retry | None = ...,
    rollback_for: type[Exception] | Iterable[type[Exception]] = ...,
    no_rollback_for: type[Exception] | Iterable[type[Exception]] = ...,
    label: str | None = ...,
) -> TransactionalBlock[Any]: ...


def transactional(
    propagation: Any = Propagation.REQUIRED, *, database: str | None = None, **options: Any
) -> Any:
    """:meth:`.Database.transactional` for the one-database case.

    The database is found on entering: the one that has a scope there, or outside of any scope the
    only one there is.

    Args:
        propagation: What to do with a transaction that is there; see :class:`.Propagation`.

        database: The database's name, where there are several.

        options: As :meth:`.Database.transactional` has them.
    """
    if callable(propagation) and not isinstance(propagation, str):
        return TransactionalBlock[Any](None, name=database)(propagation)
    block = TransactionalBlock[Any]
    return block(None, name=database, propagation=cast("Any", propagation), **options)
