"""Errors that have an HTTP answer of their own, for an app that says nothing else.

Of all the waits here the server knows more than "500": try again later, or it took too long. The
answers are plain text, and tell nothing of the database.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from asgi_dbscope._messages import type_of
from asgi_dbscope.errors import (
    DatabaseUnreachableError,
    DBScopeError,
    OverloadedError,
    PoolExhaustedError,
    TransactionTimeoutError,
)

if TYPE_CHECKING:
    from asgi_dbscope._asgi import Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class Answer:
    """A small response: an ASGI app.

    Attributes:
        status: The HTTP status.

        retry_after: Seconds after which the client may try again; ``None`` to say nothing of it.
    """

    status: HTTPStatus
    retry_after: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        """Answer; the request's body is left unread."""
        content = self.status.phrase.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(content)),
        ]
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after))
        await send({"type": "http.response.start", "status": int(self.status), "headers": headers})
        await send({"type": "http.response.body", "body": content})


TRY_AGAIN = Answer(HTTPStatus.SERVICE_UNAVAILABLE, retry_after=1)
"""There are too many at once, or two were in each other's way: the next attempt may do better."""

TOO_LATE = Answer(HTTPStatus.GATEWAY_TIMEOUT)
"""The request took longer than it may."""

ANSWERS: dict[type[BaseException], Answer] = {
    DatabaseUnreachableError: TRY_AGAIN,
    OverloadedError: TRY_AGAIN,
    PoolExhaustedError: TRY_AGAIN,
    PoolTimeoutError: TRY_AGAIN,
    TransactionTimeoutError: TOO_LATE,
}

_MARK = "asgi_dbscope_answer"


def mark(error: BaseException, answer: Answer) -> None:
    """Let *error*, whose class says nothing, be answered with *answer*."""
    setattr(error, _MARK, answer)


def find_answer(error: BaseException | None) -> Answer | None:
    """The answer that *error* has of its own, if it has one."""
    found = _alone(error)
    marked: Answer | None = getattr(found, _MARK, None)
    if marked is not None:
        return marked
    kinds: tuple[type, ...] = type(found).__mro__
    return next((ANSWERS[each] for each in kinds if each in ANSWERS), None)


def _alone(error: BaseException | None) -> BaseException | None:
    """*error*, or the only one of a task group, as older Starlette has them."""
    found = error
    while isinstance(found, BaseExceptionGroup):
        inside: list[BaseException] = list(cast("Any", found).exceptions)
        if len(inside) > 1:
            return error
        found = inside[0]
    return found


def describe(error: BaseException) -> str:
    """What a log shows of *error*: the text of ours and the pool's, and of others the kind.

    Theirs may have statements, values and line breaks in it.
    """
    found = _alone(error)
    is_known = isinstance(found, (DBScopeError, PoolTimeoutError))
    return str(found) if is_known else type(found).__name__


PHRASE = HTTPStatus.INTERNAL_SERVER_ERROR.phrase.encode()
"""What every framework's own 500 says, in whatever it is wrapped."""

LONGEST_PAGE = 512
"""The most bytes that a framework's own 500 has; Quart's has 265."""


def says_nothing(message: Any, scope: Scope) -> bool:
    """Whether *message*, the first one of a 500's body, says only that it is one."""
    if type_of(message) != "http.response.body":
        return False
    content: object = message.get("body", b"")
    if not content:
        return scope.get("method") == "HEAD"
    return isinstance(content, bytes) and len(content) <= LONGEST_PAGE and PHRASE in content
