"""Object graphs with synchronous sessions: `def` endpoints in worker threads, on a pool of two."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import dishka
import litestar.di
import litestar.params
import pytest
import sqlalchemy as sa
import that_depends
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from dishka import FromDishka
from dishka.integrations.fastapi import DishkaSyncRoute, setup_dishka
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from litestar import Litestar, Response, post
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import HTTPException as LitestarHTTPException
from litestar.middleware import DefineMiddleware
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    SessionScopeClosedError,
    SessionScopeMismatchError,
    current_session,
)
from tests.fix_asgi import http_scope
from tests.fix_frameworks import answering_disconnect
from tests.integrations.graphs import (
    SyncChildren,
    SyncItems,
    SyncPlaceItem,
    serve_synchronously,
)

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
PSYCOPG = pytest.mark.parametrize("engine", ["psycopg"], indirect=True)
COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]

SyncNote = Callable[[SyncPlaceItem], object]


# --------------------------------------------------------------------------------------
# dependency-injector
# --------------------------------------------------------------------------------------


class Container(containers.DeclarativeContainer):
    """The session by one provider, the graph by the usual ones."""

    session = providers.Callable(current_session)
    items = providers.Factory(SyncItems, session)
    children = providers.Factory(SyncChildren, session)
    place = providers.Factory(SyncPlaceItem, items, children)


injected = APIRouter()


@injected.post("/{what}/{item_id}")
@inject
def create_injected(
    what: str,
    item_id: int,
    place: Annotated[SyncPlaceItem, Depends(Provide[Container.place])],
    request: Request,
    tasks: BackgroundTasks,
) -> None:
    """Answer with an injected use case."""
    answer(what, item_id, place, request, tasks)


def answer(
    what: str, item_id: int, place: SyncPlaceItem, request: Request, tasks: BackgroundTasks
) -> None:
    """What every endpoint of FastAPI's does."""
    note = request.app.state.note
    rest = serve_synchronously(what, item_id, place, note, HTTPException(409))
    if rest is not None:
        tasks.add_task(rest)


def with_dependency_injector(db: Database[Session], note: SyncNote) -> Any:
    """A wired container."""
    Container().wire(modules=[sys.modules[__name__]])
    return with_router(injected, db, note)


def with_router(router: APIRouter, db: Database[Session], note: SyncNote) -> Any:
    """An app of FastAPI's."""
    app = FastAPI()
    app.include_router(router)
    app.state.note = note
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


# --------------------------------------------------------------------------------------
# dishka, that-depends, FastAPI's own, Litestar's own
# --------------------------------------------------------------------------------------


def with_dishka(db: Database[Session], note: SyncNote) -> Any:
    """A synchronous container, whose objects are built in the endpoint's thread."""
    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    provider.provide(lambda: current_session(), provides=Session)  # noqa: PLW0108 - the type
    provider.provide_all(SyncItems, SyncChildren, SyncPlaceItem)
    router = APIRouter(route_class=DishkaSyncRoute)

    @router.post("/{what}/{item_id}")
    def create(
        what: str,
        item_id: int,
        place: FromDishka[SyncPlaceItem],
        request: Request,
        tasks: BackgroundTasks,
    ) -> None:
        answer(what, item_id, place, request, tasks)

    app = FastAPI()
    app.include_router(router)
    app.state.note = note
    setup_dishka(dishka.make_container(provider), app)
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


def with_that_depends(db: Database[Session], note: SyncNote) -> Any:
    """Factories, asked by the endpoint itself."""
    session: Any = that_depends.providers.Factory(current_session)
    items = that_depends.providers.Factory(SyncItems, session)
    children = that_depends.providers.Factory(SyncChildren, session)
    place = that_depends.providers.Factory(SyncPlaceItem, items.cast, children.cast)
    router = APIRouter()

    @router.post("/{what}/{item_id}")
    def create(what: str, item_id: int, request: Request, tasks: BackgroundTasks) -> None:
        answer(what, item_id, place.resolve_sync(), request, tasks)

    return with_router(router, db, note)


def with_fastapi(db: Database[Session], note: SyncNote) -> Any:
    """Dependencies in worker threads."""
    session_of_request = Annotated[Session, Depends(db.get_session)]

    def items(session: session_of_request) -> SyncItems:
        return SyncItems(session)

    def children(session: session_of_request) -> SyncChildren:
        return SyncChildren(session)

    def place(
        items: Annotated[SyncItems, Depends(items)],
        children: Annotated[SyncChildren, Depends(children)],
    ) -> Iterator[SyncPlaceItem]:
        yield SyncPlaceItem(items, children)

    router = APIRouter()

    @router.post("/{what}/{item_id}")
    def create(
        what: str,
        item_id: int,
        place: Annotated[SyncPlaceItem, Depends(place)],
        request: Request,
        tasks: BackgroundTasks,
    ) -> None:
        answer(what, item_id, place, request, tasks)

    return with_router(router, db, note)


# Litestar 2.23 asks for annotations that older versions don't know.
if hasattr(litestar.di, "NamedDependency"):
    BY_NAME: Any = "dependency"
    IN_PATH: Any = litestar.params.PathParameter()
else:
    BY_NAME = IN_PATH = litestar.params.Parameter()


def with_litestar(db: Database[Session], note: SyncNote) -> Any:
    """Dependencies by the names of parameters, in worker threads."""

    def place(session: Annotated[Session, BY_NAME]) -> SyncPlaceItem:
        return SyncPlaceItem(SyncItems(session), SyncChildren(session))

    @post("/{what:str}/{item_id:int}", status_code=200, sync_to_thread=True)
    def create(
        what: Annotated[str, IN_PATH],
        item_id: Annotated[int, IN_PATH],
        place: Annotated[SyncPlaceItem, BY_NAME],
    ) -> Response[None]:
        conflict = LitestarHTTPException(status_code=409)
        rest = serve_synchronously(what, item_id, place, note, conflict)
        return Response(None, background=None if rest is None else BackgroundTask(rest))

    app = Litestar(
        [create],
        dependencies={
            "session": litestar.di.Provide(db.get_session),
            "place": litestar.di.Provide(place, sync_to_thread=True),
        },
        middleware=[DefineMiddleware(DBSessionMiddleware, database=db)],
        logging_config=None,
        openapi_config=None,
    )
    return answering_disconnect(app)


# --------------------------------------------------------------------------------------
# The same for all
# --------------------------------------------------------------------------------------


@pytest.fixture
def two(engine: AsyncEngine, timeline: Any) -> Iterator[Engine]:
    """A synchronous engine of two connections on the same database."""
    driver = {"sqlite+aiosqlite": "sqlite"}.get(engine.url.drivername, engine.url.drivername)
    two = sa.create_engine(
        engine.url.set(drivername=driver), pool_size=2, max_overflow=0, pool_timeout=30
    )
    if driver == "sqlite":

        @sa.event.listens_for(two, "connect")
        def enforce_foreign_keys(connection: Any, record: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")

    for name in ("begin", "commit", "rollback", "checkout", "checkin"):
        sa.event.listen(two, name, lambda *args, name=name: timeline.append(name))
    yield two
    leaked = two.pool.checkedout()  # type: ignore[attr-defined]
    two.dispose()
    assert 0 == leaked, "a connection was not given back"


@pytest.fixture
def db(two: Engine) -> Database[Session]:
    """A database of synchronous sessions."""
    return Database(two)


Build = Callable[[Database[Session], SyncNote], Any]


@pytest.fixture(
    params=[
        with_dependency_injector,
        with_dishka,
        with_that_depends,
        with_fastapi,
        with_litestar,
    ],
    ids=["dependency-injector", "dishka", "that-depends", "fastapi", "litestar"],
)
def build(request: pytest.FixtureRequest) -> Build:
    """Make an app with a container; each use case that a handler is given is noted."""
    way: Build = request.param
    return way


@pytest.mark.parametrize("engine", ["sqlite", "psycopg"], indirect=True)
async def test_graph_is_one_transaction_before_the_head(build, db, drive, rows, timeline):
    """G1, G6, G11: what both repositories wrote in a thread is committed before the head."""
    noted: list[SyncPlaceItem] = []

    exchange = await drive(build(db, noted.append), http_scope("/placed/7", "POST"))

    assert 200 == exchange.status
    assert [*COMMITTED, "start 200"] == timeline[:5]
    assert [1] == [len(place.sessions) for place in noted]
    assert [7] == await rows()


@PSYCOPG
@pytest.mark.once
async def test_more_requests_at_once_than_threads_have_a_session_each(build, two, db, drive, rows):
    """G12, G14: endpoints in all forty threads wait for two connections, and none hangs."""
    count = 200 if build is with_dependency_injector else 60
    noted: list[SyncPlaceItem] = []
    app = build(db, noted.append)
    whats = ["refused" if each % 4 == 0 else "placed" for each in range(count)]

    exchanges = await asyncio.gather(
        *(drive(app, http_scope(f"/{what}/{each}", "POST")) for each, what in enumerate(whats))
    )

    statuses = {"refused": 409, "placed": 200}
    assert [statuses[what] for what in whats] == [each.status for each in exchanges]
    assert count == len(set().union(*(place.sessions for place in noted)))
    assert 0 == two.pool.checkedout()
    assert [each for each in range(count) if each % 4] == await rows()


@SQLITE
async def test_raised_http_exception_rolls_the_graph_back(build, db, drive, rows, timeline):
    """G3: a 409 that was raised in the thread leaves nothing of either repository."""
    exchange = await drive(build(db, id), http_scope("/refused/7", "POST"))

    assert (409, None) == (exchange.status, exchange.error)
    assert [*ROLLED_BACK, "start 409"] == timeline[:5]
    assert [] == await rows()


@SQLITE
async def test_failed_commit_of_the_graph_is_a_500(build, db, drive, rows):
    """G2: where only COMMIT fails, after the thread has ended, the client gets a 500."""
    exchange = await drive(build(db, id), http_scope("/orphaned/7", "POST"))

    assert 500 == exchange.status
    assert [] == await rows()


@SQLITE
async def test_background_task_goes_on_with_the_graph(build, db, drive, rows, timeline):
    """G8: after the response the same objects write, in a thread, in a transaction of their own."""
    exchange = await drive(build(db, id), http_scope("/later/7", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert ["start 200", "last body", *COMMITTED] == timeline
    assert [7] == await rows()


@SQLITE
async def test_graph_that_outlives_its_request_is_told_so(build, db, drive, rows):
    """G9: objects of a request that is over write nothing, and say what to do."""
    noted: list[SyncPlaceItem] = []
    await drive(build(db, noted.append), http_scope("/placed/1", "POST"))

    with pytest.raises(SessionScopeClosedError, match="scope of its own"):
        noted[0](2)

    assert [1] == await rows()


@SQLITE
async def test_session_that_another_request_kept_is_refused_at_once(db, drive, rows):
    """G1, G12: in threads, too, a session that a singleton kept serves no other request."""

    class Keeping(containers.DeclarativeContainer):
        items = providers.ThreadSafeSingleton(SyncItems, providers.Callable(current_session))

    kept, inside, go_on = Keeping(), asyncio.Event(), asyncio.Event()
    app = with_router(APIRouter(), db, id)

    @app.post("/first")
    async def keep() -> None:
        await asyncio.to_thread(kept.items)
        inside.set()
        await go_on.wait()
        raise HTTPException(409)

    @app.post("/second")
    def add_by_kept() -> None:
        kept.items().add(2)

    first = asyncio.create_task(drive(app, http_scope("/first", "POST")))
    await inside.wait()
    second = await drive(app, http_scope("/second", "POST"))
    go_on.set()

    assert 409 == (await first).status
    assert 500 == second.status
    assert isinstance(second.error, SessionScopeMismatchError)
    assert [] == await rows()


@PSYCOPG
async def test_singleton_with_the_proxy_has_each_requests_session(db, drive, rows):
    """G11, G12: with `session_proxy` one object serves twenty threads, each by its own session."""

    class Keeping(containers.DeclarativeContainer):
        items = providers.Singleton(SyncItems, db.session_proxy)

    kept = Keeping()
    app = with_router(APIRouter(), db, id)

    @app.post("/{item_id}")
    def add_by_kept(item_id: int) -> None:
        kept.items().add(item_id)
        if item_id % 2:
            raise HTTPException(409)

    await asyncio.gather(*(drive(app, http_scope(f"/{each}", "POST")) for each in range(20)))

    assert list(range(0, 20, 2)) == await rows()
