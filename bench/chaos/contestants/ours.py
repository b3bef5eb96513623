"""`DBSessionMiddleware`, with an answer for a COMMIT that got none."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from asgi_dbscope import CommitInDoubtError, Database, DBSessionMiddleware
from bench.chaos.app import IN_DOUBT, OUTCOME, Contestant, disposing


def make(
    engine: Any,
    database_options: Mapping[str, Any] = MappingProxyType({}),
    options: Mapping[str, Any] = MappingProxyType({}),
    lifespan: Any = None,
) -> Contestant:
    """The app, with an engine of either kind; *options* are the middleware's."""
    db = Database(engine, cleanup_timeout=2.0, **database_options)

    def answer(scope: Any, error: BaseException) -> JSONResponse | None:  # noqa: ARG001
        if not isinstance(error, CommitInDoubtError):
            return None
        return JSONResponse({"detail": "ask before you repeat it"}, 503, {OUTCOME: IN_DOUBT})

    app = FastAPI(lifespan=lifespan or disposing(engine))
    app.add_middleware(DBSessionMiddleware, database=db, commit_error_response=answer, **options)
    return Contestant(app, engine, db.get_session)
