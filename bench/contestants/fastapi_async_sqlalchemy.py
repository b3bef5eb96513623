"""The package fastapi-async-sqlalchemy, with `commit_on_exit`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import asked

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


def make(name: str, setup: Setup) -> Application:
    from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

    def get_session() -> AsyncSession:
        session: AsyncSession = db.session
        return session

    engine = setup.async_engine()
    module = framework(name)
    app = module.app(asked(get_session, operations(module)))
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)
    return Application(app, engine)


CONTESTANTS = [
    Contestant(
        "fastapi_async_sqlalchemy",
        name,
        "fastapi-async-sqlalchemy",
        partial(make, name),
        packages=("fastapi-async-sqlalchemy",),
        environment="peers",
    )
    for name in ("starlette", "fastapi")
]
