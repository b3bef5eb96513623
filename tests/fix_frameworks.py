"""Pytest plugin: the ways to put the middleware on a framework's app."""

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
