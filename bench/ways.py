"""What an app's own code has in some ways to get a session, whatever it is wired into."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.middleware.base import DispatchFunction, RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.responses import Response

    Factory = async_sessionmaker[AsyncSession]


def yielding(session_factory: Factory) -> Callable[[], AsyncGenerator[AsyncSession]]:
    """A dependency that yields, then commits, as FastAPI's tutorial has it."""

    async def get_session() -> AsyncGenerator[AsyncSession]:
        async with session_factory() as session:
            try:
                yield session
                await session.commit()
            except Exception:
                await session.rollback()
                raise

    return get_session


def dispatching(session_factory: Factory) -> DispatchFunction:
    """What a `BaseHTTPMiddleware` does that commits when the response is known."""

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        async with session_factory() as session:
            request.state.session = session
            try:
                response = await call_next(request)
                if response.status_code < HTTPStatus.BAD_REQUEST:
                    await session.commit()
                else:
                    await session.rollback()
            except Exception:
                await session.rollback()
                raise
            return response

    return dispatch


def session_of(request: Request) -> AsyncSession:
    """The session that `dispatching` left there."""
    session: AsyncSession = request.state.session
    return session


def context(engine: AsyncEngine) -> tuple[Any, Callable[[], Awaitable[AsyncSession]]]:
    """A `DBConnect` of context-async-sqlalchemy, and what awaits its session."""
    from context_async_sqlalchemy import DBConnect, db_session

    connection = DBConnect(
        engine_creator=lambda _host: engine,
        session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
        host="bench",
    )

    async def get_session() -> AsyncSession:
        session: AsyncSession = await db_session(connection)
        return session

    return connection, get_session
