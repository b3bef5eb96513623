"""A `BaseHTTPMiddleware` that commits when the response is known."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

from bench.chaos.app import Contestant, disposing


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        async with sessions() as session:
            request.state.session = session
            try:
                response = await call_next(request)
                if response.status_code < 400:  # noqa: PLR2004
                    await session.commit()
                else:
                    await session.rollback()
            except Exception:
                await session.rollback()
                raise
            return response

    async def get_session(request: Request) -> AsyncSession:
        session: AsyncSession = request.state.session
        return session

    @asynccontextmanager
    async def own(_: AsyncSession) -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    app = FastAPI(lifespan=disposing(engine))
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    return Contestant(app, engine, get_session, in_body=own, in_background=own)
