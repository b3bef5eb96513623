"""Pytest plugin: the ways to put the middleware on a framework's app."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asgi_dbscope import DBSessionMiddleware

Install = Callable[..., Any]


def added(app: Any, **options: Any) -> Any:
    """As one of the app's own middlewares (Starlette, FastAPI)."""
    app.add_middleware(DBSessionMiddleware, **options)
    return app


def wrapped(app: Any, **options: Any) -> Any:
    """Around the whole app."""
    return DBSessionMiddleware(app, **options)


@pytest.fixture(params=[added, wrapped], ids=["added", "wrapped"])
def install(request: pytest.FixtureRequest) -> Install:
    """Put the middleware on an app of Starlette's or FastAPI's; returns what is to be served."""
    way: Install = request.param
    return way


def innermost(error: BaseException | None) -> BaseException | None:
    """The error inside the groups of one that older frameworks' task groups make of it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def answering_disconnect(app: Any) -> Any:
    """What servers do, and hand-driven requests don't.

    Once all is sent the client is gone, and a second head is refused.
    """

    async def answering(scope: Any, receive: Any, send: Any) -> Any:
        is_started = False
        complete = asyncio.Event()
        waiting: asyncio.Task[Any] | None = None

        async def receive_until_complete() -> Any:
            nonlocal waiting
            waiting = waiting or asyncio.create_task(receive())
            ended = asyncio.create_task(complete.wait())
            try:
                await asyncio.wait([waiting, ended], return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended.cancel()
            if not waiting.done():
                return {"type": "http.disconnect"}
            message, waiting = waiting.result(), None
            return message

        async def send_and_see(message: Any) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                if is_started:
                    raise RuntimeError("Expected a body message, got a second head.")
                is_started = True
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                complete.set()

        try:
            return await app(scope, receive_until_complete, send_and_see)
        finally:
            if waiting is not None:
                waiting.cancel()

    return answering
