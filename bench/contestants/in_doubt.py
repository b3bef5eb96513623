"""`DBSessionMiddleware`, told to ask PostgreSQL about COMMITs that got no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.apps import Application, framework, operations
from bench.contestant import Contestant
from bench.handlers import asked

if TYPE_CHECKING:
    from bench.apps import Setup


def make(setup: Setup) -> Application:
    from asgi_dbscope import Database, DBSessionMiddleware, current_session

    asgi = framework("asgi")
    engine = setup.async_engine()
    app = asgi.app(asked(current_session, operations(asgi)))
    database = Database(engine, resolve_in_doubt=True)
    return Application(DBSessionMiddleware(app, database=database), engine)


CONTESTANTS = [Contestant("in_doubt", "asgi", "`resolve_in_doubt=True`", make)]
