"""The app without a database."""

from __future__ import annotations

from functools import partial

from bench.apps import Application, Setup, framework
from bench.contestant import Contestant
from bench.handlers import sync_without, without


def make(name: str, setup: Setup, *, is_sync: bool = False) -> Application:
    module = framework(name)
    handlers = sync_without() if is_sync else without(module)
    return Application(module.app(handlers), setup.async_engine())


CONTESTANTS = [
    *(
        Contestant("bare", name, "the bare app", partial(make, name))
        for name in ("asgi", "starlette", "fastapi", "litestar")
    ),
    Contestant(
        "bare", "fastapi", "the bare app", partial(make, "fastapi", is_sync=True), is_sync=True
    ),
]
