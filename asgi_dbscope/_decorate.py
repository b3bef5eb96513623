"""A function that runs inside a block: each call in one of its own, again if it lost to a conflict.

The blocks are those of :mod:`._blocks` and :mod:`._transactional`.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from asgi_dbscope._current import (
    due_around,
    find_attempt,
    get_innermost,
    reset_innermost,
    set_innermost,
)
from asgi_dbscope._driver_errors import find_conflict
from asgi_dbscope._retry import Attempt, log_fence, log_loss
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Protocol

    from asgi_dbscope._admission import AdmittedRequest
    from asgi_dbscope._database import Database
    from asgi_dbscope._retry import Retry
    from asgi_dbscope._scope import SessionScope

    class Block(Protocol):
        """What a function is run inside of: also a context manager of one kind or the other."""

        def owned_scope(self) -> SessionScope[Any] | None:
            """The scope whose transaction its innermost entry here ends; ``None`` if it joined."""
            ...


F = TypeVar("F", bound="Callable[..., Any]")


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
                    with tries.inside(block):
                        return await function(*args, **kwargs)
            except Exception as error:
                delay = tries.delay_after(error)
                if delay is None:
                    raise
            finally:
                tries.end()
            await asyncio.sleep(delay)
            tries.go_on()

    return in_block


def _again(function: Any, enter: Callable[[], Any], retry: Retry) -> Any:
    @wraps(function)
    def in_block(*args: Any, **kwargs: Any) -> Any:
        tries = _Tries(retry, function)
        while True:
            block = enter()
            try:
                with block, tries.inside(block):
                    return function(*args, **kwargs)
            except Exception as error:
                delay = tries.delay_after(error)
                if delay is None:
                    raise
            finally:
                tries.end()
            time.sleep(delay)
            tries.go_on()

    return in_block


class _Tries:
    """The attempts at one call of a function."""

    def __init__(self, retry: Retry, function: Any) -> None:
        self._retry = retry
        self._label = f"{getattr(function, '__qualname__', function)}()"
        self._attempt = Attempt(retry)
        self._around: Attempt | None = None
        self._scope: SessionScope[Any] | None = None
        self._conflict: BaseException | None = None
        self._error: Exception | None = None

    @contextmanager
    def inside(self, block: Block) -> Generator[None]:
        """*block* was entered, and the function is called in it."""
        self._scope = scope = block.owned_scope()
        if scope is None:  # the attempt is that of whoever has the transaction
            yield
            return
        self._around = scope.current_attempt
        self._attempt.outer = find_attempt() or self._around
        scope.current_attempt = self._attempt
        call = _Call(self._attempt)
        try:
            yield
        except Exception:
            if scope.agenda is not None:  # was the transaction lost by then?
                self._conflict = scope.agenda.conflict
            raise
        finally:
            call.leave()

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
        delay = self._attempt.delay(due_around(get_innermost()))
        log_loss(self._label, self._attempt, code, delay)
        if delay is not None:
            self._error = error
        return delay

    def end(self) -> None:
        """The block was left."""
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.current_attempt = self._around
        if self._error is None:
            self._attempt.finish()

    def go_on(self) -> None:
        """The pause is over: go on to the next attempt.

        Raises:
            Exception: What the last one has lost to, if something has forbidden another meanwhile.
        """
        error, self._error = self._error, None
        assert error is not None
        if self._attempt.fence is not None:
            log_fence(self._label, self._attempt)
            self._attempt.finish()
            raise error
        self._attempt = self._attempt.following()


class _Call:
    """One try at a call: what the context variable holds inside of it."""

    databases: tuple[Database[Any], ...] = ()
    scopes: tuple[SessionScope[Any], ...] = ()
    """It has no session scope."""

    is_request = False

    # What only a request knows of.
    admitted_request: AdmittedRequest | None = None
    loop: asyncio.AbstractEventLoop | None = None

    __slots__ = ("_token", "current_attempt", "is_over", "outer")

    def __init__(self, attempt: Attempt) -> None:
        self.current_attempt = attempt
        self.is_over = False
        self.outer = get_innermost()
        self._token = set_innermost(self)

    def find(self, database: Database[Any]) -> None:
        """It has none."""

    def take_late_hooks(self, scope: SessionScope[Any]) -> bool:  # noqa: ARG002 - as a request
        """Only a request has a response that they could wait for."""
        return False

    def leave(self) -> None:
        """What is around it is the innermost again."""
        self.is_over = True
        reset_innermost(self._token)
