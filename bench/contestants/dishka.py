"""The package dishka: a provider that yields the session, is sent what failed, and commits."""

from __future__ import annotations

from collections.abc import AsyncGenerator  # noqa: TC003 - dishka reads annotations
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from bench.apps import Application, Setup, framework, operations
from bench.contestant import Contestant
from bench.handlers import given

if TYPE_CHECKING:
    from bench.apps import Handler

INTEGRATIONS = {
    "starlette": "starlette_dishka",  # a package of its own
    "fastapi": "dishka.integrations.fastapi",
    "litestar": "dishka.integrations.litestar",
}


def make(name: str, setup: Setup) -> Application:
    from dishka import FromDishka, Provider, Scope, make_async_container

    integration = import_module(INTEGRATIONS[name])
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
    if name == "starlette":
        handlers = {route: _after_request(each) for route, each in handlers.items()}
    injected = {
        route: integration.inject(each) if "session" in each.__annotations__ else each
        for route, each in handlers.items()
    }
    app = module.app(injected)
    integration.setup_dishka(make_async_container(provider), app)
    return Application(app, engine)


def _after_request(handler: Handler) -> Handler:
    """With the request before the session, where its integration looks for the container."""
    if "session" not in handler.__annotations__:
        return handler
    from starlette.requests import Request

    async def handle(_: Any, session: Any) -> Any:
        return await handler(session)

    handle.__annotations__.update({**handler.__annotations__, "_": Request})
    return handle


CONTESTANTS = [
    Contestant(
        "dishka",
        "starlette",
        "dishka",
        partial(make, "starlette"),
        packages=("dishka", "starlette-dishka"),
        environment="peers",
    ),
    *(
        Contestant("dishka", name, "dishka", partial(make, name), packages=("dishka",))
        for name in ("fastapi", "litestar")
    ),
]
