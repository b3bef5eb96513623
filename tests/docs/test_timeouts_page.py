"""Waits and timeouts: the examples do what the page says."""

import asyncio
import logging

from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"


@runs("timeouts.md", "tutorial.md/tables", "waits", "release")
async def test_release_before_a_wait_is_told_of_by_nobody(example, serve, query, caplog):
    """What was written is committed before the wait, and the endpoints answer."""

    async def ask_the_warehouse(item):
        assert ["tea"] == await asyncio.to_thread(query, ORDERS)
        return f"{item} is on its way"

    example.ask_the_warehouse = ask_the_warehouse
    with caplog.at_level(logging.WARNING, "asgi_dbscope"):
        async with serve(example.app) as client:
            ordered = await client.post("/orders", params={"item": "tea"})
            counted = await client.get("/count")

    assert "tea is on its way" == ordered.json()
    assert 1 == counted.json()
    assert [] == caplog.messages


@runs("timeouts.md", "tutorial.md/tables", "waits", "release")
async def test_options_are_as_the_page_says(example, serve):
    """The endpoint with an own timeout has it, and the others the middleware's."""
    seen = []

    @example.app.get("/seen")
    async def seen_here():
        seen.append(example.db.scope.options.timeout)

    async with serve(example.app) as client:
        await client.get("/seen")

    assert [5] == seen
    assert (2, 1, 10) == (
        example.db.options.checkout_timeout,
        example.db.options.idle_warning,
        example.db.options.idle_timeout,
    )
