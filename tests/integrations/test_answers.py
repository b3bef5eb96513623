"""Errors with an HTTP answer of their own, in frameworks that would answer 500."""

from typing import Any

import pytest
from fastapi import FastAPI
from litestar import Litestar, get
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_dbscope import DBScopeError, DBSessionMiddleware, PoolExhaustedError, current_session
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
    from litestar import Response as LitestarResponse

    def render_it(request: Any, error: Exception) -> Any:
        return LitestarResponse({"mine": str(error)}, status_code=500)

    exchange = await drive(in_litestar(exception_handlers={PoolExhaustedError: render_it}))

    assert (500, b'{"mine":"busy"}') == (exchange.status, exchange.body)
