"""that-depends: factories for what a request has, singletons for what it shares."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession
from that_depends import BaseContainer, Provide, inject, providers
from that_depends.integrations.fastapi import create_fastapi_route_class
from that_depends.providers.context_resources import ContextScopes

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    SessionScopeClosedError,
    current_session,
)
from tests.fix_asgi import http_scope
from tests.fix_database import Item
from tests.integrations.graphs import Children, Items, PlaceItem

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
COMMITTED = ["checkout", "begin", "commit", "checkin"]


class Graph(BaseContainer):
    """One factory for the session; the rest is what it would be anyway."""

    session = providers.Factory(current_session)
    items = providers.Factory(Items, session.cast)
    children = providers.Factory(Children, session.cast)
    place = providers.Factory(PlaceItem, items.cast, children.cast)


def make_app(db: Database[Any]) -> FastAPI:
    """An app under the middleware."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


@inject
async def place_in_job(item_id: int, place: PlaceItem = Provide["Graph.place"]) -> PlaceItem:
    """Code without a request."""
    await place(item_id)
    return place


@SQLITE
async def test_route_class_hands_the_graph_to_endpoints(db, drive, rows, timeline):
    """G1, G11: the integration's own route class, in an endpoint of either kind."""
    seen = []
    router = APIRouter(route_class=create_fastapi_route_class(scope=ContextScopes.REQUEST))

    @router.post("/{item_id}")
    async def create(item_id: int, place: PlaceItem = Graph.place.cast) -> None:
        await place(item_id)
        seen.append(place.sessions == {current_session()})

    @router.get("/")
    def look(place: PlaceItem = Graph.place.cast) -> None:
        seen.append(place.sessions == {current_session()})

    app = make_app(db)
    app.include_router(router)
    await drive(app, http_scope("/7", "POST"))
    await drive(app)

    assert [True, True] == seen
    assert [*COMMITTED, "start 200", "last body", "start 200", "last body"] == timeline
    assert [7] == await rows()


@SQLITE
async def test_context_resource_leaves_the_ending_to_the_scope(db, drive, rows, timeline):
    """G1, G3: the exit of a context resource ends nothing; a raised 409 is rolled back."""
    exits = []

    async def resource() -> AsyncIterator[AsyncSession]:
        yield current_session()
        exits.append(current_session().in_transaction())

    class InContext(BaseContainer):
        default_scope = ContextScopes.REQUEST
        session = providers.ContextResource(resource)
        items = providers.Factory(Items, session.cast)

    router = APIRouter(
        route_class=create_fastapi_route_class(InContext, scope=ContextScopes.REQUEST)
    )

    @router.post("/{item_id}")
    async def create(item_id: int, items: Items = InContext.items.cast) -> None:
        items.add(item_id)
        await items.session.flush()
        if item_id == 409:
            raise HTTPException(409)

    app = make_app(db)
    app.include_router(router)
    exchanges = [await drive(app, http_scope(f"/{each}", "POST")) for each in (1, 409)]

    assert [200, 409] == [each.status for each in exchanges]
    assert [True, True] == exits
    assert [*COMMITTED, "start 200", "last body"] == timeline[:6]
    assert [1] == await rows()


@SQLITE
async def test_session_that_a_singleton_kept_is_refused_to_the_next_request(db, drive, rows):
    """G9: a singleton keeps the first request's session, and the second is told so."""
    kept = providers.Singleton(Items, providers.Factory(current_session).cast)
    app, errors = make_app(db), []

    @app.post("/{item_id}")
    async def add(item_id: int, items: Annotated[Items, Depends(kept)]) -> None:
        try:
            items.add(item_id)
        except SessionScopeClosedError as error:
            errors.append(error)
            raise

    exchanges = [await drive(app, http_scope(f"/{each}", "POST")) for each in (1, 2)]

    assert [200, 500] == [each.status for each in exchanges]
    assert 1 == len(errors)
    assert [1] == await rows()


async def test_singleton_with_the_proxy_has_each_requests_session(db, drive, rows):
    """G11, G12: with `session_proxy` one object serves twenty requests at once."""
    kept = providers.Singleton(Items, db.session_proxy)
    app = make_app(db)

    @app.post("/{item_id}")
    async def add(item_id: int, items: Annotated[Items, Depends(kept)]) -> None:
        items.add(item_id)
        await items.session.flush()
        assert await current_session().get(Item, item_id) is not None
        if item_id % 2:
            raise HTTPException(409)

    await asyncio.gather(*(drive(app, http_scope(f"/{each}", "POST")) for each in range(20)))

    assert list(range(0, 20, 2)) == await rows()


async def test_overridden_session_serves_the_graph_and_goes(db, drive, rows):
    """G12: a test's own session serves its requests; after the override each has its own again."""
    app, seen = make_app(db), []

    @app.post("/{item_id}")
    async def create(item_id: int, place: Annotated[PlaceItem, Depends(Graph.place)]) -> None:
        await place(item_id)
        seen.append(place.sessions)

    async with db.session_scope() as session:
        with Graph.session.override_context_sync(session):
            await drive(app, http_scope("/1", "POST"))
            await drive(app, http_scope("/2", "POST"))
        db.set_rollback_only()
    await drive(app, http_scope("/3", "POST"))

    mine, same, own = seen
    assert {session} == mine == same
    assert mine.isdisjoint(own)
    assert [3] == await rows()


async def test_job_is_injected_inside_of_its_scope(db, rows):
    """G12: each call of an injected job has a session; one that raises leaves nothing."""

    @db.session_scope()
    async def job(item_id: int) -> PlaceItem:
        place = await place_in_job(item_id)
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


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_graph_without_a_scope_says_what_is_missing(sync):
    """Outside of any scope the container's error is ours, and says what to do."""
    with pytest.raises(NoSessionScopeError, match="session_scope"):
        Graph.place.resolve_sync() if sync else await Graph.place.resolve()
