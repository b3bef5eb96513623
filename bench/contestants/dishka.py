"""The package dishka: a provider that yields the session, is sent what failed, and commits."""

from __future__ import annotations

from collections.abc import AsyncGenerator  # noqa: TC003 - dishka reads annotations
from functools import partial
from importlib import import_module
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import given


def make(name: str, setup: Setup) -> Application:
    from dishka import FromDishka, Provider, Scope, make_async_container

    integration = import_module(f"dishka.integrations.{name}")
    engine = setup.async_engine()
    session_factory = async_sessionmaker(engine, expire_on_commit=False)

    async def get_session() -> AsyncGenerator[AsyncSession, Exception | None]:
        async with session_factory() as session:
            error = yield session
            if error is None:
                await session.commit()

    provider = Provider(scope=Scope.REQUEST)
    provider.provide(get_session)
    module = framework(name)
    session_type: Any = FromDishka[AsyncSession]  # type: ignore[misc]  # what it is at run time
    handlers = given(session_type, operations(module))
    app = module.app({route: integration.inject(each) for route, each in handlers.items()})
    integration.setup_dishka(make_async_container(provider), app)
    return Application(app, engine)


CONTESTANTS = [
    Contestant("dishka", name, "dishka", partial(make, name), packages=("dishka",))
    for name in ("fastapi", "litestar")
]
