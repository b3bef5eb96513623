"""`DBSessionMiddleware` with `reads`: the route `select` is read-only, in one round trip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.apps import Application, framework, operations
from bench.contestant import Contestant
from bench.handlers import asked

if TYPE_CHECKING:
    from bench.apps import Setup


def make(setup: Setup) -> Application:
    from sqlalchemy import make_url
    from sqlalchemy.ext.asyncio import create_async_engine

    from asgi_dbscope import (
        Database,
        DBSessionMiddleware,
        current_session,
        read_only_options,
        session_options,
    )

    asgi = framework("asgi")
    engine = setup.async_engine()
    url = make_url(setup.url).set(drivername="postgresql+asyncpg")
    reads = create_async_engine(url, **read_only_options(url, **setup.pool))
    handlers = asked(current_session, operations(asgi))
    handlers["select"] = session_options(read_only=True)(handlers["select"])
    database = Database(engine, reads=reads)
    return Application(DBSessionMiddleware(asgi.app(handlers), database=database), engine)


CONTESTANTS = [Contestant("ours_reads", "asgi", "asgi-dbscope, reads", make)]
