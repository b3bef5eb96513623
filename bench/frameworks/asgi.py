"""No framework: a raw ASGI app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.apps import ASGIApp, Body, Handler, Handlers

START = {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}


class ServerError(Exception):
    """What the server makes a 500 of."""


def app(handlers: Handlers) -> ASGIApp:
    async def route(scope: Any, _receive: Any, send: Any) -> None:
        answer = await handlers[scope["path"][1:]]()
        if not isinstance(answer, str):
            await answer(send)
            return
        await send({**START})
        await send({"type": "http.response.body", "body": answer.encode()})

    return route


def stream(body: Body) -> Handler:
    async def answer(send: Any) -> None:
        await send({**START})
        async for chunk in body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return answer


def background(content: str, task: Handler, seconds: float) -> Handler:
    async def answer(send: Any) -> None:
        await send({**START})
        await send({"type": "http.response.body", "body": content.encode()})
        await task(seconds)

    return answer


def server_error() -> Exception:
    return ServerError()
