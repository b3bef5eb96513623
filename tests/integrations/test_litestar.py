"""Litestar: as one of its middlewares and around the whole app."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import litestar.di
import litestar.params
import pytest
import sqlalchemy as sa
from litestar import (
    Controller,
    Litestar,
    Request,
    Response,
    Router,
    WebSocket,
    asgi,
    get,
    post,
    websocket,
)
from litestar.background_tasks import BackgroundTask
from litestar.di import Provide
from litestar.exceptions import HTTPException, NotFoundException
from litestar.middleware import DefineMiddleware
from litestar.response import Stream
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
from tests.fix_frameworks import answering_disconnect

Serve = Callable[..., Any]
# Litestar 2.23 asks for annotations that older versions don't know.
if hasattr(litestar.di, "NamedDependency"):
    BY_NAME: Any = "dependency"
    IN_PATH: Any = litestar.params.PathParameter()
else:
    BY_NAME = IN_PATH = litestar.params.Parameter()
ItemId = Annotated[int, IN_PATH]
SessionDependency = Annotated[AsyncSession, BY_NAME]

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]


def as_middleware(handlers: list[Any], *, database: Database[Any], **options: Any) -> Any:
    """One of the app's own middlewares."""
    middleware = [DefineMiddleware(DBSessionMiddleware, database=database)]
    app = Litestar(handlers, middleware=middleware, **_defaults(database), **options)
    return answering_disconnect(app)


def wrapped(handlers: list[Any], *, database: Database[Any], **options: Any) -> Any:
    """Around the whole app."""
    app = Litestar(handlers, **_defaults(database), **options)
    return answering_disconnect(DBSessionMiddleware(app, database=database))


def _defaults(database: Database[Any]) -> dict[str, Any]:
    return {
        "dependencies": {"db_session": Provide(database.get_session)},
        "logging_config": None,
        "openapi_config": None,
    }


@pytest.fixture(params=[as_middleware, wrapped], ids=["middleware", "wrapped"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """Make an app of handlers, served under the middleware."""
    way: Serve = request.param
    return way


async def test_commits_what_a_dependency_was_handed(db, serve, drive, rows, timeline):
    """G1, G6: the session of `Provide(db.get_session)` is committed before the head goes out."""

    @post("/items/{item_id:int}")
    async def create(item_id: ItemId, db_session: SessionDependency) -> dict[str, int]:
        db_session.add(Item(id=item_id))
        return {"id": item_id}

    exchange = await drive(serve([create], database=db), http_scope("/items/7", "POST"))

    assert (201, b'{"id":7}') == (exchange.status, exchange.body)
    assert [*COMMITTED, "start 201"] == timeline[:5]
    assert [7] == await rows()


@pytest.mark.parametrize("sync_to_thread", [True, False], ids=["thread", "loop"])
async def test_sync_handler_sees_the_scope(sync_to_thread, db, serve, drive, rows):
    """G11: a `def` handler, in a worker thread or in the loop, has the request's session."""
    sessions = []

    @post("/", sync_to_thread=sync_to_thread)
    def create(db_session: SessionDependency) -> None:
        sessions.extend([db_session, current_session(), db.session])
        current_session().add(Item(id=1))

    exchange = await drive(serve([create], database=db), http_scope("/", "POST"))

    assert 201 == exchange.status
    assert 1 == len(set(map(id, sessions)))
    assert [1] == await rows()


async def test_one_session_however_it_is_reached(db, serve, drive):
    """G11: nested dependencies and child tasks share the request's one session."""
    seen: list[Any] = []

    async def service() -> None:
        seen.append(current_session())

    async def nested(db_session: SessionDependency) -> list[Any]:
        return [db_session]

    @get("/", dependencies={"found": Provide(nested)})
    async def endpoint(found: Annotated[Any, BY_NAME], db_session: SessionDependency) -> None:
        seen.extend([*found, db_session])
        await asyncio.gather(service(), service())

    assert 200 == (await drive(serve([endpoint], database=db))).status
    assert 4 == len(seen)
    assert 1 == len(set(map(id, seen)))


@pytest.mark.parametrize("error", [NotFoundException(), HTTPException(status_code=409)])
@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_raised_http_exception_rolls_back(sync, error, db, serve, drive, rows, timeline):
    """G3: what was raised rolls back, though the client gets its 4xx."""

    @post("/async")
    async def fail(db_session: SessionDependency) -> None:
        db_session.add(Item(id=1))
        await db_session.flush()
        raise error

    async def write(db_session: SessionDependency) -> bool:
        db_session.add(Item(id=1))
        await db_session.flush()
        return True

    @post("/sync", sync_to_thread=True, dependencies={"written": Provide(write)})
    def fail_in_thread(written: Annotated[bool, BY_NAME]) -> None:
        raise error

    served = serve([fail, fail_in_thread], database=db)
    exchange = await drive(served, http_scope("/sync" if sync else "/async", "POST"))

    assert (error.status_code, None) == (exchange.status, exchange.error)
    assert [*ROLLED_BACK, f"start {error.status_code}"] == timeline[:5]
    assert [] == await rows()


async def test_returned_error_response_commits(db, serve, drive, rows):
    """G3: a 404 that the handler returned is an answer like any other."""

    @get("/")
    async def answer(db_session: SessionDependency) -> Response[dict[str, str]]:
        db_session.add(Item(id=1))
        return Response({"detail": "gone"}, status_code=404)

    exchange = await drive(serve([answer], database=db))

    assert 404 == exchange.status
    assert [1] == await rows()


async def test_options_of_one_handler(db, serve, drive, rows):
    """G3: `session_options` on a handler keeps its signature, and its policy decides."""

    @get("/{status:int}")
    @session_options(commit_policy=commit_on_success)
    async def answer(status: ItemId, db_session: SessionDependency) -> Response[None]:
        db_session.add(Item(id=status))
        return Response(None, status_code=status)

    served = serve([answer], database=db)

    assert 404 == (await drive(served, http_scope("/404"))).status
    assert 201 == (await drive(served, http_scope("/201"))).status
    assert [201] == await rows()


async def test_unhandled_error_rolls_back_before_the_500(db, serve, drive, rows, timeline):
    """G3: Litestar's own 500 follows the rollback."""

    @post("/")
    async def fail(db_session: SessionDependency) -> None:
        db_session.add(Item(id=1))
        await db_session.flush()
        raise LookupError

    exchange = await drive(serve([fail], database=db), http_scope("/", "POST"))

    assert 500 == exchange.status
    assert [*ROLLED_BACK, "start 500"] == timeline[:5]
    assert [] == await rows()


@pytest.mark.parametrize("status", [200, 409])
async def test_handled_domain_error_rolls_back_whatever_its_handler_answers(
    status, db, serve, drive, rows
):
    """G3: what counts is that it was raised; the hook after exceptions is called as ever."""
    hooked = []

    class OutOfStockError(Exception):
        pass

    def render(request: Request[Any, Any, Any], error: Exception) -> Response[None]:
        return Response(None, status_code=status)

    async def hook(error: Exception, scope: Any) -> None:
        hooked.append(type(error))

    @post("/", exception_handlers={OutOfStockError: render})
    async def fail(db_session: SessionDependency) -> None:
        db_session.add(Item(id=1))
        await db_session.flush()
        raise OutOfStockError

    served = serve([fail], database=db, after_exception=[hook])
    exchange = await drive(served, http_scope("/", "POST"))

    assert (status, None) == (exchange.status, exchange.error)
    assert [OutOfStockError] == hooked
    assert [] == await rows()


async def test_failed_commit_is_never_a_success(db, serve, drive, rows, timeline):
    """G2: Litestar renders the 500 that it has for any error; the background task doesn't run."""
    ran: list[str] = []
    hooked: list[Exception] = []

    async def hook(error: Exception, scope: Any) -> None:
        hooked.append(error)

    @post("/")
    async def create(db_session: SessionDependency) -> Response[None]:
        await db_session.execute(sa.insert(Child).values(id=1, item_id=404))
        return Response(None, background=BackgroundTask(ran.append, "background"))

    served = serve([create], database=db, after_exception=[hook])
    exchange = await drive(served, http_scope("/", "POST"))

    assert (500, None) == (exchange.status, exchange.error)
    assert "start 500" in timeline[-2:]
    (error,) = hooked
    assert isinstance(error, sa.exc.IntegrityError)
    assert "was rolled back" in error.__notes__[0]
    assert [] == ran
    assert [] == await rows()


@pytest.mark.parametrize("layer", ["app", "handler"])
async def test_apps_own_handler_renders_a_failed_commit(layer, db, serve, drive, rows):
    """G2: Litestar's exception handlers, of the app or of the route, render the error."""
    rendered: list[type[Exception]] = []

    def render(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, bool]]:
        rendered.append(type(error))
        return Response({"mine": True}, status_code=409)

    handlers: Any = {"exception_handlers": {sa.exc.IntegrityError: render}}

    @post("/", **(handlers if layer == "handler" else {}))
    async def create(db_session: SessionDependency) -> None:
        await db_session.execute(sa.insert(Child).values(id=1, item_id=404))

    served = serve([create], database=db, **(handlers if layer == "app" else {}))
    exchange = await drive(served, http_scope("/", "POST"))

    assert (409, b'{"mine":true}', None) == (exchange.status, exchange.body, exchange.error)
    assert [sa.exc.IntegrityError] == rendered
    assert [] == await rows()


async def test_stream_and_background_have_transactions_of_their_own(
    db, serve, drive, rows, timeline
):
    """G7, G8: response, body and background each commit at their own end."""

    @get("/")
    async def statement(db_session: SessionDependency) -> Stream:
        db_session.add(Item(id=1))

        async def lines() -> AsyncIterator[str]:
            db_session.add(Item(id=2))
            await db_session.flush()
            yield "line\n"

        async def after() -> None:
            db_session.add(Item(id=3))

        return Stream(lines(), background=BackgroundTask(after))

    exchange = await drive(serve([statement], database=db))

    assert b"line\n" == exchange.body
    assert ["commit", "start 200", "body", "commit", "last body", "commit"] == [
        each for each in timeline if each in {"commit", "start 200", "body", "last body"}
    ]
    assert [1, 2, 3] == await rows()


async def test_stream_whose_commit_fails_ends_torn(db, serve, drive, rows):
    """G7: the client never sees a clean end of a body whose transaction didn't commit."""

    @get("/")
    async def statement(db_session: SessionDependency) -> Stream:
        async def lines() -> AsyncIterator[str]:
            await db_session.execute(sa.insert(Child).values(id=1, item_id=404))
            yield "line\n"

        return Stream(lines())

    exchange = await drive(serve([statement], database=db))

    assert (200, b"line\n", False) == (exchange.status, exchange.body, exchange.is_complete)
    assert exchange.error is not None
    assert [] == await rows()


async def test_router_and_app_may_both_have_the_middleware(db, drive, rows, timeline):
    """G18: the second instance for one database does nothing."""

    @post("/")
    async def create() -> None:
        current_session().add(Item(id=1))

    middleware = DefineMiddleware(DBSessionMiddleware, database=db)
    router = Router("/inner", route_handlers=[create], middleware=[middleware])
    served = as_middleware([router], database=db)

    exchange = await drive(served, http_scope("/inner", "POST"))

    assert 201 == exchange.status
    assert [*COMMITTED, "start 201"] == timeline[:5]
    assert [1] == await rows()


async def test_controller_with_dependencies_of_its_own(db, drive, rows):
    """G11: Litestar copies a controller's dependencies; the database stays one and the same."""

    class Items(Controller):
        path = "/items"
        dependencies = {"db_session": Provide(db.get_session)}  # noqa: RUF012 - Litestar's way

        @post("/")
        async def create(self, db_session: SessionDependency) -> None:
            db_session.add(Item(id=1))
            assert db_session is current_session()

    app = Litestar([Items], logging_config=None, openapi_config=None)
    exchange = await drive(DBSessionMiddleware(app, database=db), http_scope("/items", "POST"))

    assert 201 == exchange.status
    assert [1] == await rows()


async def test_concurrent_requests_have_sessions_of_their_own(engine, db, serve, drive):
    """G12: fifty requests at once, on a pool of ten, each write their own row once."""

    @post("/items/{item_id:int}")
    async def create(item_id: ItemId, db_session: SessionDependency) -> None:
        await asyncio.sleep(0)
        db_session.add(Item(id=item_id))

    served = serve([create], database=db)
    exchanges = await asyncio.gather(
        *(drive(served, http_scope(f"/items/{each}", "POST")) for each in range(50))
    )

    assert {201} == {each.status for each in exchanges}
    assert 0 == engine.pool.checkedout()
    async with db.session_scope() as session:
        assert list(range(50)) == sorted(await session.scalars(sa.select(Item.id)))


async def test_websocket_opens_a_scope_for_each_message(engine, db, serve, rows):
    """G17: a message's block commits; between messages no connection is held."""
    checked_out: list[int] = []

    @websocket("/")
    async def echo(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        for number in (1, 2):
            await socket.receive_text()
            async with db.session_scope() as session:
                session.add(Item(id=number))
            checked_out.append(engine.pool.checkedout())
        await socket.close()

    messages = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "one"},
        {"type": "websocket.receive", "text": "two"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None: ...

    scope = {
        **{key: value for key, value in http_scope().items() if key != "method"},
        "type": "websocket",
        "subprotocols": [],
    }
    await serve([echo], database=db)(scope, receive, send)

    assert [0, 0] == checked_out
    assert [1, 2] == await rows()


async def test_failed_commit_of_a_mounted_app_with_a_state_of_its_own(db, drive, rows):
    """G2, G18: an app inside Litestar that has nothing of its state still gets its own error."""
    caught: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        try:
            await send({"type": "http.response.start", "status": 201, "headers": []})
        except sa.exc.IntegrityError as error:
            caught.append(error)
            raise

    served = DBSessionMiddleware(app, database=db)

    @asgi("/", is_mount=True, copy_scope=True)
    async def mount(scope: Any, receive: Any, send: Any) -> None:
        await served({**scope, "state": {}}, receive, send)

    litestar_app = Litestar([mount], logging_config=None, openapi_config=None)
    exchange = await drive(answering_disconnect(litestar_app))

    assert (500, None) == (exchange.status, exchange.error)
    (error,) = caught
    assert isinstance(error, sa.exc.IntegrityError)
    assert [] == await rows()
