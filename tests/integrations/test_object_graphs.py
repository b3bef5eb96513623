"""Whatever builds an object graph for a request, its session is the request's, on a pool of two."""

import asyncio
import gc
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import dishka
import dishka.integrations.fastapi
import litestar.di
import litestar.params
import pytest
import that_depends
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from dishka import FromDishka
from dishka.integrations.fastapi import DishkaRoute
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from litestar import Litestar, Response, post
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import HTTPException as LitestarHTTPException
from litestar.middleware import DefineMiddleware
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asgi_dbscope import Database, DBSessionMiddleware, SessionScopeClosedError, current_session
from tests.fix_asgi import http_scope
from tests.fix_frameworks import answering_disconnect
from tests.integrations.graphs import Children, Items, Note, PlaceItem, serve, serve_in_thread

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]


def conflict() -> HTTPException:
    """What an endpoint of FastAPI's raises."""
    return HTTPException(409)


# --------------------------------------------------------------------------------------
# dependency-injector
# --------------------------------------------------------------------------------------


class Container(containers.DeclarativeContainer):
    """The session by one provider, the graph by the usual ones."""

    session = providers.Callable(current_session)
    items = providers.Factory(Items, session)
    children = providers.Factory(Children, session)
    place = providers.Factory(PlaceItem, items, children)


injected = APIRouter()
Injected = Annotated[PlaceItem, Depends(Provide[Container.place])]


@injected.post("/{what}/{item_id}")
@inject
async def create_injected(
    what: str, item_id: int, place: Injected, request: Request, tasks: BackgroundTasks
) -> None:
    """Answer with an injected use case."""
    rest = await serve(what, item_id, place, request.app.state.note, conflict())
    if rest is not None:
        tasks.add_task(rest)


@injected.post("/threaded/{what}/{item_id}")
@inject
def create_injected_in_thread(what: str, item_id: int, place: Injected, request: Request) -> None:
    """The same in a worker thread."""
    serve_in_thread(what, item_id, place, request.app.state.note, conflict())


def with_dependency_injector(db: Database[Any], note: Note) -> Any:
    """A wired container."""
    Container().wire(modules=[sys.modules[__name__]])
    return with_router(injected, db, note)


def with_router(router: APIRouter, db: Database[Any], note: Note) -> Any:
    """An app of FastAPI's."""
    app = FastAPI()
    app.include_router(router)
    app.state.note = note
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


# --------------------------------------------------------------------------------------
# dishka
# --------------------------------------------------------------------------------------


class GraphProvider(dishka.Provider):
    """The session by one method, the graph by its types."""

    scope = dishka.Scope.REQUEST
    graph = dishka.provide_all(Items, Children, PlaceItem)

    @dishka.provide
    def session(self) -> AsyncSession:
        """The request's."""
        return current_session()


resolved = APIRouter(route_class=DishkaRoute)


@resolved.post("/{what}/{item_id}")
async def create_resolved(
    what: str,
    item_id: int,
    place: FromDishka[PlaceItem],
    request: Request,
    tasks: BackgroundTasks,
) -> None:
    """Answer with a resolved use case."""
    rest = await serve(what, item_id, place, request.app.state.note, conflict())
    if rest is not None:
        tasks.add_task(rest)


@resolved.post("/threaded/{what}/{item_id}")
def create_resolved_in_thread(
    what: str, item_id: int, place: FromDishka[PlaceItem], request: Request
) -> None:
    """The same in a worker thread."""
    serve_in_thread(what, item_id, place, request.app.state.note, conflict())


def with_dishka(db: Database[Any], note: Note) -> Any:
    """A container with a request scope of its own, inside the session scope."""
    app = FastAPI()
    app.include_router(resolved)
    app.state.note = note
    dishka.integrations.fastapi.setup_dishka(dishka.make_async_container(GraphProvider()), app)
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


# --------------------------------------------------------------------------------------
# that-depends
# --------------------------------------------------------------------------------------


class GraphContainer(that_depends.BaseContainer):
    """The session by one factory, the graph by others."""

    session = that_depends.providers.Factory(current_session)
    items = that_depends.providers.Factory(Items, session.cast)
    children = that_depends.providers.Factory(Children, session.cast)
    place = that_depends.providers.Factory(PlaceItem, items.cast, children.cast)


depended = APIRouter()
Depended = Annotated[PlaceItem, Depends(GraphContainer.place)]


@depended.post("/{what}/{item_id}")
async def create_depended(
    what: str, item_id: int, place: Depended, request: Request, tasks: BackgroundTasks
) -> None:
    """Answer with a use case that FastAPI asks the provider for."""
    rest = await serve(what, item_id, place, request.app.state.note, conflict())
    if rest is not None:
        tasks.add_task(rest)


@depended.post("/threaded/{what}/{item_id}")
def create_depended_in_thread(what: str, item_id: int, place: Depended, request: Request) -> None:
    """The same in a worker thread."""
    serve_in_thread(what, item_id, place, request.app.state.note, conflict())


# --------------------------------------------------------------------------------------
# FastAPI's own
# --------------------------------------------------------------------------------------


def with_fastapi(db: Database[Any], note: Note) -> Any:
    """Dependencies on dependencies: coroutine functions and, for one, a thread."""
    session_of_request = Annotated[AsyncSession, Depends(db.get_session)]

    async def items(session: session_of_request) -> Items:
        return Items(session)

    def children(session: session_of_request) -> Children:
        return Children(session)

    async def place(
        items: Annotated[Items, Depends(items)], children: Annotated[Children, Depends(children)]
    ) -> PlaceItem:
        return PlaceItem(items, children)

    router = APIRouter()

    @router.post("/{what}/{item_id}")
    async def create(
        what: str,
        item_id: int,
        place: Annotated[PlaceItem, Depends(place)],
        tasks: BackgroundTasks,
    ) -> None:
        rest = await serve(what, item_id, place, note, conflict())
        if rest is not None:
            tasks.add_task(rest)

    @router.post("/threaded/{what}/{item_id}")
    def create_in_thread(
        what: str, item_id: int, place: Annotated[PlaceItem, Depends(place)]
    ) -> None:
        serve_in_thread(what, item_id, place, note, conflict())

    return with_router(router, db, note)


# --------------------------------------------------------------------------------------
# Litestar's own
# --------------------------------------------------------------------------------------

# Litestar 2.23 asks for annotations that older versions don't know.
if hasattr(litestar.di, "NamedDependency"):
    BY_NAME: Any = "dependency"
    IN_PATH: Any = litestar.params.PathParameter()
else:
    BY_NAME = IN_PATH = litestar.params.Parameter()


def with_litestar(db: Database[Any], note: Note) -> Any:
    """Dependencies by the names of parameters."""

    async def items(session: Annotated[AsyncSession, BY_NAME]) -> Items:
        return Items(session)

    def children(session: Annotated[AsyncSession, BY_NAME]) -> Children:
        return Children(session)

    async def place(
        items: Annotated[Items, BY_NAME], children: Annotated[Children, BY_NAME]
    ) -> PlaceItem:
        return PlaceItem(items, children)

    @post("/{what:str}/{item_id:int}", status_code=200)
    async def create(
        what: Annotated[str, IN_PATH],
        item_id: Annotated[int, IN_PATH],
        place: Annotated[PlaceItem, BY_NAME],
    ) -> Response[None]:
        rest = await serve(what, item_id, place, note, LitestarHTTPException(status_code=409))
        return Response(None, background=None if rest is None else BackgroundTask(rest))

    @post("/threaded/{what:str}/{item_id:int}", status_code=200, sync_to_thread=True)
    def create_in_thread(
        what: Annotated[str, IN_PATH],
        item_id: Annotated[int, IN_PATH],
        place: Annotated[PlaceItem, BY_NAME],
    ) -> None:
        serve_in_thread(what, item_id, place, note, LitestarHTTPException(status_code=409))

    app = Litestar(
        [create, create_in_thread],
        dependencies={
            "session": litestar.di.Provide(db.get_session),
            "items": litestar.di.Provide(items),
            "children": litestar.di.Provide(children, sync_to_thread=True),
            "place": litestar.di.Provide(place),
        },
        middleware=[DefineMiddleware(DBSessionMiddleware, database=db)],
        logging_config=None,
        openapi_config=None,
    )
    return answering_disconnect(app)


# --------------------------------------------------------------------------------------
# The same for all
# --------------------------------------------------------------------------------------

Build = Callable[[Database[Any], Note], Any]


@pytest.fixture
def make_engine(make_engine: Callable[..., AsyncEngine]) -> Callable[..., AsyncEngine]:
    """Engines of two connections, so that whoever keeps one is found out."""
    return partial(make_engine, pool_size=2, max_overflow=0, pool_timeout=30)


@pytest.fixture(
    params=[
        with_dependency_injector,
        with_dishka,
        partial(with_router, depended),
        with_fastapi,
        with_litestar,
    ],
    ids=["dependency-injector", "dishka", "that-depends", "fastapi", "litestar"],
)
def build(request: pytest.FixtureRequest) -> Build:
    """Make an app with a container; each use case that a handler is given is noted."""
    way: Build = request.param
    return way


@pytest.fixture(params=["", "/threaded"], ids=["async", "sync"])
def kind(request: pytest.FixtureRequest) -> str:
    """The path of coroutine functions, or the one of `def` endpoints."""
    path: str = request.param
    return path


async def test_graph_is_one_transaction_before_the_head(build, kind, db, drive, rows, timeline):
    """G1, G6, G11: what both repositories wrote is committed in one go, before the head."""
    noted: list[PlaceItem] = []

    exchange = await drive(build(db, noted.append), http_scope(f"{kind}/placed/7", "POST"))

    assert 200 == exchange.status
    assert [*COMMITTED, "start 200"] == timeline[:5]
    assert [1] == [len(place.sessions) for place in noted]
    assert [7] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
@pytest.mark.once
async def test_requests_at_once_have_a_session_each(engine, build, kind, db, drive, rows):
    """G12, G14: on a pool of two, fifty graphs at once have fifty sessions, and commit."""
    noted: list[PlaceItem] = []
    app = build(db, noted.append)

    exchanges = await asyncio.gather(
        *(drive(app, http_scope(f"{kind}/placed/{each}", "POST")) for each in range(50))
    )

    assert {200} == {each.status for each in exchanges}
    assert [1] * 50 == [len(place.sessions) for place in noted]
    assert 50 == len(set().union(*(place.sessions for place in noted)))
    assert 0 == engine.pool.checkedout()
    assert list(range(50)) == await rows()


@SQLITE
async def test_raised_http_exception_rolls_the_graph_back(build, kind, db, drive, rows, timeline):
    """G3: a 409 that was raised after both repositories wrote leaves nothing of either."""
    exchange = await drive(build(db, id), http_scope(f"{kind}/refused/7", "POST"))

    assert (409, None) == (exchange.status, exchange.error)
    assert [*ROLLED_BACK, "start 409"] == timeline[:5]
    assert [] == await rows()


@SQLITE
async def test_failed_commit_of_the_graph_is_a_500(build, kind, db, drive, rows):
    """G2: where only COMMIT fails, after the handler has returned, the client gets a 500."""
    exchange = await drive(build(db, id), http_scope(f"{kind}/orphaned/7", "POST"))

    assert 500 == exchange.status
    assert [] == await rows()


@SQLITE
async def test_background_task_goes_on_with_the_graph(build, db, drive, rows, timeline):
    """G8: after the response the same objects write in a transaction of their own."""
    noted: list[PlaceItem] = []

    exchange = await drive(build(db, noted.append), http_scope("/later/7", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert ["start 200", "last body", *COMMITTED] == timeline
    assert [7] == await rows()


@SQLITE
async def test_graph_that_outlives_its_request_is_told_so(build, db, drive, rows):
    """G9: objects of a request that is over write nothing, and say what to do."""
    noted: list[PlaceItem] = []
    await drive(build(db, noted.append), http_scope("/placed/1", "POST"))

    with pytest.raises(SessionScopeClosedError, match="needs a scope of its own"):
        await noted[0](2)

    assert [1] == await rows()


@SQLITE
@pytest.mark.once
async def test_nothing_is_kept_of_a_request(build, db, drive):
    """G9: of many requests, half of them refused, no session and no object of a graph is left."""
    noted = []
    kept: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(place: PlaceItem) -> None:
        noted.append(id(place))
        kept.update((place, place.items, place.children, *place.sessions))

    app = build(db, note)
    for each in range(40):
        await drive(app, http_scope("/refused/1" if each % 2 else "/read/1", "POST"))
    gc.collect()

    assert 40 == len(noted)
    assert len(kept) <= 5  # what an idle worker thread of older AnyIO's did last
