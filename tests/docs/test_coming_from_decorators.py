"""Coming from a decorator of one's own: what goes wrong, and what the page puts in its place."""

import asyncio
from contextlib import suppress

import pytest
from fastapi import Request
from sqlalchemy import select
from sqlalchemy.exc import InvalidRequestError

from asgi_dbscope import RollbackOnlyError
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TABLES = "tutorial.md/tables"
DECORATORS = "coming-from/transactional-decorators.md"


# --------------------------------------------------------------------------------------
# Before
# --------------------------------------------------------------------------------------


@runs(DECORATORS, TABLES, "contextvar")
async def test_decorator_that_asks_the_session_joins_a_read(example, query):
    """The trap of autobegin: after a read the decorated call joins, and nobody commits."""

    @example.transactional
    async def place(item):
        example.session_var.get().add(example.Order(item=item))

    async with example.lifespan(None):
        await place("no read before")
        async with example.factory() as session:
            token = example.session_var.set(session)
            await session.scalar(select(1))
            await place("a read before")
            example.session_var.reset(token)

    assert ["no read before"] == query(ORDERS)


@runs(DECORATORS, TABLES, "contextvar")
async def test_decorator_without_a_memory_commits_what_failed(example, query):
    """An inner decorated call that failed and was caught is committed with the outer one."""

    @example.transactional
    async def place(item, *, fails):
        session = example.session_var.get()
        session.add(example.Order(item=item))
        await session.flush()
        if fails:
            raise ValueError
        with suppress(ValueError):
            await place("failed", fails=True)

    async with example.lifespan(None):
        await place("placed", fails=False)

    assert ["placed", "failed"] == query(ORDERS)


@runs(DECORATORS, TABLES, "uuid")
async def test_inner_decorated_call_commits_the_outer_half(example, query):
    """Of two decorated functions the inner commits, and the outer's failure undoes nothing."""

    @example.transactional
    async def place(item):
        example.session.add(example.Order(item=item))

    @example.transactional
    async def place_pair(first, second):
        await place(first)
        if not second:
            raise ValueError
        await place(second)

    async def app(scope, receive, send):
        await place_pair("half a pair", "")

    async with example.lifespan(None):
        with pytest.raises(ValueError):
            await example.SessionMiddleware(app)({}, None, None)

    assert ["half a pair"] == query(ORDERS)


@runs(DECORATORS, TABLES, "uuid")
async def test_endpoint_without_the_decorator_stores_nothing_and_holds_on(example, query):
    """Without the decorator nothing is committed, and the connection stays to the very end."""
    held = []

    async def app(scope, receive, send):
        example.session.add(example.Order(item="tea"))
        await example.session.flush()
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        held.append(example.engine.pool.checkedout())

    async with example.lifespan(None):
        await example.SessionMiddleware(app)({}, None, send)

    assert [1] == held
    assert [] == query(ORDERS)


@runs(DECORATORS, TABLES, "uuid")
async def test_job_has_no_key(example):
    """Outside of a request the session that is keyed by a uuid has none."""
    with pytest.raises(LookupError):
        await example.session.scalar(select(1))


@runs(DECORATORS, TABLES, "hash")
async def test_hash_of_a_request_is_used_again(example):
    """A request that is over leaves its session in the registry, for a later one to get."""
    registry = example.session.registry.registry

    for _ in range(100):
        token = example.request_var.set(Request({"type": "http"}))
        example.session()
        example.request_var.reset(token)
        del token

    assert 0 < len(registry) < 100


@runs(DECORATORS, TABLES, "hash")
async def test_begin_in_a_decorator_refuses_reads_and_nesting(example):
    """A decorator around `session.begin()` raises after a read, and inside of itself."""

    @example.transactional
    async def place(item):
        example.session.add(example.Order(item=item))

    @example.transactional
    async def place_pair():
        await place("tea")

    async with example.lifespan(None):
        token = example.request_var.set("a request")
        await example.session.scalar(select(1))
        with pytest.raises(InvalidRequestError, match="already begun"):
            await place("tea")
        await example.session.rollback()
        with pytest.raises(InvalidRequestError, match="already begun"):
            await place_pair()
        await example.session.remove()
        example.request_var.reset(token)


# --------------------------------------------------------------------------------------
# After
# --------------------------------------------------------------------------------------


@runs(DECORATORS, TABLES, "app")
async def test_decorated_service_is_one_transaction(example, serve, query):
    """G1, G3: a read before harms nothing; a pair is placed or not; what is logged stays."""
    async with serve(example.app) as client:
        placed = await client.post("/pairs", params={"first": "tea", "second": "coffee"})
        failed = await client.post("/pairs", params={"first": "half", "second": ""})
        await example.job()

    assert (200, 500) == (placed.status_code, failed.status_code)
    log = "log: a pair is asked for"
    assert [log, "tea", "coffee", log, "tea", "coffee"] == query(ORDERS)


@runs(DECORATORS, TABLES, "app")
async def test_decorated_service_runs_many_times_at_once(example, query):
    """G12: concurrent calls of one decorated method keep their transactions apart."""
    async with example.lifespan(None):
        answers = await asyncio.gather(
            *(example.orders.place_pair(f"a{n}", "" if n % 2 else f"b{n}") for n in range(10)),
            return_exceptions=True,
        )

    assert 5 == sum(isinstance(each, ValueError) for each in answers)
    assert sorted(f"{a}{n}" for n in range(0, 10, 2) for a in "ab") == sorted(query(ORDERS))


@runs(DECORATORS, TABLES, "app", "nested")
async def test_nested_calls_do_what_the_page_says(example, serve, query, caplog):
    """G4: a savepoint undoes its part; a joined failure that is swallowed is no success."""
    async with serve(example.app) as client:
        with_extra = await client.post("/orders", params={"item": "a", "extra": "b"})
        without = await client.post("/orders", params={"item": "c", "extra": ""})
        careless = await client.post("/careless", params={"item": "d", "extra": ""})
        honest = await client.post("/honest", params={"item": "e"})

    assert {"item": "a", "extra": "b"} == with_extra.json()
    assert {"item": "c"} == without.json()
    assert 500 == careless.status_code
    assert (422, {"detail": "an order of nothing"}) == (honest.status_code, honest.json())
    assert ["a", "wrapping", "b", "c"] == query(ORDERS)


@runs(DECORATORS, TABLES, "app", "import")
async def test_imported_decorator_finds_the_database(example, serve, query):
    """`@transactional` of the package works on the database of the request."""
    async with serve(example.app) as client:
        await client.post("/pairs", params={"first": "tea", "second": "coffee"})
        assert 200 == (await client.put("/orders/2", params={"item": "milk"})).status_code

    assert ["milk", "coffee"] == query(ORDERS)[1:]


@runs(DECORATORS, TABLES, "app")
async def test_swallowed_failure_is_told_in_jobs_too(example, query):
    """G4: an outer block that swallows an inner one's error ends with a `RollbackOnlyError`."""

    @example.db.transactional
    async def job():
        await example.orders.place("tea")
        with suppress(ValueError):
            await example.orders.place("")

    async with example.lifespan(None):
        with pytest.raises(RollbackOnlyError) as raised:
            await job()

    assert isinstance(raised.value.__cause__, ValueError)
    assert [] == query(ORDERS)
