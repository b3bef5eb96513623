"""A request that lost to a conflict is served again: the loop around its attempts.

Each attempt has a response gate of its own, which recognizes the conflict where the response would
go out, or where the app raised, and rolls back. If another attempt may follow, the app is unwound
by an error out of ``send``, as after a COMMIT that failed.
"""

from __future__ import annotations

import asyncio
import logging
from copy import copy
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from sys import exception as handled_exception
from typing import TYPE_CHECKING, Any, cast

from asgi_dbscope._answers import Answer, mark
from asgi_dbscope._completion import redeliver
from asgi_dbscope._current import get_innermost, open_around, reset_innermost, set_innermost
from asgi_dbscope._dialects import find_conflict
from asgi_dbscope._gate import Phase, ResponseGate, find_base_http_middleware
from asgi_dbscope._messages import type_of
from asgi_dbscope._policy import Cause
from asgi_dbscope._retry import (
    BODY_TOO_LARGE,
    CLIENT_LEFT,
    HOOK_RAN,
    SENT,
    Attempt,
    endpoint_retries,
)
from asgi_dbscope.errors import ReplayedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_dbscope._asgi import AnyASGIApp, Message, Receive, Scope, Send
    from asgi_dbscope._current import ScopeHolder
    from asgi_dbscope._gate import Served
    from asgi_dbscope._retry import Retry

logger = logging.getLogger("asgi_dbscope")


async def serve(app: AnyASGIApp, served: Served, scope: Scope, receive: Receive, send: Send) -> Any:
    """Serve a request, and serve it again as long as it loses to conflicts and may be replayed.

    The first attempt has the very *scope* that the server made, each later one a copy of it as it
    was at the beginning.
    """
    outer = open_around(get_innermost())
    recording = Recording(receive, _most_bytes(served.retry))
    attempt = Attempt(served.retry, None if outer is None else outer.current_attempt)
    snapshot, current = _copied(scope), scope
    try:
        while True:
            hand_back = partial(_hand_back, scope, current)
            gate = AttemptGate(served, outer, current, recording, send, attempt, hand_back)
            result = await serve_once(app, gate, current)
            if gate.delay is None:
                return result
            lost = gate.lost
            assert lost is not None
            has_left = await recording.client_leaves(gate.delay)
            if has_left:
                logger.info("%s: the client has left before the next attempt", lost.label)
                raise lost.error
            attempt, current = attempt.following(), _copied(snapshot)
    finally:
        _hand_back(scope, current)


def _hand_back(scope: Scope, current: Scope) -> None:
    """Let *scope* be as the attempt has it whose own is *current*.

    For those around us who look at what the app put there: when the head goes out (a session's
    cookie is made then), or when the app has returned.
    """
    if current is not scope:
        for name in scope.keys() - current.keys():
            del scope[name]
        scope.update(current)


async def serve_once(app: AnyASGIApp, gate: ResponseGate, scope: Scope) -> Any:
    """Serve a request, or an attempt of it, through *gate*."""
    token = set_innermost(gate)
    try:
        result = await app(scope, gate.receive, gate.send)
        return await gate.finish(result, None) if gate.scopes else result
    except BaseException as error:
        if gate.scopes:
            return await gate.finish(None, error)
        raise
    finally:
        gate.is_over = True
        reset_innermost(token)


def _most_bytes(retry: Retry | None) -> int:
    """How much of a body is kept before it is known which endpoint the request is for."""
    own = 0 if retry is None else retry.max_body
    return max(own, endpoint_retries.max_body or 0)


def _copied(scope: Scope) -> Scope:
    """A copy of *scope* in which an app can put things without the other copies' having them.

    What the values of ``scope["state"]`` share with the whole app they go on sharing.
    """
    return {
        name: copy(cast("Any", value)) if isinstance(value, (dict, list)) else value
        for name, value in scope.items()
    }


class Recording:
    """What the server tells of a request, kept for another attempt.

    Attributes:
        messages: What the request's body has come in so far.

        size: How many bytes of it that was.

        has_left: Whether the client has left.

        is_complete: Whether the end of the body has come.
    """

    __slots__ = ("_limit", "_receive", "has_left", "is_complete", "is_over", "messages", "size")

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self.messages: list[Message] = []
        self.size = 0
        self.has_left = False
        self.is_complete = False
        self.is_over = False
        """Whether nothing is kept any more."""

    async def fetch(self) -> Message:
        """The server's next message."""
        message = await self._receive()
        kind = type_of(message)
        if kind == "http.disconnect":
            self.has_left = True
        elif kind == "http.request" and not self.is_over:
            self._keep(message)
        return message

    def _keep(self, message: Message) -> None:
        kept = dict(message)
        content = kept.get("body")
        if isinstance(content, (bytes, bytearray, memoryview)):  # else the app is to object to it
            content = bytes(cast("bytes", content))  # who sent it may use its memory again
            kept["body"] = content
            self.size += len(content)
        self.messages.append(kept)
        self.is_complete = not kept.get("more_body", False)

    def stop_if_full(self) -> None:
        """Keep nothing any more of a body that is too long."""
        if self.size > self._limit:
            self.stop()

    def stop(self) -> None:
        """Keep nothing any more."""
        self.is_over = True
        self.messages = []

    async def client_leaves(self, delay: float) -> bool:
        """Wait for *delay* seconds; ``True`` as soon as the client leaves.

        Whoever waits for a client's leaving reads what it sends before that.
        """
        try:
            async with asyncio.timeout(delay):
                while self.size <= self._limit:
                    if self.has_left:
                        return True
                    is_over = self.is_complete
                    await self.fetch()
                    if is_over and not self.has_left:
                        break  # it says nothing new, and may do so for ever
                    await asyncio.sleep(0)  # nor does one that never waits hold up the clock
                await asyncio.sleep(delay)
        except TimeoutError:
            pass
        return False


@dataclass(frozen=True, slots=True)
class Lost:
    """What an attempt has lost to.

    Attributes:
        code: The conflict's.

        error: The error that told of it.

        label: Whose attempt it was.
    """

    code: str
    error: BaseException
    label: str


class AttemptGate(ResponseGate):
    """One attempt at a request, which finds out whether it has lost to a conflict.

    Attributes:
        lost: The conflict that it has lost to.

        delay: Seconds until the next attempt; ``None`` if there is none.
    """

    __slots__ = (
        "_attempt",
        "_hand_back",
        "_position",
        "_recording",
        "_server_send",
        "delay",
        "lost",
    )

    def __init__(  # noqa: PLR0917 - as its base
        self,
        served: Served,
        outer: ScopeHolder | None,
        asgi_scope: Scope,
        recording: Recording,
        send: Send,
        attempt: Attempt,
        hand_back: Callable[[], None],
    ) -> None:
        super().__init__(served, outer, asgi_scope, self._read, self._send_first)
        self._hand_back = hand_back
        self._recording = recording
        self._position = 0
        self._server_send = send
        self._attempt = attempt
        self.lost: Lost | None = None
        self.delay: float | None = None

    @property
    def current_attempt(self) -> Attempt:
        """What forbids another one."""
        return self._attempt

    # ---------------------------------------------------------------- messages

    async def _read(self) -> Message:
        """The next message: one that was kept, or a new one."""
        recording = self._recording
        if self._position < len(recording.messages):
            self._position += 1
            return dict(recording.messages[self._position - 1])
        message = await recording.fetch()
        recording.stop_if_full()
        self._position = len(recording.messages)
        self._look_at_client()
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """The app's ``send``: looks at each head, also where no transaction is open any more.

        What a task of an attempt that is over still sends must not get into the next one's answer.
        """
        if self._phase is Phase.RESPONSE and (self.scopes or self._failure is not None):
            return self._settle_and_send(message, handled_exception())
        return super().send(message)

    async def _send_first(self, message: Message) -> None:
        """Pass on what may be the first message; after it there is no other attempt."""
        if type_of(message) != "http.response.debug":  # is for test clients, which take a second
            self._attempt.forbid(SENT)
            self._recording.stop()
            self._raw_send = self._server_send
            self._hand_back()
        await self._server_send(message)

    # ---------------------------------------------------------------- conflicts

    async def _settle_head(self, message: Message, exception: BaseException | None) -> None:
        conflict = self._conflict_behind_head(message, exception)
        try:
            await super()._settle_head(message, exception)
        except Exception as failure:
            self._note_loss(failure)
            self._unwind()
            raise
        if conflict is not None:
            self._note_loss(conflict)
            self._unwind()
            self._check_answer(message, conflict)

    def _conflict_behind_head(
        self, message: Message, exception: BaseException | None
    ) -> BaseException | None:
        """The conflict that this head is the app's answer to; none where it claims a success.

        A 4xx that was returned is an answer of another kind, unless it can't be told from one that
        was raised.
        """
        if exception is self._outer_exception:
            exception = None
        status = message.get("status")
        is_error = isinstance(status, int) and (
            status >= 500  # noqa: PLR2004 - a server error
            or (status >= 400 and find_base_http_middleware() is not None)  # noqa: PLR2004 - a 4xx
        )
        return self._conflict_behind(exception) if exception is not None or is_error else None

    def _conflict_behind(self, error: BaseException | None) -> BaseException | None:
        """The conflict that *error* tells of, or else that an open transaction has lost to."""
        retry = self._attempt.retry
        if retry is None:
            return None
        if error is not None and find_conflict(error, retry.classes) is not None:
            return error
        agendas = [scope.agenda for scope in self.scopes if scope.agenda is not None]
        return next((each.conflict for each in agendas if each.conflict is not None), None)

    def _note_loss(self, error: BaseException) -> None:
        """The request is rolled back, for *error*: see whether another attempt may follow."""
        attempt = self._attempt
        retry = attempt.retry
        code = None if retry is None else find_conflict(error, retry.classes)
        if retry is None or code is None or self.lost is not None:
            return
        self.lost = Lost(code, error, self.scopes[0].label)
        self._look_at_client()
        if self.late_scopes:  # a hook waits for the response to tell of this rollback
            attempt.forbid(HOOK_RAN)
        self.delay = attempt.delay()
        if self._is_loser:
            mark(error, Answer(HTTPStatus.SERVICE_UNAVAILABLE, retry.retry_after))
        if self.delay is not None:
            logger.info(
                "%s: attempt %d of %d has lost to a conflict (%s); the next one in %.3f s",
                *(self.lost.label, attempt.number, retry.attempts, code, self.delay),
            )
        else:
            logger.warning(
                "%s: attempt %d of %d has lost to a conflict (%s), and was the last one: %s",
                *(self.lost.label, attempt.number, retry.attempts, code),
                attempt.why_last,
            )

    def _look_at_client(self) -> None:
        """See whether the client lets the request be replayed."""
        attempt, recording = self._attempt, self._recording
        if recording.has_left:
            attempt.forbid(CLIENT_LEFT)
        elif attempt.retry is not None and recording.size > attempt.retry.max_body:
            attempt.forbid(BODY_TOO_LARGE)

    def _unwind(self) -> None:
        """End the app's part in an attempt that another one follows.

        Raises:
            ReplayedError: For that.
        """
        if self.delay is None or self.lost is None:
            return
        msg = (
            f"{self.lost.label}: attempt {self._attempt.number} has lost to a conflict with "
            f"another transaction ({self.lost.code}), and the request is served once more. Its "
            "response must not go out; there is nothing to do."
        )
        raise ReplayedError(msg) from self.lost.error

    @property
    def _is_loser(self) -> bool:
        """Whether the last attempt has lost that there was to be."""
        return self.lost is not None and self.delay is None and self._attempt.fence is None

    # ---------------------------------------------------------------- the attempt's end

    async def finish(self, result: Any, error: BaseException | None) -> Any:
        """The app has returned, or raised: another attempt follows, or what it left open ends."""
        if self._phase is Phase.RESPONSE and (error is None or isinstance(error, Exception)):
            if self._failure is None:  # neither a head, nor one that failed
                conflict = self._conflict_behind(error)
                if conflict is not None:
                    await self._settle_all(Cause.RAISED)
                    self._note_loss(conflict)
            if self.lost is not None:
                await self._settle_all(Cause.RAISED)
                if self.delay is not None and self._attempt.fence is None:
                    redeliver(await self._close(Cause.RAISED))
                    self._failure = self._failure or self.lost.error
                    return None
                self.delay = None  # what the app did while it was unwound forbids it
                if self._is_loser or self._failure is not None:
                    self._failure = self.lost.error
        return await super().finish(result, error)

    def _answers_failure(self, message: Message) -> bool:
        return self.delay is None and super()._answers_failure(message)
