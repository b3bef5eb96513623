"""The ASGI protocol's shapes, and the response head as a commit policy sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[Any]]

AnyASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[Any]]
"""An app by whatever types its framework has for ASGI's."""


class ResponseHead(NamedTuple):
    """What a commit policy decides from: the head that the app wants to send.

    Attributes:
        status: The HTTP status.

        headers: Pairs of bytes, names in lower case, as ASGI has them.

        exception: The exception that the framework turned into this response, if it can be seen.

        raised: Whether the response stands for an exception: one was seen, or the status is a 4xx
            and a ``BaseHTTPMiddleware`` inside hides exceptions.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    exception: BaseException | None = None
    raised: bool = False
