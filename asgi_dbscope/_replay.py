"""A request that lost to a conflict is served again: the loop around its attempts.

Each attempt has a response gate of its own, which recognizes the conflict where the response would
go out, or where the app raised, and rolls back. If another attempt may follow, the app is unwound
by an error out of ``send``, as after a COMMIT that failed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from http import HTTPStatus
from sys import exception as handled_exception
from typing import TYPE_CHECKING, Any

from asgi_dbscope._answers import Answer, find_answer, mark
from asgi_dbscope._completion import redeliver
from asgi_dbscope._current import (
    due_around,
    find_attempt,
    get_innermost,
    open_around,
    reset_innermost,
    set_innermost,
)
from asgi_dbscope._driver_errors import find_conflict
from asgi_dbscope._gate import Phase, ResponseGate
from asgi_dbscope._inside import find_base_http_middleware
from asgi_dbscope._messages import type_of
from asgi_dbscope._policy import Cause
from asgi_dbscope._recording import Reader, Recording
from asgi_dbscope._retry import (
    BODY_TOO_LARGE,
    CLIENT_LEFT,
    SENT,
    Attempt,
    endpoint_retries,
    log_fence,
    log_loss,
)
from asgi_dbscope._snapshot import ScopeSnapshot
from asgi_dbscope._text import label_of
from asgi_dbscope.errors import ReplayedError

if TYPE_CHECKING:
    from collections.abc import Awaitable

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
    attempt = Attempt(served.retry, find_attempt())
    snapshot = ScopeSnapshot(scope)
    try:
        while True:
            gate = AttemptGate(served, outer, recording, send, attempt, snapshot)
            result = await serve_once(app, gate, snapshot.current)
            if gate.delay is None:
                return result
            lost = gate.lost
            assert lost is not None
            gate.reader.is_lost = True
            has_left = await recording.client_leaves(gate.delay)
            if has_left:
                logger.info("%s: the client has left before the next attempt", lost.label)
                raise lost.error
            if attempt.fence is not None:
                log_fence(lost.label, attempt)
                return await gate.answer_after_all()
            attempt = attempt.following()
            snapshot.renew()
    finally:
        attempt.finish()
        snapshot.hand_back()


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
        gate.task = None
        reset_innermost(token)


def _most_bytes(retry: Retry | None) -> int:
    """How much of a body is kept before it is known which endpoint the request is for."""
    own = 0 if retry is None else retry.max_body
    return max(own, endpoint_retries.max_body or 0)


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

        reader: What it is told by the server.
    """

    __slots__ = (
        "_attempt",
        "_recording",
        "_server_send",
        "_snapshot",
        "delay",
        "lost",
        "reader",
    )

    def __init__(  # noqa: PLR0917 - as its base
        self,
        served: Served,
        outer: ScopeHolder | None,
        recording: Recording,
        send: Send,
        attempt: Attempt,
        snapshot: ScopeSnapshot,
    ) -> None:
        super().__init__(served, outer, snapshot.current, self._read, self._send_first)
        self._attempt = attempt
        self._recording = recording
        self._server_send = send
        self._snapshot = snapshot
        self.reader = Reader(recording)
        self.lost: Lost | None = None
        self.delay: float | None = None
        self._look_at_client()

    @property
    def current_attempt(self) -> Attempt:
        """What forbids another one."""
        return self._attempt

    def have_retry(self, retry: Retry | None) -> None:
        self._attempt.retry = retry

    # ---------------------------------------------------------------- messages

    async def _read(self) -> Message:
        """The next message: one that was kept, or a new one."""
        message = await self.reader.read()
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
            self._attempt.end(SENT)
            self.reader.forget()
            self._raw_send = self._server_send
            self._snapshot.hand_back()
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

    def _hidden_error(
        self, exception: BaseException | None, failure: BaseException | None
    ) -> BaseException | None:
        error = super()._hidden_error(exception, failure)
        if error is None and self.lost is not None and find_answer(self.lost.error) is not None:
            return self.lost.error
        return error

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
        self.lost = Lost(code, error, label_of(self._asgi_scope))
        self._look_at_client()
        self.delay = attempt.delay(due_around(self.outer))
        if self._is_loser:
            mark(error, Answer(HTTPStatus.SERVICE_UNAVAILABLE, retry.retry_after))
        log_loss(self.lost.label, attempt, code, self.delay)

    def _look_at_client(self) -> None:
        """See whether the client lets the request be replayed."""
        attempt, recording = self._attempt, self._recording
        attempt.note_body(recording.size)
        if recording.has_left:
            attempt.end(CLIENT_LEFT)
        elif recording.is_full:
            attempt.end(BODY_TOO_LARGE)

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
                if self.delay is not None:  # what the app did while it was unwound forbids it
                    log_fence(self.lost.label, self._attempt)
                    self.delay = None
                if self._is_loser or self._failure is not None:
                    self._failure = self.lost.error
        return await super().finish(result, error)

    async def answer_after_all(self) -> Any:
        """Answer as the last attempt, which it was not to be when it ended."""
        assert self.lost is not None
        self.delay = None
        self._failure = self.lost.error
        return await super().finish(None, None)

    def _answers_failure(self, message: Message) -> bool:
        return self.delay is None and super()._answers_failure(message)
