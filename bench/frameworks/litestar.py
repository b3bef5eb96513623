"""Litestar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Litestar, get
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import InternalServerException
from litestar.response import Response, Stream

if TYPE_CHECKING:
    from bench.apps import Body, Handler, Handlers


def app(handlers: Handlers, **options: Any) -> Litestar:
    return Litestar(
        [get(f"/{route}")(handler) for route, handler in handlers.items()],
        openapi_config=None,
        **options,
    )


def stream(body: Body) -> Stream:
    return Stream(body)


def background(content: str, task: Handler, seconds: float) -> Response[str]:
    return Response(content, background=BackgroundTask(task, seconds))


def server_error() -> Exception:
    return InternalServerException()
