"""Errors with an HTTP answer of their own, in frameworks that would answer 500."""

import asyncio
import contextlib
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from litestar import Litestar, MediaType, get
from litestar import Response as LitestarResponse
from litestar.middleware import DefineMiddleware
from quart import Quart
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_dbscope import (
    DBScopeError,
    DBSessionMiddleware,
    OverloadedError,
    PoolExhaustedError,
    Retry,
    current_session,
)
from asgi_dbscope._admission import Admission
from asgi_dbscope.testing import inject_conflicts
from tests.fix_database import Item
from tests.fix_frameworks import answering_disconnect

UNAVAILABLE = (503, b"Service Unavailable")


async def busy(request: Request) -> Response:
    """An endpoint that gets no connection."""
    current_session()
    raise PoolExhaustedError("busy")


def render(request: Request, error: Exception) -> Response:
    """A handler of the app's own."""
    return PlainTextResponse(f"mine: {error}", status_code=500)


def starlette(**options: Any) -> Starlette:
    """An app whose one endpoint fails."""
    return Starlette(routes=[Route("/", busy)], **options)


def fastapi(**options: Any) -> FastAPI:
    """The same, of FastAPI's."""
    app = FastAPI(**options)
    app.add_api_route("/", busy, methods=["GET"])
    return app


@pytest.fixture(params=[starlette, fastapi])
def make(request: pytest.FixtureRequest) -> Any:
    """Make an app."""
    return request.param


async def test_default_answer_wins_over_the_frameworks_500(make, db, install, drive):
    """G14: Starlette's and FastAPI's "Internal Server Error" becomes 503 with Retry-After."""
    exchange = await drive(install(make(), database=db))

    assert UNAVAILABLE == (exchange.status, exchange.body)
    assert (b"retry-after", b"1") in exchange.messages[0]["headers"]
    assert exchange.error is None


@pytest.mark.parametrize("handled", [PoolExhaustedError, DBScopeError, Exception, 500])
async def test_handler_of_the_apps_own_wins(make, db, install, drive, handled):
    """G14: a handler that the app has registered, for all errors even, answers instead."""
    exchange = await drive(install(make(exception_handlers={handled: render}), database=db))

    assert (500, b"mine: busy") == (exchange.status, exchange.body)


async def test_debug_mode_shows_its_traceback(make, db, install, drive):
    """G14: in debug mode the framework's traceback goes out."""
    exchange = await drive(install(make(debug=True), database=db))

    assert 500 == exchange.status
    assert b"PoolExhaustedError" in exchange.body


@pytest.mark.filterwarnings("ignore:.*is a BaseHTTPMiddleware inside")
async def test_base_http_middleware_inside_does_not_hide_the_error(db, install, drive):
    """G14: an error that came through a `BaseHTTPMiddleware` has its answer too."""

    async def dispatch(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    app = starlette()
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    exchange = await drive(install(app, database=db))

    assert UNAVAILABLE == (exchange.status, exchange.body)


# --------------------------------------------------------------------------------------
# Frameworks that the core knows nothing of
# --------------------------------------------------------------------------------------


async def conflict(db: Any) -> None:
    """Lose to a conflict."""
    db.session.add(Item(id=1))
    await db.session.flush()


async def overloaded(db: Any) -> None:
    """Get no place."""
    await db.session.execute(sa.text("SELECT 1"))


async def late(db: Any) -> None:
    """Take too long."""
    await db.session.execute(sa.text("SELECT 1"))
    await asyncio.sleep(0.05)
    await db.session.execute(sa.text("SELECT 1"))


WORKS: dict[str, Any] = {"conflict": conflict, "overloaded": overloaded, "late": late}
OPTIONS: dict[str, dict[str, Any]] = {
    "conflict": {"retry": Retry(1)},
    "overloaded": {"max_concurrent": 1, "max_waiting": 0},
    "late": {"timeout": 0.02},
}


def in_quart(work: Any, options: dict[str, Any], render: Any) -> Any:
    """An app of Quart's."""
    app = Quart(__name__)

    @app.get("/")
    async def endpoint() -> str:
        await work(options["database"])
        return "done"

    if render:

        @app.errorhandler(Exception)
        async def answer(error: Exception) -> tuple[str, int]:
            return "mine", 500

    return DBSessionMiddleware(app, **options)


def in_litestar_as(media_type: MediaType) -> Any:
    """Make an app of Litestar's whose errors are of *media_type*."""

    def make(work: Any, options: dict[str, Any], render: Any) -> Any:
        @get("/", media_type=media_type)
        async def endpoint() -> str:
            await work(options["database"])
            return "done"

        def answer(request: Any, error: Exception) -> Any:
            return LitestarResponse("mine", status_code=500, media_type=MediaType.TEXT)

        handlers: Any = {Exception: answer} if render else {}
        middleware = [DefineMiddleware(DBSessionMiddleware, **options)]
        return Litestar([endpoint], middleware=middleware, exception_handlers=handlers)

    return make


MAKERS = {
    "quart": in_quart,
    "litestar text": in_litestar_as(MediaType.TEXT),
    "litestar html": in_litestar_as(MediaType.HTML),
    "litestar json": in_litestar_as(MediaType.JSON),
}


@pytest.mark.parametrize("renders", [False, True], ids=["plain", "rendered"])
@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_default_answer_wins_whatever_the_500_looks_like(
    db, drive, caplog, make, name, renders
):
    """G14: whatever it looks like, a page that only says 500 is replaced; the app's own stays."""
    app = answering_disconnect(make(WORKS[name], {"database": db, **OPTIONS[name]}, renders))
    async with contextlib.AsyncExitStack() as stack:
        if name == "conflict":
            stack.enter_context(inject_conflicts(db, at="INSERT", times=None))
        if name == "overloaded":
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(Admission, "enter", refuse)
        exchange = await drive(app)

    answers = [each for each in caplog.messages if ": answered 50" in each]
    assert [] == [each for each in answers if "\n" in each or "INSERT" in each]
    status = 504 if name == "late" else 503
    assert exchange.error is None
    assert (500 if renders else status) == exchange.status
    assert renders == (exchange.body == b"mine")


async def refuse(*_: Any) -> None:
    """Let nobody in."""
    raise OverloadedError("busy")


@get("/")
async def busy_in_litestar() -> None:
    """An endpoint that gets no connection."""
    current_session()
    raise PoolExhaustedError("busy")


@pytest.fixture(params=["wrapped", "as middleware"])
def in_litestar(request: pytest.FixtureRequest, db: Any) -> Any:
    """Make an app of Litestar's."""

    def make(**options: Any) -> Any:
        if request.param == "wrapped":
            app = Litestar([busy_in_litestar], openapi_config=None, **options)
            return answering_disconnect(DBSessionMiddleware(app, database=db))
        middleware = [DefineMiddleware(DBSessionMiddleware, database=db)]
        app = Litestar([busy_in_litestar], middleware=middleware, openapi_config=None, **options)
        return answering_disconnect(app)

    return make


async def test_default_answer_wins_over_litestars_500(in_litestar, drive):
    """G14: Litestar's own 500 becomes 503."""
    exchange = await drive(in_litestar())

    assert UNAVAILABLE == (exchange.status, exchange.body)


async def test_handler_of_litestars_wins(in_litestar, drive):
    """G14: a handler that the Litestar app has registered answers instead."""

    def render_it(request: Any, error: Exception) -> Any:
        return LitestarResponse({"mine": str(error)}, status_code=500)

    exchange = await drive(in_litestar(exception_handlers={PoolExhaustedError: render_it}))

    assert (500, b'{"mine":"busy"}') == (exchange.status, exchange.body)
