"""A `BaseHTTPMiddleware` that commits when the response is known."""

from __future__ import annotations

from functools import partial

from sqlalchemy.ext.asyncio import async_sessionmaker

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import from_request
from bench.ways import dispatching, session_of


def make(name: str, setup: Setup) -> Application:
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import Request

    engine = setup.async_engine()
    session_factory = async_sessionmaker(engine, expire_on_commit=False)
    module = framework(name)
    app = module.app(from_request(Request, session_of, operations(module)))
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatching(session_factory))
    return Application(app, engine)


CONTESTANTS = [
    Contestant("base_http_middleware", name, "`BaseHTTPMiddleware`", partial(make, name))
    for name in ("starlette", "fastapi")
]
