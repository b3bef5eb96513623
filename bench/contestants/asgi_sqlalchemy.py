"""The package asgi-sqlalchemy: its middleware, and what it has for FastAPI and Starlette."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import awaited_from_request, given

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def make(name: str, setup: Setup) -> Application:
    from asgi_sqlalchemy import DatabaseContext, SessionMiddleware

    url = setup.async_url.render_as_string(hide_password=False)
    context = DatabaseContext(url, {**setup.pool}, {"expire_on_commit": False})

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[dict[str, Any]]:
        yield {"db": context}

    module = framework(name)
    each = operations(module)
    if name == "fastapi":
        from asgi_sqlalchemy.fastapi import SessionDependency

        handlers = given(SessionDependency, each)
    else:
        from asgi_sqlalchemy.starlette import get_session
        from starlette.requests import Request

        handlers = awaited_from_request(Request, get_session, each)
    app = module.app(handlers, lifespan=lifespan)
    app.add_middleware(SessionMiddleware)
    return Application(app, context.engine)


CONTESTANTS = [
    Contestant(
        "asgi_sqlalchemy",
        name,
        "asgi-sqlalchemy",
        partial(make, name),
        packages=("asgi-sqlalchemy",),
        environment="peers",
    )
    for name in ("starlette", "fastapi")
]
