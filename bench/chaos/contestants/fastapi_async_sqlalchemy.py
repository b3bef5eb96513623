"""The package fastapi-async-sqlalchemy, with `commit_on_exit`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from bench.chaos.app import Contestant, disposing


def make(engine: AsyncEngine) -> Contestant:
    """The app."""

    async def get_session() -> AsyncSession:
        session: AsyncSession = db.session
        return session

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with db(commit_on_exit=True):
            yield db.session

    app = FastAPI(lifespan=disposing(engine))
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)
    return Contestant(app, engine, get_session, in_body=own, in_background=own)
