"""`DBSessionMiddleware`, with an answer for a COMMIT that nobody answered."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database, DBSessionMiddleware, Outcome
from bench.chaos.app import IN_DOUBT, OUTCOME, Contestant, disposing


def make(engine: AsyncEngine) -> Contestant:
    """The app."""
    db = Database(engine, cleanup_timeout=2.0)

    def answer(scope: Any, error: BaseException) -> JSONResponse | None:  # noqa: ARG001
        if db.scope.outcome is not Outcome.IN_DOUBT:
            return None
        return JSONResponse({"detail": "ask before you repeat it"}, 503, {OUTCOME: IN_DOUBT})

    app = FastAPI(lifespan=disposing(engine))
    app.add_middleware(DBSessionMiddleware, database=db, commit_error_response=answer)
    return Contestant(app, engine, db.get_session)
