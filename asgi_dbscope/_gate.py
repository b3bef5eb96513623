"""The response gate: one request's way, from the app's first message to its return.

ASGI in, decide (``_policy``), one driver (``_scope``), ASGI out.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

from asgi_dbscope._asgi import ResponseHead
from asgi_dbscope._completion import redeliver
from asgi_dbscope._policy import Cause, Ending

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from asgi_dbscope._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_dbscope._middleware import DBSessionMiddleware
    from asgi_dbscope._scope import SessionScope

logger = logging.getLogger("asgi_dbscope")


class Phase(Enum):
    """Which transaction of the request would end next."""

    RESPONSE = "RESPONSE"
    BODY = "BODY"
    BACKGROUND = "BACKGROUND"


class ResponseGate:
    """One request on its way: holds the head back until the transaction is settled."""

    __slots__ = (
        "_answered_failure",
        "_asgi_scope",
        "_failure",
        "_has_trailers",
        "_lock",
        "_middleware",
        "_outer_exception",
        "_phase",
        "_raw_receive",
        "_raw_send",
        "_scopes",
    )

    def __init__(
        self,
        middleware: DBSessionMiddleware,
        scopes: list[SessionScope[Any]],
        asgi_scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._middleware = middleware
        self._scopes = scopes
        self._asgi_scope = asgi_scope
        self._raw_receive = receive
        self._raw_send = send
        self._phase = Phase.RESPONSE
        self._has_trailers = False
        self._lock: asyncio.Lock | None = None
        self._failure: BaseException | None = None
        self._answered_failure = False
        self._outer_exception = sys.exception()

    # ---------------------------------------------------------------- the request's way

    async def run(self, app: ASGIApp) -> Any:
        """Run the app to its end, and end what it left open."""
        result = error = None
        try:
            result = await app(self._asgi_scope, self.receive, self.send)
        except BaseException as raised:  # noqa: BLE001 - raised again below
            error = raised
        if self._failure is None and error is None:
            await self._finish()
            return result
        failure, self._failure = self._failure, None
        if failure is None or self._answered_failure or isinstance(error, asyncio.CancelledError):
            await self._close(Ending.ROLLBACK)
            if error is None:
                return result
            raise error
        # The head that failed never went out, and the app has been unwound: answer in its place.
        responder = None
        if self._phase is Phase.RESPONSE and app is self._middleware.app:
            await self._settle_all(Ending.ROLLBACK)
            responder = self._find_responder(failure)
        if responder is None:
            await self._close(Ending.ROLLBACK)
            raise failure
        logger.error("%s: %s", self._scopes[0].label, failure, exc_info=failure)
        return await self.run(responder)

    def receive(self) -> Awaitable[Message]:
        """The app's ``receive``."""
        if self._phase is not Phase.BODY:
            return self._raw_receive()
        return self._receive_in_body()

    def send(self, message: Message) -> Awaitable[None]:
        """The app's ``send``: passes a message on, after settling what it puts an end to."""
        if self._failure is None and (self._lock is None or not self._lock.locked()):
            for scope in self._scopes:
                if not scope.is_settled():
                    break
            else:
                self._note(message)
                return self._raw_send(message)
        return self._settle_and_send(message, sys.exception())

    async def _receive_in_body(self) -> Message:
        message = await self._raw_receive()
        if self._phase is Phase.BODY and message.get("type") == "http.disconnect":
            # Nobody reads the body any more. What it began is rolled back at the session's next
            # use, or at the end; work after the body (background tasks) starts afresh.
            self._phase = Phase.BACKGROUND
            for scope in self._scopes:
                scope.is_torn = not scope.is_settled()
        return message

    async def _settle_and_send(self, message: Message, exception: BaseException | None) -> None:
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:  # a message from another task of the app waits for its turn
            if self._failure is not None and not self._answers_failure(message):
                raise self._failure
            try:
                if self._phase is Phase.RESPONSE and _type_of(message) == "http.response.start":
                    await self._settle_head(message, exception)
                elif self._phase is Phase.BODY and self._is_last(message):
                    await self._settle(Cause.COMPLETED)
            except Exception as error:
                self._failure = error
                self._answered_failure = False
                raise
            self._note(message)
            await self._raw_send(message)

    # ---------------------------------------------------------------- settling

    async def _settle_head(self, message: Message, exception: BaseException | None) -> None:
        head = self._read_head(message, exception)
        for position, scope in enumerate(self._scopes):
            if scope.is_settled():
                continue
            try:
                ending = scope.decide(Cause.HEAD, head)
            except Exception:
                await self._settle_all(Ending.ROLLBACK)
                raise
            if ending is Ending.COMMIT and scope.options.stream == "hold":
                continue
            try:
                cancellation = await scope.settle(ending)
            except BaseException:
                for other in self._scopes[position + 1 :]:
                    await other.settle(Ending.ROLLBACK)
                raise
            if cancellation is not None:
                # The answer stands: let it go out if it can without another wait.
                redeliver(cancellation)

    async def _settle(self, cause: Cause) -> None:
        for scope in self._scopes:
            if not scope.is_settled():
                cancellation = await scope.settle(scope.decide(cause))
                if cancellation is not None:
                    redeliver(cancellation)

    async def _settle_all(self, ending: Ending) -> None:
        for scope in self._scopes:
            cancellation = await scope.settle(ending)
            if cancellation is not None:
                redeliver(cancellation)

    async def _finish(self) -> None:
        """The app has returned."""
        cause = {
            Phase.RESPONSE: Cause.NO_HEAD,
            Phase.BODY: Cause.TORN,
            Phase.BACKGROUND: Cause.COMPLETED,
        }[self._phase]
        for scope in self._scopes:
            if scope.is_settled():
                scope.close_settled()
                continue
            try:
                cancellation = await scope.close(scope.decide(cause))
            except Exception:
                # Raised here, after the response, it would make the server close a connection on
                # which the client's next request may be under way already.
                logger.exception("%s: work after the response was not committed", scope.label)
            else:
                if cancellation is not None:
                    redeliver(cancellation)

    async def _close(self, ending: Ending) -> None:
        for scope in self._scopes:
            if scope.is_settled():
                scope.close_settled()
                continue
            cancellation = await scope.close(ending)
            if cancellation is not None:
                redeliver(cancellation)

    # ---------------------------------------------------------------- reading messages

    def _note(self, message: Message) -> None:
        """Follow the response's phases."""
        if self._phase is Phase.RESPONSE:
            if _type_of(message) == "http.response.start":
                self._phase = Phase.BODY
                self._has_trailers = bool(message.get("trailers", False))
                for scope in self._scopes:
                    scope.is_stream_refused = scope.options.stream == "error"
        elif self._phase is Phase.BODY and self._is_last(message):
            self._phase = Phase.BACKGROUND
            for scope in self._scopes:
                scope.is_stream_refused = False

    def _is_last(self, message: Message) -> bool:
        kind = _type_of(message)
        if kind == "http.response.trailers":
            return not message.get("more_trailers", False)
        if self._has_trailers:
            return False
        if kind in _BODY:
            return not message.get("more_body", False)
        return kind == "http.response.pathsend"

    def _read_head(self, message: Message, exception: BaseException | None) -> ResponseHead | None:
        status = message.get("status")
        if not isinstance(status, int):
            return None  # the server will object to it
        if exception is self._outer_exception:
            exception = None
        is_raised = exception is not None or (
            400 <= status < 500 and self._middleware.hides_exceptions()  # noqa: PLR2004 - a 4xx
        )
        headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
        return ResponseHead(status, headers, exception, is_raised)

    # ---------------------------------------------------------------- failures before the head

    def _answers_failure(self, message: Message) -> bool:
        """Whether the app renders the failure by itself: a new head, with an error status."""
        if self._phase is not Phase.RESPONSE:
            return False
        if _type_of(message) == "http.response.start":
            status = message.get("status")
            self._answered_failure = isinstance(status, int) and status >= 400  # noqa: PLR2004
            if self._answered_failure:
                self._failure = None
        return self._answered_failure

    def _find_responder(self, failure: BaseException) -> ASGIApp | None:
        render = self._middleware.commit_error_response
        if render is not None:
            responder = render(self._asgi_scope, failure)
            if responder is not None:
                return responder
        if "starlette.exception_handlers" in self._asgi_scope:
            from asgi_dbscope.integrations.starlette import find_responder

            return find_responder(self._asgi_scope, failure)
        return None


_BODY = frozenset({"http.response.body", "http.response.zerocopysend"})


def _type_of(message: Message) -> object:
    # Whatever the app sends goes on to the server, which knows best how to object.
    return message.get("type") if isinstance(message, dict) else None
