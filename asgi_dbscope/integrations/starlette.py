"""Starlette and FastAPI: let the app's own exception handler render a failed commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyio import to_thread
from starlette._utils import is_async_callable
from starlette.exceptions import HTTPException
from starlette.requests import Request

if TYPE_CHECKING:
    from asgi_dbscope._asgi import ASGIApp, Receive, Scope, Send


def has_last_word(scope: Scope) -> bool:
    """Whether the app answers every error that nobody else does: by a handler, or in debug mode.

    Such a handler (of ``Exception``, or of the status 500) is outside of all middleware.
    """
    app = scope.get("app")
    handlers = getattr(app, "exception_handlers", ())
    return getattr(app, "debug", False) or Exception in handlers or 500 in handlers  # noqa: PLR2004


def find_responder(scope: Scope, failure: BaseException) -> ASGIApp | None:
    """An app that answers with what the exception handler for *failure* makes of it, if any.

    Starlette keeps the handlers of ``ExceptionMiddleware`` in the ASGI scope. Raised through
    Starlette itself, *failure* would meet a response that it takes for started, and become a
    ``RuntimeError``.
    """
    handlers: dict[Any, Any]
    status_handlers: dict[int, Any]
    handlers, status_handlers = scope["starlette.exception_handlers"]
    handler = None
    if isinstance(failure, HTTPException):
        handler = status_handlers.get(failure.status_code)
    if handler is None:
        handler = next((handlers[cls] for cls in type(failure).__mro__ if cls in handlers), None)
    if handler is None:
        return None

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        if is_async_callable(handler):
            response = await handler(request, failure)
        else:
            response = await to_thread.run_sync(handler, request, failure)
        if response is not None:
            await response(scope, receive, send)

    return respond
