"""The frameworks' own injection: what FastAPI and Litestar build by themselves."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Annotated, Any

import litestar.di
import litestar.params
import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from litestar import Controller, Litestar, post
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asgi_dbscope import Database, DBSessionMiddleware, SessionScopeClosedError, current_session
from tests.fix_asgi import http_scope
from tests.fix_database import Item
from tests.integrations.graphs import Children, Items, PlaceItem

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
COMMITTED = ["checkout", "begin", "commit", "checkin"]

# Litestar 2.23 asks for annotations that older versions don't know.
if hasattr(litestar.di, "NamedDependency"):
    BY_NAME: Any = "dependency"
    IN_PATH: Any = litestar.params.PathParameter()
else:
    BY_NAME = IN_PATH = litestar.params.Parameter()


@pytest.fixture
def make_engine(make_engine: Callable[..., AsyncEngine]) -> Callable[..., AsyncEngine]:
    """Engines of two connections, so that whoever keeps one is found out."""
    return partial(make_engine, pool_size=2, max_overflow=0, pool_timeout=30)


# --------------------------------------------------------------------------------------
# FastAPI
# --------------------------------------------------------------------------------------


@pytest.fixture
def app(db: Database[Any]) -> FastAPI:
    """An app under the middleware."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


@SQLITE
async def test_classes_are_dependencies(app, db, drive, rows, timeline):
    """G1, G11: classes that name each other as dependencies make one graph, one transaction."""
    session_of_request = Annotated[AsyncSession, Depends(db.get_session)]

    class ItemsOfRequest(Items):
        def __init__(self, session: session_of_request) -> None:
            super().__init__(session)

    class ChildrenOfRequest(Children):
        def __init__(self, session: session_of_request) -> None:
            super().__init__(session)

    class Place(PlaceItem):
        def __init__(
            self,
            items: Annotated[ItemsOfRequest, Depends()],
            children: Annotated[ChildrenOfRequest, Depends()],
        ) -> None:
            super().__init__(items, children)

    @app.post("/{item_id}")
    async def create(item_id: int, place: Annotated[Place, Depends()]) -> int:
        await place(item_id)
        return len(place.sessions | {current_session()})

    exchange = await drive(app, http_scope("/7", "POST"))

    assert (200, b"1") == (exchange.status, exchange.body)
    assert [*COMMITTED, "start 200", "last body"] == timeline
    assert [7] == await rows()


async def test_exits_of_every_kind_leave_the_ending_to_the_scope(app, db, drive, rows):
    """G3: dependencies with exits, of both kinds, around one session: a raised 409 is undone."""
    exits = []

    async def items(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> AsyncIterator[Items]:
        yield Items(session)
        exits.append("items")

    def children(
        session: Annotated[AsyncSession, Depends(db.get_session)],
    ) -> Iterator[Children]:
        try:
            yield Children(session)
        finally:
            exits.append("children")

    @app.post("/{item_id}")
    async def create(
        item_id: int,
        items: Annotated[Items, Depends(items)],
        children: Annotated[Children, Depends(children)],
    ) -> None:
        await PlaceItem(items, children)(item_id)
        if item_id == 409:
            raise HTTPException(409)

    exchanges = [await drive(app, http_scope(f"/{each}", "POST")) for each in (1, 409)]

    assert [200, 409] == [each.status for each in exchanges]
    assert ["children", "items", "children"] == exits
    assert [1] == await rows()


@SQLITE
async def test_overridden_session_serves_the_graph_and_goes(app, db, drive, rows):
    """G12: with `dependency_overrides` a test's session serves its requests, and no others."""
    sessions = []

    @app.post("/{item_id}")
    async def create(
        item_id: int, session: Annotated[AsyncSession, Depends(db.get_session)]
    ) -> None:
        session.add(Item(id=item_id))
        await session.flush()
        sessions.append(session)

    async with db.session_scope() as session:
        app.dependency_overrides[db.get_session] = lambda: session
        await drive(app, http_scope("/1", "POST"))
        await drive(app, http_scope("/2", "POST"))
        app.dependency_overrides.clear()
        db.set_rollback_only()
    await drive(app, http_scope("/3", "POST"))

    mine, same, own = sessions
    assert session is mine is same
    assert mine is not own
    assert [3] == await rows()


@SQLITE
def test_test_client_sees_what_was_committed(app, engine, db):
    """G1: a client in another thread and loop reads, in its next request, what it has written."""

    @app.post("/{item_id}")
    def create(item_id: int, session: Annotated[AsyncSession, Depends(db.get_session)]) -> None:
        session.add(Item(id=item_id))

    @app.get("/{item_id}")
    async def show(item_id: int, session: Annotated[AsyncSession, Depends(db.get_session)]) -> bool:
        return await session.get(Item, item_id) is not None

    with TestClient(app) as client:
        found = [
            client.get("/1").json(),
            client.post("/1").status_code,
            client.get("/1").json(),
        ]
        assert client.portal is not None
        client.portal.call(engine.dispose)

    assert [False, 200, True] == found


# --------------------------------------------------------------------------------------
# Litestar
# --------------------------------------------------------------------------------------


def in_litestar(db: Database[Any], *handlers: Any, **options: Any) -> Litestar:
    """An app of Litestar's under the middleware."""
    return Litestar(
        handlers,
        middleware=[DefineMiddleware(DBSessionMiddleware, database=db)],
        logging_config=None,
        openapi_config=None,
        **options,
    )


@SQLITE
async def test_litestar_layers_share_the_session(db, drive, rows, timeline):
    """G1, G11: dependencies of app, controller and handler are one graph, one transaction."""

    async def items(session: Annotated[AsyncSession, BY_NAME]) -> Items:
        return Items(session)

    async def children(session: Annotated[AsyncSession, BY_NAME]) -> AsyncIterator[Children]:
        yield Children(session)

    async def place(
        items: Annotated[Items, BY_NAME], children: Annotated[Children, BY_NAME]
    ) -> PlaceItem:
        return PlaceItem(items, children)

    class ItemController(Controller):
        path = "/"
        dependencies = {"items": Provide(items), "children": Provide(children)}  # noqa: RUF012

        @post("/{item_id:int}", dependencies={"place": Provide(place)})
        async def create(
            self, item_id: Annotated[int, IN_PATH], place: Annotated[PlaceItem, BY_NAME]
        ) -> int:
            await place(item_id)
            return len(place.sessions | {current_session()})

    app = in_litestar(db, ItemController, dependencies={"session": Provide(db.get_session)})
    exchange = await drive(app, http_scope("/7", "POST"))

    assert (201, b"1") == (exchange.status, exchange.body)
    assert [*COMMITTED, "start 201"] == timeline[:5]
    assert [7] == await rows()


@SQLITE
async def test_litestar_cache_keeps_the_first_session_and_is_told_so(db, drive, rows):
    """G9: `use_cache=True` hands the first request's session to the second, which is told so."""
    errors = []

    @post("/{item_id:int}")
    async def create(
        item_id: Annotated[int, IN_PATH], session: Annotated[AsyncSession, BY_NAME]
    ) -> None:
        try:
            session.add(Item(id=item_id))
        except SessionScopeClosedError as error:
            errors.append(error)
            raise

    app = in_litestar(db, create, dependencies={"session": Provide(db.get_session, use_cache=True)})
    exchanges = [await drive(app, http_scope(f"/{each}", "POST")) for each in (1, 2)]

    assert [201, 500] == [each.status for each in exchanges]
    assert 1 == len(errors)
    assert [1] == await rows()


async def test_litestar_cache_may_keep_what_has_the_proxy(db, drive, rows):
    """G11, G12: a cached repository with `session_proxy` serves twenty requests at once."""
    built = []

    async def items() -> Items:
        built.append(Items(db.session_proxy))
        return built[0]

    @post("/{item_id:int}")
    async def create(item_id: Annotated[int, IN_PATH], items: Annotated[Items, BY_NAME]) -> None:
        items.add(item_id)
        await items.session.flush()
        assert await current_session().get(Item, item_id) is not None

    app = in_litestar(db, create, dependencies={"items": Provide(items, use_cache=True)})
    await drive(app, http_scope("/20", "POST"))
    await asyncio.gather(*(drive(app, http_scope(f"/{each}", "POST")) for each in range(20)))

    assert 1 == len(built)
    assert list(range(21)) == await rows()


# --------------------------------------------------------------------------------------
# current_session by itself
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@SQLITE
async def test_current_session_is_a_dependency_of_fastapis(sync, app, drive, rows):
    """G11, G12: `Depends(current_session)` takes nothing from the request: no `?name=`."""
    session_of_request = Annotated[AsyncSession, Depends(current_session)]

    async def create(session: session_of_request) -> bool:
        session.add(Item(id=1))
        return session is current_session()

    def create_in_thread(session: session_of_request) -> bool:
        session.add(Item(id=1))
        return session is current_session()

    app.post("/")(create_in_thread if sync else create)
    exchange = await drive(app, http_scope("/", "POST", query_string=b"name=reports"))

    assert (200, b"true") == (exchange.status, exchange.body)
    assert "parameters" not in app.openapi()["paths"]["/"]["post"]
    assert [1] == await rows()


@SQLITE
async def test_current_session_is_a_dependency_of_litestars(db, drive, rows):
    """G11, G12: `Provide(current_session)` takes nothing from the request: no `?name=`."""

    @post("/")
    async def create(session: Annotated[AsyncSession, BY_NAME]) -> bool:
        session.add(Item(id=1))
        return session is current_session()

    provided = {"session": Provide(current_session, sync_to_thread=False)}
    app = in_litestar(db, create, dependencies=provided)
    exchange = await drive(app, http_scope("/", "POST", query_string=b"name=reports"))

    assert (201, b"true") == (exchange.status, exchange.body)
    assert [1] == await rows()
