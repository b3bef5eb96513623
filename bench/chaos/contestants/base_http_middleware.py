"""A `BaseHTTPMiddleware` that commits when the response is known."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from starlette.middleware.base import BaseHTTPMiddleware

from bench.chaos.app import Contestant, disposing
from bench.ways import dispatching, session_of


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def get_session(request: Request) -> AsyncSession:
        return session_of(request)

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    app = FastAPI(lifespan=disposing(engine))
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatching(sessions))
    return Contestant(app, engine, get_session, in_body=own, in_background=own)
