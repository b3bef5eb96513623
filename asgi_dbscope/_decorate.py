"""A function that runs inside a block: each call in one of its own, again if it lost to a conflict.

The blocks are those of :mod:`._blocks` and :mod:`._transactional`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from asgi_dbscope._dialects import find_conflict
from asgi_dbscope._retry import Attempt
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from asgi_dbscope._database import Database
    from asgi_dbscope._retry import Retry
    from asgi_dbscope._scope import SessionScope

    class Block(Protocol):
        """What a function is run inside of: also a context manager of one kind or the other."""

        def owned_scope(self) -> SessionScope[Any] | None:
            """The scope whose transaction its innermost entry here ends; ``None`` if it joined."""
            ...


F = TypeVar("F", bound="Callable[..., Any]")

logger = logging.getLogger("asgi_dbscope")


def decorate(
    function: F,
    database: Database[Any] | None,
    call: str,
    enter: Callable[[], Any],
    retry: Retry | None = None,
) -> F:
    """*function*, each call of which runs inside what *enter* returns.

    Args:
        function: A coroutine function for an asynchronous database, a plain one for a synchronous.

        database: The database, where it is known by now.

        call: What messages call the decorator.

        enter: Makes a fresh context manager.

        retry: Whether and how a call is done again that lost to a conflict.

    Raises:
        ConfigurationError: If *function* is of the wrong kind.
    """
    method: Any = function
    if isinstance(function, (classmethod, staticmethod)):
        inner = decorate(method.__func__, database, call, enter, retry)
        return cast("F", type(method)(inner))
    is_async = _check_function(function, database, call)
    call_it: Any = function
    if retry is not None:
        again = _again_async if is_async else _again
        return cast("F", again(call_it, enter, retry))
    if is_async:

        @wraps(call_it)
        async def in_block(*args: Any, **kwargs: Any) -> Any:
            async with enter():
                return await call_it(*args, **kwargs)

        return cast("F", in_block)

    @wraps(call_it)
    def in_block_here(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return call_it(*args, **kwargs)

    return cast("F", in_block_here)


def _check_function(function: Any, database: Database[Any] | None, call: str) -> bool:
    """Refuse what can't be decorated; whether *function* is a coroutine function."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        msg = (
            f"{function!r} is a generator, which is suspended between its values for as long as "
            f"its reader likes. Use `{call}` as a context manager inside it, or around the loop "
            "that reads it."
        )
        raise ConfigurationError(msg)
    if isinstance(function, type) or not callable(function):
        msg = f"{call} decorates functions; got {function!r}."
        raise ConfigurationError(msg)
    is_async = inspect.iscoroutinefunction(function)
    if database is not None and database.is_sync is is_async:
        kind, functions = (
            ("synchronous", "plain functions")
            if is_async
            else ("asynchronous", "coroutine functions")
        )
        msg = (
            f"{database!r} is {kind}, so {call} decorates {functions}; {function!r} is none. In "
            "other code use it as a context manager."
        )
        raise ConfigurationError(msg)
    return is_async


def refuse_retry(call: str) -> NoReturn:
    """Refuse a block with a ``retry`` that is entered by ``with``.

    Raises:
        ConfigurationError: That.
    """
    msg = (
        f"{call} was entered with `with`, and what is inside a `with` statement can't be run a "
        "second time. Make a function of it and decorate that, or leave retry out."
    )
    raise ConfigurationError(msg)


# --------------------------------------------------------------------------------------
# Again, after a conflict
# --------------------------------------------------------------------------------------


def _again_async(function: Any, enter: Callable[[], Any], retry: Retry) -> Any:
    @wraps(function)
    async def in_block(*args: Any, **kwargs: Any) -> Any:
        tries = _Tries(retry, function)
        while True:
            block = enter()
            try:
                async with block:
                    tries.begin(block)
                    try:
                        return await function(*args, **kwargs)
                    except Exception:
                        tries.look()
                        raise
            except Exception as error:
                delay = tries.delay_after(error)
                if delay is None:
                    raise
            finally:
                tries.end()
            await asyncio.sleep(delay)

    return in_block


def _again(function: Any, enter: Callable[[], Any], retry: Retry) -> Any:
    @wraps(function)
    def in_block(*args: Any, **kwargs: Any) -> Any:
        tries = _Tries(retry, function)
        while True:
            block = enter()
            try:
                with block:
                    tries.begin(block)
                    try:
                        return function(*args, **kwargs)
                    except Exception:
                        tries.look()
                        raise
            except Exception as error:
                delay = tries.delay_after(error)
                if delay is None:
                    raise
            finally:
                tries.end()
            time.sleep(delay)

    return in_block


class _Tries:
    """The attempts at one call of a function."""

    def __init__(self, retry: Retry, function: Any) -> None:
        self._retry = retry
        self._label = f"{getattr(function, '__qualname__', function)}()"
        self._attempt = Attempt(retry)
        self._scope: SessionScope[Any] | None = None
        self._conflict: BaseException | None = None

    def begin(self, block: Block) -> None:
        """A block was entered."""
        self._scope = scope = block.owned_scope()
        if scope is not None:
            self._attempt.outer = scope.current_attempt
            scope.current_attempt = self._attempt

    def look(self) -> None:
        """The function has raised: see whether its transaction was lost by then."""
        if self._scope is not None and self._scope.agenda is not None:
            self._conflict = self._scope.agenda.conflict

    def delay_after(self, error: Exception) -> float | None:
        """Seconds until the next attempt; ``None`` if there is none after *error*.

        A block that joined can't be done again by itself: that is for whoever has the transaction.
        """
        conflict, self._conflict = self._conflict, None
        if self._scope is None:
            return None
        code = find_conflict(error, self._retry.classes)
        if code is None and conflict is not None:
            code = find_conflict(conflict)
        if code is None:
            return None
        delay = self._attempt.delay()
        if delay is None:
            reason = self._attempt.why_last
            logger.warning(
                "%s: attempt %d of %d has lost to a conflict (%s), and was the last one: %s",
                *(self._label, self._attempt.number, self._retry.attempts, code, reason),
            )
            return None
        logger.info(
            "%s: attempt %d of %d has lost to a conflict (%s); the next one in %.3f s",
            *(self._label, self._attempt.number, self._retry.attempts, code, delay),
        )
        return delay

    def end(self) -> None:
        """The block was left."""
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.current_attempt = self._attempt.outer
            self._attempt = self._attempt.following()
