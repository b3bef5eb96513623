"""Dependency injection: each example does what the page says."""

import asyncio

import pytest
from dependency_injector import providers
from starlette.testclient import TestClient

from asgi_dbscope import (
    NoSessionScopeError,
    SessionScopeClosedError,
    WebSocketSessionError,
    current_session,
)
from tests.docs.blocks import runs

PAGE = "dependency-injection.md"
ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
GRAPH = ("tutorial.md/tables", "graph")
INJECTOR = (*GRAPH, "dependency-injector")


@pytest.fixture(autouse=True)
def unwired(request, example):
    """Take back what the page's container did to its module."""
    yield
    unwire = getattr(getattr(example, "container", None), "unwire", None)
    if unwire is not None:
        unwire()


@runs(PAGE, *INJECTOR)
async def test_dependency_injector_builds_the_graph(example, serve, query):
    """G1, G3, G11: one session for the graph; what is refused in the end is rolled back."""
    async with serve(example.app) as client:
        placed = await client.post("/orders", params=TEA)
        async with example.db.session_scope() as session:
            session.add_all(example.Order(item="many") for _ in range(99))
        refused = await client.post("/orders", params=TEA)

    assert (201, 1) == (placed.status_code, placed.json())
    assert (409, {"detail": "sold out"}) == (refused.status_code, refused.json())
    assert 100 == len(query(ORDERS))


@runs(PAGE, *INJECTOR, "singleton")
async def test_singleton_counts_by_each_requests_session(example, serve):
    """G11: one object with the proxy answers several requests; with a session only the first."""
    kept = providers.Singleton(example.Statistics, providers.Callable(current_session))
    errors = []

    @example.app.get("/kept")
    async def count_by_kept() -> int:
        try:
            count: int = await kept().count()
        except SessionScopeClosedError as error:
            errors.append(error)
            raise
        return count

    async with serve(example.app) as client:
        counts = [(await client.get("/orders/count")).json() for _ in range(2)]
        statuses = [(await client.get("/kept")).status_code for _ in range(2)]

    assert [0, 0] == counts
    assert [200, 500] == statuses
    assert 1 == len(errors)


@runs(PAGE, *INJECTOR, "job")
async def test_job_builds_in_its_scope(example, query):
    """G12: each call of the job has a scope and a graph, and commits."""
    async with example.lifespan(None):
        numbers = [await example.import_order(each) for each in ("tea", "coffee")]

    assert [1, 2] == numbers
    assert ["tea", "coffee"] == query(ORDERS)


@runs(PAGE, *INJECTOR)
async def test_scope_above_inject_is_no_way_to_say_it(example):
    """What a container wires in a module it wraps outside of the decorators that are there."""

    @example.db.session_scope()
    @example.inject
    async def job(place_order=example.Provide[example.Container.place_order]) -> None: ...

    example.job = job
    example.container.wire(modules=["example"])

    with pytest.raises(NoSessionScopeError):
        await example.job()


@runs(PAGE, *INJECTOR, "use-case")
async def test_use_case_joins_a_request_and_is_a_job_by_itself(example, serve, query):
    """G3, G12: a decorated use case, built once, is part of a request or a transaction itself."""
    async with serve(example.app) as client:
        statuses = [
            (await client.post("/reservations", params={"item": item})).status_code
            for item in ("tea", "gold")
        ]
        await example.reserve_nightly()

    assert [200, 409] == statuses
    assert ["tea", "nightly"] == query(ORDERS)


@runs(PAGE, *INJECTOR, "job", "websocket")
def test_websocket_has_a_graph_per_message(example, query):
    """G17: each message is committed when it is answered; a graph for all of it is refused."""

    @example.app.websocket("/graph")
    async def whole_graph(websocket: example.WebSocket) -> None:  # type: ignore[name-defined]
        example.container.place_order()

    with TestClient(example.app) as client:
        with client.websocket_connect("/orders") as websocket:
            for number, item in enumerate(("tea", "coffee"), start=1):
                websocket.send_text(item)
                assert f"order {number}" == websocket.receive_text()
                assert number == len(query(ORDERS))
        with pytest.raises(WebSocketSessionError), client.websocket_connect("/graph"):
            pass


@runs(PAGE, *INJECTOR, "override")
async def test_override_serves_a_test_and_goes(example, serve, query):
    """G12: a test's session serves the app and is rolled back; after it all is as before."""
    async with serve(example.app) as client:
        await example.check_create_order(client)
        await example.check_create_order(client)
        assert [] == query(ORDERS)
        assert 1 == (await client.post("/orders", params=TEA)).json()

    assert ["tea"] == query(ORDERS)


@runs(PAGE, *INJECTOR, "inner")
async def test_what_was_handed_in_keeps_its_session(example, serve, query):
    """G11: what is built in an inner scope is committed with it, the request's is rolled back."""
    async with serve(example.app) as client:
        assert 409 == (await client.post("/attempts", params=TEA)).status_code

    assert ["attempt: tea", "by proxy"] == query(ORDERS)


@runs(PAGE, *GRAPH, "dishka")
async def test_dishka_builds_the_graph(example, serve, query):
    """G1, G11: dishka's request scope inside ours, in an endpoint and in a job."""
    async with serve(example.app) as client:
        responses = [await client.post("/orders", params=TEA) for _ in range(2)]
        assert 3 == await example.import_order("coffee")

    assert [1, 2] == [each.json() for each in responses]
    assert ["tea", "tea", "coffee"] == query(ORDERS)


@runs(PAGE, *GRAPH, "that-depends")
async def test_that_depends_builds_the_graph(example, serve, query):
    """G1, G11: that-depends' factories in an endpoint and in a job."""
    async with serve(example.app) as client:
        responses = [await client.post("/orders", params=TEA) for _ in range(2)]
        assert 3 == await example.import_order("coffee")

    assert [1, 2] == [each.json() for each in responses]
    assert ["tea", "tea", "coffee"] == query(ORDERS)


@runs(PAGE, *GRAPH, "fastapi")
async def test_fastapi_builds_the_graph(example, serve, query):
    """G1, G11: FastAPI's own dependencies, and a test's session in their place."""
    async with serve(example.app) as client:
        async with example.db.session_scope() as session:
            example.app.dependency_overrides[example.db.get_session] = lambda: session
            assert 1 == (await client.post("/orders", params=TEA)).json()
            example.db.set_rollback_only()
        example.app.dependency_overrides.clear()
        responses = await asyncio.gather(*(client.post("/orders", params=TEA) for _ in range(9)))

    assert {201} == {each.status_code for each in responses}
    assert ["tea"] * 9 == query(ORDERS)


# The new spelling is not known to the oldest Litestar that we run.
@pytest.mark.filterwarnings("ignore:.*Inferred dependency field")
@runs(PAGE, *GRAPH, "litestar")
async def test_litestar_builds_the_graph(example, serve, query):
    """G1, G11: Litestar's own dependencies."""
    async with serve(example.app) as client:
        responses = [await client.post("/orders", params=TEA) for _ in range(2)]

    assert [1, 2] == [each.json() for each in responses]
    assert ["tea", "tea"] == query(ORDERS)


@runs(PAGE, *GRAPH, "sync")
async def test_def_endpoint_writes_in_its_thread(example, serve, query):
    """G1, G11: a `def` endpoint's graph with a synchronous session commits."""
    async with serve(example.app) as client:
        responses = await asyncio.gather(*(client.post("/invoices", params=TEA) for _ in range(9)))
    example.sync_db.session_factory.kw["bind"].dispose()

    assert {201} == {each.status_code for each in responses}
    assert ["tea"] * 9 == query(ORDERS)


@runs(PAGE, *GRAPH)
async def test_get_session_is_not_for_containers_that_do_not_await(example):
    """A container that is given `db.get_session` hands over something else than a session."""
    orders = providers.Factory(example.Orders, providers.Callable(example.db.get_session))

    async with example.db.session_scope():
        with pytest.raises(AttributeError, match="'SessionHandle' object has no attribute 'add'"):
            orders().add("tea")
