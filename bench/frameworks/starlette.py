"""Starlette."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.websockets import WebSocket

    from bench.apps import Body, Handler, Handlers


def app(handlers: Handlers, **options: Any) -> Starlette:
    routes = [Route(f"/{route}", _endpoint(handler)) for route, handler in handlers.items()]
    return Starlette(routes=[*routes, WebSocketRoute("/idle", _idle)], **options)


async def _idle(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.receive()


def _endpoint(handler: Handler) -> Handler:
    takes_request = bool(inspect.signature(handler).parameters)

    async def endpoint(request: Request) -> Response:
        answer = await (handler(request) if takes_request else handler())
        return PlainTextResponse(answer) if isinstance(answer, str) else answer

    return endpoint


def stream(body: Body) -> Response:
    return StreamingResponse(body)


def background(content: str, task: Handler, seconds: float) -> Response:
    return PlainTextResponse(content, background=BackgroundTask(task, seconds))


def server_error() -> Exception:
    return HTTPException(500)
