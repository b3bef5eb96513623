"""A dependency that yields, then commits, as FastAPI's tutorial has it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from bench.chaos.app import Contestant, disposing


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            try:
                yield session
                await session.commit()
            except Exception:
                await session.rollback()
                raise

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    app = FastAPI(lifespan=disposing(engine))
    return Contestant(app, engine, get_session, in_background=own)
