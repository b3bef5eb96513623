"""Type checkers read this file, nobody runs it: the middleware in each framework."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, assert_type

from fastapi import FastAPI
from litestar import Litestar
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from quart import Quart
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_dbscope import Database, DBSessionMiddleware, commit_on_success


async def hand_written(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """An ASGI app without a framework."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


def any_app_is_wrapped(engine: AsyncEngine) -> None:
    """An app is wrapped whole, and what comes out is an app again."""
    wrapped = DBSessionMiddleware(hand_written, engine=engine)
    twice = DBSessionMiddleware(wrapped, engine=engine)
    of_starlette: ASGIApp = DBSessionMiddleware(Starlette(), engine=engine)

    assert_type(wrapped, DBSessionMiddleware)
    assert_type(twice.databases, tuple[Database[Any], ...])
    DBSessionMiddleware(of_starlette, engine=engine)
    DBSessionMiddleware(FastAPI(), engine=engine)


def starlette_and_fastapi_add_it(
    engine: AsyncEngine, first: Database[AsyncSession], second: Database[AsyncSession]
) -> None:
    """`add_middleware` and `Middleware(...)` know its options."""
    app = Starlette(middleware=[Middleware(DBSessionMiddleware, engine=engine)])
    app.add_middleware(DBSessionMiddleware, engine=engine)
    app.add_middleware(DBSessionMiddleware, database=first)
    app.add_middleware(DBSessionMiddleware, databases=[first, second])
    app.add_middleware(
        DBSessionMiddleware,
        databases=(first, second),
        mode="manual",
        commit_policy=commit_on_success,
        commit_error_response=conflict,
        stream="hold",
        exclude=["/health", "/static/*"],
    )
    FastAPI().add_middleware(DBSessionMiddleware, engine=engine)
    app.add_middleware(DBSessionMiddleware, motor=engine)  # type: ignore[call-arg]


def litestar_defines_it(engine: AsyncEngine, db: Database[AsyncSession]) -> None:
    """Litestar takes the class and its options, and the session as a dependency."""
    Litestar(
        middleware=[DefineMiddleware(DBSessionMiddleware, engine=engine)],
        dependencies={"session": Provide(db.get_session)},
    )


def apps_of_every_framework_are_wrapped(engine: AsyncEngine) -> None:
    """Each framework has its own types for ASGI; an app of any of them can be wrapped whole."""
    DBSessionMiddleware(Litestar(), engine=engine)
    DBSessionMiddleware(Quart(__name__), engine=engine)
    DBSessionMiddleware(Quart(__name__).asgi_app, engine=engine)


def conflict(scope: MutableMapping[str, Any], error: BaseException) -> ASGIApp | None:
    """An app that answers where a COMMIT failed."""
    return JSONResponse({"path": scope["path"]}, 409) if isinstance(error, ValueError) else None


def conflict_of_starlette(scope: Scope, error: BaseException) -> JSONResponse:
    """The same in Starlette's own types."""
    return JSONResponse({"path": scope["path"]}, 409)


def options_of_the_right_type(engine: AsyncEngine) -> None:
    """Each option has its type, and a wrong one is told."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    DBSessionMiddleware(app, engine=engine, commit_error_response=conflict_of_starlette)
    DBSessionMiddleware(app, engine=engine, exclude="/health")
    DBSessionMiddleware(app, engine=engine, read_only_methods=("GET", "HEAD"))
    DBSessionMiddleware(app, engine=engine, exclude=lambda scope: scope["path"] == "/health")
    DBSessionMiddleware(app, engine=engine, commit_policy=lambda head: head.status < 300)

    DBSessionMiddleware(app, engine=engine, mode="atomic")  # type: ignore[arg-type]
    DBSessionMiddleware(app, engine=engine, stream="keep")  # type: ignore[arg-type]
    DBSessionMiddleware(app, engine=engine, commit_policy=lambda head: "yes")  # type: ignore[arg-type, return-value]
    DBSessionMiddleware(app, engine=engine, commit_policy=app)  # type: ignore[arg-type]
    DBSessionMiddleware(app, engine)  # type: ignore[call-arg]
    DBSessionMiddleware(app, databases=[engine])  # type: ignore[list-item]
