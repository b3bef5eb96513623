"""The package advanced-alchemy, its extensions, with `"autocommit"`."""

from __future__ import annotations

from typing import Annotated, Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from bench.apps import Application, Setup, framework, operations, sync_operations
from bench.contestant import Contestant
from bench.handlers import from_request, given, sync_given


def make_starlette(setup: Setup) -> Application:
    from advanced_alchemy.extensions import starlette as package
    from starlette.requests import Request

    engine = setup.async_engine()
    config = package.SQLAlchemyAsyncConfig(
        engine_instance=engine,
        commit_mode="autocommit",
        session_config=package.AsyncSessionConfig(expire_on_commit=False),
    )
    starlette = framework("starlette")
    alchemy = package.AdvancedAlchemy(config=config)

    def get_session(request: Request) -> AsyncSession:
        session: AsyncSession = alchemy.get_async_session(request)
        return session

    app = starlette.app(from_request(Request, get_session, operations(starlette)))
    alchemy.init_app(app)
    return Application(app, engine)


def make_fastapi(setup: Setup) -> Application:
    from advanced_alchemy.extensions import fastapi as package
    from fastapi import Depends

    engine = setup.async_engine()
    config = package.SQLAlchemyAsyncConfig(
        engine_instance=engine,
        commit_mode="autocommit",
        session_config=package.AsyncSessionConfig(expire_on_commit=False),
    )
    alchemy = package.AdvancedAlchemy(config=config)
    fastapi = framework("fastapi")
    session_type = Annotated[AsyncSession, Depends(alchemy.provide_session())]
    app = fastapi.app(given(session_type, operations(fastapi)))
    alchemy.init_app(app)
    return Application(app, engine)


def make_sync(setup: Setup) -> Application:
    from advanced_alchemy.extensions import fastapi as package
    from fastapi import Depends

    engine = setup.sync_engine()
    config = package.SQLAlchemySyncConfig(
        engine_instance=engine,
        commit_mode="autocommit",
        session_config=package.SyncSessionConfig(expire_on_commit=False),
    )
    alchemy = package.AdvancedAlchemy(config=config)
    fastapi = framework("fastapi")
    session_type = Annotated[Session, Depends(alchemy.provide_session())]
    app = fastapi.app(sync_given(session_type, sync_operations(fastapi)))
    alchemy.init_app(app)
    return Application(app, engine)


def make_litestar(setup: Setup) -> Application:
    from advanced_alchemy.extensions import litestar as package

    engine = setup.async_engine()
    config: Any = package.SQLAlchemyAsyncConfig(
        engine_instance=engine,
        before_send_handler="autocommit",
        session_config=package.AsyncSessionConfig(expire_on_commit=False),
        session_dependency_key="session",
    )
    litestar = framework("litestar")
    handlers = given(AsyncSession, operations(litestar))
    app = litestar.app(handlers, plugins=[package.SQLAlchemyPlugin(config=config)])
    return Application(app, engine)


CONTESTANTS = [
    Contestant(
        "advanced_alchemy",
        name,
        "advanced-alchemy",
        make,
        packages=("advanced-alchemy",),
        environment="peers",
        is_sync=make is make_sync,
    )
    for name, make in (
        ("starlette", make_starlette),
        ("fastapi", make_fastapi),
        ("fastapi", make_sync),
        ("litestar", make_litestar),
    )
]
