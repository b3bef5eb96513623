"""The two ways into a session by hand: ``db.session_scope()`` and ``db.get_session()``."""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import _current
from asgi_dbscope._completion import redeliver
from asgi_dbscope._policy import Cause
from asgi_dbscope._scope import SessionScope
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from contextvars import Token
    from types import FunctionType, TracebackType

    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._database import Database

F = TypeVar("F", bound="Callable[..., Any]")
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=AsyncSession)


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


class SessionHandle(Generic[S]):
    """What ``db.get_session()`` returns: to be awaited, or entered with ``async with``."""

    __slots__ = ("_block", "_database")

    def __init__(self, database: Database[S]) -> None:
        self._database = database
        self._block: SessionScopeBlock[S] | None = None

    def __await__(self) -> Generator[Any, Any, S]:
        return self._current().__await__()

    async def _current(self) -> S:
        return self._database.session

    async def __aenter__(self) -> S:
        scope = _current.find_scope(self._database)
        if scope is not None and scope.has_session:
            session: S = scope.session
            return session
        self._block = self._database.session_scope()
        return await self._block.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._block is not None:
            await self._block.__aexit__(exc_type, exc, traceback)


class SessionScopeBlock(Generic[S]):
    """What ``db.session_scope()`` returns: a context manager and a decorator."""

    __slots__ = ("_changes", "_database", "_scope", "_token")

    def __init__(self, database: Database[S], changes: dict[str, Any]) -> None:
        database.options.changed(changes)  # an error now rather than at the first entry
        self._database = database
        self._changes = changes
        self._scope: SessionScope[S] | None = None
        self._token: Token[ScopeHolder | None] | None = None

    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> Callable[P, Coroutine[Any, Any, R]]:
        """Decorate a coroutine function: each call runs in a scope of its own."""
        if not inspect.iscoroutinefunction(function):
            msg = (
                f"session_scope() decorates coroutine functions; {function!r} is none. In other "
                "code use `async with db.session_scope() as session:`."
            )
            raise ConfigurationError(msg)

        @wraps(function)
        async def in_scope(*args: P.args, **kwargs: P.kwargs) -> R:
            async with SessionScopeBlock(self._database, self._changes):
                return await function(*args, **kwargs)

        return in_scope

    async def __aenter__(self) -> S:
        if self._scope is not None:
            msg = "This session_scope() is entered already; call db.session_scope() once per block."
            raise ConfigurationError(msg)
        options = self._database.options
        enclosing = _current.find_scope(self._database)
        if enclosing is not None and enclosing.is_websocket:
            options = enclosing.options  # the middleware's, for this connection
        scope = SessionScope(
            self._database, _current.innermost.get(), options.changed(self._changes)
        )
        session = scope.session
        self._scope, self._token = scope, _current.innermost.set(scope)
        return session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, self._scope = self._scope, None
        assert scope is not None
        assert self._token is not None
        # ValueError: left in another context than entered (a fixture, a generator's exit). The
        # variable was set in a context that nobody looks into any more.
        with suppress(ValueError):
            _current.innermost.reset(self._token)
        cause = Cause.COMPLETED if exc is None else Cause.RAISED
        cancellation = await scope.close(scope.decide(cause))
        if cancellation is None:
            return
        if exc is None:
            raise cancellation
        redeliver(cancellation)  # the error under way goes on; the cancellation comes after it
