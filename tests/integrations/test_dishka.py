"""dishka: a container with a request scope of its own, inside or outside of the session scope."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import dishka
import dishka.integrations.fastapi
import dishka.integrations.litestar
import litestar
import litestar.exceptions
import pytest
from dishka import FromDishka, Provider, Scope, make_async_container, provide
from dishka.exceptions import GraphMissingFactoryError
from dishka.integrations.fastapi import DishkaRoute
from fastapi import APIRouter, FastAPI, HTTPException
from litestar.middleware import DefineMiddleware
from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    SessionScopeClosedError,
    current_session,
)
from tests.fix_asgi import http_scope
from tests.fix_database import Item
from tests.integrations.graphs import AnySession, Children, Items, PlaceItem

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
COMMITTED = ["checkout", "begin", "commit", "checkin"]


class GraphProvider(Provider):
    """One method for the session; the rest is what it would be anyway."""

    scope = Scope.REQUEST
    graph = dishka.provide_all(Items, Children, PlaceItem)

    @provide
    def session(self) -> AsyncSession:
        """The current scope's."""
        return current_session()


router = APIRouter(route_class=DishkaRoute)


@router.post("/items/{item_id}")
async def create(item_id: int, place: FromDishka[PlaceItem]) -> None:
    """An endpoint that is handed its use case."""
    await place(item_id)
    if item_id == 409:
        raise HTTPException(409)


def make_app(db: Database[Any], *providers: Provider, is_inside: bool = True) -> FastAPI:
    """An app whose container is inside or outside of the session scope."""
    app = FastAPI()
    app.include_router(router)
    container = make_async_container(*providers)
    if is_inside:
        dishka.integrations.fastapi.setup_dishka(container, app)
    app.add_middleware(DBSessionMiddleware, database=db)
    if not is_inside:
        dishka.integrations.fastapi.setup_dishka(container, app)
    return app


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
async def test_commits_whichever_middleware_is_outside(is_inside, db, drive, rows, timeline):
    """G1: the container closes after the response; what it gave out is committed before."""
    app = make_app(db, GraphProvider(), is_inside=is_inside)

    exchanges = [await drive(app, http_scope(f"/items/{each}", "POST")) for each in (1, 409)]

    assert [200, 409] == [each.status for each in exchanges]
    assert [*COMMITTED, "start 200", "last body"] == timeline[:6]
    assert [1] == await rows()


class ExitingProvider(GraphProvider):
    """A provider with an exit, which writes once more."""

    @provide(override=True)
    async def session(self) -> AsyncIterator[AsyncSession]:
        """The current scope's, and an item when the container's scope ends."""
        session = current_session()
        yield session
        session.add(Item(id=99))


@SQLITE
async def test_exit_of_a_provider_is_background_work(db, drive, rows, timeline):
    """G8: what a provider's exit writes is a transaction of its own, after the response."""
    exchange = await drive(make_app(db, ExitingProvider()), http_scope("/items/1", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert [*COMMITTED, "start 200", "last body", *COMMITTED] == timeline
    assert [1, 99] == await rows()


@SQLITE
async def test_exit_of_a_provider_outside_of_the_scope_is_told_so(db, drive, rows):
    """G9: with the container outside, its exits come when the session is over."""
    app = make_app(db, ExitingProvider(), is_inside=False)

    exchange = await drive(app, http_scope("/items/1", "POST"))

    (error,) = exchange.error.exceptions
    assert isinstance(error, SessionScopeClosedError)
    assert [1] == await rows()


@SQLITE
async def test_objects_of_the_app_cannot_ask_for_the_requests_session(db):
    """G12: dishka itself refuses an object of the app's that wants what a request has."""

    class Keeping(GraphProvider):
        kept = provide(Items, scope=Scope.APP, override=True)

    with pytest.raises(GraphMissingFactoryError, match="AsyncSession"):
        make_async_container(Keeping())


async def test_object_of_the_app_with_the_proxy_has_each_requests_session(db, drive, rows):
    """G11, G12: built once with `session_proxy`, it serves twenty requests by their sessions."""
    built = []

    class AppItems(Items):
        def __init__(self, session: AnySession) -> None:
            built.append(self)
            self.session = session

    class AppProvider(Provider):
        @provide(scope=Scope.APP)
        def items(self) -> AppItems:
            return AppItems(db.session_proxy)

    app = make_app(db, GraphProvider(), AppProvider())
    routes = APIRouter(route_class=DishkaRoute)

    @routes.post("/kept/{item_id}")
    async def add(item_id: int, items: FromDishka[AppItems]) -> None:
        items.add(item_id)
        await items.session.flush()
        assert await current_session().get(Item, item_id) is not None
        if item_id % 2:
            raise HTTPException(409)

    app.include_router(routes)
    await asyncio.gather(*(drive(app, http_scope(f"/kept/{each}", "POST")) for each in range(20)))

    assert 1 == len(built)
    assert list(range(0, 20, 2)) == await rows()


@SQLITE
async def test_overridden_session_serves_the_graph(db, drive, rows):
    """A test's own session in the place of the request's: its requests are rolled back with it."""
    async with db.session_scope() as session:
        override = Provider(scope=Scope.REQUEST)
        override.provide(lambda: session, provides=AsyncSession, override=True)
        app = make_app(db, GraphProvider(), override)
        exchanges = [await drive(app, http_scope(f"/items/{each}", "POST")) for each in (1, 2)]
        db.set_rollback_only()

    assert [200, 200] == [each.status for each in exchanges]
    assert [] == await rows()


async def test_job_opens_the_session_scope_first(db, rows):
    """G12: a container's request scope inside a session scope is a job; one that raises is gone."""
    container = make_async_container(GraphProvider())

    async def job(item_id: int) -> PlaceItem:
        async with db.session_scope(), container() as request:
            place = await request.get(PlaceItem)
            await place(item_id)
            if item_id == 3:
                raise LookupError
            return place

    jobs = (job(each) for each in (1, 2, 3))
    first, second, failed = await asyncio.gather(*jobs, return_exceptions=True)

    assert isinstance(first, PlaceItem)
    assert isinstance(second, PlaceItem)
    assert isinstance(failed, LookupError)
    assert first.sessions.isdisjoint(second.sessions)
    assert [1, 2] == await rows()


async def test_graph_without_a_scope_says_what_is_missing():
    """Outside of any scope the container's error is ours, and says what to do."""
    container = make_async_container(GraphProvider())

    async with container() as request:
        with pytest.raises(NoSessionScopeError, match="session_scope"):
            await request.get(PlaceItem)


@SQLITE
async def test_get_session_is_a_source_by_itself(db, rows):
    """G11: dishka awaits `db.get_session` where it is named as the source of the session."""
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(db.get_session, provides=AsyncSession)
    provider.provide_all(Items, Children, PlaceItem)
    container = make_async_container(provider)

    async with db.session_scope() as session, container() as request:
        place = await request.get(PlaceItem)

    assert {session} == place.sessions


@SQLITE
async def test_litestar_handler_is_handed_its_graph(db, drive, rows, timeline):
    """G1, G3: the same provider in Litestar: committed before the head, rolled back if raised."""

    @litestar.post("/items/{item_id:int}")
    @dishka.integrations.litestar.inject
    async def create(
        request: litestar.Request[Any, Any, Any], place: FromDishka[PlaceItem]
    ) -> None:
        item_id = request.path_params["item_id"]
        await place(item_id)
        if item_id == 409:
            raise litestar.exceptions.HTTPException(status_code=409)

    app = litestar.Litestar(
        [create],
        middleware=[DefineMiddleware(DBSessionMiddleware, database=db)],
        openapi_config=None,
        logging_config=None,
    )
    dishka.integrations.litestar.setup_dishka(make_async_container(GraphProvider()), app)
    exchanges = [await drive(app, http_scope(f"/items/{each}", "POST")) for each in (1, 409)]

    assert [201, 409] == [each.status for each in exchanges]
    assert [*COMMITTED, "start 201"] == timeline[:5]
    assert [1] == await rows()


@SQLITE
async def test_current_session_is_a_source_by_itself(db):
    """G11: dishka takes `current_session` as the source of what it returns."""
    provider = Provider(scope=Scope.REQUEST)
    provider.provide(current_session)
    provider.provide_all(Items, Children, PlaceItem)
    container = make_async_container(provider)

    async with db.session_scope() as session, container() as request:
        place = await request.get(PlaceItem)

    assert {session} == place.sessions
