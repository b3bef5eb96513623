"""Finishing what was begun: cancellations wait, and none is lost, doubled or left behind."""

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest

from asgi_dbscope._completion import redeliver, run_to_completion

GRACE = 10.0


class Operation:
    """Something that must not be left half done; the test says when it goes on.

    Attributes:
        is_running: Set when it has begun.

        may_end: Set by the test to let it end.

        happened: What it did: `"ended"` or `"cancelled"`.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self.is_running = asyncio.Event()
        self.may_end = asyncio.Event()
        self.happened: list[str] = []
        self._error = error

    def end_after(self, seconds: float) -> None:
        """Let it end then: after every shorter timeout that runs already, on a busy machine too."""
        asyncio.get_running_loop().call_later(seconds, self.may_end.set)

    async def run(self) -> None:
        """Wait, then end."""
        self.is_running.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.happened.append("cancelled")
            raise
        self.happened.append("ended")
        if self._error is not None:
            raise self._error


async def turns(count: int) -> None:
    """Let everybody run *count* times."""
    for _ in range(count):
        await asyncio.sleep(0)


def left_of_cancellation() -> int:
    """How many requests to cancel are pending on the current task."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


# --------------------------------------------------------------------------------------
# Without a cancellation
# --------------------------------------------------------------------------------------


async def test_operation_runs_to_its_end():
    """G10: Without a cancellation the operation runs, and nothing is owed."""
    operation = Operation()
    operation.may_end.set()

    assert await run_to_completion(operation.run(), grace=GRACE) is None
    assert ["ended"] == operation.happened


async def test_error_of_the_operation_is_raised():
    """G2: What the operation raises is raised, the very object."""
    error = LookupError()
    operation = Operation(error)
    operation.may_end.set()

    with pytest.raises(LookupError) as caught:
        await run_to_completion(operation.run(), grace=GRACE)

    assert error is caught.value


async def test_operation_that_is_cancelled_itself_raises_that():
    """G10: An operation that somebody cancels by itself ends in that cancellation."""

    async def give_up() -> None:
        raise asyncio.CancelledError("mine")

    with pytest.raises(asyncio.CancelledError, match="mine"):
        await run_to_completion(give_up(), grace=GRACE)

    assert 0 == left_of_cancellation()


# --------------------------------------------------------------------------------------
# Native cancellation
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("between", [0, 1, 3])
async def test_native_cancellation_waits_for_the_operation(times, between):
    """G10: `Task.cancel()`, once or many times, comes after the operation's end, and is owed."""
    operation = Operation()
    owed = []

    async def caller() -> None:
        owed.append(await run_to_completion(operation.run(), grace=GRACE))

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    for number in range(times):
        task.cancel(f"stop {number}")
        await turns(between)
    assert not task.done()
    operation.may_end.set()
    await asyncio.wait([task])

    assert ["ended"] == operation.happened
    assert ["stop"] == [str(each).split(" ")[0] for each in owed]


@pytest.mark.parametrize("waits", [False, True])
async def test_cancellation_before_the_first_step_lets_the_operation_run(waits):
    """G10: A task whose cancellation is pending when it comes here still runs the operation.

    The cancellation is owed; or, where the operation ended without waiting, still pending.
    """
    operation = Operation()
    owed = []

    async def caller() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("early")
        owed.append(await run_to_completion(operation.run(), grace=GRACE))
        assert 1 == task.cancelling()

    if not waits:
        operation.may_end.set()
    task = asyncio.create_task(caller())
    await turns(5)
    operation.may_end.set()
    await asyncio.wait([task])

    assert ["ended"] == operation.happened
    (cancellation,) = owed
    assert (cancellation is None) == task.cancelled()
    if waits:
        assert "early" == str(cancellation)


@pytest.mark.parametrize("moment", range(6))
async def test_cancellation_at_the_very_moment_of_completion(moment):
    """G10: A cancellation in the loop's turns around the operation's end is neither lost nor early.

    Either the call had returned already, and the caller is cancelled where it goes on, or the
    cancellation is owed.
    """
    operation = Operation()
    owed = []
    where = []

    async def caller() -> None:
        owed.append(await run_to_completion(operation.run(), grace=GRACE))
        where.append("after")
        await asyncio.Event().wait()

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    operation.may_end.set()
    await turns(moment)
    task.cancel("now")
    await turns(6)

    assert ["ended"] == operation.happened
    assert ["after"] == where
    (cancellation,) = owed
    assert (cancellation is None) == task.cancelled()
    if cancellation is not None:
        assert "now" == str(cancellation)
        task.cancel()
        await asyncio.wait([task])


async def test_cancellation_between_the_operations_end_and_the_callers_turn():
    """G10: A cancellation by the operation's own last step is owed."""
    owed = []
    tasks: list[asyncio.Task[None]] = []

    async def cancel_its_caller() -> None:
        await asyncio.sleep(0)
        tasks[0].cancel("last step")

    async def caller() -> None:
        owed.append(await run_to_completion(cancel_its_caller(), grace=GRACE))

    tasks.append(asyncio.create_task(caller()))
    await asyncio.wait(tasks)

    assert ["last step"] == [str(each) for each in owed]


# --------------------------------------------------------------------------------------
# The grace
# --------------------------------------------------------------------------------------


async def test_grace_that_runs_out_cancels_the_operation():
    """G10: After a cancellation the operation has its grace, then it is cancelled itself."""
    operation = Operation()

    async def caller() -> None:
        await run_to_completion(operation.run(), grace=0.01)

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    task.cancel("stop")
    await asyncio.wait([task])

    assert task.cancelled()
    assert ["cancelled"] == operation.happened


async def test_grace_is_counted_once():
    """G10: Further cancellations don't renew the grace: there is one deadline."""
    operation = Operation()

    async def caller() -> None:
        await run_to_completion(operation.run(), grace=0.05)

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0.001)

    assert ["cancelled"] == operation.happened


async def test_grace_is_not_counted_without_a_cancellation():
    """G10: An operation that nobody cancels may take as long as it takes."""
    operation = Operation()
    asyncio.get_running_loop().call_later(0.05, operation.may_end.set)

    await run_to_completion(operation.run(), grace=0.001)

    assert ["ended"] == operation.happened


async def test_grace_that_was_not_needed_cancels_nothing_later():
    """G10: After the operation's end its deadline is gone."""
    operation = Operation()

    async def caller() -> None:
        cancellation = await run_to_completion(operation.run(), grace=0.01)
        assert cancellation is not None
        await asyncio.sleep(0.03)

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    task.cancel()
    operation.may_end.set()
    await task

    assert ["ended"] == operation.happened


async def test_error_outranks_the_cancellation_which_comes_after():
    """G2, G10: An operation that raises while its caller is cancelled: the error, then that."""
    operation = Operation(LookupError())
    seen = []

    async def caller() -> None:
        try:
            await run_to_completion(operation.run(), grace=GRACE)
        except LookupError:
            seen.append("error")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as cancellation:
            seen.append(str(cancellation))
            raise

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    task.cancel("stop")
    await turns(1)
    operation.may_end.set()
    await asyncio.wait([task])

    assert ["error", "stop"] == seen
    assert task.cancelled()


async def test_operation_cancelled_by_the_end_of_the_loop_does_not_hang():
    """G10: A loop that cancels everything at its end ends the caller too."""
    operation = Operation()

    async def caller() -> None:
        await run_to_completion(operation.run(), grace=GRACE)

    here = asyncio.current_task()
    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    for each in asyncio.all_tasks() - {here}:
        each.cancel("the loop ends")
    await asyncio.wait([task])

    assert ["cancelled"] == operation.happened
    assert task.cancelled()


def test_operation_in_flight_when_asyncio_run_ends():
    """G10: `asyncio.run()` that ends in mid-operation terminates, and the operation has ended."""
    operations = []

    async def main() -> None:
        operation = Operation()
        operations.append(operation)

        async def caller() -> None:
            await run_to_completion(operation.run(), grace=GRACE)

        main.task = asyncio.create_task(caller())  # type: ignore[attr-defined]
        await operation.is_running.wait()

    asyncio.run(main())

    assert ["cancelled"] == operations[0].happened


# --------------------------------------------------------------------------------------
# Cancel scopes and timeouts
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shielded", [False, True])
async def test_cancel_scope_waits_for_the_operation(is_shielded):
    """G10: A cancelled anyio scope takes effect after the operation, at the next suspension."""
    operation = Operation()
    seen: list[object] = []

    async def caller() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            with anyio.CancelScope(shield=is_shielded):
                seen.append(await run_to_completion(operation.run(), grace=GRACE))
            seen.append("after")
            await anyio.lowlevel.checkpoint()
            seen.append("never")
        seen.append("out")

    scopes: list[anyio.CancelScope] = []
    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    scopes[0].cancel()
    await turns(5)
    assert not task.done()
    operation.may_end.set()
    await task

    assert ["ended"] == operation.happened
    assert "after" in seen
    assert "never" not in seen
    assert "out" == seen[-1]
    assert scopes[0].cancelled_caught


async def test_cancel_scope_cancelled_before_the_operation():
    """G10: Under a scope that is cancelled already the operation still runs to its end."""
    operation = Operation()
    operation.may_end.set()

    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_to_completion(operation.run(), grace=GRACE)
        await anyio.lowlevel.checkpoint()

    assert ["ended"] == operation.happened
    assert scope.cancelled_caught


async def test_grace_begins_in_a_cancel_scope_too():
    """G10: In a cancelled scope too an operation that doesn't end has its grace, and no more."""
    operation = Operation()

    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_to_completion(operation.run(), grace=0.01)

    assert ["cancelled"] == operation.happened
    assert scope.cancelled_caught
    await no_stray_cancellation()


async def test_cancel_scope_says_so_once():
    """G10: A cancelled scope doesn't wake the task at every turn while the operation runs."""
    operation = Operation()
    asyncio.get_running_loop().call_later(0.03, operation.may_end.set)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_to_completion(operation.run(), grace=GRACE)
        assert left_of_cancellation() <= 1
        await anyio.lowlevel.checkpoint()

    assert ["ended"] == operation.happened
    assert scope.cancelled_caught
    await no_stray_cancellation()


async def test_move_on_after_waits_for_the_operation():
    """G10: `anyio.move_on_after` ends its block after the operation, not in it."""
    operation = Operation()

    with anyio.move_on_after(0.01) as scope:
        operation.end_after(0.03)
        await run_to_completion(operation.run(), grace=GRACE)
        await anyio.lowlevel.checkpoint()

    assert ["ended"] == operation.happened
    assert scope.cancelled_caught
    await no_stray_cancellation()


async def no_stray_cancellation() -> None:
    """Fail if a cancellation arrives that belongs to something that is over."""
    assert 0 == left_of_cancellation()
    await turns(5)
    await asyncio.sleep(0.001)
    assert 0 == left_of_cancellation()


@pytest.mark.parametrize("how", ["raise", "redeliver"])
async def test_timeout_is_raised_where_its_block_ends(how):
    """G10: `asyncio.timeout()` that ran out in the operation is a TimeoutError, and only that."""
    operation = Operation()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            operation.end_after(0.03)
            cancellation = await run_to_completion(operation.run(), grace=GRACE)
            assert cancellation is not None
            if how == "raise":
                raise cancellation
            redeliver(cancellation)
            await asyncio.Event().wait()

    assert ["ended"] == operation.happened
    await no_stray_cancellation()


async def test_timeout_whose_block_ends_without_another_wait_is_not_left_behind():
    """G10: A timeout that ran out, in a block that ends without waiting, hits nobody later."""
    operation = Operation()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            operation.end_after(0.03)
            cancellation = await run_to_completion(operation.run(), grace=GRACE)
            assert cancellation is not None
            redeliver(cancellation)
            raise cancellation

    await no_stray_cancellation()


async def test_timeout_whose_block_returns_hits_nobody_later():
    """G10: A block that returned its answer in spite of a timeout leaves no request behind."""
    operation = Operation()
    timeout = asyncio.timeout(0.01)

    async def answer() -> str:
        async with timeout:
            operation.end_after(0.03)
            redeliver(await run_to_completion(operation.run(), grace=GRACE))
            return "answer"

    try:
        answered = await answer()
    except TimeoutError:
        answered = "timeout"

    assert answered in {"answer", "timeout"}
    assert timeout.expired()
    await no_stray_cancellation()


async def test_error_in_a_timeout_that_ran_out():
    """G2, G10: An operation that raises after the timeout ran out: its error, and nothing later."""
    operation = Operation(LookupError())

    with pytest.raises(LookupError):
        async with asyncio.timeout(0.01):
            operation.end_after(0.03)
            await run_to_completion(operation.run(), grace=GRACE)

    assert ["ended"] == operation.happened
    await no_stray_cancellation()


async def test_nested_timeouts_both_ran_out():
    """G10: Two timeouts that ran out in one operation: the outer one is raised, as without us."""
    operation = Operation()
    seen = []

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            try:
                async with asyncio.timeout(0.005):
                    operation.end_after(0.03)
                    redeliver(await run_to_completion(operation.run(), grace=GRACE))
                    await asyncio.Event().wait()
            except TimeoutError:
                seen.append("inner")
            await asyncio.Event().wait()

    assert [] == seen
    await no_stray_cancellation()


async def test_task_group_ends_after_the_operation():
    """G10: A task group whose other child fails waits for the operation, then raises."""
    operation = Operation()
    seen = []

    async def fail() -> None:
        await operation.is_running.wait()
        asyncio.get_running_loop().call_soon(operation.may_end.set)
        raise LookupError

    async def child() -> None:
        redeliver(await run_to_completion(operation.run(), grace=GRACE))
        seen.append("after")
        await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            group.create_task(fail())

    assert ["ended"] == operation.happened
    assert ["after"] == seen


# --------------------------------------------------------------------------------------
# redeliver
# --------------------------------------------------------------------------------------


async def run_cancelled(after: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Cancel a task in its operation, redeliver, and let it go on with *after*."""
    operation = Operation()

    async def caller() -> None:
        redeliver(await run_to_completion(operation.run(), grace=GRACE))
        await after()

    task = asyncio.create_task(caller())
    await operation.is_running.wait()
    task.cancel("stop")
    await turns(1)
    operation.may_end.set()
    await asyncio.wait([task])
    return task


async def test_redelivered_cancellation_arrives_at_the_next_wait():
    """G10: A redelivered cancellation arrives where the task waits next, with its message."""
    seen = []

    async def after() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as cancellation:
            seen.append((str(cancellation), left_of_cancellation()))
            raise

    task = await run_cancelled(after)

    assert task.cancelled()
    assert [("stop", 1)] == seen


async def test_redelivered_cancellation_lets_a_task_end_that_waits_no_more():
    """G10: A task that has only its answer left to give can give it."""
    seen = []

    async def after() -> None:
        seen.append("answered")

    task = await run_cancelled(after)

    assert ["answered"] == seen
    assert not task.cancelled()


async def test_redelivered_cancellation_that_was_taken_back_does_not_arrive():
    """G10: Where the request was taken back (`uncancel()`), it isn't delivered again."""
    seen = []

    async def after() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        await turns(5)
        seen.append("untouched")

    task = await run_cancelled(after)

    assert ["untouched"] == seen
    assert not task.cancelled()


async def test_redelivering_nothing_does_nothing():
    """G10: Where nothing was held back nothing is delivered."""
    redeliver(None)
    await no_stray_cancellation()
