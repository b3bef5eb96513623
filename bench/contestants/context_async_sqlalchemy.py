"""The package context-async-sqlalchemy, by its middleware for each framework."""

from __future__ import annotations

from functools import partial

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import awaited
from bench.ways import context


def make(name: str, setup: Setup) -> Application:
    from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware

    engine = setup.async_engine()
    _, get_session = context(engine)
    module = framework(name)
    app = module.app(awaited(get_session, operations(module)))
    if name == "starlette":
        from context_async_sqlalchemy.starlette_utils import (
            add_starlette_http_db_session_middleware,
        )

        add_starlette_http_db_session_middleware(app)
    elif name == "fastapi":
        from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

        add_fastapi_http_db_session_middleware(app)
    else:
        app = ASGIHTTPDBSessionMiddleware(app)
    return Application(app, engine)


CONTESTANTS = [
    Contestant(
        "context_async_sqlalchemy",
        name,
        "context-async-sqlalchemy",
        partial(make, name),
        packages=("context-async-sqlalchemy",),
        environment="peers",
    )
    for name in ("asgi", "starlette", "fastapi", "litestar")
]
