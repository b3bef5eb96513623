"""Starlette: the middleware as one of its own, and around the whole app."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio.from_thread
import pytest
import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route, Router

from asgi_dbscope import (
    DBSessionMiddleware,
    commit_on_success,
    current_scope,
    current_session,
    session_options,
)
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]


def app_of(endpoint: Any, **options: Any) -> Starlette:
    """An app with one endpoint at `/`."""
    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])], **options)


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_commits_before_the_head(engine, db, install, drive, rows, timeline):
    """G1, G6: COMMIT is answered and the connection is back before the head goes out."""

    async def create(request: Request) -> Response:
        current_session().add(Item(id=1))
        return PlainTextResponse("created", status_code=201)

    exchange = await drive(install(app_of(create), database=db))

    assert (201, b"created", None) == (exchange.status, exchange.body, exchange.error)
    assert [*COMMITTED, "start 201", "last body"] == timeline
    assert [1] == await rows()


async def test_sync_endpoint_in_its_thread_sees_the_scope(db, install, drive, rows):
    """G11: a `def` endpoint adds from its worker thread, and queries by way of the loop."""

    def create(request: Request) -> Response:
        session = current_session()
        assert session is db.session
        session.add(Item(id=1))
        found = anyio.from_thread.run(session.scalar, sa.select(Item.id))
        return PlainTextResponse(str(found))

    exchange = await drive(install(app_of(create), database=db))

    assert (200, b"1") == (exchange.status, exchange.body)
    assert [1] == await rows()


async def test_middleware_in_the_constructor_is_as_good(db, drive, rows):
    """G1: `Middleware(DBSessionMiddleware, ...)` in Starlette's own list."""

    async def create(request: Request) -> Response:
        current_session().add(Item(id=1))
        return Response(status_code=204)

    app = app_of(create, middleware=[Middleware(DBSessionMiddleware, database=db)])

    assert 204 == (await drive(app)).status
    assert [1] == await rows()


@pytest.mark.parametrize("level", ["route", "mount", "router"])
async def test_middleware_of_a_part_of_the_app(level, db, drive, rows):
    """G1: a route, a mount or a router may have the middleware for itself alone."""

    async def create(request: Request) -> Response:
        current_session().add(Item(id=1))
        return Response(status_code=204)

    middleware = [Middleware(DBSessionMiddleware, database=db)]
    route: Route | Mount
    if level == "route":
        route = Route("/part/", create, middleware=middleware)
    elif level == "mount":
        route = Mount("/part", routes=[Route("/", create)], middleware=middleware)
    else:
        route = Mount("/part", Router([Route("/", create)], middleware=middleware))

    exchange = await drive(Starlette(routes=[route]), http_scope("/part/"))

    assert (204, None) == (exchange.status, exchange.error)
    assert [1] == await rows()


async def test_failed_commit_under_a_routes_own_middleware(db, drive, rows):
    """G2: between Starlette's two error layers, too, the app's own handler renders it."""

    async def render(request: Request, error: Exception) -> Response:
        return PlainTextResponse(type(error).__name__, status_code=409)

    async def create(request: Request) -> Response:
        await current_session().execute(sa.insert(Child).values(id=1, item_id=404))
        return Response(status_code=204)

    middleware = [Middleware(DBSessionMiddleware, database=db)]
    app = Starlette(
        routes=[Route("/", create, middleware=middleware)],
        exception_handlers={sa.exc.IntegrityError: render},
    )

    exchange = await drive(app)

    assert (409, b"IntegrityError", None) == (exchange.status, exchange.body, exchange.error)
    assert [] == await rows()


@pytest.mark.parametrize(
    ("status", "expected"), [(404, "rollback"), (304, "rollback"), (503, "rollback")]
)
async def test_raised_http_exception_rolls_back(
    status, expected, db, install, drive, rows, timeline
):
    """G3: what was raised rolls back, whatever its status."""

    async def fail(request: Request) -> Response:
        current_session().add(Item(id=1))
        await current_session().flush()
        raise HTTPException(status)

    exchange = await drive(install(app_of(fail), database=db))

    assert (status, None) == (exchange.status, exchange.error)
    assert ["checkout", "begin", expected, "checkin", f"start {status}"] == timeline[:5]
    assert [] == await rows()


@pytest.mark.parametrize(
    ("status", "committed"), [(200, True), (302, True), (404, True), (500, False), (503, False)]
)
async def test_returned_status_decides(status, committed, db, install, drive, rows):
    """G3: what was returned commits below 500, redirects and 4xx included."""

    async def answer(request: Request) -> Response:
        current_session().add(Item(id=1))
        if status == 302:
            return RedirectResponse("/elsewhere", status_code=status)
        return JSONResponse({}, status_code=status)

    exchange = await drive(install(app_of(answer), database=db))

    assert status == exchange.status
    assert ([1] if committed else []) == await rows()


async def test_error_that_the_endpoint_caught_was_not_raised(db, install, drive, rows):
    """G3: an endpoint that catches its error, and answers afterwards, has raised nothing."""

    async def answer(request: Request) -> Response:
        current_session().add(Item(id=1))
        try:
            raise LookupError
        except LookupError:
            return JSONResponse({}, status_code=404)

    exchange = await drive(install(app_of(answer), database=db))

    assert 404 == exchange.status
    assert [1] == await rows()


async def test_unhandled_error_rolls_back_before_the_500(db, install, drive, rows, timeline):
    """G3: Starlette's 500, in debug mode as well, follows the rollback; the error surfaces."""

    async def fail(request: Request) -> Response:
        current_session().add(Item(id=1))
        await current_session().flush()
        raise LookupError

    exchange = await drive(install(app_of(fail, debug=True), database=db))

    assert 500 == exchange.status
    assert isinstance(exchange.error, LookupError)
    assert [*ROLLED_BACK, "start 500", "last body"] == timeline
    assert [] == await rows()


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
async def test_failed_commit_becomes_starlettes_500(debug, db, drive, rows):
    """G2: the database's own error surfaces; the client sees a 500, with a traceback in debug."""
    ran: list[str] = []

    async def create(request: Request) -> Response:
        await current_session().execute(sa.insert(Child).values(id=1, item_id=404))
        return Response(status_code=201, background=BackgroundTask(ran.append, "background"))

    app = app_of(create, debug=debug)
    app.add_middleware(DBSessionMiddleware, database=db)
    exchange = await drive(app)

    assert 500 == exchange.status
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert debug is (b"IntegrityError" in exchange.body)
    assert ([], []) == (ran, await rows())


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_apps_own_handler_renders_a_failed_commit(sync, db, install, drive, rows):
    """G2: the handler that Starlette has for the error answers, in a thread if it is `def`."""

    def render(request: Request, error: Exception) -> Response:
        current_scope()
        return JSONResponse({"path": request.url.path}, status_code=409)

    async def render_async(request: Request, error: Exception) -> Response:
        return render(request, error)

    async def create(request: Request) -> Response:
        await current_session().execute(sa.insert(Child).values(id=1, item_id=404))
        return Response(status_code=201)

    handlers: Any = {sa.exc.DBAPIError: render if sync else render_async}
    exchange = await drive(install(app_of(create, exception_handlers=handlers), database=db))

    assert (409, b'{"path":"/"}', None) == (exchange.status, exchange.body, exchange.error)
    assert [] == await rows()


async def test_apps_own_handler_that_answers_nothing_leaves_it_to_the_server(
    db, install, drive, rows
):
    """G2: a handler may return no response, as Starlette has it: nothing is sent, no success."""
    handled: list[type[Exception]] = []

    async def note(request: Request, error: Exception) -> None:
        handled.append(type(error))

    async def create(request: Request) -> Response:
        await current_session().execute(sa.insert(Child).values(id=1, item_id=404))
        return Response(status_code=201)

    handlers: Any = {sa.exc.IntegrityError: note}
    exchange = await drive(install(app_of(create, exception_handlers=handlers), database=db))

    assert ([], None) == (exchange.messages, exchange.error)
    assert [sa.exc.IntegrityError] == handled
    assert [] == await rows()


async def test_options_of_one_endpoint(db, install, drive, rows):
    """G3: `session_options` on an endpoint: its policy rolls back the 404 that it returned."""

    @session_options(commit_policy=commit_on_success)
    async def answer(request: Request) -> Response:
        current_session().add(Item(id=1))
        return JSONResponse({}, status_code=404)

    assert 404 == (await drive(install(app_of(answer), database=db))).status
    assert [] == await rows()


async def test_stream_and_background_have_transactions_of_their_own(
    db, install, drive, rows, timeline
):
    """G7, G8: response, body and background each commit at their own end."""

    async def statement(request: Request) -> Response:
        session = current_session()
        session.add(Item(id=1))

        async def lines() -> AsyncIterator[str]:
            session.add(Item(id=2))
            await session.flush()
            yield "line\n"

        async def after() -> None:
            session.add(Item(id=3))

        def after_in_thread() -> None:
            current_session().add(Item(id=4))

        tasks = BackgroundTasks([BackgroundTask(after), BackgroundTask(after_in_thread)])
        return StreamingResponse(lines(), background=tasks)

    exchange = await drive(install(app_of(statement), database=db))

    assert b"line\n" == exchange.body
    assert ["commit", "start 200", "body", "commit", "last body", "commit"] == [
        each for each in timeline if each in {"commit", "start 200", "body", "last body"}
    ]
    assert [1, 2, 3, 4] == await rows()


async def test_sync_iterator_streams_what_the_scope_read(db, install, drive, rows):
    """G7: a `def` generator, stepped in worker threads, reaches the session by the loop."""

    async def statement(request: Request) -> Response:
        session = current_session()

        def lines() -> Any:
            for number in (1, 2):
                current_session().add(Item(id=number))
                yield str(anyio.from_thread.run(session.scalar, sa.select(sa.func.max(Item.id))))

        return StreamingResponse(lines())

    exchange = await drive(install(app_of(statement), database=db))

    assert b"12" == exchange.body
    assert [1, 2] == await rows()


async def test_disconnect_in_mid_stream_rolls_the_body_back(db, install, drive, rows):
    """G7: the client leaves; what the stream wrote is gone, what came before its head stays."""
    gone = asyncio.Event()

    async def statement(request: Request) -> Response:
        session = current_session()
        session.add(Item(id=1))

        async def lines() -> AsyncIterator[str]:
            session.add(Item(id=2))
            await session.flush()
            yield "line\n"
            gone.set()
            await asyncio.Event().wait()

        return StreamingResponse(lines())

    served = install(app_of(statement), database=db)

    async def leaving(scope: Any, receive: Any, send: Any) -> None:
        async def receive_disconnect() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        await served(scope, receive_disconnect, send)

    exchange = await drive(leaving)

    assert (200, b"line\n", False) == (exchange.status, exchange.body, exchange.is_complete)
    assert [1] == await rows()
