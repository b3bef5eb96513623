"""The hooks that are due: run in their order, each in a session scope of its own."""

from __future__ import annotations

import asyncio
import inspect
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from asgi_dbscope._completion import run_to_completion
from asgi_dbscope._retry import HOOK_RAN
from asgi_dbscope._text import name_of

if TYPE_CHECKING:
    from asgi_dbscope._agenda import Hook
    from asgi_dbscope._lifecycle import Outcome
    from asgi_dbscope._scope import SessionScope

logger = logging.getLogger("asgi_dbscope")


async def run_hooks(
    scope: SessionScope[Any], *, late: bool = False, is_failing: bool = False
) -> asyncio.CancelledError | None:
    """Run the hooks whose transaction is over, each in a scope of its own.

    Args:
        scope: Whose hooks.

        late: Those that waited for the response too.

        is_failing: Whether an error is under way already: then a hook's is only logged.

    Returns:
        A cancellation that arrived meanwhile, which the caller has to pass on.

    Raises:
        Exception: The first error of a hook with ``on_error="raise"``.
    """
    due = _take_due(scope, late=late)
    started = () if scope.agenda is None else tuple(scope.agenda.started)
    if not (due or started):
        return None
    if scope.database.is_sync:
        operation = anyio.to_thread.run_sync(
            partial(_call_hooks_here, scope, due), limiter=scope.database.limiter("hooks")
        )
    else:
        operation = _call_hooks(scope, due, started)
    try:
        return await run_to_completion(operation, grace=scope.database.cleanup_timeout)
    except Exception:
        if not is_failing:
            raise
        logger.exception("%s: a hook failed", scope.label)
        return None


def run_hooks_here(
    scope: SessionScope[Any], *, late: bool = False, is_failing: bool = False
) -> None:
    """:func:`run_hooks` of a synchronous session, in this thread."""
    due = _take_due(scope, late=late)
    try:
        if due:
            _call_hooks_here(scope, due)
    except Exception:
        if not is_failing:
            raise
        logger.exception("%s: a hook failed", scope.label)


def _take_due(scope: SessionScope[Any], *, late: bool) -> list[tuple[Hook, Outcome]]:
    agenda = scope.agenda
    if agenda is None:
        return []
    if late:
        due, agenda.late = agenda.late, []
    else:
        due, agenda.due = agenda.due, []
    if due:
        scope.forbid_attempts(HOOK_RAN)
    return due


async def _call_hooks(
    scope: SessionScope[Any],
    due: list[tuple[Hook, Outcome]],
    started: tuple[asyncio.Task[None], ...],
) -> None:
    if started:
        await asyncio.wait(started)
    failure: Exception | None = None
    for hook, outcome in due:
        try:
            async with scope.database.hook_scope():
                answer = hook.call(outcome)
                if inspect.isawaitable(answer):
                    await answer
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # out of grace
                logger.error(  # noqa: TRY400 - nothing to see in the cancellation
                    "%s: the hook %s and those after it were given up",
                    scope.label,
                    name_of(hook.function),
                )
                raise
            _tell(scope, hook, error)  # something that it waited for was cancelled, not we
        except Exception as error:  # noqa: BLE001 - logged or raised, as its hook says
            failure = _judge(scope, hook, error, failure)
    if failure is not None:
        raise failure


def _call_hooks_here(scope: SessionScope[Any], due: list[tuple[Hook, Outcome]]) -> None:
    failure: Exception | None = None
    for hook, outcome in due:
        try:
            with scope.database.hook_scope():
                hook.call(outcome)
        except Exception as error:  # noqa: BLE001 - logged or raised, as its hook says
            failure = _judge(scope, hook, error, failure)
    if failure is not None:
        raise failure


def _judge(
    scope: SessionScope[Any], hook: Hook, error: Exception, failure: Exception | None
) -> Exception | None:
    """Log *error*, or make it the one that is raised once all hooks have run."""
    if hook.on_error == "raise" and failure is None:
        error.add_note(
            f"asgi_dbscope: raised by a hook of {scope.label}, whose transaction was over by "
            f"then: {scope.outcome.name}."
        )
        return error
    _tell(scope, hook, error)
    return failure


def _tell(scope: SessionScope[Any], hook: Hook, error: BaseException) -> None:
    logger.error(
        "%s: the hook %s failed; the others run",
        scope.label,
        name_of(hook.function),
        exc_info=error,
    )
