"""Finish what was begun: the one place that holds cancellation back."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def run_to_completion(
    operation: Coroutine[object, object, None], *, grace: float
) -> asyncio.CancelledError | None:
    """Run *operation* to its end, even if the calling task is cancelled meanwhile.

    Neither tool does it alone. An anyio shield doesn't stop a native ``Task.cancel()``;
    ``asyncio.shield`` lets the operation go on but gives control back before it has ended. So: a
    task of its own, waited for in a loop, inside an anyio shield.

    Args:
        operation: What must not be left half done.

        grace: Seconds that *operation* has left once the caller is cancelled; then it is cancelled
            itself, so that nothing waits for ever.

    Returns:
        The cancellation that arrived meanwhile, if one did: the caller owes it to its own caller,
        by raising it or by :func:`redeliver`.

    Raises:
        BaseException: What *operation* raised; ``CancelledError`` if its grace ran out. An error
            outranks a cancellation that arrived meanwhile, which is then redelivered.
    """
    loop = asyncio.get_running_loop()
    has_ended: asyncio.Future[None] = loop.create_future()
    task = _start(operation, has_ended, loop)
    cancellation: asyncio.CancelledError | None = None
    try:
        await has_ended
    except asyncio.CancelledError as error:
        # Also where the operation ended in the very moment of the cancellation.
        cancellation = error
        await _see_through(task, loop, grace)
    try:
        task.result()
    except asyncio.CancelledError as error:
        raise cancellation or error  # noqa: B904 - one cancellation, whoever passed it on
    except BaseException:
        redeliver(cancellation)
        raise
    return cancellation


def _start(
    operation: Coroutine[object, object, None],
    has_ended: asyncio.Future[None],
    loop: asyncio.AbstractEventLoop,
) -> asyncio.Task[None]:
    """Make a task of *operation*; where Python can, run it to its first wait at once.

    Then it is sure to run, and can say by itself that it *has_ended*: that wakes the caller two
    turns of the loop earlier than ``asyncio.shield`` of a task, a twentieth of a SELECT's cost.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(_attended(operation, has_ended), loop=loop, eager_start=True)
    task = loop.create_task(operation)
    task.add_done_callback(lambda _: _tell(has_ended))
    return task


async def _attended(
    operation: Coroutine[object, object, None], has_ended: asyncio.Future[None]
) -> None:
    try:
        await operation
    finally:
        _tell(has_ended)


def _tell(has_ended: asyncio.Future[None]) -> None:
    if not has_ended.done():  # cancelled, with the caller that waits for it
        has_ended.set_result(None)


async def _see_through(
    task: asyncio.Task[None], loop: asyncio.AbstractEventLoop, grace: float
) -> None:
    """Wait for *task* in a caller that was cancelled, *grace* seconds at most."""
    deadline = loop.call_later(grace, task.cancel)
    with anyio.CancelScope(shield=True):  # or anyio would cancel again at every turn of the loop
        while not task.done():
            with suppress(BaseException):
                await asyncio.shield(task)
    deadline.cancel()


def redeliver(cancellation: asyncio.CancelledError | None) -> None:
    """Deliver *cancellation*, if there is one, to this task again, at its next suspension.

    A task that was about to be cancelled, but would have sent its response without suspending,
    must still be able to: so the cancellation isn't raised here, it is handed on. The request is
    not left pending on the task (``Task.cancel()`` here and now), because before Python 3.13 such
    a request survives the end of an ``asyncio.timeout()`` block that it belongs to, and would hit
    innocent code.
    """
    if cancellation is None:
        return
    arguments = cancellation.args
    task = asyncio.current_task()
    assert task is not None
    requests = task.cancelling()

    def cancel_again() -> None:
        if requests and task.cancelling() >= requests and not task.done():
            task.uncancel()
            task.cancel(*arguments)

    asyncio.get_running_loop().call_soon(cancel_again)
