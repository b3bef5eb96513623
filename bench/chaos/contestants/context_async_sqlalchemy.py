"""The package context-async-sqlalchemy, by its middleware for FastAPI."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from context_async_sqlalchemy import new_non_ctx_atomic_session
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from bench.chaos.app import Contestant, disposing
from bench.ways import context


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    connection, get_session = context(engine)

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with new_non_ctx_atomic_session(connection) as session:
            yield session

    app = FastAPI(lifespan=disposing(engine))
    add_fastapi_http_db_session_middleware(app)
    return Contestant(app, engine, get_session, in_body=own, in_background=own)
