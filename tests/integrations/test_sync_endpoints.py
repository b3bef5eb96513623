"""`def` endpoints of FastAPI, Starlette and Litestar, with synchronous sessions."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import anyio.to_thread
import pytest
import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from litestar import Litestar, post
from litestar.di import Provide
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    EventLoopMismatchError,
    current_session,
    session_options,
)
from tests.fix_asgi import Drive, Exchange, http_scope
from tests.fix_database import Child, Item, Timeline
from tests.fix_frameworks import Install, innermost
from tests.sync_apps import Rows, committed, narrow_threads

pytest_plugins = ["tests.fix_sync"]

SyncDatabase = Database[Session]
MakeEngine = Callable[..., sa.Engine]


def write(db: SyncDatabase, number: int) -> None:
    """Write an item with the current session."""
    db.session.add(Item(id=number))
    db.session.flush()


# --------------------------------------------------------------------------------------
# FastAPI
# --------------------------------------------------------------------------------------


async def test_commits_what_a_def_endpoint_was_handed(
    install: Install,
    drive: Drive,
    sync_db: SyncDatabase,
    sync_rows: Rows,
    timeline: Timeline,
) -> None:
    """G1, G6: the session of `Depends(db.get_session)` is committed before the head goes out."""
    app = FastAPI()

    @app.post("/items/{item_id}", status_code=201)
    def create(
        item_id: int, session: Annotated[Session, Depends(sync_db.get_session)]
    ) -> dict[str, int]:
        session.add(Item(id=item_id))
        return {"id": item_id}

    exchange = await drive(install(app, database=sync_db), http_scope("/items/7", "POST"))

    assert (201, b'{"id":7}') == (exchange.status, exchange.body)
    assert ["checkout", "begin", "commit", "checkin", "start 201", "last body"] == timeline
    assert [7] == sync_rows()


async def test_needs_no_more_than_a_synchronous_engine(
    install: Install, drive: Drive, sync_engine: sa.Engine, sync_rows: Rows
) -> None:
    """G1: with an engine alone `current_session()` is a `Session`, and committed."""
    app = FastAPI()

    @app.post("/")
    def create() -> None:
        session: Any = current_session()
        assert isinstance(session, Session)
        session.add(Item(id=1))

    exchange = await drive(install(app, engine=sync_engine), http_scope("/", "POST"))

    assert (200, [1]) == (exchange.status, sync_rows())


async def test_dependencies_and_endpoint_in_their_threads_share_the_session(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G11: `def` dependencies, with `yield` or not, nested ones and the endpoint: one session."""
    app = FastAPI()
    seen: list[Session] = []

    SessionDep = Annotated[Session, Depends(sync_db.get_session)]  # noqa: N806 - a type

    def user(session: SessionDep) -> int:
        seen.append(session)
        write(sync_db, 1)
        return 1

    def unit(user: Annotated[int, Depends(user)]) -> Iterator[Session]:
        with sync_db.get_session() as session:
            seen.append(session)
            yield session

    async def asynchronous() -> None:
        seen.append(await sync_db.get_session())

    @app.post("/", dependencies=[Depends(asynchronous)])
    def create(session: SessionDep, unit: Annotated[Session, Depends(unit)]) -> None:
        seen.extend([session, unit, sync_db.session])
        write(sync_db, 2)

    exchange = await drive(install(app, database=sync_db), http_scope("/", "POST"))

    assert (200, [1, 2]) == (exchange.status, sync_rows())
    assert (6, 1) == (len(seen), len(set(map(id, seen))))


async def test_raised_http_exception_rolls_back_and_a_returned_404_commits(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G3: what the endpoint's thread raised rolls back; what it returned doesn't."""
    app = FastAPI()

    @app.post("/raise")
    def raise_it() -> None:
        write(sync_db, 1)
        raise HTTPException(404)

    @app.post("/return")
    def return_it() -> JSONResponse:
        write(sync_db, 2)
        return JSONResponse({}, 404)

    asgi = install(app, database=sync_db)
    statuses = [
        (await drive(asgi, http_scope(path, "POST"))).status for path in ("/raise", "/return")
    ]

    assert ([404, 404], [2]) == (statuses, sync_rows())


async def test_apps_own_handler_renders_a_failed_commit(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G2: the handler that is registered for the database's error answers, with no session."""
    app = FastAPI()

    @app.exception_handler(sa.exc.IntegrityError)
    def conflict(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "conflict"}, 409)

    @app.post("/", status_code=201)
    def create() -> None:
        sync_db.session.add(Child(id=1, item_id=99))

    exchange = await drive(install(app, database=sync_db), http_scope("/", "POST"))

    assert (409, b'{"error":"conflict"}') == (exchange.status, exchange.body)
    assert [] == sync_rows()


async def test_def_generator_streams_in_a_transaction_of_its_own(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G7: a `def` generator's writes are committed before the last body message."""
    app = FastAPI()

    @app.get("/")
    def stream() -> StreamingResponse:
        write(sync_db, 1)

        def pieces() -> Iterator[str]:
            for number in (2, 3):
                write(sync_db, number)
                yield f"{number} "

        return StreamingResponse(pieces())

    exchange = await drive(install(app, database=sync_db))

    assert (200, b"2 3 ", [1, 2, 3]) == (exchange.status, exchange.body, sync_rows())
    assert ["commit", "checkin", "last body"] == timeline[-3:]
    assert timeline.index("checkin") < timeline.index("start 200")


async def test_def_generator_that_raises_is_rolled_back_and_torn(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G7: an exception in a `def` generator rolls its transaction back; no clean end."""
    app = FastAPI()

    @app.get("/")
    def stream() -> StreamingResponse:
        def pieces() -> Iterator[str]:
            write(sync_db, 1)
            yield "piece"
            raise ValueError("boom")

        return StreamingResponse(pieces())

    exchange = await drive(install(app, database=sync_db))

    assert isinstance(innermost(exchange.error), ValueError)
    assert (False, []) == (exchange.is_complete, sync_rows())


async def test_held_stream_reads_on_in_the_same_transaction(
    install: Install, drive: Drive, sync_db: SyncDatabase, timeline: Timeline
) -> None:
    """G7: with stream="hold" a server-side cursor of a `def` endpoint goes on in the body."""
    with sync_db.session_scope() as session:
        session.add_all([Item(id=number) for number in range(5)])
    timeline.clear()
    app = FastAPI()

    @app.get("/", dependencies=[Depends(session_options(stream="hold").apply)])
    def stream() -> StreamingResponse:
        ids = sync_db.session.scalars(sa.select(Item.id), execution_options={"yield_per": 2})
        return StreamingResponse(f"{number} " for number in ids)

    exchange = await drive(install(app, database=sync_db))

    assert b"0 1 2 3 4 " == exchange.body
    assert 1 == timeline.count("begin")
    assert ["commit", "checkin", "last body"] == timeline[-3:]


async def test_def_background_task_goes_on_with_the_session(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G8: a `def` background task has a transaction of its own, and no connection before it."""
    app = FastAPI()

    @app.post("/", status_code=201)
    def create(background: BackgroundTasks) -> None:
        item = Item(id=1)
        sync_db.session.add(item)

        def finish() -> None:
            item.note = "sent"
            write(sync_db, 2)

        background.add_task(finish)

    exchange = await drive(install(app, database=sync_db), http_scope("/", "POST"))

    assert (201, [1, 2]) == (exchange.status, sync_rows())
    assert [*_TRANSACTION, "start 201", "last body", *_TRANSACTION] == timeline


_TRANSACTION = ["checkout", "begin", "commit", "checkin"]


async def test_session_in_an_async_endpoint_is_refused(
    install: Install, drive: Drive, sync_db: SyncDatabase
) -> None:
    """A synchronous session in an `async def` endpoint would stop the loop: a clear error."""
    app = FastAPI()

    @app.get("/")
    async def ask() -> None:
        sync_db.session.scalar(sa.select(1))

    exchange = await drive(install(app, database=sync_db))

    error = innermost(exchange.error)
    assert 500 == exchange.status
    assert isinstance(error, EventLoopMismatchError)
    assert "`def` endpoint" in str(error)


async def test_transactional_service_serves_endpoints_and_scripts(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """One decorated function joins a request's transaction, and is one by itself in a script."""

    @sync_db.transactional
    def place(number: int) -> None:
        write(sync_db, number)
        sync_db.on_commit(timeline.append, f"placed {number}")

    app = FastAPI()

    @app.post("/")
    def create() -> None:
        place(1)
        place(2)

    await drive(install(app, database=sync_db), http_scope("/", "POST"))
    in_request = [each for each in timeline if each not in _TRANSACTION]
    await asyncio.to_thread(place, 3)

    assert ["placed 1", "placed 2", "start 200", "last body"] == in_request
    assert [1, 2, 3] == sync_rows()


async def test_both_kinds_of_database_in_one_app(
    install: Install,
    drive: Drive,
    sync_db: SyncDatabase,
    sync_rows: Rows,
    make_engine: Callable[..., AsyncEngine],
) -> None:
    """G1, G3: an endpoint writes with both; a success commits both, an error neither."""
    engine = make_engine("sqlite")
    async with engine.begin() as connection:
        await connection.run_sync(Item.metadata.create_all)
    other = Database(engine, name="other")
    app = FastAPI()

    def audit(number: int) -> None:
        write(sync_db, number)

    @app.post("/{number}", dependencies=[Depends(audit)])
    async def create(
        number: int, session: Annotated[AsyncSession, Depends(other.get_session)]
    ) -> None:
        session.add(Item(id=number + 100))
        await session.flush()
        if number == 2:
            raise HTTPException(400)

    asgi = install(app, databases=[sync_db, other])
    statuses = [(await drive(asgi, http_scope(f"/{number}", "POST"))).status for number in (1, 2)]
    async with engine.begin() as connection:
        found = (await connection.scalars(sa.select(Item.id))).all()
    await engine.dispose()

    assert ([200, 400], [1], [101]) == (statuses, sync_rows(), found)


def test_websocket_commits_each_message(sync_db: SyncDatabase, sync_rows: Rows) -> None:
    """G17: each message has a session in a worker thread, and none is held between them."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=sync_db)

    @sync_db.session_scope
    def place(number: int) -> None:
        sync_db.session.add(Item(id=number))

    @app.websocket("/")
    async def orders(websocket: WebSocket) -> None:
        await websocket.accept()
        for _ in range(2):
            number = int(await websocket.receive_text())
            await run_in_threadpool(place, number)
            await websocket.send_text(f"placed {number}")
        await websocket.close()

    with TestClient(app) as client, client.websocket_connect("/") as websocket:
        for number in (1, 2):
            websocket.send_text(str(number))
            assert f"placed {number}" == websocket.receive_text()
            assert number == len(sync_rows())


async def test_base_http_middleware_sees_the_endpoints_session(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows
) -> None:
    """G11: a BaseHTTPMiddleware outside leaves the session to dependency and endpoint."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=sync_db)

    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)

    def first() -> None:
        write(sync_db, 1)

    @app.post("/", dependencies=[Depends(first)])
    def create() -> None:
        write(sync_db, 2)

    exchange = await drive(app, http_scope("/", "POST"))

    assert (200, [1, 2]) == (exchange.status, sync_rows())


# --------------------------------------------------------------------------------------
# Starlette, Litestar
# --------------------------------------------------------------------------------------


async def test_starlette_def_endpoint_and_background_task(
    install: Install, drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G1, G8: Starlette's `def` endpoint is committed before the head, its task after it."""

    def create(request: Any) -> Response:
        write(sync_db, 1)
        return Response(status_code=201, background=BackgroundTask(write, sync_db, 2))

    app = Starlette(routes=[Route("/", create, methods=["POST"])])

    exchange = await drive(install(app, database=sync_db), http_scope("/", "POST"))

    assert (201, [1, 2]) == (exchange.status, sync_rows())
    assert [*_TRANSACTION, "start 201", "last body", *_TRANSACTION] == timeline


# The new spelling is not known to the oldest Litestar that we run.
@pytest.mark.filterwarnings("ignore:.*Inferred dependency field")
async def test_litestar_handler_in_a_thread(
    drive: Drive, sync_db: SyncDatabase, sync_rows: Rows, timeline: Timeline
) -> None:
    """G1, G11: a Litestar handler with `sync_to_thread` is handed the session, and committed."""

    @post("/", sync_to_thread=True, dependencies={"session": Provide(sync_db.get_session)})
    def create(session: Any) -> dict[str, bool]:
        session.add(Item(id=1))
        return {"same": session is sync_db.session}

    app = DBSessionMiddleware(Litestar([create]), database=sync_db)

    exchange = await drive(app, http_scope("/", "POST"))

    assert (201, b'{"same":true}', [1]) == (exchange.status, exchange.body, sync_rows())
    assert [*_TRANSACTION, "start 201", "last body"] == timeline


# --------------------------------------------------------------------------------------
# Two hundred at once
# --------------------------------------------------------------------------------------


def fastapi_app(db: SyncDatabase) -> Any:
    """A FastAPI app whose `def` endpoint writes."""
    app = FastAPI()

    @app.post("/{number}", status_code=201)
    def create(number: int) -> None:
        write(db, number)

    return app


def starlette_app(db: SyncDatabase) -> Any:
    """A Starlette app whose `def` endpoint writes."""

    def create(request: Any) -> Response:
        write(db, request.path_params["number"])
        return Response(status_code=201)

    return Starlette(routes=[Route("/{number:int}", create, methods=["POST"])])


async def rush(drive: Drive, app: Any, count: int) -> list[int | None]:
    """Send *count* requests at once; return their statuses."""
    exchanges = await asyncio.gather(
        *(drive(app, http_scope(f"/{number}", "POST")) for number in range(1, count + 1))
    )
    return [exchange.status for exchange in exchanges]


@pytest.mark.parametrize("driver", ["sqlite", "psycopg"])
@pytest.mark.parametrize("make_app", [fastapi_app, starlette_app])
@pytest.mark.once
async def test_two_connections_serve_two_hundred_def_requests(
    drive: Drive, make_sync_engine: MakeEngine, make_app: Callable[..., Any], driver: str
) -> None:
    """G14: pool_size=2, the default 40 threads, 200 writing `def` requests: all are committed."""
    engine = make_sync_engine(driver, pool_size=2, max_overflow=0, pool_timeout=30)
    db = Database(engine)
    app = make_app(db)
    app.add_middleware(DBSessionMiddleware, database=db)

    statuses = await rush(drive, app, 200)

    assert [201] * 200 == statuses
    assert list(range(1, 201)) == committed(engine)


@pytest.mark.parametrize("shared", [False, True])
async def test_endings_of_def_endpoints_wait_for_no_thread_of_theirs(
    drive: Drive, make_sync_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """G14: all threads are of `def` endpoints that wait for a connection; *shared* is the control:
    there those who could give theirs back need a thread for it.
    """
    timeout = 0.5 if shared else 30
    engine = make_sync_engine("psycopg", pool_size=2, max_overflow=0, pool_timeout=timeout)
    db = Database(engine)
    loop = asyncio.get_running_loop()
    narrow_threads(monkeypatch, db, 4, shared=shared)
    holding, waiting = asyncio.Semaphore(0), asyncio.Semaphore(0)
    go_on = asyncio.Event()
    app = FastAPI()

    @app.post("/hold/{number}", status_code=201)
    async def hold(number: int) -> None:
        await run_in_threadpool(write, db, number)
        holding.release()
        await go_on.wait()

    @app.post("/{number}", status_code=201)
    def create(number: int) -> None:
        loop.call_soon_threadsafe(waiting.release)
        write(db, number)

    def send(path: str) -> asyncio.Task[Exchange]:
        served = drive(DBSessionMiddleware(app, database=db), http_scope(path, "POST"))
        return asyncio.ensure_future(served)

    holders = [send(f"/hold/{number}") for number in range(2)]
    for _ in holders:
        await holding.acquire()
    waiters = [send(f"/{number}") for number in range(2, 6)]
    for _ in waiters:
        await waiting.acquire()
    go_on.set()
    statuses = [each.status for each in await asyncio.gather(*holders, *waiters)]

    assert [201] * 2 == statuses[:2]
    assert shared == (503 in statuses[2:])  # QueuePool's TimeoutError


@pytest.mark.parametrize(("threads", "releases"), [(50, False), (40, True)])
async def test_requests_that_query_in_two_threads_need_more_of_them_or_a_release(
    drive: Drive, make_sync_engine: MakeEngine, threads: int, releases: bool
) -> None:
    """G14: either more threads than requests at once, or a dependency that holds no connection."""
    engine = make_sync_engine("psycopg", pool_size=2, max_overflow=0, pool_timeout=30)
    db = Database(engine)
    app = FastAPI()

    def user() -> None:
        db.session.scalar(sa.select(1))
        if releases:
            db.release()

    @app.post("/{number}", status_code=201, dependencies=[Depends(user)])
    def create(number: int) -> None:
        write(db, number)

    limiter = anyio.to_thread.current_default_thread_limiter()
    tokens, limiter.total_tokens = limiter.total_tokens, threads
    try:
        statuses = await rush(drive, DBSessionMiddleware(app, database=db), 50)
    finally:
        limiter.total_tokens = tokens

    assert [201] * 50 == statuses
    assert list(range(1, 51)) == committed(engine)
