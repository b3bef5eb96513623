"""Admission: how many requests of a middleware may work with the database at the same time.

A request asks when it is about to take its first connection, whichever of its sessions takes it,
and keeps its place to its response, or longer where its response still holds one then; one that
uses no session never asks. Who has to wait holds nothing, in the order of their coming. A request
leaves the queue with its client, where that can be seen: while the app itself waits for a message,
or has been sent more of the body than is kept, it waits for its turn or its time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

from asgi_dbscope._lifecycle import OPEN
from asgi_dbscope._messages import type_of
from asgi_dbscope._options import check_seconds
from asgi_dbscope.errors import ConfigurationError, OverloadedError

if TYPE_CHECKING:
    from asgi_dbscope._asgi import Message, Receive, Send
    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._scope import SessionScope

KEY = "asgi_dbscope"
"""The key in the ASGI scope that says: this very request has been here."""

MOST_KEPT = 65536
"""Bytes of a request's body that are kept while it is looked whether its client has left."""


class Admission:
    """The places of a middleware, and who waits for one.

    Args:
        most: How many requests have a place at the same time.

        waiting: How many may wait; ``None`` is any number.

        timeout: Seconds that one may wait.

    Raises:
        ConfigurationError: If an argument is wrong.
    """

    def __init__(self, most: int, waiting: int | None, timeout: float) -> None:
        _check_number("max_concurrent", most, 1)
        if waiting is not None:
            _check_number("max_waiting", waiting, 0)
        self.timeout = check_seconds("waiting_timeout", timeout)
        self.most = most
        self.waiting = waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._taken = 0

    def __repr__(self) -> str:
        return f"<Admission: {self._taken} of {self.most} inside, {len(self._queue)} waiting>"

    async def enter(self, client: ReadAhead, label: str) -> None:
        """Take a place, when it is this request's turn.

        Raises:
            OverloadedError: If there is none in time, too many wait already, or the client left.
        """
        if self._taken < self.most:
            self._taken += 1
        elif self.waiting is not None and len(self._queue) >= self.waiting:
            msg = f"{label} was not let in: {self._figures} (max_concurrent, max_waiting)."
            raise OverloadedError(msg)
        else:
            await self._wait(client, label)

    async def _wait(self, client: ReadAhead, label: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        watching = asyncio.create_task(client.until_gone())
        try:
            await asyncio.wait(
                [turn, watching], timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:
            self._leave_queue(turn)
            raise
        finally:
            watching.cancel()
        if turn.done():
            return
        self._leave_queue(turn)
        why = "its client has left" if watching.done() else f"it waited {self.timeout:g} seconds"
        msg = f"{label} was not let in: {why}, and {self._figures} (max_concurrent)."
        raise OverloadedError(msg)

    def _leave_queue(self, turn: asyncio.Future[None]) -> None:
        if turn.done():  # in the very moment of a cancellation
            self.leave()
        else:
            self._queue.remove(turn)

    @property
    def _figures(self) -> str:
        return f"{self._taken} requests are being served, {len(self._queue)} wait"

    def leave(self) -> None:
        """A place is free: it is the next one's."""
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._taken -= 1


class AdmittedRequest:
    """A request that has to ask for a place, and gives it back with its response.

    Attributes:
        admission: Where it asks.

        is_inside: Whether it has a place.

        receive: The app's ``receive``.
    """

    def __init__(
        self, admission: Admission, receive: Receive, send: Send, holder: ScopeHolder | None
    ) -> None:
        self.admission = admission
        self.is_inside = False
        self.receive = ReadAhead(receive)
        self._send = send
        self._has_answered = False
        self._entering = asyncio.Lock()
        self._takers: WeakSet[SessionScope[Any]] = WeakSet()
        self._around = _find_around(holder, admission)

    async def enter(self, scope: SessionScope[Any]) -> None:
        """Wait for a place, before *scope* takes a connection.

        There is nothing to wait for where the request has its place already, or is called in
        process by one that has: that would wait for itself. Nor after its head: what its body or
        its background work needs is the end of something that was begun.

        Raises:
            OverloadedError: If there is none in time, too many wait already, or the client left.
        """
        async with self._entering:  # two tasks may ask, for two sessions
            if not (self.is_inside or self._has_answered or self._is_within()):
                await self.admission.enter(self.receive, scope.label)
                self.is_inside = True
                if self._has_answered:  # its response went out without it
                    self._leave()
        if self.is_inside:
            self._takers.add(scope)

    def _is_within(self) -> bool:
        return self._around is not None and self._around.is_inside

    async def send(self, message: Message) -> None:
        """Send what the response gate lets through: its transaction is over by the head."""
        if type_of(message) == "http.response.start":
            self._has_answered = True
        if self._has_answered and self.is_inside and not self._holds_connection():
            self._leave()
        await self._send(message)

    def _holds_connection(self) -> bool:
        return any(each.state in OPEN for each in self._takers)

    def _leave(self) -> None:
        if self.is_inside:
            self.is_inside = False
            self.admission.leave()

    def close(self) -> None:
        """The request is over."""
        self._has_answered = True
        self._leave()
        self.receive.close()


def _find_around(holder: ScopeHolder | None, admission: Admission) -> AdmittedRequest | None:
    """The request that calls this one in process, and has asked at the same *admission*."""
    while holder is not None:
        request = holder.admitted_request
        if request is not None and request.admission is admission:
            return request
        holder = holder.outer
    return None


class ReadAhead:
    """An app's ``receive`` that can be looked ahead in: nothing is lost, nor comes out of order.

    A server tells by a message that the client has left, after those of the body. So what comes
    before it is kept for the app, as long as it isn't much.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._size = 0
        self._is_complete = False
        self._pending: asyncio.Task[Message] | None = None
        self._receivers = 0

    async def __call__(self) -> Message:
        """The next message, for the app."""
        if self._kept:
            return self._kept.popleft()
        pending = self._pending
        if pending is None:
            self._receivers += 1
            try:
                return await self._receive()
            finally:
                self._receivers -= 1
        if not pending.done():  # who only looks is cancelled at its first wait
            await asyncio.wait([pending])
        if self._pending is pending:
            self._pending = None
            return pending.result()
        return await self()  # somebody else was first

    async def until_gone(self) -> None:
        """Return when the client has left; never, where that can't be seen from here."""
        while not self._receivers and self._size <= MOST_KEPT:
            if self._kept and type_of(self._kept[-1]) == "http.disconnect":
                return
            if self._pending is None:
                self._pending = asyncio.create_task(_fetch(self._receive))
            pending = self._pending
            await asyncio.wait([pending])
            if self._pending is not pending or pending.cancelled() or pending.exception():
                break  # the app has it, or will
            self._pending = None
            if not self._keep(pending.result()):
                break
        await asyncio.get_running_loop().create_future()

    def _keep(self, message: Message) -> bool:
        """Keep *message* for the app; whether another one can be expected."""
        self._kept.append(message)
        kind = type_of(message)
        if kind != "http.request":
            return kind == "http.disconnect"
        content = message.get("body", b"")
        if isinstance(content, (bytes, bytearray, memoryview)):  # else the app is to object to it
            self._size += len(cast("bytes", content))
        was_complete, self._is_complete = self._is_complete, not message.get("more_body", False)
        return not was_complete  # more after the end says nothing new, and may come for ever

    def close(self) -> None:
        """The request is over."""
        if self._pending is not None:
            self._pending.cancel()


async def _fetch(receive: Receive) -> Message:
    return await receive()


def _check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{name} must be a whole number of requests, {least} or more; got {value!r}."
        raise ConfigurationError(msg)
