"""The session opened in the endpoint: `async with session_factory() as session`."""

from __future__ import annotations

from functools import partial

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from bench.apps import Application, Setup, framework, operations, sync_operations
from bench.contestant import Contestant
from bench.handlers import by_hand, sync_by_hand


def make(name: str, setup: Setup) -> Application:
    module = framework(name)
    engine = setup.async_engine()
    factory = async_sessionmaker(engine, expire_on_commit=False)
    return Application(module.app(by_hand(factory, operations(module))), engine)


def make_sync(setup: Setup) -> Application:
    fastapi = framework("fastapi")
    engine = setup.sync_engine()
    factory = sessionmaker(engine, expire_on_commit=False)
    return Application(fastapi.app(sync_by_hand(factory, sync_operations(fastapi))), engine)


CONTESTANTS = [
    *(
        Contestant("by_hand", name, "by hand", partial(make, name))
        for name in ("asgi", "starlette", "fastapi", "litestar")
    ),
    Contestant("by_hand", "fastapi", "by hand", make_sync, is_sync=True),
]
