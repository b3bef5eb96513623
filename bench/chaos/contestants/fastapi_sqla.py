"""The package fastapi-sqla, by its middleware."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import fastapi_sqla
import structlog
from fastapi import FastAPI
from fastapi_sqla import AsyncSessionDependency, async_sqla, open_async_session
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from bench.chaos.app import Contestant


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    # Where rich is installed, structlog draws each traceback with it, which takes a second.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[plain])
    # It makes its engine from the environment, where the driver's options have no place.
    os.environ["sqlalchemy_url"] = engine.url.render_as_string(hide_password=False)  # noqa: SIM112
    async_sqla.new_async_engine = lambda *_: engine

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await fastapi_sqla.startup()
        yield
        await engine.dispose()

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with open_async_session() as session:
            yield session

    app = FastAPI(lifespan=lifespan)
    fastapi_sqla.setup_middlewares(app)
    return Contestant(app, engine, AsyncSessionDependency(), in_body=own, in_background=own)
