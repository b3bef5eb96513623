"""A dependency that yields, then commits, as FastAPI's tutorial has it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from bench.chaos.app import Contestant, disposing
from bench.ways import yielding


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    app = FastAPI(lifespan=disposing(engine))
    return Contestant(app, engine, yielding(sessions), in_background=own)
