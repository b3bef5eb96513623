"""`DBSessionMiddleware`, with everything as it is by default."""

from __future__ import annotations

from functools import partial

from bench.apps import Application, Setup, framework, operations, sync_operations
from bench.contestant import Contestant
from bench.handlers import asked, sync_asked


def make(name: str, setup: Setup) -> Application:
    from asgi_dbscope import Database, DBSessionMiddleware, current_session

    module = framework(name)
    engine = setup.async_engine()
    app = module.app(asked(current_session, operations(module)))
    return Application(DBSessionMiddleware(app, database=Database(engine)), engine)


def make_sync(setup: Setup) -> Application:
    from asgi_dbscope import Database, DBSessionMiddleware

    fastapi = framework("fastapi")
    engine = setup.sync_engine()
    database = Database(engine)
    app = fastapi.app(sync_asked(lambda: database.session, sync_operations(fastapi)))
    return Application(DBSessionMiddleware(app, database=database), engine)


CONTESTANTS = [
    *(
        Contestant("ours", name, "asgi-dbscope", partial(make, name))
        for name in ("asgi", "starlette", "fastapi", "litestar")
    ),
    Contestant("ours", "fastapi", "asgi-dbscope", make_sync, is_sync=True),
]
