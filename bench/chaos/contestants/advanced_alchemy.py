"""The package advanced-alchemy, its extension for FastAPI, with `commit_mode="autocommit"`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemyAsyncConfig
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from bench.chaos.app import Contestant, disposing


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    app = FastAPI(lifespan=disposing(engine))
    config = SQLAlchemyAsyncConfig(engine_instance=engine, commit_mode="autocommit")
    alchemy = AdvancedAlchemy(config=config, app=app)

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with config.get_session() as session, session.begin():
            yield session

    return Contestant(app, engine, alchemy.provide_session(), in_body=own, in_background=own)
