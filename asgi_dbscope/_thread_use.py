"""The use of a synchronous session: threads, one at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from queue import Empty, Queue
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from asgi_dbscope import _dialects
from asgi_dbscope._doubt import lose_answer
from asgi_dbscope._hook_runs import run_hooks_here
from asgi_dbscope._lifecycle import OPEN, State
from asgi_dbscope._policy import Ending
from asgi_dbscope._use import IdleNotes, SessionUse
from asgi_dbscope.errors import (
    ConcurrentSessionUseError,
    EventLoopMismatchError,
    IllegalTransitionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._pool import ThreadWork
    from asgi_dbscope._scope import SessionScope

T = TypeVar("T")

logger = logging.getLogger("asgi_dbscope")


class ThreadUse(SessionUse):
    """The use of a synchronous session."""

    __slots__ = ("_changed", "_loop")

    def __init__(self, scope: SessionScope[Any]) -> None:
        super().__init__(scope)
        self._changed = threading.Condition()
        self._loop = _loop_around(scope)

    @property
    def is_held_by_another(self) -> bool:
        return not {self.ender, self.user} <= {None, threading.current_thread()}

    async def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run *function* in a worker thread that no endpoint can occupy.

        With the limiter that endpoints share, as many of them as there are threads would wait for
        connections, and keep the commits that would free them from running. So would commits that
        wait for a connection themselves, to flush what was only added.
        """
        has_begun = threading.Event()

        def begin() -> None:
            has_begun.set()
            function(*arguments)

        work: ThreadWork = "end" if self.scope.state in OPEN else "begin and end"
        try:
            await anyio.to_thread.run_sync(
                begin,
                limiter=self.scope.database.limiter(work),
                abandon_on_cancel=True,
            )
        except asyncio.CancelledError:  # out of grace: the thread goes on, and clears up
            self.is_abandoned = self.is_closed = has_begun.is_set()
            if self.is_abandoned and self.scope.state is State.COMMITTING:
                with suppress(IllegalTransitionError):  # the answer has come in this very moment
                    lose_answer(self.scope)
            raise

    def _is_on_loop(self) -> bool:
        loop = self._loop
        return loop is not None and asyncio._get_running_loop() is loop  # noqa: SLF001 - public, for those who ask often

    def check_place(self) -> threading.Thread:
        if self._is_on_loop():
            msg = (
                f"The synchronous session of {self.scope!r} was used on the event loop, where its "
                "I/O would hold up every other request. Use it in a `def` endpoint or in `await "
                "asyncio.to_thread(...)`; or make the Database of an AsyncEngine."
            )
            raise EventLoopMismatchError(msg)
        return threading.current_thread()

    def enter(self) -> threading.Thread | None:
        thread = self.check_place()
        if thread is self.user or thread is self.ender:
            return None
        gate = self.scope.gate
        if gate is not None and gate.late_streamer is not None:
            self._part_from_body(gate.late_streamer)
        self.check_registration()
        self.scope.check_deadline()
        with self._changed:
            is_serial = self.scope.database.concurrency == "serialize"
            while self.ender is not None or (is_serial and self.user is not None):
                self._changed.wait()
            self.check_registration()
            if self.scope.is_closing:
                self.scope.refuse_late_use()
            if self.user is not None:
                inside, entering = (f"thread {each.name!r}" for each in (self.user, thread))
                raise ConcurrentSessionUseError(self.concurrent_message(inside, entering))
            if self.scope.holder is not None:
                self.scope.expect_second_connection()
            self.user = thread
        return thread

    def is_left(self) -> bool:
        """Whether nobody is inside; while the scope is closing that remains so."""
        with self._changed:  # a thread may be about to enter
            return self.is_free

    def enter_quietly(self) -> threading.Thread | None:
        with self._changed:
            if not self.is_free:
                return None
            thread = self.user = threading.current_thread()
        return thread

    def _part_from_body(self, streamer: asyncio.Task[Any]) -> None:
        """Roll back what a body has written since its client left, before what comes after it.

        Its task is cancelled, but a thread that this waits for isn't.
        """
        if not streamer.done():
            self.has_late_body = True
        elif self.has_late_body:
            self.has_late_body = False
            self.scope.settle_here(Ending.ROLLBACK)

    def enter_registration(self) -> threading.Thread | None:
        # Not while another thread flushes: SQLAlchemy would lose the object.
        if self._is_on_loop():
            self.check_registration()
            return None
        return self.enter()

    def leave(self, user: object, session: Session) -> None:
        if user is None:
            return
        if self.scope.holder is not None:
            self.scope.got_second_connection()
        with self._changed:
            self.user = None
            self._changed.notify_all()
        if self.is_torn and self.ender is None:
            self.is_torn = False
            self.scope.settle_here(Ending.ROLLBACK)
        if self.scope.expiry is not None and self.ender is None and self.scope.state in OPEN:
            self.scope.end_expired_here()  # this operation was over before the clock could cut it
        if self.is_abandoned:
            self._throw_away(session)

    def begin_ending(self, ending: Ending, timeout: float) -> bool:
        patience = None if ending is Ending.COMMIT else timeout
        with self._changed:
            known = self.failed_commit
            if not self._changed.wait_for(lambda: self.ender is None, patience):
                return False
            self.check_commit_before(ending, known)
            self.ender = threading.current_thread()
        return True

    def end_ending(self, session: Session) -> None:
        with self._changed:
            self.ender = None
            self._changed.notify_all()
        if self.is_abandoned:  # nobody waits for this thread any more
            self._throw_away(session)

    def wait_until_free(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        with self._changed:
            while self.user is not None:
                remaining = deadline - monotonic()
                if remaining <= 0 or not self._changed.wait(remaining):
                    logger.warning("%s", self.busy_message(timeout))
                    return False
        return True

    def roll_back(self, session: Session, timeout: float) -> None:
        # A thread can't be interrupted; what it waits for can be cut.
        timer = threading.Timer(timeout, _cut, [self.connections.copy()])
        timer.daemon = True
        timer.start()
        try:
            session.rollback()
        finally:
            timer.cancel()

    def in_time(self, function: Callable[[], T], timeout: float) -> T:
        answer: Queue[T | BaseException] = Queue()

        def call() -> None:
            try:
                answer.put(function())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                answer.put(error)

        threading.Thread(target=call, name="asgi_dbscope", daemon=True).start()
        try:
            found = answer.get(timeout=max(timeout, 0))
        except Empty:  # the thread can't be interrupted; it clears up by itself
            raise TimeoutError from None
        if isinstance(found, BaseException):
            raise found
        return found

    def pause(self, seconds: float) -> None:
        sleep(seconds)

    def run_hooks(self) -> None:
        run_hooks_here(self.scope)

    def _throw_away(self, session: Session) -> None:
        try:
            session.invalidate()
        except Exception:
            logger.warning("%s: a connection was lost", self.scope.label, exc_info=True)


class IdleThreadUse(IdleNotes, ThreadUse):
    """The same, where it matters whether a transaction idles."""


def _cut(connections: list[Connection]) -> None:
    for connection in connections:
        _dialects.cut(connection)


def _loop_around(scope: SessionScope[Any]) -> asyncio.AbstractEventLoop | None:
    """The event loop of the request that *scope* serves, or is inside of, if there is one.

    A script that blocks its own loop holds up nobody else.
    """
    holder: ScopeHolder | None = scope.gate or scope.outer
    while holder is not None:
        if holder.is_request:
            return holder.loop
        holder = holder.outer
    return None
