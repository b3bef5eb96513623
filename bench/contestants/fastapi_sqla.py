"""The package fastapi-sqla, by its middlewares."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from bench.apps import Application, Setup, framework, operations, sync_operations
from bench.contestant import Contestant
from bench.handlers import given, sync_given

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def make(setup: Setup) -> Application:
    from fastapi_sqla import AsyncSession, async_sqla

    engine = setup.async_engine()
    # It makes its engine from the environment, where a pool's options are strings.
    async_sqla.new_async_engine = lambda *_: engine
    fastapi = framework("fastapi")
    return _application(engine, given(AsyncSession, operations(fastapi)))


def make_sync(setup: Setup) -> Application:
    from fastapi_sqla import Session, sqla

    engine = setup.sync_engine()
    sqla.new_engine = lambda *_: engine
    fastapi = framework("fastapi")
    return _application(engine, sync_given(Session, sync_operations(fastapi)))


def _application(engine: Any, handlers: Any) -> Application:
    import fastapi_sqla

    # Whether it is asynchronous is told by the driver of this.
    os.environ["SQLALCHEMY_URL"] = engine.url.render_as_string(hide_password=False)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        await fastapi_sqla.startup()
        yield

    app = framework("fastapi").app(handlers, lifespan=lifespan)
    fastapi_sqla.setup_middlewares(app)
    return Application(app, engine)


CONTESTANTS = [
    Contestant(
        "fastapi_sqla",
        "fastapi",
        "fastapi-sqla",
        make_sync if is_sync else make,
        packages=("fastapi-sqla",),
        environment="fastapi-sqla",
        is_sync=is_sync,
    )
    for is_sync in (False, True)
]
