"""Hooks: ``on_commit()``, ``on_rollback()`` and ``on_completion()``."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any, TypeVar, overload

from asgi_dbscope import _current
from asgi_dbscope._agenda import Hook, Occasion, check_hook_options
from asgi_dbscope._lifecycle import Outcome
from asgi_dbscope._retry import HOOK_RAN
from asgi_dbscope.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_dbscope._agenda import OnError, When
    from asgi_dbscope._database import Database
    from asgi_dbscope._scope import SessionScope

F = TypeVar("F", bound="Callable[..., Any]")

logger = logging.getLogger("asgi_dbscope")

_running: set[asyncio.Task[None]] = set()
"""Hooks that run at once, where there is no scope whose end would wait for them."""


class HookRegistrar:
    """A call that registers a hook: plain, ``on_commit(function, *args)``, or as a decorator."""

    __slots__ = ("_database", "_occasion")

    def __init__(self, occasion: Occasion, database: Database[Any] | None = None) -> None:
        self._occasion = occasion
        self._database = database

    @overload
    def __call__(
        self,
        function: F,
        /,
        *args: Any,
        when: When = ...,
        on_error: OnError = ...,
        **kwargs: Any,
    ) -> F: ...

    @overload
    def __call__(
        self, /, *, when: When = ..., on_error: OnError = ..., **kwargs: Any
    ) -> Callable[[F], F]: ...

    def __call__(
        self,
        function: Any = None,
        /,
        *args: Any,
        when: When = "before_response",
        on_error: OnError = "log",
        **kwargs: Any,
    ) -> Any:
        """Let *function* run at the end of the transaction that is open here.

        Args:
            function: A function, or a coroutine function for an asynchronous database. Left out,
                the call is a decorator.

            args: What it is called with; an on-completion hook gets the outcome first.

            when: ``"before_response"``, before the head goes out; or ``"after_response"``, when
                the app has returned, so that it doesn't delay the client.

            on_error: ``"log"`` its error, or ``"raise"`` it once the other hooks have run.

            kwargs: What it is called with.

        Returns:
            *function*.

        Raises:
            ConfigurationError: If an argument is wrong.
            SessionScopeClosedError: If the scope has ended.
        """
        if function is None:
            check_hook_options(when, on_error)

            def register(later: Callable[..., Any]) -> Any:
                return self(later, *args, when=when, on_error=on_error, **kwargs)

            return register
        hook = Hook(self._occasion, function, args, kwargs, when, on_error)
        database = self._database or _current.find_database()
        if database.is_sync and hook.is_async:
            msg = (
                f"{function!r} is a coroutine function, and the hooks of {database!r} are run in "
                "threads, because it is synchronous. Use a plain function."
            )
            raise ConfigurationError(msg)
        _register(hook, database)
        return function


def _register(hook: Hook, database: Database[Any]) -> None:
    scope = _current.find_scope(database)
    if scope is not None and scope.is_websocket:
        scope = None
    if scope is not None and (scope.is_in_transaction or scope.options.mode != "autocommit"):
        scope.add_hook(hook)
        return
    # Outside of any transaction: what was done is durable already, and nothing can be undone.
    if hook.occasion is Occasion.ROLLBACK:
        return
    if scope is not None and hook.when == "after_response":
        scope.add_late_hook(hook)
    else:
        _call_at_once(hook, database, scope)


def _call_at_once(hook: Hook, database: Database[Any], scope: SessionScope[Any] | None) -> None:
    if scope is not None:
        scope.check_open()
    elif hook.is_async:
        _check_loop(hook)
    _current.forbid_attempts(HOOK_RAN, None if scope is None else scope.current_attempt)
    try:
        if database.is_sync:
            with database.hook_scope():
                hook.call(Outcome.NOT_BEGUN)
            return
        answer = hook.call(Outcome.NOT_BEGUN)
    except Exception:
        if hook.on_error == "raise":
            raise
        logger.exception("The hook %r failed", hook.function)
        return
    if not inspect.isawaitable(answer):
        return
    if scope is None:
        _start(hook, answer, database, _running)
    elif asyncio._get_running_loop() is scope.loop or scope.loop is None:  # noqa: SLF001 - public, for those who ask often
        _start(hook, answer, database, scope.started_hooks())
    else:  # a worker thread
        scope.loop.call_soon_threadsafe(_start, hook, answer, database, scope.started_hooks())


def _check_loop(hook: Hook) -> None:
    """Refuse a coroutine function where there is no event loop that it could run on."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        msg = (
            f"{hook.function!r} is a coroutine function, and there is no event loop here that it "
            "could run on. Use a plain function, or open a scope: `async with db.session_scope():`."
        )
        raise ConfigurationError(msg) from None


def _start(
    hook: Hook, answer: Any, database: Database[Any], running: set[asyncio.Task[None]]
) -> None:
    task = asyncio.get_running_loop().create_task(_run_in_scope(hook, answer, database))
    running.add(task)
    task.add_done_callback(running.discard)


async def _run_in_scope(hook: Hook, answer: Any, database: Database[Any]) -> None:
    try:
        async with database.hook_scope():
            await answer
    except Exception:
        logger.exception("The hook %r failed", hook.function)


on_commit = HookRegistrar(Occasion.COMMIT)
"""Run a function after the COMMIT of the transaction that is open here.

The one-database form of :attr:`.Database.on_commit`.
"""

on_rollback = HookRegistrar(Occasion.ROLLBACK)
"""Run a function after the rollback of the transaction that is open here.

The one-database form of :attr:`.Database.on_rollback`.
"""

on_completion = HookRegistrar(Occasion.COMPLETION)
"""Run a function with the outcome of the transaction that is open here.

The one-database form of :attr:`.Database.on_completion`.
"""
