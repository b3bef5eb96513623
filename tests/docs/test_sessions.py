"""Sessions anywhere: each example does what the page says."""

import asyncio

import pytest
from starlette.testclient import TestClient

from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")


@runs("sessions.md", *APP, "depends")
async def test_dependencies_share_the_session(example, serve, query):
    """G11: the endpoint and its dependency are handed the scope's one session."""
    async with serve(example.app) as client:
        response = await client.post("/orders", params=TEA)

    assert (201, {"same": True}) == (response.status_code, response.json())
    assert ["tea"] == query(ORDERS)


# The new spelling is not known to the oldest Litestar that we run.
@pytest.mark.filterwarnings("ignore:.*Inferred dependency field")
@runs("sessions.md", *APP, "provide")
async def test_litestar_provides_the_session(example, serve, query):
    """G11: Litestar's `Provide(db.get_session)` hands over the scope's one session."""
    async with serve(example.litestar) as client:
        response = await client.post("/orders", params=TEA)

    assert (201, {"same": True}) == (response.status_code, response.json())
    assert ["tea"] == query(ORDERS)


@runs("sessions.md", *APP, "get-session")
async def test_get_session_joins_inside_and_commits_outside(example, serve, query):
    """G11: `async with db.get_session()` joins a request's scope, and opens one elsewhere."""
    async with serve(example.app) as client:
        await client.post("/recorded", params=TEA)
        await example.nightly()

    assert ["tea", "nightly"] == query(ORDERS)


@runs("sessions.md", *APP, "proxy")
async def test_proxy_stands_for_the_current_session(example, serve):
    """G11: a repository that was built at import uses each request's session."""
    async with serve(example.app) as client:
        async with example.db.session_scope() as session:
            session.add(example.Order(item="tea"))
        assert ["tea"] == (await client.get("/orders")).json()


@runs("sessions.md", *APP, "thread")
async def test_thread_calls_back_into_the_loop(example, serve):
    """G11: a `def` endpoint reaches the scope's session through the event loop."""
    async with serve(example.app) as client:
        async with example.db.session_scope() as session:
            session.add(example.Order(item="tea"))
        assert "tea" == (await client.get("/first-order")).json()


@runs("sessions.md", *APP, "gather")
async def test_branches_with_scopes_of_their_own_run_side_by_side(example, serve):
    """G12: concurrent branches that open scopes don't share a session."""
    async with serve(example.app) as client:
        async with example.db.session_scope() as session:
            session.add(example.Order(item="coffee"))
        assert [None, 1] == (await client.get("/search")).json()


@runs("sessions.md", *APP, "gather", "detached")
async def test_task_that_outlives_its_request_has_a_scope_of_its_own(example, serve, query):
    """G9: a task with a scope of its own goes on after the request."""
    async with serve(example.app) as client:
        await client.post("/later", params=TEA)
        await asyncio.gather(*example.tasks)

    assert ["tea"] == query(ORDERS)


@runs("sessions.md", *APP, "background")
async def test_background_task_and_stream_go_on_with_the_session(example, serve, query):
    """G7, G8: a background task uses an object of the endpoint, a stream reads what is there."""
    async with serve(example.app) as client:
        await client.post("/with-receipt", params=TEA)
        streamed = await client.get("/stream")

    assert ["tea", "receipt for 1"] == query(ORDERS)
    assert "tea\nreceipt for 1\n" == streamed.text


@runs("sessions.md", *APP, "websocket")
def test_websocket_commits_each_message(example, query):
    """G17: what a websocket says it has placed is committed, message by message."""
    with (
        TestClient(example.app) as client,
        client.websocket_connect("/orders") as websocket,
    ):
        for position, item in enumerate(["tea", "coffee"], start=1):
            websocket.send_text(item)
            assert f"placed {item}" == websocket.receive_text()
            assert position == len(query(ORDERS))
            assert 0 == example.engine.pool.checkedout()


@runs("sessions.md", *APP, "script")
async def test_decorated_function_has_a_scope_per_call(example, query):
    """G12: each call of a decorated function is a transaction of its own."""
    async with example.lifespan(None):
        await example.consume(["tea", "coffee"])
        await asyncio.gather(example.handle("a"))

    assert ["tea", "coffee", "a"] == query(ORDERS)


@runs("sessions.md", *APP, "own-class")
async def test_session_class_is_kept(example):
    """A session class of the user's is what the scope hands out."""
    async with example.lifespan(None):
        assert 0 == await example.report()
