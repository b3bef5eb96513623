"""FastAPI: dependencies, sync endpoints, error handlers, responses that outlive the endpoint."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio.from_thread
import fastapi
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    commit_on_success,
    current_session,
    session_options,
)
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item

VERSION = tuple(int(part) for part in fastapi.__version__.split(".")[:2])

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]


# --------------------------------------------------------------------------------------
# The response's transaction
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_commits_what_a_dependency_was_handed(engine, db, install, drive, rows, timeline):
    """G1, G6: the session of `Depends(db.get_session)` is committed before the head goes out."""
    app = FastAPI()

    @app.post("/items/{item_id}", status_code=201)
    async def create(
        item_id: int, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> dict[str, int]:
        session.add(Item(id=item_id))
        return {"id": item_id}

    exchange = await drive(install(app, database=db), http_scope("/items/7", "POST"))

    assert (201, b'{"id":7}') == (exchange.status, exchange.body)
    assert [*COMMITTED, "start 201", "last body"] == timeline
    assert [7] == await rows()


async def test_needs_no_more_than_an_engine(engine, install, drive, rows):
    """G1: with an engine alone `current_session()` is committed."""
    app = FastAPI()

    @app.post("/")
    async def create() -> None:
        current_session().add(Item(id=1))

    exchange = await drive(install(app, engine=engine), http_scope("/", "POST"))

    assert 200 == exchange.status
    assert [1] == await rows()


async def test_sync_endpoint_in_its_thread_writes_to_the_requests_session(
    db, install, drive, rows, timeline
):
    """G11: a `def` endpoint reaches the scope from its worker thread, and queries by the loop."""
    app = FastAPI()
    sessions = []

    @app.post("/")
    def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> list[int]:
        sessions.extend([session, current_session(), db.session])
        current_session().add(Item(id=1))
        found = anyio.from_thread.run(session.scalars, sa.select(Item.id))
        return list(found)

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert (200, b"[1]") == (exchange.status, exchange.body)
    assert 1 == len(set(map(id, sessions)))
    assert [*COMMITTED, "start 200", "last body"] == timeline
    assert [1] == await rows()


async def test_one_session_however_it_is_reached(db, install, drive):
    """G11: dependencies of both kinds, nested, child tasks and middlewares share one session."""
    seen: list[AsyncSession] = []

    async def service() -> None:
        seen.append(current_session())

    async def by_hand() -> AsyncSession:
        session: AsyncSession = db.session
        return session

    def in_thread() -> AsyncSession:
        return current_session()

    async def nested(
        one: Annotated[AsyncSession, Depends(db.get_session)],
        two: Annotated[AsyncSession, Depends(by_hand)],
        three: Annotated[AsyncSession, Depends(in_thread)],
    ) -> list[AsyncSession]:
        return [one, two, three]

    async def exiting() -> AsyncIterator[AsyncSession]:
        yield db.session
        seen.append(db.session)

    class Inner:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http":
                seen.append(current_session())
            await self.app(scope, receive, send)

    router = APIRouter(dependencies=[Depends(service)])

    @router.get("/")
    async def endpoint(
        found: Annotated[list[AsyncSession], Depends(nested)],
        yielded: Annotated[AsyncSession, Depends(exiting)],
        uncached: Annotated[AsyncSession, Depends(db.get_session, use_cache=False)],
    ) -> None:
        seen.extend([*found, yielded, uncached, db.session_proxy()])
        await asyncio.gather(service(), service())
        async with db.get_session() as session:
            seen.append(session)

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(Inner)

    exchange = await drive(install(app, database=db))

    assert 200 == exchange.status
    assert 12 == len(seen)
    assert 1 == len(set(map(id, seen)))


@pytest.mark.once
async def test_concurrent_requests_have_sessions_of_their_own(engine, db, install, drive):
    """G12: two hundred requests at once, on a pool of ten, each write their own row once."""
    app = FastAPI()
    sessions = set()

    @app.post("/items/{item_id}")
    async def create(
        item_id: int, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> None:
        sessions.add(session)
        await asyncio.sleep(0)
        session.add(Item(id=item_id))
        await session.flush()
        assert db.session is session

    served = install(app, database=db)
    exchanges = await asyncio.gather(
        *(drive(served, http_scope(f"/items/{each}", "POST")) for each in range(200))
    )

    assert {200} == {each.status for each in exchanges}
    assert 200 == len(sessions)
    assert 0 == engine.pool.checkedout()
    async with db.session_scope() as session:
        assert list(range(200)) == sorted(await session.scalars(sa.select(Item.id)))


async def test_request_without_the_session_costs_no_connection(db, install, drive, timeline):
    """G5: an endpoint that is handed the session and leaves it alone has no connection."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        return None

    await drive(install(app, database=db))

    assert ["start 200", "last body"] == timeline


# --------------------------------------------------------------------------------------
# Raised and returned errors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_raised_http_exception_rolls_back(sync, db, install, drive, rows, timeline):
    """G3: an HTTPException that was raised rolls back, though the client gets its 404."""
    app = FastAPI()

    async def write(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))
        await session.flush()

    if sync:

        @app.get("/", dependencies=[Depends(write)])
        def fail() -> None:
            raise HTTPException(404)

    else:

        @app.get("/", dependencies=[Depends(write)])
        async def fail_async() -> None:
            raise HTTPException(404)

    exchange = await drive(install(app, database=db))

    assert (404, None) == (exchange.status, exchange.error)
    assert [*ROLLED_BACK, "start 404", "last body"] == timeline
    assert [] == await rows()


async def test_returned_error_response_commits(db, install, drive, rows, timeline):
    """G3: a 404 that the endpoint returned is an answer like any other."""
    app = FastAPI()

    @app.get("/")
    async def answer(session: Annotated[AsyncSession, Depends(db.get_session)]) -> JSONResponse:
        session.add(Item(id=1))
        return JSONResponse({"detail": "gone"}, status_code=404)

    exchange = await drive(install(app, database=db))

    assert 404 == exchange.status
    assert [*COMMITTED, "start 404", "last body"] == timeline
    assert [1] == await rows()


async def test_commit_policy_of_one_endpoint(db, install, drive, rows):
    """G3: `commit_on_success` on an endpoint rolls back the error response that it returned."""
    app = FastAPI()

    @app.get("/items/{item_id}")
    @session_options(commit_policy=commit_on_success)
    async def answer(
        item_id: int, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> JSONResponse:
        session.add(Item(id=item_id))
        return JSONResponse({}, status_code=item_id)

    served = install(app, database=db)

    assert 404 == (await drive(served, http_scope("/items/404"))).status
    assert 201 == (await drive(served, http_scope("/items/201"))).status
    assert [201] == await rows()


async def test_invalid_request_rolls_back_what_dependencies_wrote(db, install, drive, rows):
    """G3: a RequestValidationError rolls back the dependency that ran before it was raised."""
    app = FastAPI()
    ran = []

    async def audit(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))
        await session.flush()
        ran.append("audit")

    @app.get("/items/{item_id}", dependencies=[Depends(audit)])
    async def endpoint(item_id: int) -> None: ...

    exchange = await drive(install(app, database=db), http_scope("/items/one"))

    assert 422 == exchange.status
    assert ["audit"] == ran
    assert [] == await rows()


@pytest.mark.parametrize("handled", [Exception, 500], ids=["Exception", "500"])
async def test_unhandled_error_rolls_back_before_the_apps_own_500(
    handled, db, install, drive, rows, timeline
):
    """G3: the app's handler for everything renders the 500, after the rollback."""
    app = FastAPI()

    @app.exception_handler(handled)
    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=500)

    @app.get("/")
    async def fail(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))
        await session.flush()
        raise LookupError("broken")

    exchange = await drive(install(app, database=db))

    assert (500, b'{"error":"broken"}') == (exchange.status, exchange.body)
    assert isinstance(exchange.error, LookupError)
    assert [*ROLLED_BACK, "start 500", "last body"] == timeline
    assert [] == await rows()


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("status", [200, 409])
async def test_handled_domain_error_rolls_back_whatever_its_handler_answers(
    sync, status, db, install, drive, rows
):
    """G3: what counts is that it was raised, also where its handler makes a 200 of it."""

    class OutOfStockError(Exception):
        pass

    def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=status)

    async def render_async(request: Request, error: Exception) -> JSONResponse:
        return render(request, error)

    handler: Any = render if sync else render_async
    app = FastAPI(exception_handlers={OutOfStockError: handler})

    @app.get("/")
    async def fail(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))
        await session.flush()
        raise OutOfStockError

    exchange = await drive(install(app, database=db))

    assert (status, None) == (exchange.status, exchange.error)
    assert [] == await rows()


async def test_error_handler_may_write_after_the_rollback_of_its_own(db, install, drive, rows):
    """G3: what an exception handler writes itself belongs to the failed request, too."""
    app = FastAPI()

    @app.exception_handler(LookupError)
    async def render(request: Request, error: Exception) -> JSONResponse:
        db.session.add(Item(id=2))
        return JSONResponse({}, status_code=400)

    @app.get("/")
    async def fail() -> None:
        db.session.add(Item(id=1))
        raise LookupError

    exchange = await drive(install(app, database=db))

    assert 400 == exchange.status
    assert [] == await rows()


# --------------------------------------------------------------------------------------
# A COMMIT that fails
# --------------------------------------------------------------------------------------


def app_whose_commit_fails(db: Database[Any], *, sync: bool = False, **options: Any) -> FastAPI:
    """An app with one endpoint: its statements succeed, its COMMIT doesn't."""
    app = FastAPI(**options)

    async def write(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        await session.execute(sa.insert(Child).values(id=1, item_id=404))

    if sync:

        @app.post("/", status_code=201, dependencies=[Depends(write)])
        def create(tasks: BackgroundTasks) -> dict[str, bool]:
            tasks.add_task(app.state.ran.append, "background")
            return {"created": True}

    else:

        @app.post("/", status_code=201, dependencies=[Depends(write)])
        async def create_async(tasks: BackgroundTasks) -> dict[str, bool]:
            tasks.add_task(app.state.ran.append, "background")
            return {"created": True}

    app.state.ran = []
    return app


async def test_failed_commit_becomes_the_frameworks_500(db, drive, timeline):
    """G2: without a handler, Starlette's own 500 is what the client gets; nothing else ran."""
    app = app_whose_commit_fails(db)
    app.add_middleware(DBSessionMiddleware, database=db)

    exchange = await drive(app, http_scope("/", "POST"))

    assert (500, b"Internal Server Error") == (exchange.status, exchange.body)
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert "was rolled back" in exchange.error.__notes__[0]
    assert ["start 500", "last body"] == timeline[-2:]
    assert [] == app.state.ran


async def test_failed_commit_of_an_app_wrapped_whole_surfaces(db, drive):
    """G2: around the whole app there is nobody inside to ask; the server gets the error."""
    app = app_whose_commit_fails(db)

    exchange = await drive(DBSessionMiddleware(app, database=db), http_scope("/", "POST"))

    assert [] == exchange.messages
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == app.state.ran


@pytest.mark.parametrize(
    ("handled", "sync_handler", "sync_endpoint"),
    [
        (sa.exc.IntegrityError, False, False),
        (sa.exc.DBAPIError, True, False),
        (sa.exc.SQLAlchemyError, False, True),
    ],
    ids=["async", "sync-handler", "sync-endpoint"],
)
async def test_apps_own_handler_renders_a_failed_commit(
    handled, sync_handler, sync_endpoint, db, install, drive, timeline, caplog
):
    """G2: a handler for the database's error, or a base class of it, answers; once, loudly."""
    rendered = []

    def render(request: Request, error: Exception) -> JSONResponse:
        rendered.append(error)
        return JSONResponse({"path": request.url.path}, status_code=409)

    async def render_async(request: Request, error: Exception) -> JSONResponse:
        return render(request, error)

    app = app_whose_commit_fails(
        db,
        sync=sync_endpoint,
        exception_handlers={handled: render if sync_handler else render_async},
    )

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert (409, b'{"path":"/"}') == (exchange.status, exchange.body)
    assert exchange.error is None
    assert ["checkin", "start 409", "last body"] == timeline[-3:]
    assert [] == app.state.ran
    (error,) = rendered
    assert isinstance(error, sa.exc.IntegrityError)
    assert ["ERROR"] == [each.levelname for each in caplog.records if each.name == "asgi_dbscope"]


@pytest.mark.parametrize("handled", [Exception, 500], ids=["Exception", "500"])
async def test_handler_for_everything_renders_a_failed_commit(handled, db, drive):
    """G2: it lives in ServerErrorMiddleware, outside of us, and sees the database's error."""
    rendered = []

    async def render(request: Request, error: Exception) -> JSONResponse:
        rendered.append(type(error))
        return JSONResponse({"mine": True}, status_code=500)

    app = app_whose_commit_fails(db, exception_handlers={handled: render})
    app.add_middleware(DBSessionMiddleware, database=db)

    exchange = await drive(app, http_scope("/", "POST"))

    assert (500, b'{"mine":true}') == (exchange.status, exchange.body)
    assert [sa.exc.IntegrityError] == rendered
    assert isinstance(exchange.error, sa.exc.IntegrityError)


async def test_handler_that_raises_for_a_failed_commit(db, install, drive):
    """G2: a handler that fails in its turn gets no success out; both errors are there."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        raise LookupError("handler") from error

    app = app_whose_commit_fails(db, exception_handlers={sa.exc.IntegrityError: render})

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert exchange.status in {None, 500}
    assert isinstance(exchange.error, LookupError)
    assert isinstance(exchange.error.__cause__, sa.exc.IntegrityError)


async def test_handler_may_use_the_session_after_a_failed_commit(db, install, drive, rows):
    """G2, G1: what the handler writes is a transaction of its own, committed before its head."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        db.session.add(Item(id=9))
        return JSONResponse({}, status_code=409)

    app = app_whose_commit_fails(db, exception_handlers={sa.exc.IntegrityError: render})

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert 409 == exchange.status
    assert [9] == await rows()


async def test_handler_of_a_status_renders_what_a_commit_hook_raised(db, install, drive, rows):
    """G2: an HTTPException raised by the session's own hook goes the way Starlette sends it."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"status handler": True}, status_code=409)

    app = FastAPI(exception_handlers={409: render})

    def refuse(session: Any) -> None:
        raise HTTPException(409)

    @app.post("/")
    async def create(session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=1))
        sa.event.listen(session.sync_session, "before_commit", refuse)

    exchange = await drive(install(app, database=db), http_scope("/", "POST"))

    assert (409, b'{"status handler":true}') == (exchange.status, exchange.body)
    assert [] == await rows()
