"""What is inside of a middleware: when it is built, and where a message comes from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


def find_hider(app: object) -> type | None:
    """The class of the first ``BaseHTTPMiddleware`` inside."""
    for cls, _ in _middlewares(app):
        if isinstance(cls, type) and _is_base_http_middleware(cls):
            return cls
    return None


def has_retry_inside(app: object, kind: type) -> bool:
    """Whether a middleware of *kind* is inside that was given a ``retry``."""
    return any(
        isinstance(cls, type) and issubclass(cls, kind) and retry is not None
        for cls, retry in _middlewares(app)
    )


def _middlewares(app: Any) -> Iterator[tuple[object, object]]:
    """The class of each app inside, and its ``retry``; also of those that are only planned."""
    while app is not None:
        yield type(app), getattr(app, "retry", None)
        for each in getattr(app, "user_middleware", ()):  # Starlette's
            yield getattr(each, "cls", None), getattr(each, "kwargs", {}).get("retry")
        app = getattr(app, "app", None)


def _is_base_http_middleware(cls: type) -> bool:
    # By name, so that Starlette need not be installed.
    return any(
        each.__name__ == "BaseHTTPMiddleware" and each.__module__ == "starlette.middleware.base"
        for each in cls.__mro__
    )


def find_base_http_middleware() -> type | None:
    """The class of a ``BaseHTTPMiddleware`` inside that the message being sent came through.

    It runs the app in a task of its own, so that the exception behind a response can't be seen,
    and sends the response from its ``__call__``: a frame of the coroutines that wait for this one,
    wherever it is added: to the app, a mount or a route.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, of CPython
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            module = frame.f_globals.get("__name__")
            middleware: object = frame.f_locals.get("self")
            if module == "starlette.middleware.base" and hasattr(middleware, "dispatch_func"):
                return type(middleware)
            if module == "asgi_dbscope._middleware":
                break  # what comes now is around us, not inside
        frame = frame.f_back
    return None
