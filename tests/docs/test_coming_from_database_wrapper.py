"""Coming from a database wrapper: what goes wrong with it, and what the page puts in its place."""

import asyncio

import pytest
from sqlalchemy import insert, select

from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TABLES = "tutorial.md/tables"
WRAPPER = "coming-from/database-wrapper.md"


# --------------------------------------------------------------------------------------
# Before
# --------------------------------------------------------------------------------------


@runs(WRAPPER, TABLES, "before")
async def test_shared_block_commits_the_work_of_another_call(example, query):
    """The wrapper's decorator keeps one session: a call commits what a concurrent one half did."""
    is_inside, has_written, may_fail = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @example.wrapper.transaction()
    async def place(item):
        if not item:
            is_inside.set()
            await has_written.wait()
            return
        await example.wrapper.execute(insert(example.Order).values(item=item))
        has_written.set()
        await may_fail.wait()
        raise TimeoutError

    async with example.lifespan(None):
        first = asyncio.create_task(place(""))
        await is_inside.wait()
        second = asyncio.create_task(place("half an order"))
        with pytest.raises(ValueError, match="different Context"):
            await first
        may_fail.set()
        with pytest.raises(TimeoutError):
            await second

    assert ["half an order"] == query(ORDERS)


@runs(WRAPPER, TABLES, "before")
async def test_wrapper_without_its_decorator_has_no_session(example):
    """The wrapper's methods raise where nobody has put the decorator."""
    with pytest.raises(LookupError):
        await example.wrapper.scalar(select(1))


@runs(WRAPPER, TABLES, "before")
async def test_transaction_of_the_wrapper_takes_a_second_connection(example):
    """The wrapper's transaction inside its session is another session, on another connection."""
    async with example.lifespan(None), example.wrapper.init_session():
        await example.wrapper.scalar(select(1))
        async with example.wrapper.transaction():
            await example.wrapper.scalar(select(1))
            held = example.engine.pool.checkedout()

    assert 2 == held


# --------------------------------------------------------------------------------------
# After
# --------------------------------------------------------------------------------------


@runs(WRAPPER, TABLES, "app")
async def test_autocommit_and_blocks_in_place_of_the_wrapper(example, serve, query):
    """Without a decorator each write is durable, in a transactional block both are or none."""
    async with serve(example.app) as client:
        statuses = [
            (await client.post("/imports", params={"items": "a,b,,c"})).status_code,
            (await client.post("/pairs", params={"first": "x", "second": ""})).status_code,
            (await client.post("/pairs", params={"first": "y", "second": "z"})).status_code,
        ]
        listed = await client.get("/orders")

    assert [500, 500, 200] == statuses
    assert ["a", "b", "y", "z"] == query(ORDERS) == listed.json()


@runs(WRAPPER, TABLES, "app", "jobs")
async def test_the_same_decorators_serve_jobs(example, serve, query):
    """G8, G12: consumers and background tasks commit call by call, or not at all."""
    async with serve(example.app) as client:
        await asyncio.gather(example.on_order("tea"), example.on_order("coffee"))
        with pytest.raises(ValueError, match="nothing"):
            await example.on_import("milk,,sugar")
        with pytest.raises(ValueError, match="nothing"):
            await example.on_order("")
        await client.post("/confirmed", params={"item": "cake"})

    assert {"tea", "receipt for tea", "coffee", "receipt for coffee"} == set(query(ORDERS)[:4])
    assert ["milk", "cake", "confirmed cake", "receipt for confirmed cake"] == query(ORDERS)[4:]


@runs(WRAPPER, TABLES, "app")
async def test_repository_of_the_page_gets_by_key(example):
    """The repository over `session_proxy` reads by primary key in any session scope."""
    async with example.lifespan(None), example.db.session_scope():
        order = await example.orders.add("tea")
        assert order is await example.orders.get_by_pk(order.id)
