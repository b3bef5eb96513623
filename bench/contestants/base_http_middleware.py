"""A `BaseHTTPMiddleware` that commits when the response is known."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import from_request

if TYPE_CHECKING:
    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.responses import Response


def make(name: str, setup: Setup) -> Application:
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import Request

    engine = setup.async_engine()
    session_factory = async_sessionmaker(engine, expire_on_commit=False)

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

    def get_session(request: Request) -> AsyncSession:
        session: AsyncSession = request.state.session
        return session

    module = framework(name)
    app = module.app(from_request(Request, get_session, operations(module)))
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    return Application(app, engine)


CONTESTANTS = [
    Contestant("base_http_middleware", name, "`BaseHTTPMiddleware`", partial(make, name))
    for name in ("starlette", "fastapi")
]
