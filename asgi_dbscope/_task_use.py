"""The use of an asynchronous session: tasks of one event loop."""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbscope._completion import redeliver, run_to_completion
from asgi_dbscope._current import is_of_another_task
from asgi_dbscope._hook_runs import run_hooks
from asgi_dbscope._policy import Ending
from asgi_dbscope._use import IdleNotes, SessionUse
from asgi_dbscope.errors import ConcurrentSessionUseError, EventLoopMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import CodeType, FrameType

    from asgi_dbscope._scope import SessionScope

T = TypeVar("T")

logger = logging.getLogger("asgi_dbscope")

GRACE = 1.0
"""Seconds for throwing away a connection that its scope has given up already."""

_ending: ContextVar[TaskUse | None] = ContextVar("asgi_dbscope_ending", default=None)
"""The use of the session that this task, or the one that started it, is ending."""


class TaskUse(SessionUse):
    """The use of an asynchronous session, whose class may have verbs of its own."""

    _becomes_free: asyncio.Future[None] | None = None
    _last = 0
    _turns: asyncio.Lock | None = None

    def __init__(self, scope: SessionScope[Any]) -> None:
        super().__init__(scope)
        if scope.database.concurrency == "serialize":
            self._turns = asyncio.Lock()

    @property
    def is_held_by_another(self) -> bool:
        if self.ender is not None and _ending.get() is not self:
            return True
        return self.user is not None and self.user is not asyncio.current_task()

    def run(self, function: Callable[..., None], *arguments: Any) -> Coroutine[Any, Any, None]:
        """Run *function* in a greenlet, where SQLAlchemy's synchronous API awaits."""
        return greenlet_spawn(function, *arguments)

    def check_place(self) -> asyncio.Task[Any] | None:
        """The task that asks for an operation.

        Raises:
            EventLoopMismatchError: If it is in another thread or event loop than the scope's.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not None and loop is self.scope.loop:
            return asyncio.current_task(loop)
        msg = (
            f"The AsyncSession of {self.scope!r} was used outside of the asyncio event loop that "
            "its scope was opened in. `def` endpoints and threads are better off with a Database "
            "of a synchronous engine. Or call back into the loop: `asyncio.run_coroutine_"
            "threadsafe(session.execute(statement), current_scope().loop).result()`. In another "
            "loop open a scope of its own: `async with db.session_scope() as session:`."
        )
        raise EventLoopMismatchError(msg)

    def enter(self) -> asyncio.Task[Any] | None:
        task = self.check_place()
        if task is None:
            self.check_registration()
            return None
        if task is self.user:
            return None
        self.check_registration()
        if task is self.ender:
            return None
        if self.ender is not None and _ending.get() is self:
            return None  # a task that the user's own commit() or rollback() started
        if self._turns is None:
            self._take(task)
            return task
        await_only(self._turns.acquire())
        try:
            self.check_registration()
            self._take(task)
        except BaseException:
            self._turns.release()
            raise
        return task

    def enter_quietly(self) -> asyncio.Task[Any] | None:
        if not self.is_free:
            return None
        if self._turns is not None:
            await_only(self._turns.acquire())
        task = self.user = self.check_place()
        return task

    def _take(self, task: asyncio.Task[Any]) -> None:
        while self.ender is not None:
            await_only(asyncio.wait([self.ender]))
            self.check_registration()
        if self.scope.is_closing:
            self.scope.refuse_late_use()
        if self.user is not None:
            msg = self.concurrent_message(_describe(self.user), _describe(task))
            raise ConcurrentSessionUseError(msg)
        if self.scope.boundaries:
            self._check_block()
        if self.scope.holder is not None:
            self.scope.expect_second_connection()
        if self._last != id(task):
            self.has_several_users = self.has_several_users or self._last != 0
            self._last = id(task)
        self.user = task
        gate = self.scope.gate
        if gate is not None and gate.late_streamer is not None:
            if gate.late_streamer is task:
                self.is_torn = True  # until its cancellation arrives, what it does is the body's
            else:
                self._part_from_body(gate.late_streamer)

    def _check_block(self) -> None:
        """Refuse what would be part of another task's block, and be rolled back with it."""
        boundary = self.scope.boundaries[-1]
        if is_of_another_task(boundary):
            msg = (
                f"{self.scope!r}: the session is used while another task has {boundary.label} open "
                "on it; what is done here would be rolled back with that. Do one after the other, "
                "or give this one a session of its own: `async with db.branch() as session:`."
            )
            raise ConcurrentSessionUseError(msg)

    def enter_registration(self) -> None:
        self.check_registration()
        gate = self.scope.gate
        if gate is not None and gate.late_streamer is not None:
            self._part_from_body(gate.late_streamer)
        if self.scope.boundaries and self.user is None and _task_here() is not None:
            self._check_block()
        if self._turns is None and self._is_used_by_another():
            msg = self.concurrent_message(_describe(cast("Any", self.user)), "another")
            raise ConcurrentSessionUseError(msg)

    def _part_from_body(self, late_streamer: asyncio.Task[Any]) -> None:
        """Keep apart what a body adds whose client has left, and what comes after the body.

        Its statements are rolled back at once; what it adds waits in the session, where the next
        one to come finds it. No transaction is begun in the database by then: this does no I/O.
        """
        if _task_here() is late_streamer:
            if self.connections and self._last != id(late_streamer):
                msg = (
                    f"{self.scope!r}: the client of this body has left, and what comes after the "
                    "body has a transaction open, which what the body adds must not be a part of."
                )
                raise ConcurrentSessionUseError(msg)
            self.has_late_body = True
        elif self.has_late_body and not self.connections:
            self.has_late_body = False
            session, _ = self.scope.in_use()
            Session.rollback(session)  # past our own, which enters: this may be on the way in

    @property
    def is_overtaking(self) -> bool:
        return self._turns is not None and self._is_used_by_another()

    def _is_used_by_another(self) -> bool:
        return self.user is not None and _task_here() is not self.user

    def leave(self, user: object, session: Session) -> None:
        if user is None:
            return
        self.user = None
        if self.scope.holder is not None:
            self.scope.got_second_connection()
        if self._turns is not None:
            self._turns.release()
        if self.is_torn and self.ender is None:
            # In a task of its own: this one is most likely being cancelled.
            self.is_torn = False
            redeliver(await_only(self.scope.settle(Ending.ROLLBACK)))
        if self.is_abandoned:
            throwing_away = greenlet_spawn(session.invalidate)
            redeliver(await_only(run_to_completion(throwing_away, grace=GRACE)))
        if self._becomes_free is not None and not self._becomes_free.done():
            self._becomes_free.set_result(None)

    def begin_ending(self, ending: Ending, timeout: float) -> bool:
        if self.ender is not None and not self._outlast(ending, timeout):
            return False
        self.ender = asyncio.current_task()
        _ending.set(self)  # in the context of the ending's task, and so of those it starts
        return True

    def _outlast(self, ending: Ending, timeout: float) -> bool:
        """Wait for another ending; whether it is over."""
        known = self.failed_commit
        patience = None if ending is Ending.COMMIT else timeout
        while self.ender is not None:
            _, late = await_only(asyncio.wait([self.ender], timeout=patience))
            if late:
                return False
        self.check_commit_before(ending, known)
        return True

    def end_ending(self, session: Session) -> None:  # noqa: ARG002 - for threads
        self.ender = None

    def wait_until_free(self, timeout: float) -> bool:
        is_free: bool = await_only(self._wait_until_free(timeout))
        return is_free

    async def _wait_until_free(self, timeout: float) -> bool:  # noqa: ASYNC109 - the answer is False, not an error
        self._becomes_free = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._becomes_free
        except TimeoutError:
            logger.warning("%s", self.busy_message(timeout))
            return False
        finally:
            self._becomes_free = None
        return True

    def roll_back(self, session: Session, timeout: float) -> None:  # noqa: ARG002 - its own verb
        await_only(_in_time(self.scope.session.rollback(), timeout))

    def commit(self, session: Session) -> None:
        own: AsyncSession = self.scope.session
        if type(own).commit is AsyncSession.commit:
            super().commit(session)  # the same, by a shorter way
        else:
            await_only(own.commit())

    def invalidate(self, session: Session) -> None:  # noqa: ARG002 - its own verb
        await_only(self.scope.session.invalidate())

    def in_time(self, function: Callable[[], T], timeout: float) -> T:
        answer: T = await_only(_in_time(greenlet_spawn(function), timeout))
        return answer

    def pause(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))

    def run_hooks(self) -> None:
        redeliver(await_only(run_hooks(self.scope)))


class IdleTaskUse(IdleNotes, TaskUse):
    """The same, where it matters whether a transaction idles."""


async def _in_time(operation: Coroutine[Any, Any, T], timeout: float) -> T:  # noqa: ASYNC109 - that is its point
    async with asyncio.timeout(timeout):
        return await operation


def _task_here() -> asyncio.Task[Any] | None:
    """The task that asks; ``None`` in a worker thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


# --------------------------------------------------------------------------------------
# Naming a task
# --------------------------------------------------------------------------------------


_ASYNCIO = str(PurePath(asyncio.__file__).parent)


def _describe(task: asyncio.Task[Any]) -> str:
    """The name of *task*, what it runs, and where it was created, as far as Python knows."""
    coroutine: Any = task.get_coro()
    code: CodeType | None = getattr(coroutine, "cr_code", None)
    place = ""
    if code is not None:
        place = f", {code.co_qualname} ({_short(code.co_filename)}:{code.co_firstlineno})"
    # asyncio keeps the place only in debug mode (PYTHONASYNCIODEBUG=1).
    known: Any = getattr(task, "_source_traceback", None) or ()
    created = [each for each in known if not each.filename.startswith(_ASYNCIO)]
    if created:
        line = created[-1]
        place += f", created at {_short(line.filename)}:{line.lineno}"
    frames: list[FrameType] = task.get_stack()
    if frames:
        frame = frames[-1]
        place += f", now at {_short(frame.f_code.co_filename)}:{frame.f_lineno}"
    return f"task {task.get_name()!r}{place}"


def _short(filename: str) -> str:
    return "/".join(PurePath(filename).parts[-2:])
