"""The package advanced-alchemy, its extensions, with `"autocommit"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from bench.apps import Application, Setup, framework, operations, sync_operations
from bench.contestant import Contestant
from bench.handlers import from_request, given, sync_given

if TYPE_CHECKING:
    from sqlalchemy import Engine


def _config(package: Any, engine: AsyncEngine | Engine, **options: Any) -> Any:
    """What each of its extensions is told of the engine."""
    kind = "Async" if isinstance(engine, AsyncEngine) else "Sync"
    config, session_config = (
        getattr(package, name) for name in (f"SQLAlchemy{kind}Config", f"{kind}SessionConfig")
    )
    return config(
        engine_instance=engine, session_config=session_config(expire_on_commit=False), **options
    )


def make_starlette(setup: Setup) -> Application:
    from advanced_alchemy.extensions import starlette as package
    from starlette.requests import Request

    engine = setup.async_engine()
    starlette = framework("starlette")
    alchemy = package.AdvancedAlchemy(config=_config(package, engine, commit_mode="autocommit"))

    def get_session(request: Request) -> AsyncSession:
        session: AsyncSession = alchemy.get_async_session(request)
        return session

    app = starlette.app(from_request(Request, get_session, operations(starlette)))
    alchemy.init_app(app)
    return Application(app, engine)


def make_fastapi(setup: Setup) -> Application:
    fastapi = framework("fastapi")
    return _fastapi(setup.async_engine(), AsyncSession, given, operations(fastapi))


def make_sync(setup: Setup) -> Application:
    fastapi = framework("fastapi")
    return _fastapi(setup.sync_engine(), Session, sync_given, sync_operations(fastapi))


def _fastapi(engine: AsyncEngine | Engine, kind: Any, given: Any, each: Any) -> Application:
    from advanced_alchemy.extensions import fastapi as package
    from fastapi import Depends

    alchemy = package.AdvancedAlchemy(config=_config(package, engine, commit_mode="autocommit"))
    session_type: Any = Annotated[kind, Depends(alchemy.provide_session())]
    app = framework("fastapi").app(given(session_type, each))
    alchemy.init_app(app)
    return Application(app, engine)


def make_litestar(setup: Setup) -> Application:
    from advanced_alchemy.extensions import litestar as package

    engine = setup.async_engine()
    config = _config(
        package, engine, before_send_handler="autocommit", session_dependency_key="session"
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
