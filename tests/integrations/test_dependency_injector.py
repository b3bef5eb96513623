"""dependency-injector: one provider for the session, and what containers do besides."""

import asyncio
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from dependency_injector import containers, providers
from dependency_injector.wiring import Closing, Provide, Provider, inject
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.testclient import TestClient

from asgi_dbscope import (
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    SessionScopeClosedError,
    SessionScopeMismatchError,
    WebSocketSessionError,
    current_session,
)
from tests.fix_asgi import http_scope
from tests.fix_database import Item
from tests.integrations.graphs import Children, Items, PlaceItem, serve, serve_in_thread

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
COMMITTED = ["checkout", "begin", "commit", "checkin"]


class Container(containers.DeclarativeContainer):
    """One provider for the session; the rest is what it would be anyway."""

    session = providers.Callable(current_session)
    items = providers.Factory(Items, session)
    children = providers.Factory(Children, session)
    place = providers.Factory(PlaceItem, items, children)


Placing = Annotated[PlaceItem, Depends(Provide[Container.place])]


@inject
async def place_item(
    what: str, item_id: int, place: Placing, request: Request, tasks: BackgroundTasks
) -> None:
    """An endpoint that is handed its use case."""
    if what == "overridden":
        request.app.state.note(place)
        await place(item_id)
        return
    if what == "built":
        request.app.state.note(place)
        return
    if what == "cancelled":
        await place(item_id)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
    rest = await serve(what, item_id, place, request.app.state.note, HTTPException(409))
    if rest is not None:
        tasks.add_task(rest)


@inject
def place_item_in_thread(what: str, item_id: int, place: Placing, request: Request) -> None:
    """The same in a worker thread."""
    serve_in_thread(what, item_id, place, request.app.state.note, HTTPException(409))


@inject
async def place_in_job(item_id: int, place: PlaceItem = Provide[Container.place]) -> PlaceItem:
    """Code without a request."""
    await place(item_id)
    return place


@pytest.fixture
def make_engine(make_engine: Callable[..., AsyncEngine]) -> Callable[..., AsyncEngine]:
    """Engines of two connections, so that whoever keeps one is found out."""
    return partial(make_engine, pool_size=2, max_overflow=0, pool_timeout=30)


@pytest.fixture
def container() -> Iterator[Container]:
    """A container, wired with this module."""
    container = Container()
    container.wire(modules=[sys.modules[__name__]])
    yield container
    container.unwire()


@pytest.fixture
def app(container: Container, db: Database[Any]) -> FastAPI:
    """An app whose endpoints the container serves."""
    app = FastAPI()
    app.post("/{what}/{item_id}")(place_item)
    app.post("/threaded/{what}/{item_id}")(place_item_in_thread)
    app.state.note = id
    app.add_middleware(DBSessionMiddleware, database=db)
    return app


# --------------------------------------------------------------------------------------
# Many requests
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "/threaded"], ids=["async", "sync"])
@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
@pytest.mark.once
async def test_two_hundred_requests_at_once_with_every_ending(kind, app, engine, drive, rows):
    """G12, G14: two hundred at once are committed, refused, failed or cancelled, each alone."""
    noted: list[PlaceItem] = []
    app.state.note = noted.append
    endings = ["placed", "refused", "orphaned", "placed" if kind else "cancelled"]
    whats = [endings[each % 4] for each in range(200)]

    exchanges = await asyncio.gather(
        *(
            drive(app, http_scope(f"{kind}/{what}/{each}", "POST"))
            for each, what in enumerate(whats)
        )
    )

    statuses = {"placed": 200, "refused": 409, "orphaned": 500, "cancelled": None}
    assert [statuses[what] for what in whats] == [each.status for each in exchanges]
    assert 0 == engine.pool.checkedout()
    assert {1} == {len(place.sessions) for place in noted}
    assert len(noted) == len(set().union(*(place.sessions for place in noted)))
    assert [each for each in range(200) if whats[each] == "placed"] == await rows()


@SQLITE
@pytest.mark.once
async def test_two_thousand_requests_leave_nothing_in_memory(app, drive):
    """G9: no object is left of thousands of requests: no session, no graph, nothing else."""
    noted = []
    kept: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(place: PlaceItem) -> None:
        noted.append(id(place))
        kept.update((place, place.items, place.children, *place.sessions))

    app.state.note = note

    async def count_objects(requests: int) -> int:
        for _ in range(requests):
            await drive(app, http_scope("/built/1", "POST"))
        gc.collect()
        return len(gc.get_objects())

    before = await count_objects(50)
    after = await count_objects(2000)

    assert 2050 == len(noted)
    assert [] == list(kept)
    assert after - before < 10


@SQLITE
async def test_containers_of_one_app_share_the_session(app, container, db, drive, rows, timeline):
    """G11: a second container, and one inside another, give the same session and transaction."""

    class Shop(containers.DeclarativeContainer):
        parts = providers.Container(Container)
        place = providers.Factory(PlaceItem, parts.items, parts.children)

    shop, sessions = Shop(), []

    @app.post("/twice")
    async def place_twice() -> None:
        for each, place in enumerate((container.place(), Container().place(), shop.place())):
            await place(each)
            sessions.append(place.sessions)

    exchange = await drive(app, http_scope("/twice", "POST"))

    assert 200 == exchange.status
    assert 1 == len(set().union(*sessions))
    assert [*COMMITTED, "start 200", "last body"] == timeline
    assert [0, 1, 2] == await rows()


@SQLITE
async def test_closing_marker_closes_nothing(app, container, drive, rows, timeline):
    """G1: endpoints that keep their `Closing[...]` markers are committed at the head, too."""

    @app.post("/")
    @inject
    async def place_one(
        place: Annotated[PlaceItem, Depends(Closing[Provide[Container.place]])],
    ) -> None:
        await place(7)

    container.wire(modules=[sys.modules[__name__]])
    exchange = await drive(app, http_scope("/", "POST"))

    assert 200 == exchange.status
    assert [*COMMITTED, "start 200", "last body"] == timeline
    assert [7] == await rows()


@SQLITE
async def test_containers_name_the_database_they_mean(engine, drive, rows):
    """G11: of several databases a container takes one by its name, or by its object."""
    orders, reports = Database(engine, name="orders"), Database(engine, name="reports")

    class Shop(containers.DeclarativeContainer):
        orders_session = providers.Callable(current_session, "orders")
        reports_session = providers.Object(reports).provided.session

    shop, same = Shop(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        same.append(shop.orders_session() is orders.session)
        same.append(shop.reports_session() is reports.session)
        shop.orders_session().add(Item(id=1))

    await drive(DBSessionMiddleware(app, databases=[orders, reports]))

    assert [True, True] == same


# --------------------------------------------------------------------------------------
# Background work, jobs, websockets, scopes inside a request
# --------------------------------------------------------------------------------------


@SQLITE
async def test_injected_background_task_has_a_transaction_of_its_own(app, drive, rows, timeline):
    """G8: a task that is injected when it runs gets the session, after the response."""

    @app.post("/")
    async def leave_to_task(tasks: BackgroundTasks) -> None:
        tasks.add_task(place_in_job, 7)

    exchange = await drive(app, http_scope("/", "POST"))

    assert (200, None) == (exchange.status, exchange.error)
    assert ["start 200", "last body", *COMMITTED] == timeline
    assert [7] == await rows()


@SQLITE
async def test_injected_task_that_outlives_its_request_opens_a_scope(app, db, drive, rows):
    """G9: the scope that a detached task opens is what its graph is built in."""
    tasks: set[asyncio.Task[PlaceItem]] = set()
    go_on = asyncio.Event()

    async def place_when_it_is_over(item_id: int) -> PlaceItem:
        await go_on.wait()
        async with db.session_scope():
            return await place_in_job(item_id)

    @app.post("/")
    async def start_task() -> None:
        tasks.add(asyncio.create_task(place_when_it_is_over(7)))
        tasks.add(asyncio.create_task(place_when_it_is_over(8)))

    await drive(app, http_scope("/", "POST"))
    go_on.set()
    first, second = await asyncio.gather(*tasks)

    assert first.sessions.isdisjoint(second.sessions)
    assert [7, 8] == await rows()


@SQLITE
async def test_injected_task_without_a_scope_of_its_own_is_told_so(app, drive):
    """G9: after the request a container builds nothing, and the error says what to do."""
    tasks: set[asyncio.Task[PlaceItem]] = set()
    go_on = asyncio.Event()

    async def place_when_it_is_over() -> PlaceItem:
        await go_on.wait()
        return await place_in_job(7)

    @app.post("/")
    async def start_task() -> None:
        tasks.add(asyncio.create_task(place_when_it_is_over()))

    await drive(app, http_scope("/", "POST"))
    go_on.set()

    (task,) = tasks
    with pytest.raises(SessionScopeClosedError, match="session_scope"):
        await task


async def test_job_builds_its_graph_inside_of_its_scope(container, db, rows):
    """G12: a job with `Provider[...]` has a session per call; one that raises leaves nothing."""

    @inject
    async def job(
        item_id: int, build: Callable[[], PlaceItem] = Provider[Container.place]
    ) -> PlaceItem:
        async with db.session_scope():
            place = build()
            await place(item_id)
            if item_id == 3:
                raise LookupError
            return place

    container.wire(modules=[sys.modules[__name__]])
    jobs = (job(each) for each in (1, 2, 3))
    first, second, failed = await asyncio.gather(*jobs, return_exceptions=True)

    assert isinstance(first, PlaceItem)
    assert isinstance(second, PlaceItem)
    assert isinstance(failed, LookupError)
    assert first.sessions.isdisjoint(second.sessions)
    assert [1, 2] == await rows()


@SQLITE
@pytest.mark.parametrize("is_outside", [True, False], ids=["outside", "inside"])
async def test_job_that_is_injected_outside_of_its_scope_is_told_so(is_outside, container, db):
    """Wiring wraps what it finds in a module outside of its decorators, whatever their order."""
    module = ModuleType("tests_wired")

    async def job(place: PlaceItem = Provide[Container.place]) -> None: ...

    job.__module__ = module.__name__
    scoped = db.session_scope()
    module.job = inject(scoped(job)) if is_outside else scoped(inject(job))  # type: ignore[attr-defined]
    container.wire(modules=[module])

    with pytest.raises(NoSessionScopeError, match="session_scope"):
        await module.job()


async def test_factory_of_sessions_in_the_graph_ends_in_a_quick_error(make_engine, drive):
    """G14: who opens sessions of its own besides takes two connections per request: no hang."""
    engine = make_engine("sqlite", pool_timeout=0.1)
    both = asyncio.Barrier(2)

    class Leftover(containers.DeclarativeContainer):
        session = providers.Factory(AsyncSession, expire_on_commit=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await current_session().execute(sa.text("SELECT 1"))
        await both.wait()
        async with Leftover.session(engine) as session:
            try:
                await session.execute(sa.text("SELECT 1"))
            finally:
                await both.wait()  # neither gets the other one's connection

    served = DBSessionMiddleware(app, engine=engine)
    exchanges = await asyncio.gather(drive(served), drive(served))
    left = engine.pool.checkedout()
    await engine.dispose()

    assert [503, 503] == [each.status for each in exchanges]
    assert 0 == left


@SQLITE
async def test_graph_of_a_scope_inside_a_request_is_built_there(app, container, db, drive, rows):
    """G11: what is built in an inner scope belongs to it, what was handed in before doesn't."""

    class Kept(containers.DeclarativeContainer):
        items = providers.Singleton(Items, providers.Object(db).provided.session_proxy)

    kept = Kept()

    @app.post("/")
    async def record_attempt() -> None:
        outer = container.items()
        async with db.session_scope():
            container.items().add(1)
            kept.items().add(2)
            outer.add(3)
        raise HTTPException(409)

    exchange = await drive(app, http_scope("/", "POST"))

    assert 409 == exchange.status
    assert [1, 2] == await rows()


@SQLITE
def test_websocket_builds_a_graph_for_each_message(container, engine, db):
    """G17: with `Provider[...]` each message has a graph and a session, and commits by itself."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db)

    @app.websocket("/")
    @inject
    async def place_each(
        websocket: WebSocket, build: Annotated[Any, Depends(Provider[Container.place])]
    ) -> None:
        await websocket.accept()
        async for item_id in websocket.iter_text():
            async with db.session_scope():
                await build()(int(item_id))
            await websocket.send_json(engine.pool.checkedout())

    container.wire(modules=[sys.modules[__name__]])
    with TestClient(app) as client, client.websocket_connect("/") as websocket:
        for item_id in ("1", "2"):
            websocket.send_text(item_id)
            assert 0 == websocket.receive_json()


@SQLITE
def test_websocket_that_is_handed_a_graph_is_told_so(container, db):
    """G17: a graph for a whole connection would hold a session; the error says what to do."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db)

    @app.websocket("/")
    @inject
    async def place_each(websocket: WebSocket, place: Placing) -> None: ...

    container.wire(modules=[sys.modules[__name__]])

    with (
        TestClient(app) as client,
        pytest.raises(WebSocketSessionError, match="session_scope"),
        client.websocket_connect("/"),
    ):
        pass


# --------------------------------------------------------------------------------------
# Overrides
# --------------------------------------------------------------------------------------


async def test_overridden_session_serves_the_graph_and_goes(app, container, db, drive, rows):
    """G12: a test's own session serves its requests; after the override each has its own again."""
    noted: list[PlaceItem] = []
    app.state.note = noted.append

    async with db.session_scope() as session:
        with container.session.override(providers.Object(session)):
            await drive(app, http_scope("/overridden/1", "POST"))
            await drive(app, http_scope("/overridden/2", "POST"))
        db.set_rollback_only()
    await drive(app, http_scope("/placed/3", "POST"))

    mine, same, own = (place.sessions for place in noted)
    assert {session} == mine == same
    assert mine.isdisjoint(own)
    assert [3] == await rows()


@SQLITE
async def test_overridden_repository_leaves_the_rest_as_it_is(app, container, drive, rows):
    """A fake in the place of one repository: the other one still has the request's session."""

    class NoChildren(Children):
        def add(self, child_id: int, *, of: int) -> None: ...

    with container.children.override(providers.Factory(NoChildren, container.session)):
        await drive(app, http_scope("/orphaned/1", "POST"))
    exchange = await drive(app, http_scope("/orphaned/2", "POST"))

    assert 500 == exchange.status
    assert [1] == await rows()


@SQLITE
async def test_override_reaches_concurrent_requests_only_while_it_lasts(app, container, drive):
    """G12: requests that were built before, during and after an override don't mix."""
    inside, go_on = asyncio.Event(), asyncio.Event()
    seen: dict[str, Any] = {}

    @app.post("/waiting")
    async def wait() -> None:
        items = container.items()
        inside.set()
        await go_on.wait()
        seen["before"] = items.session is current_session()

    waiting = asyncio.create_task(drive(app, http_scope("/waiting", "POST")))
    await inside.wait()
    fake = object()
    with container.session.override(providers.Object(fake)):
        seen["during"] = container.items().session is fake
        go_on.set()
        await waiting
    with pytest.raises(NoSessionScopeError):
        container.items()

    assert {"during": True, "before": True} == seen


# --------------------------------------------------------------------------------------
# Objects that outlive a request
# --------------------------------------------------------------------------------------

KEEPING = [
    providers.Singleton,
    providers.ThreadSafeSingleton,
    providers.ThreadLocalSingleton,
    providers.Resource,
]


@pytest.mark.parametrize("keeping", KEEPING, ids=lambda cls: cls.__name__)
@SQLITE
async def test_session_that_a_singleton_kept_is_refused_to_the_next_request(
    keeping, app, drive, rows
):
    """G9: whatever a container builds once keeps the first request's session, and is told so."""

    class Keeping(containers.DeclarativeContainer):
        items = keeping(Items, providers.Callable(current_session))

    kept, errors = Keeping(), []

    @app.post("/kept/items/{item_id}")
    async def add_by_kept(item_id: int) -> None:
        try:
            kept.items().add(item_id)
        except SessionScopeClosedError as error:
            errors.append(error)
            raise

    first = await drive(app, http_scope("/kept/items/1", "POST"))
    second = await drive(app, http_scope("/kept/items/2", "POST"))

    assert (200, 500) == (first.status, second.status)
    assert 1 == len(errors)
    assert [1] == await rows()


async def test_use_case_that_is_a_transaction_needs_no_scope_around(app, db, drive, rows):
    """G11, G12: built once with the proxy, it joins a request's transaction, or is one itself."""

    class Placing(PlaceItem):
        @db.transactional()
        async def __call__(self, item_id: int, *, of: int | None = None) -> None:
            await super().__call__(item_id, of=of)
            if item_id % 2:
                raise HTTPException(409)

    class Kept(containers.DeclarativeContainer):
        items = providers.Singleton(Items, db.session_proxy)
        children = providers.Singleton(Children, db.session_proxy)
        place = providers.Singleton(Placing, items, children)

    kept = Kept()

    @app.post("/kept/items/{item_id}")
    async def place_kept(item_id: int) -> None:
        await kept.place()(item_id)
        await kept.place()(item_id + 100)

    jobs = (kept.place()(each) for each in range(10))
    requests = (drive(app, http_scope(f"/kept/items/{each}", "POST")) for each in range(10, 30))
    ran, exchanges = await asyncio.gather(
        asyncio.gather(*jobs, return_exceptions=True), asyncio.gather(*requests)
    )

    assert [type(None), HTTPException] * 5 == [type(each) for each in ran]
    assert [200, 409] * 10 == [each.status for each in exchanges]
    assert [*range(0, 30, 2), *range(110, 130, 2)] == await rows()


@SQLITE
async def test_block_of_its_own_is_seen_by_the_proxy_only(app, container, db, drive, rows):
    """G11: in a REQUIRES_NEW block what was handed in goes on with the request's session."""
    proxied = Items(db.session_proxy)

    @app.post("/")
    async def record_attempt() -> None:
        handed_in = container.items()
        async with db.transactional("REQUIRES_NEW"):
            proxied.add(1)
            container.items().add(2)
            handed_in.add(3)
        proxied.add(4)
        raise HTTPException(409)

    assert 409 == (await drive(app, http_scope("/", "POST"))).status
    assert [1, 2] == await rows()


@pytest.mark.parametrize("keeping", KEEPING, ids=lambda cls: cls.__name__)
@SQLITE
async def test_singleton_with_the_proxy_has_each_requests_session(keeping, app, db, drive, rows):
    """G11, G12: with `session_proxy` one object serves twenty requests at once, each by its own."""

    class Keeping(containers.DeclarativeContainer):
        database = providers.Object(db)
        items = keeping(Items, database.provided.session_proxy)

    kept = Keeping()

    @app.post("/kept/items/{item_id}")
    async def add_by_kept(item_id: int) -> None:
        items = kept.items()
        items.add(item_id)
        await items.session.flush()
        assert await items.session.get(Item, item_id) in current_session()
        if item_id % 2:
            raise HTTPException(409)

    exchanges = await asyncio.gather(
        *(drive(app, http_scope(f"/kept/items/{each}", "POST")) for each in range(20))
    )

    assert [409 if each % 2 else 200 for each in range(20)] == [each.status for each in exchanges]
    assert list(range(0, 20, 2)) == await rows()


@SQLITE
async def test_session_that_another_request_kept_is_refused_at_once(app, drive, rows):
    """G1, G12: while its request is open, too, a kept session serves no other one."""

    class Keeping(containers.DeclarativeContainer):
        items = providers.Singleton(Items, providers.Callable(current_session))

    kept, inside, go_on = Keeping(), asyncio.Event(), asyncio.Event()

    @app.post("/first/request/is/open")
    async def keep() -> None:
        kept.items()
        inside.set()
        await go_on.wait()
        raise HTTPException(409)

    @app.post("/kept/items/{item_id}")
    async def add_by_kept(item_id: int) -> None:
        kept.items().add(item_id)

    first = asyncio.create_task(drive(app, http_scope("/first/request/is/open", "POST")))
    await inside.wait()
    second = await drive(app, http_scope("/kept/items/2", "POST"))
    go_on.set()

    assert 409 == (await first).status
    assert 500 == second.status
    assert isinstance(second.error, SessionScopeMismatchError)
    assert [] == await rows()


@SQLITE
async def test_proxy_by_itself_may_be_given_to_a_singleton(app, db, drive, rows):
    """G11: a container copies what it is given, and the copy of a proxy is the proxy."""

    class Keeping(containers.DeclarativeContainer):
        items = providers.Singleton(Items, db.session_proxy)

    kept = Keeping()

    @app.post("/kept/items/{item_id}")
    async def add_by_kept(item_id: int) -> None:
        kept.items().add(item_id)

    exchanges = [await drive(app, http_scope(f"/kept/items/{each}", "POST")) for each in (1, 2)]

    assert [200, 200] == [each.status for each in exchanges]
    assert [1, 2] == await rows()


async def test_marker_on_a_module_is_filled_when_it_is_wired(container):
    """A marker outside of a function is one for ever; wiring asks for it when nothing is open."""
    module = ModuleType("tests_wired")
    module.session = Provide[Container.session]  # type: ignore[attr-defined]

    with pytest.raises(NoSessionScopeError):
        container.wire(modules=[module])


async def test_graph_without_a_scope_says_what_is_missing(container):
    """Outside of any scope a container's error is ours, and says what to do."""
    with pytest.raises(NoSessionScopeError, match="DBSessionMiddleware"):
        container.place()
