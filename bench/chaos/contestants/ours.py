"""`DBSessionMiddleware`, with an answer for a COMMIT that got none."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import CommitInDoubtError, Database, DBSessionMiddleware
from bench.chaos.app import IN_DOUBT, OUTCOME, Contestant, disposing


def make(engine: AsyncEngine, **options: Any) -> Contestant:
    """The app; *options* are the database's."""
    db = Database(engine, cleanup_timeout=2.0, **options)

    def answer(scope: Any, error: BaseException) -> JSONResponse | None:  # noqa: ARG001
        if not isinstance(error, CommitInDoubtError):
            return None
        return JSONResponse({"detail": "ask before you repeat it"}, 503, {OUTCOME: IN_DOUBT})

    app = FastAPI(lifespan=disposing(engine))
    app.add_middleware(DBSessionMiddleware, database=db, commit_error_response=answer)
    return Contestant(app, engine, db.get_session)
