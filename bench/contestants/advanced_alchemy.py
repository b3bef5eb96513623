"""The package advanced-alchemy, its extensions, with `"autocommit"`."""

from __future__ import annotations

from typing import Annotated, Any

from sqlalchemy.ext.asyncio import AsyncSession

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import from_request, given


def make_starlette(setup: Setup) -> Application:
    from advanced_alchemy.extensions.starlette import AdvancedAlchemy, SQLAlchemyAsyncConfig
    from starlette.requests import Request

    engine = setup.async_engine()
    config = SQLAlchemyAsyncConfig(engine_instance=engine, commit_mode="autocommit")
    starlette = framework("starlette")
    alchemy = AdvancedAlchemy(config=config)

    def get_session(request: Request) -> AsyncSession:
        session: AsyncSession = alchemy.get_async_session(request)
        return session

    app = starlette.app(from_request(Request, get_session, operations(starlette)))
    alchemy.init_app(app)
    return Application(app, engine)


def make_fastapi(setup: Setup) -> Application:
    from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemyAsyncConfig
    from fastapi import Depends

    engine = setup.async_engine()
    config = SQLAlchemyAsyncConfig(engine_instance=engine, commit_mode="autocommit")
    alchemy = AdvancedAlchemy(config=config)
    fastapi = framework("fastapi")
    session_type = Annotated[AsyncSession, Depends(alchemy.provide_session())]
    app = fastapi.app(given(session_type, operations(fastapi)))
    alchemy.init_app(app)
    return Application(app, engine)


def make_litestar(setup: Setup) -> Application:
    from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig, SQLAlchemyPlugin

    engine = setup.async_engine()
    config: Any = SQLAlchemyAsyncConfig(
        engine_instance=engine,
        before_send_handler="autocommit",
        session_dependency_key="session",
    )
    litestar = framework("litestar")
    handlers = given(AsyncSession, operations(litestar))
    return Application(litestar.app(handlers, plugins=[SQLAlchemyPlugin(config=config)]), engine)


CONTESTANTS = [
    Contestant(
        "advanced_alchemy",
        name,
        "advanced-alchemy",
        make,
        packages=("advanced-alchemy",),
        environment="peers",
    )
    for name, make in (
        ("starlette", make_starlette),
        ("fastapi", make_fastapi),
        ("litestar", make_litestar),
    )
]
