"""Synchronous sessions: each example does what the page says."""

import asyncio

import pytest

from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}


@pytest.fixture(autouse=True)
def disposed(example):
    """Close the connections of the examples' synchronous engine."""
    yield
    assert 0 == example.engine.pool.checkedout()
    example.engine.dispose()


@runs("sync.md", "app")
async def test_def_endpoint_is_committed(example, serve, query):
    """G1: the order is in the database when the client hears of it."""
    async with serve(example.app) as client:
        response = await client.post("/orders", params=TEA)

        assert (201, {"id": 1}) == (response.status_code, response.json())
        assert ["tea"] == query(ORDERS)


@runs("sync.md", "app", "request")
async def test_dependency_background_task_and_stream_share_the_session(example, serve, query):
    """G7, G8, G11: a dependency counts, a background task goes on, a stream reads."""
    async with serve(example.app) as client:
        first = await client.post("/counted", params=TEA)
        second = await client.post("/counted", params={"item": "coffee"})
        streamed = await client.get("/stream")

    assert ({"before": 0}, {"before": 2}) == (first.json(), second.json())
    assert ["tea", "receipt for 1", "coffee", "receipt for 3"] == query(ORDERS)
    assert "tea\nreceipt for 1\ncoffee\nreceipt for 3\n" == streamed.text


@runs("sync.md", "app", "service")
async def test_service_joins_a_request_and_is_a_transaction_elsewhere(
    example, serve, query, capsys
):
    """A decorated method joins; in a script it commits by itself, and its hook runs."""
    async with serve(example.app) as client:
        response = await client.post("/pair", params={"first": "tea", "second": "coffee"})
        await asyncio.to_thread(example.nightly)

    assert 200 == response.status_code
    assert ["tea", "coffee", "nightly"] == query(ORDERS)
    assert ["placed tea", "placed coffee", "placed nightly", "3"] == capsys.readouterr().out.split(
        "\n"
    )[:4]


@runs("sync.md", "app", "service", "from-async")
async def test_async_endpoint_uses_a_thread(example, serve, query):
    """G11: `asyncio.to_thread` in an `async def` endpoint sees the request's session."""
    async with serve(example.app) as client:
        response = await client.post("/later", params=TEA)

    assert 200 == response.status_code
    assert ["tea"] == query(ORDERS)


@runs("sync.md", "app", "service", "from-async", "both")
async def test_both_kinds_are_committed_at_one_head(example, serve, query):
    """G1: a synchronous and an asynchronous database in one request."""
    example.Base.metadata.create_all(example.engine)
    async with serve(example.both) as client:
        response = await client.post("/orders", params=TEA)

    assert 200 == response.status_code
    assert (["tea"], ["tea"]) == (query(ORDERS), query("SELECT item FROM told", "events.db"))
