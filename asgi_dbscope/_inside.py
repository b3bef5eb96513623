"""What is inside of a middleware, as far as the app has been put together when it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


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
