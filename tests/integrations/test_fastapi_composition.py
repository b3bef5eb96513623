"""FastAPI: options, mounted apps, websockets, other middleware, lifespan, the test client."""

import asyncio
import gzip
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    LateOptionsError,
    SessionScope,
    WebSocketSessionError,
    current_scope,
    current_session,
    session_options,
)
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item
from tests.fix_frameworks import added, wrapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Starlette would like another HTTP client.
    from fastapi.testclient import TestClient


# --------------------------------------------------------------------------------------
# Options of an endpoint
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_options_keep_the_endpoints_parameters(sync, db, install, drive):
    """G18: FastAPI still reads the signature of an endpoint under `session_options`."""
    app = FastAPI()

    if sync:

        @app.get("/items/{item_id}")
        @session_options(read_only=True)
        def endpoint(item_id: int, q: str = "") -> dict[str, Any]:
            return {"item": item_id, "q": q, "read_only": current_scope().options.read_only}

    else:

        @app.get("/items/{item_id}")
        @session_options(read_only=True)
        async def endpoint_async(item_id: int, q: str = "") -> dict[str, Any]:
            return {"item": item_id, "q": q, "read_only": current_scope().options.read_only}

    exchange = await drive(
        install(app, database=db), http_scope("/items/7", query_string=b"q=needle")
    )

    assert b'{"item":7,"q":"needle","read_only":true}' == exchange.body


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_read_only_endpoint_is_refused_its_writes_by_the_database(
    engine, db, install, drive, rows
):
    """G2, G19: the write surfaces as the database's error; the next request may write again."""
    app = FastAPI()

    @app.post("/report")
    @session_options(read_only=True)
    async def report(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))

    @app.post("/items")
    async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=2))

    served = install(app, database=db)

    assert isinstance((await drive(served, http_scope("/report", "POST"))).error, sa.exc.DBAPIError)
    assert 200 == (await drive(served, http_scope("/items", "POST"))).status
    assert [2] == await rows()


async def test_options_as_a_dependency_come_before_the_first_use(db, install, drive):
    """G3: `Depends(options.apply)` on the route holds for dependencies that use the session."""
    app = FastAPI()
    serializable = session_options(isolation_level="SERIALIZABLE")

    async def level(session: Annotated[AsyncSession, Depends(db.get_session)]) -> str:
        connection = await session.connection()
        return str(await connection.get_isolation_level())

    @app.get("/", dependencies=[Depends(serializable.apply)])
    async def endpoint(found: Annotated[str, Depends(level)]) -> str:
        return found

    assert b'"SERIALIZABLE"' == (await drive(install(app, database=db))).body


async def test_options_after_the_first_use_are_an_error(db, install, drive, rows):
    """G3: an option that comes too late to hold is told, and nothing is committed."""
    app = FastAPI()

    async def early(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))
        await session.flush()

    @app.get("/", dependencies=[Depends(early)])
    @session_options(read_only=True)
    async def endpoint() -> None: ...

    exchange = await drive(install(app, database=db))

    assert isinstance(exchange.error, LateOptionsError)
    assert [] == await rows()


# --------------------------------------------------------------------------------------
# Apps in apps, and other middleware
# --------------------------------------------------------------------------------------


async def test_mounted_app_shares_the_requests_scope(db, install, drive, rows, timeline):
    """G11: an app mounted below writes to the same session, which is committed once."""
    inner = FastAPI()
    seen: list[SessionScope[Any]] = []

    @inner.post("/items")
    async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        seen.append(current_scope())
        session.add(Item(id=1))

    app = FastAPI()
    app.mount("/inner", inner)

    exchange = await drive(install(app, database=db), http_scope("/inner/items", "POST"))

    assert 200 == exchange.status
    assert "POST /inner/items" in repr(seen[0])
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


async def test_second_instance_inside_does_nothing(db, install, drive, rows, timeline):
    """G18: a mounted app that has the middleware itself joins the request's scope."""
    inner = FastAPI()
    inner.add_middleware(DBSessionMiddleware, database=db)

    @inner.post("/")
    async def create() -> None:
        current_session().add(Item(id=1))

    app = FastAPI()
    app.mount("/inner", inner)

    exchange = await drive(install(app, database=db), http_scope("/inner/", "POST"))

    assert 200 == exchange.status
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == timeline
    assert [1] == await rows()


async def test_handler_of_a_mounted_app_renders_its_failed_commit(db, install, drive):
    """G2: the handlers that Starlette would ask are those of the app that answered."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"inner": True}, status_code=409)

    inner = FastAPI(exception_handlers={sa.exc.IntegrityError: render})

    @inner.post("/")
    async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        await session.execute(sa.insert(Child).values(id=1, item_id=404))

    app = FastAPI()
    app.mount("/inner", inner)

    exchange = await drive(install(app, database=db), http_scope("/inner/", "POST"))

    assert (409, b'{"inner":true}', None) == (exchange.status, exchange.body, exchange.error)


@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize("other", [GZipMiddleware, CORSMiddleware])
async def test_other_middleware_outside_and_inside(other, place, db, drive, rows, timeline):
    """G1, G18: compression and CORS, on either side, change nothing about what is committed."""
    app = FastAPI()
    options = {"allow_origins": ["*"]} if other is CORSMiddleware else {"minimum_size": 10}

    @app.post("/")
    async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> dict[str, str]:
        session.add(Item(id=1))
        return {"long": "x" * 2000}

    @app.get("/")
    async def stream(session: Annotated[AsyncSession, Depends(db.get_session)]) -> Any:
        session.add(Item(id=2))

        async def lines() -> AsyncIterator[bytes]:
            for number in (3, 4):
                session.add(Item(id=number))
                await session.flush()
                yield b"x" * 1000

        return StreamingResponse(lines())

    if place == "inside":
        app.add_middleware(other, **options)
    app.add_middleware(DBSessionMiddleware, database=db)
    if place == "outside":
        app.add_middleware(other, **options)
    headers = [(b"accept-encoding", b"gzip"), (b"origin", b"https://example.org")]

    created = await drive(app, http_scope("/", "POST", headers=headers))
    first = list(timeline)
    streamed = await drive(app, http_scope("/", headers=headers))

    assert (200, 200) == (created.status, streamed.status)
    assert ["checkout", "begin", "commit", "checkin", "start 200", "last body"] == first
    assert "last body" == timeline[-1]
    body = gzip.decompress(streamed.body) if other is GZipMiddleware else streamed.body
    assert b"x" * 2000 == body
    assert [1, 2, 3, 4] == await rows()


@pytest.mark.parametrize("place", ["outside", "inside"])
async def test_failed_commit_passes_cors(place, db, drive, rows):
    """G2: the handler's error response goes through whatever is outside, headers included."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    app = FastAPI(exception_handlers={sa.exc.IntegrityError: render})

    @app.post("/")
    async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        await session.execute(sa.insert(Child).values(id=1, item_id=404))

    if place == "inside":
        app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(DBSessionMiddleware, database=db)
    if place == "outside":
        app.add_middleware(CORSMiddleware, allow_origins=["*"])

    exchange = await drive(
        app, http_scope("/", "POST", headers=[(b"origin", b"https://example.org")])
    )

    assert (409, None) == (exchange.status, exchange.error)
    names = [name for name, _ in exchange.messages[0]["headers"]]
    assert (place == "outside") is (b"access-control-allow-origin" in names)


async def test_static_files_cost_nothing(db, install, drive, timeline, tmp_path):
    """G5, G18: files served beside the endpoints have no session and no connection."""
    (tmp_path / "file.txt").write_text("content")
    app = FastAPI()
    app.mount("/static", StaticFiles(directory=tmp_path))

    exchange = await drive(install(app, database=db), http_scope("/static/file.txt"))

    assert (200, b"content") == (exchange.status, exchange.body)
    assert "start 200" == timeline[0]
    assert {"start 200", "body", "last body"} >= set(timeline)


async def test_overridden_dependency_takes_the_place_of_the_session(db, install, drive):
    """G18: `app.dependency_overrides[db.get_session]` works as for any dependency."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(session: Annotated[Any, Depends(db.get_session)]) -> str:
        return str(session)

    app.dependency_overrides[db.get_session] = lambda: "fake"

    assert b'"fake"' == (await drive(install(app, database=db))).body


async def test_two_databases_commit_in_their_order(make_engine, db, install, drive, rows, engine):
    """G1: each database of `databases=` has its own session, all committed before the head."""
    reports = Database(engine.url, name="reports")
    app = FastAPI()

    @app.post("/")
    async def create(
        first: Annotated[AsyncSession, Depends(db.get_session)],
        second: Annotated[AsyncSession, Depends(reports.get_session)],
    ) -> bool:
        assert current_session("reports") is second
        assert current_session("default") is first
        await first.execute(sa.select(Item))
        second.add(Item(id=2))
        return first is second

    exchange = await drive(install(app, databases=[db, reports]), http_scope("/", "POST"))
    await reports.dispose()

    assert (200, b"false") == (exchange.status, exchange.body)
    assert [2] == await rows()


# --------------------------------------------------------------------------------------
# Websockets and lifespan
# --------------------------------------------------------------------------------------


async def test_websocket_opens_a_scope_for_each_message(engine, db, install, rows):
    """G17: no connection between messages; a session outside of a block is refused."""
    app = FastAPI()
    checked_out: list[int] = []
    errors: list[BaseException] = []

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        for number in (1, 2):
            text = await websocket.receive_text()
            async with db.session_scope() as session:
                session.add(Item(id=number, note=text))
                await session.flush()
            checked_out.append(engine.pool.checkedout())
            await websocket.send_text(text)
        try:
            current_session()
        except WebSocketSessionError as error:
            errors.append(error)
        await websocket.close()

    served = install(app, database=db)
    messages = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "one"},
        {"type": "websocket.receive", "text": "two"},
    ]
    sent: list[str] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {
        **{key: value for key, value in http_scope().items() if key != "method"},
        "type": "websocket",
        "subprotocols": [],
    }
    await served(scope, receive, send)

    assert ["accept", "send", "send", "close"] == [each.rpartition(".")[2] for each in sent]
    assert [0, 0] == checked_out
    assert 1 == len(errors)
    assert [1, 2] == await rows()


async def test_lifespan_disposes_of_an_engine_made_from_a_url(engine, install, drive, rows):
    """G17: the app's lifespan passes through; an engine of our own is disposed of at its end."""
    owned = Database(engine.url)
    states: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        states.append("up")
        yield
        states.append("down")

    app = FastAPI(lifespan=lifespan)

    @app.post("/{item_id}")
    async def create(item_id: int) -> None:
        owned.session.add(Item(id=item_id))

    served = install(app, database=owned)
    for item_id in (1, 2):
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        serving = asyncio.create_task(served({"type": "lifespan"}, inbox.get, outbox.put))
        await inbox.put({"type": "lifespan.startup"})
        assert "lifespan.startup.complete" == (await outbox.get())["type"]

        assert 200 == (await drive(served, http_scope(f"/{item_id}", "POST"))).status
        assert owned.owned_engine is not None
        used: Any = owned.owned_engine.pool
        assert 1 == used.checkedin()

        await inbox.put({"type": "lifespan.shutdown"})
        assert "lifespan.shutdown.complete" == (await outbox.get())["type"]
        await serving
        assert owned.owned_engine.pool is not used
        assert 0 == used.checkedin()

    assert ["up", "down"] * 2 == states
    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# The framework's own test client
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("way", [added, wrapped])
async def test_test_client_is_raised_the_databases_own_error(engine, way):
    """G2: not a RuntimeError about a response that has started; and asked to, it gets a 500."""
    db = Database(create_async_engine(engine.url, poolclass=sa.NullPool))

    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    def serve(**options: Any) -> Any:
        app = FastAPI(**options)

        @app.post("/")
        async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
            await session.execute(sa.insert(Child).values(id=1, item_id=404))

        return way(app, database=db)

    def try_them() -> tuple[BaseException, int, int]:
        with pytest.raises(sa.exc.IntegrityError) as caught, TestClient(serve()) as client:
            client.post("/")
        with TestClient(serve(), raise_server_exceptions=False) as client:
            unhandled = client.post("/").status_code
        handlers = {sa.exc.IntegrityError: render}
        with TestClient(serve(exception_handlers=handlers)) as client:
            return caught.value, unhandled, client.post("/").status_code

    error, unhandled, handled = await asyncio.to_thread(try_them)

    assert "was rolled back" in error.__notes__[0]
    assert (500, 409) == (unhandled, handled)
