"""The two ways into a session by hand: ``db.session_scope()`` and ``db.get_session()``."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbscope import _current
from asgi_dbscope._completion import redeliver
from asgi_dbscope._decorate import decorate, refuse_retry
from asgi_dbscope._policy import Cause, Ending
from asgi_dbscope._retry import check_retry
from asgi_dbscope._scope import SessionScope
from asgi_dbscope.errors import ConfigurationError, DBScopeError, RollbackOnlyError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator
    from contextvars import Token
    from types import FunctionType, TracebackType

    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._database import Database
    from asgi_dbscope._options import ScopeOptions
    from asgi_dbscope._retry import Retry

F = TypeVar("F", bound="Callable[..., Any]")
S = TypeVar("S", bound="AsyncSession | Session")
AS = TypeVar("AS", bound=AsyncSession)
SS = TypeVar("SS", bound=Session)


def looks_like_coroutine_function(function: F) -> F:
    """Mark *function*, which returns an awaitable, so that frameworks await what it returns."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    # Before 3.12 there is no mark that inspect.iscoroutinefunction() knows, and older FastAPI asks
    # only that. The flag merely informs: coroutines are made by an instruction of the code.
    code = function.__code__
    cast("FunctionType", function).__code__ = code.replace(
        co_flags=code.co_flags | inspect.CO_COROUTINE
    )
    return function


def check_with(database: Database[Any], *, is_async: bool, call: str) -> None:
    """Refuse ``with`` on an asynchronous database, and ``async with`` on a synchronous one.

    Raises:
        ConfigurationError: If it is the wrong one.
    """
    if database.is_sync is not is_async:
        return
    right = "with" if is_async else "async with"
    kind = "synchronous" if is_async else "asynchronous"
    msg = f"{database!r} is {kind}: use `{right} {call}`."
    raise ConfigurationError(msg)


class SessionHandle(Generic[S]):
    """What ``db.get_session()`` returns: to be awaited, or entered with ``(async) with``."""

    __slots__ = ("_block", "_database")

    def __init__(self, database: Database[S]) -> None:
        self._database = database
        self._block: SessionScopeBlock[Any] | None = None

    def __await__(self) -> Generator[Any, Any, S]:
        return self._current().__await__()

    async def _current(self) -> S:
        return self._database.session

    def _find(self) -> S | None:
        scope = _current.find_scope(self._database)
        if scope is not None and scope.has_session:
            session: S = scope.session
            return session
        self._block = self._database.session_scope()
        return None

    async def __aenter__(self: SessionHandle[AS]) -> AS:
        check_with(self._database, is_async=True, call="db.get_session() as session:")
        session = self._find()
        if session is not None:
            return session
        assert self._block is not None
        entered: AS = await self._block.__aenter__()
        return entered

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._block is not None:
            await self._block.__aexit__(exc_type, exc, traceback)

    def __enter__(self: SessionHandle[SS]) -> SS:
        check_with(self._database, is_async=False, call="db.get_session() as session:")
        session = self._find()
        if session is not None:
            return session
        assert self._block is not None
        entered: SS = self._block.__enter__()
        return entered

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._block is not None:
            self._block.__exit__(exc_type, exc, traceback)


class OwnScope(Generic[S]):
    """A scope of its own around a block: opened, made the current one, and closed.

    Args:
        database: Whose.

        options: How it treats its transactions.

        name: What logs and errors call it.

        has_own_time: Whether a ``timeout`` was named for it; else it has that of what is around it.
    """

    __slots__ = ("_token", "scope")

    def __init__(
        self,
        database: Database[S],
        options: ScopeOptions,
        name: str | None = None,
        *,
        has_own_time: bool = False,
    ) -> None:
        enclosing = _current.find_scope(database)
        holder = enclosing if enclosing is not None and enclosing.has_session else None
        inherited: dict[str, Any] = {}
        if holder is not None and holder.shape.timeout is not None and not has_own_time:
            inherited["timeout"] = holder.shape.timeout
        if enclosing is not None and enclosing.options.is_admitted:
            inherited["is_admitted"] = True
        if inherited:
            options = options.changed(inherited)
        self.scope: SessionScope[S] = SessionScope(
            database, _current.innermost.get(), options, name=name
        )
        if holder is not None:
            self.scope.holder = holder
        if "timeout" in inherited:
            self.scope.shares_time = True
        self._token: Token[ScopeHolder | None] = _current.innermost.set(self.scope)

    def leave(self) -> None:
        """Make the scope around it the current one again."""
        innermost = _current.innermost
        if not _current.leave_innermost(innermost, self.scope, self._token):
            return
        holder = innermost.get()
        while holder is not None and holder.is_over and not holder.is_request:
            holder = holder.outer
            innermost.set(holder)

    async def close(
        self, cause: Cause, *, is_failing: bool = False
    ) -> asyncio.CancelledError | None:
        """End it; returns a cancellation that arrived meanwhile."""
        self.leave()
        try:
            ending = self.scope.decide(cause)
            if ending is Ending.COMMIT:
                self.scope.check_blocks()
        except DBScopeError:
            if not is_failing:
                redeliver(await self.scope.close(Ending.ROLLBACK, is_failing=True))
                raise
            ending = Ending.ROLLBACK  # the error under way goes first
        return await self.scope.close(ending, is_failing=is_failing)

    def close_here(self, cause: Cause, *, is_failing: bool = False) -> None:
        """End it, of a synchronous database."""
        self.leave()
        try:
            ending = self.scope.decide(cause)
        except RollbackOnlyError:
            if not is_failing:
                self.scope.close_here(Ending.ROLLBACK, is_failing=True)
                raise
            ending = Ending.ROLLBACK
        self.scope.close_here(ending, is_failing=is_failing)


class SessionScopeBlock(Generic[S]):
    """What ``db.session_scope()`` returns: a context manager and a decorator."""

    __slots__ = ("_changes", "_database", "_own", "_retry")

    def __init__(
        self, database: Database[S], changes: dict[str, Any], retry: Retry | None = None
    ) -> None:
        database.options.changed(changes)  # an error now rather than at the first entry
        check_retry(retry)
        self._database = database
        self._changes = changes
        self._retry = retry
        self._own: OwnScope[S] | None = None

    def __call__(self, function: F) -> F:
        """Decorate a function: each call runs in a scope of its own."""
        return decorate(
            function,
            self._database,
            "db.session_scope()",
            lambda: SessionScopeBlock(self._database, self._changes),
            self._retry,
        )

    def owned_scope(self) -> SessionScope[S] | None:
        """The scope whose transaction its innermost entry here ends."""
        return None if self._own is None else self._own.scope

    def _open(self) -> S:
        if self._own is not None:
            msg = "This session_scope() is entered already; call db.session_scope() once per block."
            raise ConfigurationError(msg)
        if self._retry is not None:
            refuse_retry("db.session_scope(retry=...)")
        options = self._database.options
        enclosing = _current.find_scope(self._database)
        if enclosing is not None and enclosing.is_websocket:
            options = enclosing.options  # the middleware's, for this connection
        own = OwnScope(
            self._database,
            options.changed(self._changes),
            has_own_time=self._changes.get("timeout") is not None,
        )
        try:
            session = own.scope.session
        except BaseException:
            own.leave()
            raise
        self._own = own
        return session

    async def __aenter__(self: SessionScopeBlock[AS]) -> AS:
        check_with(self._database, is_async=True, call="db.session_scope() as session:")
        return self._open()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        own, self._own = self._own, None
        assert own is not None
        cause = Cause.COMPLETED if exc is None else Cause.RAISED
        cancellation = await own.close(cause, is_failing=exc is not None)
        if cancellation is None:
            return
        if exc is None:
            raise cancellation
        redeliver(cancellation)  # the error under way goes on; the cancellation comes after it

    def __enter__(self: SessionScopeBlock[SS]) -> SS:
        check_with(self._database, is_async=False, call="db.session_scope() as session:")
        return self._open()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        own, self._own = self._own, None
        assert own is not None
        cause = Cause.COMPLETED if exc is None else Cause.RAISED
        own.close_here(cause, is_failing=exc is not None)
