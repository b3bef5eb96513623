"""The clock of an open transaction: its timeout, and how long it may idle.

One timer per transaction, none per statement, and none at all where nobody asked. When time is up,
whoever is inside an operation is interrupted; where nobody is, the transaction is rolled back at
once, and the next use, or the response's head, gets the error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from asgi_dbscope import _dialects, _driver_errors
from asgi_dbscope._completion import redeliver
from asgi_dbscope._engine import was_handed_out
from asgi_dbscope._lifecycle import OPEN, State
from asgi_dbscope._places import outermost_frame, place_of_task, place_of_thread
from asgi_dbscope.errors import TransactionIdleError, TransactionTimeoutError

if TYPE_CHECKING:
    from sqlalchemy import CursorResult

    from asgi_dbscope._places import Place
    from asgi_dbscope._scope import SessionScope
    from asgi_dbscope._use import SessionUse

logger = logging.getLogger("asgi_dbscope")

MOST_PLACES = 1000
"""Places whose warning isn't given again; then they are forgotten."""

SLACK = 1.0
"""Seconds that the server's own limits are longer: they are for a client that is gone."""

_ending: set[asyncio.Task[None]] = set()
"""The rollbacks under way; an event loop keeps no task alive by itself."""


def watch_transaction(scope: SessionScope[Any], use: SessionUse) -> None:
    """A transaction of *scope* has begun: start its clock, if it has one and none is running."""
    shape = scope.shape
    is_running = scope.watch is not None and not scope.watch.is_over
    if is_running or shape.mode == "autocommit":
        return
    if shape.timeout is None and not shape.watches_idling:
        return
    scope.watch = ThreadWatch(scope, use) if scope.database.is_sync else TaskWatch(scope, use)
    scope.watch.start()


class TransactionWatch(ABC):
    """The clock of one transaction.

    Attributes:
        timeout: Seconds that the transaction may take; ``None`` for any number.

        deadline: When it has to be over, by :func:`time.monotonic`.

        is_over: Whether the transaction has ended.
    """

    def __init__(self, scope: SessionScope[Any], use: SessionUse) -> None:
        self.scope = scope
        self.use = cast("Any", use)
        shape = scope.shape
        self._begun_at = monotonic()
        self._around = scope.holder if scope.shares_time else None
        self.timeout = self._timeout()
        self.deadline = None if self.timeout is None else self._begun_at + self.timeout
        self.is_over = False
        self._has_warned = shape.idle_warning is None
        self._results: list[CursorResult[Any]] = []
        if shape.watches_idling:
            self.use.note_begin(self._begun_at)

    def _timeout(self) -> float | None:
        """The scope's own, or what is left of an open transaction's around it that it shares."""
        timeout = self.scope.shape.timeout
        around = None if self._around is None else self._around.watch
        if timeout is None or around is None or around.deadline is None or around.is_over:
            self._around = None
            return timeout
        return min(timeout, max(around.deadline - self._begun_at, 0.0))

    def start(self) -> None:
        """Wait for what may happen next."""
        shape = self.scope.shape
        moments = [] if self.deadline is None else [self.deadline]
        if shape.watches_idling:
            idle_since = self.use.left_at
            if not self._has_warned and shape.idle_warning is not None:
                moments.append(idle_since + shape.idle_warning)
            if shape.idle_timeout is not None:
                moments.append(idle_since + shape.idle_timeout)
        if moments:
            self._call_at(min(moments))

    @property
    def _inside(self) -> Any:
        """Who is inside the session, or ends its transaction."""
        return self.use.user or self.use.ender

    def note_result(self, result: CursorResult[Any]) -> None:
        """Rows were asked for; those of a server-side cursor are read past everything we see."""
        options = result.context.execution_options
        if options.get("stream_results") or options.get("yield_per"):
            self._results.append(result)

    @property
    def _unread(self) -> list[CursorResult[Any]]:
        """The results of server-side cursors that are open: somebody may be reading, unseen."""
        return [each for each in self._results if not each._soft_closed]  # noqa: SLF001 - there is no public word for it

    @property
    def is_shared(self) -> bool:
        """Whether somebody may be at work unseen, and a ROLLBACK beside that would go wrong."""
        return any(
            _dialects.mixes_up_answers(each.dialect) and (was_handed_out(each) or self._unread)
            for each in self.use.connections
        )

    def _note_use(self) -> None:
        """Begin to count anew where somebody is inside, or was reading rows a moment ago."""
        if self._inside is not None or self._results:
            self.use.left_at = monotonic()
        self._results = self._unread

    def _look(self) -> None:
        """A moment has come; find out which."""
        if self.is_over or self.scope.is_rolling_back or self.scope.is_answer_missing:
            return  # a rollback, and asking for a COMMIT's answer, have deadlines of their own
        if self.scope.shape.watches_idling:
            self._note_use()
        if self._is_late:
            self._expire(self._timeout_error())
        elif not (self.scope.shape.watches_idling and self._has_idled()):
            self.start()

    def strike(self) -> None:
        """Forbid a COMMIT after its time, also where code that never waited let no timer strike."""
        if self._is_late and not self.is_over and self.scope.expiry is None:
            self._forbid(self._timeout_error())

    @property
    def _is_late(self) -> bool:
        return self.deadline is not None and monotonic() >= self.deadline

    def _timeout_error(self) -> TransactionTimeoutError:
        label, timeout = self.scope.label, self.scope.shape.timeout
        if self._around is None:
            msg = (
                f"The transaction of {label} took longer than its timeout of {timeout:g} seconds "
                "and was rolled back."
            )
        else:
            msg = (
                f"The transaction of {label} was rolled back: the timeout of {timeout:g} seconds "
                f"has passed for that of {self._around.label}, around it, whose time it shares."
            )
        return TransactionTimeoutError(msg)

    def _has_idled(self) -> bool:
        """Warn of a transaction that idles, or end it; whether it was ended."""
        shape = self.scope.shape
        idle_for = monotonic() - self.use.left_at
        if shape.idle_timeout is not None and idle_for >= shape.idle_timeout:
            msg = (
                f"The transaction of {self.scope.label} was idle for more than "
                f"{shape.idle_timeout:g} seconds (idle_timeout) and was rolled back"
                f"{self._while(self._place())}. {self._cure}"
            )
            self._expire(TransactionIdleError(msg))
            return True
        warns = not self._has_warned and shape.idle_warning is not None
        if warns and idle_for >= (shape.idle_warning or 0):
            self._has_warned = True
            self._warn(idle_for)
        return False

    def _warn(self, idle_for: float) -> None:
        place = self._place()
        places = self.scope.database.idle_places
        told_of = place or self.scope.label
        if told_of in places:
            return
        if len(places) >= MOST_PLACES:
            places.clear()  # labels hold paths, of which clients can make as many as they like
        places.add(told_of)
        logger.warning(
            "%s: its transaction on %r has been idle for %.1f s and holds a connection%s. %s",
            self.scope.label,
            self.scope.database.name,
            idle_for,
            self._while(place),
            self._cure,
        )

    @staticmethod
    def _while(place: Place | None) -> str:
        return f", while {place} waits for something else" if place is not None else ""

    @property
    def _cure(self) -> str:
        release = "db.release()" if self.scope.database.is_sync else "await db.release()"
        return (
            f"Before such a wait: `{release}`, which commits and gives the connection back; the "
            "next statement begins a new transaction."
        )

    def _forbid(self, error: TransactionTimeoutError | TransactionIdleError) -> None:
        """Let nothing be done with the session any more, nor any success be claimed."""
        self.scope.expiry = error
        self.scope.meet(error)
        self.use.is_closed = True
        self.use.has_lost = True

    @abstractmethod
    def _call_at(self, moment: float) -> None:
        """Let :meth:`_look` be called at *moment*."""

    @abstractmethod
    def _place(self) -> Place | None:
        """What the code that used the session last is waiting at."""

    @abstractmethod
    def _expire(self, error: TransactionTimeoutError | TransactionIdleError) -> None:
        """End the transaction, for the reason that *error* gives."""

    def note_commit(self) -> None:
        """COMMIT was answered: what the clock says from now on, or said meanwhile, is too late."""
        self.end()
        if self.scope.expiry is not None:
            self.scope.expiry = None
            self.use.is_closed = self.use.has_lost = False

    def end(self) -> None:
        """The transaction is over."""
        self.is_over = True
        self._results.clear()

    def convert(self, error: BaseException) -> BaseException:
        """What *error*, which an operation raised, really is."""
        scope = self.scope
        if scope.expiry is None and self._is_late and _driver_errors.is_statement_timeout(error):
            self._forbid(self._timeout_error())  # the server's clock was the faster one
        return scope.expiry or error


class TaskWatch(TransactionWatch):
    """The clock of an asynchronous session's transaction: a timer of its event loop."""

    _timer: asyncio.TimerHandle

    def __init__(self, scope: SessionScope[Any], use: SessionUse) -> None:
        super().__init__(scope, use)
        self._loop = cast("asyncio.AbstractEventLoop", scope.loop)
        self._interrupted: asyncio.Task[Any] | None = None
        self._requests = 0

    def _call_at(self, moment: float) -> None:
        self._timer = self._loop.call_later(max(0.0, moment - monotonic()), self._look)

    def _place(self) -> Place | None:
        return place_of_task(self.use.left_by)

    def _expire(self, error: TransactionTimeoutError | TransactionIdleError) -> None:
        self._forbid(error)
        inside: asyncio.Task[Any] | None = self._inside
        if inside is None:
            self._end_transaction()
        else:
            self._interrupted = inside
            self._requests = inside.cancelling()
            inside.cancel()
            if self.scope.state is not State.COMMITTING:
                for each in self.use.connections:
                    _dialects.stop_thread(each)

    def _end_transaction(self) -> None:
        if self.scope.state in OPEN and self._inside is None:
            task = self._loop.create_task(self._roll_back())
            _ending.add(task)
            task.add_done_callback(_ending.discard)

    async def _roll_back(self) -> None:
        redeliver(await self.scope.end_expired())

    def convert(self, error: BaseException) -> BaseException:
        """What *error* really is; the cancellation that was this clock's is taken back."""
        if not isinstance(error, asyncio.CancelledError):
            return super().convert(error)
        task = self._interrupted
        if task is None or task is not asyncio.current_task():
            return error
        self._interrupted = None
        self._loop.call_soon(self._end_transaction)
        if task.uncancel() > self._requests:
            return error  # somebody else's as well
        return self.scope.expiry or error

    def end(self) -> None:
        super().end()
        self._timer.cancel()


class ThreadWatch(TransactionWatch):
    """The clock of a synchronous session's transaction: a thread that waits.

    A thread can't be interrupted; its connection can be cut, which ends whatever it waits for.
    """

    _timer: threading.Timer

    def __init__(self, scope: SessionScope[Any], use: SessionUse) -> None:
        super().__init__(scope, use)
        self._thread = threading.get_ident()
        self._frame = outermost_frame() if scope.shape.watches_idling else None
        self._lock = threading.Lock()

    def _call_at(self, moment: float) -> None:
        self._timer = threading.Timer(max(0.0, moment - monotonic()), self._look)
        self._timer.daemon = True
        self._timer.start()

    def _place(self) -> Place | None:
        return place_of_thread(self._thread, self._frame)

    def _expire(self, error: TransactionTimeoutError | TransactionIdleError) -> None:
        scope, use = self.scope, self.use
        with self._lock:  # not while the transaction ends, and its connection goes elsewhere
            if self.is_over:
                return
            self._forbid(error)
            is_cut = [_dialects.cut(each) for each in use.connections]
            is_idle = self._inside is None and not self._unread
        if is_idle and all(is_cut):  # nothing can hang any more
            scope.end_expired_here()

    def end(self) -> None:
        with self._lock:
            super().end()
        self._frame = None
        self._timer.cancel()
