"""Replay in frameworks: what they make of a conflict, and what runs once and what each time."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import litestar
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from litestar import Litestar, post
from litestar.middleware import DefineMiddleware
from pydantic import BaseModel
from quart import Quart
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from asgi_dbscope import Database, DBSessionMiddleware, ReplayedError, Retry, current_scope
from asgi_dbscope.testing import inject_conflicts
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Item
from tests.fix_frameworks import answering_disconnect, wrapped

AT_ONCE = Retry(attempts=3, base=0)

AT = pytest.mark.parametrize("at", ["commit", "INSERT"])


class Order(BaseModel):
    """A request's body."""

    number: int


def posted(content: Any) -> tuple[Any, list[Any]]:
    """A request with a JSON body: its ASGI scope, and its messages."""
    encoded = json.dumps(content).encode()
    headers = [
        (b"host", b"test"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(encoded)).encode()),
    ]
    middle = len(encoded) // 2
    messages = [
        {"type": "http.request", "body": encoded[:middle], "more_body": True},
        {"type": "http.request", "body": encoded[middle:], "more_body": False},
    ]
    return http_scope("/orders", "POST", headers=headers), messages


async def post_order(drive: Any, app: Any) -> Any:
    """Post one, as a server would hand it on."""
    scope, messages = posted({"number": 7})
    return await drive(answering_disconnect(app), scope, received=messages)


async def write(db: Database[Any], number: int) -> None:
    """Write a row with the current session."""
    db.session.add(Item(id=number))
    await db.session.flush()


@AT
async def test_fastapi_reads_the_body_anew_and_leaves_its_dependencies_each_time(
    at, install, db, drive, rows
):
    """G16: each attempt has its dependencies entered and left; background work runs once."""
    told: list[str] = []

    async def resource() -> AsyncIterator[None]:
        told.append("enter")
        try:
            yield
        finally:
            told.append("leave")

    def resource_in_thread() -> Iterator[None]:
        told.append("enter in thread")
        try:
            yield
        finally:
            told.append("leave in thread")

    app = FastAPI()

    @app.post("/orders", dependencies=[Depends(resource), Depends(resource_in_thread)])
    async def place(order: Order, request: Request) -> Response:
        assert not hasattr(request.state, "user")
        request.state.user = current_scope().attempt
        await write(db, order.number)
        background = BackgroundTask(told.append, "background")
        return JSONResponse({"attempt": current_scope().attempt}, 201, background=background)

    with inject_conflicts(db, at=at, times=2):
        exchange = await post_order(drive, install(app, database=db, retry=AT_ONCE))

    assert (201, b'{"attempt":3}') == (exchange.status, exchange.body)
    assert exchange.error is None
    assert [7] == await rows()
    for each in ("enter", "leave", "enter in thread", "leave in thread"):
        assert 3 == told.count(each)
    assert 1 == told.count("background")


@AT
async def test_fastapi_answers_the_last_loser_with_503(at, install, db, drive, rows):
    """G16: instead of the framework's own 500."""
    app = FastAPI()

    @app.post("/orders")
    async def place(order: Order) -> None:
        await write(db, order.number)

    with inject_conflicts(db, at=at, times=None) as injected:
        exchange = await post_order(drive, install(app, database=db, retry=AT_ONCE))

    assert 3 == injected.count
    assert (503, b"Service Unavailable") == (exchange.status, exchange.body)
    assert exchange.error is None
    assert [] == await rows()


@AT
async def test_fastapi_handler_answers_the_last_loser_alone(at, install, db, drive, rows):
    """G16: a handler for the conflict is heard where there is no other attempt."""
    app = FastAPI()

    @app.exception_handler(sa.exc.DBAPIError)
    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"attempt": current_scope().attempt}, 409)

    @app.post("/orders", status_code=201)
    async def place(order: Order) -> None:
        await write(db, order.number)

    served = install(app, database=db, retry=AT_ONCE)
    with inject_conflicts(db, at=at, times=None):
        lost = await post_order(drive, served)
    with inject_conflicts(db, at=at, times=2):
        won = await post_order(drive, served)

    assert (409, b'{"attempt":3}') == (lost.status, lost.body)
    assert 201 == won.status
    assert [7] == await rows()


async def test_fastapi_conflict_translated_by_the_endpoint_is_replayed(install, db, drive, rows):
    """G16: an `HTTPException` raised for the conflict is the answer to the last loser."""
    app = FastAPI()

    @app.post("/orders", status_code=201)
    async def place(order: Order) -> None:
        try:
            await write(db, order.number)
        except sa.exc.DBAPIError:
            raise HTTPException(409, "busy") from None

    served = install(app, database=db, retry=AT_ONCE)
    with inject_conflicts(db, at="INSERT", times=None):
        lost = await post_order(drive, served)
    with inject_conflicts(db, at="INSERT", times=2):
        won = await post_order(drive, served)

    assert (409, b'{"detail":"busy"}') == (lost.status, lost.body)
    assert 201 == won.status
    assert [7] == await rows()


async def test_fastapi_catch_all_handler_has_the_last_word(install, db, drive):
    """G16: an app that answers every error in its own words does so for the last loser."""
    handled: list[Exception] = []
    app = FastAPI()

    @app.exception_handler(Exception)
    async def render(request: Request, error: Exception) -> JSONResponse:
        handled.append(error)
        return JSONResponse({}, 500)

    @app.post("/orders", status_code=201)
    async def place(order: Order) -> None:
        await write(db, order.number)

    with inject_conflicts(db, at="INSERT", times=None) as injected:
        exchange = await post_order(drive, install(app, database=db, retry=AT_ONCE))

    assert 3 == injected.count
    assert (500, b"{}") == (exchange.status, exchange.body)
    assert all(isinstance(each, sa.exc.DBAPIError) for each in handled)


async def test_fastapi_catch_all_handler_inside_may_see_why_it_is_unwound(db, drive, rows):
    """G16: around the whole app a catch-all handler is told of a replay, and answers nobody."""
    handled: list[Exception] = []
    app = FastAPI()

    @app.exception_handler(Exception)
    async def render(request: Request, error: Exception) -> JSONResponse:
        handled.append(error)
        return JSONResponse({}, 500)

    @app.post("/orders", status_code=201)
    async def place(order: Order) -> None:
        await write(db, order.number)

    with inject_conflicts(db, times=2):
        exchange = await post_order(drive, wrapped(app, database=db, retry=AT_ONCE))

    assert [ReplayedError, ReplayedError] == [type(each) for each in handled]
    assert 201 == exchange.status
    assert [7] == await rows()


async def test_fastapi_stream_of_the_body_is_sent_by_the_attempt_that_won(db, drive):
    """G16, G18: an endpoint that echoes what it reads, piece by piece, does so in a replay."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db, retry=AT_ONCE)

    class Echo(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send(start(200))
            async for chunk in Request(scope, receive).stream():
                await send(body(chunk, more=True))
            await send(body())

    @app.post("/orders")
    async def echo() -> Response:
        await write(db, 7)
        return Echo()

    with inject_conflicts(db):
        exchange = await post_order(drive, app)

    assert (200, b'{"number": 7}') == (exchange.status, exchange.body)


async def test_state_that_a_base_http_middleware_outside_looks_at_is_the_winners(db, drive):
    """G16, G18: `request.state` outside, used before the request was served, shows the replay's."""
    seen: list[Any] = []

    class Around(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            request.state.request_id = "r1"
            response: Response = await call_next(request)
            seen.append((request.state.request_id, request.state.attempt))
            request.state.is_late = True
            return response

    app = FastAPI()

    @app.post("/orders")
    async def place(request: Request) -> None:
        request.state.attempt = current_scope().attempt
        await write(db, 7)

    app.add_middleware(DBSessionMiddleware, database=db, retry=AT_ONCE)
    app.add_middleware(Around)
    with inject_conflicts(db):
        exchange = await post_order(drive, app)

    assert 200 == exchange.status
    assert [("r1", 2)] == seen


@AT
def test_fastapi_plain_endpoints_are_replayed(at, sync_db, sync_rows):
    """G16: `def` endpoints with a synchronous session, in the framework's threads."""
    from starlette.testclient import TestClient

    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=sync_db, retry=AT_ONCE)

    @app.post("/orders", status_code=201)
    def place(order: Order) -> int:
        sync_db.session.add(Item(id=order.number))
        sync_db.session.flush()
        return current_scope().attempt

    with TestClient(app) as client:
        with inject_conflicts(sync_db, at=at, times=2):
            won = client.post("/orders", json={"number": 7})
        with inject_conflicts(sync_db, at=at, times=None):
            lost = client.post("/orders", json={"number": 8})

    assert (201, 3) == (won.status_code, won.json())
    assert (503, "1") == (lost.status_code, lost.headers["retry-after"])
    assert [7] == sync_rows()


class Passing(BaseHTTPMiddleware):
    """Passes everything on, in a task of its own."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        return await call_next(request)


@AT
@pytest.mark.filterwarnings("ignore:.*is a BaseHTTPMiddleware inside:UserWarning")
@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
async def test_base_http_middleware_hides_no_conflict(is_inside, at, db, drive, rows):
    """G16: the transaction tells what it has lost to, where the exception can't be seen."""
    app = FastAPI()
    if is_inside:
        app.add_middleware(Passing)
    app.add_middleware(DBSessionMiddleware, database=db, retry=AT_ONCE)
    if not is_inside:
        app.add_middleware(Passing)

    @app.post("/orders", status_code=201)
    async def place(order: Order) -> None:
        await write(db, order.number)

    @app.post("/translated", status_code=201)
    async def translate(order: Order) -> None:
        try:
            await write(db, order.number)
        except sa.exc.DBAPIError:
            raise HTTPException(409) from None

    with inject_conflicts(db, at=at, times=2):
        exchange = await post_order(drive, app)
    scope, messages = posted({"number": 8})
    scope["path"] = "/translated"
    with inject_conflicts(db, at=at, times=2):
        translated = await drive(answering_disconnect(app), scope, received=messages)

    assert 201 == exchange.status
    assert 201 == translated.status
    assert [7, 8] == await rows()


@AT
@pytest.mark.parametrize("way", ["middleware", "wrapped"])
async def test_litestar_is_replayed(way, at, db, drive, rows):
    """G16: in Litestar, as one of its middlewares and around the whole app."""
    attempts: list[int] = []

    @post("/orders")
    async def place(request: litestar.Request[Any, Any, Any]) -> dict[str, int]:
        attempts.append(current_scope().attempt)
        await write(db, (await request.json())["number"])
        return {"attempt": current_scope().attempt}

    options: Any = {"openapi_config": None}
    if way == "middleware":
        middleware = DefineMiddleware(DBSessionMiddleware, database=db, retry=AT_ONCE)
        app: Any = Litestar([place], middleware=[middleware], **options)
    else:
        app = DBSessionMiddleware(Litestar([place], **options), database=db, retry=AT_ONCE)

    with inject_conflicts(db, at=at, times=None):
        lost = await post_order(drive, app)
    with inject_conflicts(db, at=at, times=2):
        won = await post_order(drive, app)

    assert [1, 2, 3] * 2 == attempts
    assert 503 == lost.status
    assert (201, b'{"attempt":3}') == (won.status, won.body)
    assert [7] == await rows()


async def test_litestar_reads_a_form_and_its_files_anew(db, drive, rows):
    """G16: Litestar keeps what it has read, and closes the files, when the endpoint is left."""
    read: list[Any] = []

    @post("/orders")
    async def place(request: litestar.Request[Any, Any, Any]) -> None:
        form = await request.form()
        read.append((form["number"], await form["file"].read()))
        await form["file"].close()  # as newer Litestar does by itself
        await write(db, 7)

    middleware = DefineMiddleware(DBSessionMiddleware, database=db, retry=AT_ONCE)
    app = Litestar([place], middleware=[middleware], openapi_config=None)
    content = (
        b'--part\r\nContent-Disposition: form-data; name="number"\r\n\r\n7\r\n'
        b'--part\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\n"
        b"content\r\n--part--\r\n"
    )
    headers = [
        (b"content-type", b"multipart/form-data; boundary=part"),
        (b"content-length", str(len(content)).encode()),
    ]
    scope = http_scope("/orders", "POST", headers=headers)
    with inject_conflicts(db, times=2):
        exchange = await drive(
            answering_disconnect(app), scope, received=[{"type": "http.request", "body": content}]
        )

    assert 201 == exchange.status
    assert [("7", b"content")] * 3 == read
    assert [7] == await rows()


async def test_litestar_parses_json_anew(db, drive, rows):
    """G16: what an attempt that lost has taken out of it is there again."""

    @post("/orders")
    async def place(request: litestar.Request[Any, Any, Any]) -> None:
        await write(db, (await request.json()).pop("number"))

    middleware = DefineMiddleware(DBSessionMiddleware, database=db, retry=AT_ONCE)
    app = Litestar([place], middleware=[middleware], openapi_config=None)
    with inject_conflicts(db, times=2):
        exchange = await post_order(drive, app)

    assert 201 == exchange.status
    assert [7] == await rows()


@AT
async def test_quart_is_replayed(at, db, drive, rows):
    """G16: Quart turns every error into a response that tells nobody of it."""
    app = Quart(__name__)

    @app.post("/orders")
    async def place() -> tuple[dict[str, int], int]:
        from quart import request

        content = await request.get_json()
        await write(db, content["number"])
        return {"attempt": current_scope().attempt}, 201

    served = DBSessionMiddleware(app, database=db, retry=AT_ONCE)
    with inject_conflicts(db, at=at, times=2):
        exchange = await post_order(drive, served)

    assert 201 == exchange.status
    assert {"attempt": 3} == json.loads(exchange.body)
    assert [7] == await rows()
