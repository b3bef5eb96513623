"""Retries: each example does what the page says."""

import asyncio

import pytest

from asgi_dbscope.testing import inject_conflicts
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")

pytestmark = pytest.mark.usefixtures("forget_endpoints")


@runs("retries.md", *APP)
async def test_client_sees_the_answer_of_the_attempt_that_was_committed(example, serve, query):
    """G16: one answer and one row, however often the database refused."""
    async with serve(example.app) as client:
        with inject_conflicts(example.db, times=2) as injected:
            response = await client.post("/orders", params=TEA)

    assert 2 == injected.count
    assert (201, {"number": 1}) == (response.status_code, response.json())
    assert ["tea"] == query(ORDERS)


@runs("retries.md", *APP)
async def test_client_of_the_last_loser_gets_a_503(example, serve, query):
    """G16: with Retry-After, in plain text."""
    async with serve(example.app) as client:
        with inject_conflicts(example.db, times=None) as injected:
            response = await client.post("/orders", params=TEA)

    assert 3 == injected.count
    assert (503, "1") == (response.status_code, response.headers["retry-after"])
    assert response.headers["content-type"].startswith("text/plain")
    assert [] == query(ORDERS)


@runs("retries.md", *APP, "endpoint")
async def test_endpoint_has_a_retry_of_its_own(example, serve, query):
    """G16: five attempts where the middleware has three."""
    async with serve(example.app) as client:
        with inject_conflicts(example.db, times=4):
            response = await client.post("/orders/first", params=TEA)

    assert (201, {"first": True}) == (response.status_code, response.json())
    assert ["tea"] == query(ORDERS)


@runs("retries.md", *APP, "function")
async def test_functions_are_called_again(example, serve, query):
    """G16: outside of requests each call has a session scope of its own."""
    async with serve(example.app):
        with inject_conflicts(example.db, times=2):
            await example.import_order("tea")
        with inject_conflicts(example.db, times=2):
            count = await example.close_books()

    assert 2 == count
    assert ["tea", "the books of 1 orders"] == query(ORDERS)


@runs("retries.md", *APP, "fence")
async def test_fence_keeps_a_card_from_being_charged_twice(example, serve, query):
    """G16: after a fence the conflict is the client's to hear of."""
    charged = []

    async def charge(item):
        charged.append(item)

    example.charge = charge
    async with serve(example.app) as client:
        with inject_conflicts(example.db, times=1):
            lost = await client.post("/orders/paid", params=TEA)
        with inject_conflicts(example.db, at="INSERT INTO orders", times=1):
            won = await client.post("/orders/paid", params=TEA)

    assert (500, 201) == (lost.status_code, won.status_code)
    assert ["tea", "tea"] == charged  # once each
    assert ["tea"] == query(ORDERS)


@runs("retries.md", *APP, "test")
async def test_test_of_the_reader_passes(example, serve, query):
    """G16: the conflict that a test asks for is injected."""
    async with serve(example.app) as client, asyncio.timeout(60):
        await example.test_order_is_placed_once(client)

    assert ["tea"] == query(ORDERS)
