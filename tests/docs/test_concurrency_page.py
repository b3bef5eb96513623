"""At the same time: each example of the page does what the page says."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import (
    ConcurrentSessionUseError,
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    PoolTooSmallError,
)
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")


@runs("concurrency.md", *APP, "two-at-once")
async def test_two_tasks_in_one_session_are_an_error(example, serve):
    """G13: two tasks that use one session at the same time are answered with an error."""
    async with serve(example.app) as client:
        response = await client.get("/counts/wrong")

    assert 500 == response.status_code


@runs("concurrency.md", *APP, "two-at-once")
async def test_error_names_both_tasks_and_what_they_run(example, serve):
    """G13: the message has the names of both tasks, and the function that each of them runs."""
    async with serve(example.app), example.db.session_scope():
        first = asyncio.create_task(example.count("tea"), name="first")
        second = asyncio.create_task(example.count("milk"), name="second")
        done, _ = await asyncio.wait([first, second])

        assert {first, second} == done
        assert 0 == first.result()
        message = str(second.exception())
        assert "task 'second', count (docs/concurrency.md:" in message
        assert "while task 'first', count (docs/concurrency.md:" in message
        assert isinstance(second.exception(), ConcurrentSessionUseError)


@runs("concurrency.md", *APP)
async def test_tasks_do_not_enter_a_block_of_another(example, serve, query):
    """G13: a block inside another task's open block is refused, for it would end with that."""
    entered, refused = asyncio.Event(), asyncio.Event()

    async def fill() -> None:
        async with example.db.transactional("NESTED") as session:
            session.add(example.Order(item="tea"))
            entered.set()
            await refused.wait()

    async with serve(example.app), example.db.session_scope():
        filling = asyncio.create_task(fill())
        await entered.wait()
        with pytest.raises(ConcurrentSessionUseError, match="a session of its own"):
            async with example.db.transactional():
                raise AssertionError
        refused.set()
        await filling

    assert ["tea"] == query(ORDERS)


@runs("concurrency.md", *APP, "branch")
async def test_branch_has_a_session_of_its_own(example, serve, query):
    """G13: a branch commits beside the request, at the same time as other work."""
    async with serve(example.app) as client:
        response = await client.post("/orders/noted", params=TEA)

    assert 201 == response.status_code
    assert {"tea", "tea was asked for"} == set(query(ORDERS))


@runs("concurrency.md", *APP, "branch")
async def test_branch_stays_committed(example, serve, query):
    """A branch that has ended is committed, also where the scope around it is rolled back."""
    async with serve(example.app):
        with pytest.raises(ZeroDivisionError):
            async with example.db.session_scope():
                await example.note("asked for")
                raise ZeroDivisionError

    assert ["asked for"] == query(ORDERS)


@runs("concurrency.md", *APP, "gather")
async def test_gather_gives_each_a_branch(example, serve):
    """G13: gathered coroutines use sessions of their own, and the results keep their order."""
    async with serve(example.app) as client:
        async with example.db.session_scope() as session:
            session.add_all(example.Order(item=item) for item in ("tea", "bread", "bread"))
        response = await client.get("/counts")

    assert [1, 0, 2] == response.json()


@runs("concurrency.md", *APP, "gather")
async def test_gather_keeps_to_its_limit(example, serve):
    """No more than `limit` branches run at once."""
    running: set[object] = set()
    most = 0

    async def run() -> None:
        nonlocal most
        session = current = example.db.session
        running.add(session)
        most = max(most, len(running))
        await current.scalar(example.select(1))
        running.remove(session)

    async with serve(example.app):
        await example.db.gather(*(run() for _ in range(6)), limit=2)

    assert 2 == most


@runs("concurrency.md", *APP)
async def test_gather_that_fails_rolls_the_others_back(example, serve, query):
    """If one branch fails the others are cancelled and undone, and its error is raised."""
    written = asyncio.Event()

    async def write() -> None:
        example.db.session.add(example.Order(item="tea"))
        await example.db.session.flush()
        written.set()
        await asyncio.Event().wait()

    async def fail() -> None:
        await written.wait()
        raise ZeroDivisionError

    async with serve(example.app):
        with pytest.raises(ZeroDivisionError):
            await example.db.gather(write(), fail())

    assert [] == query(ORDERS)


@runs("concurrency.md", *APP)
async def test_gather_refuses_tasks(example, serve):
    """A task runs already, outside of any branch."""
    async with serve(example.app), example.db.session_scope():
        task = asyncio.create_task(example.count("tea"))
        with pytest.raises(ConfigurationError, match="the coroutine itself"):
            await example.db.gather(task)
        await task


@runs("concurrency.md", *APP)
async def test_gather_may_be_nested(example, serve):
    """G14: branches that gather wait for deeper ones only, so all of them come to an end."""

    async def descend(levels: int) -> int:
        await example.db.session.scalar(example.select(1))
        if not levels:
            return 1
        return sum(await example.db.gather(*(descend(levels - 1) for _ in range(3))))

    async with serve(example.app), example.db.session_scope():
        assert 9 == await descend(2)


@runs("concurrency.md", *APP, "serialize")
async def test_session_that_queues_serves_one_after_the_other(example, serve):
    """G13: with `concurrency="serialize"` tasks wait for their turn."""
    async with serve(example.app):
        async with example.db.session_scope() as session:
            session.add(example.Order(item="milk"))

        assert [0, 1] == await example.resolve()


# --------------------------------------------------------------------------------------
# The pool
# --------------------------------------------------------------------------------------


@pytest.fixture
async def make_database(example):
    """Make a database over the example's file, with a pool of its own."""
    engines = []

    def make(size: int) -> Database[Any]:
        engine = create_async_engine(example.engine.url, pool_size=size, max_overflow=0)
        engines.append(engine)
        return Database(engine, name="small")

    yield make
    for engine in engines:
        await engine.dispose()


@runs("concurrency.md", *APP)
async def test_second_connection_that_can_never_come_is_an_error(example, serve, make_database):
    """G14: who would wait for ever beside the connection that he holds is told at once."""
    small = make_database(1)
    async with serve(example.app), small.session_scope() as session:
        await session.scalar(example.select(1))
        with pytest.raises(PoolTooSmallError, match=r"The pool has 1 .* n \+ 1 connections"):
            async with small.transactional("REQUIRES_NEW") as second:
                await second.scalar(example.select(1))
        async with small.transactional("NESTED") as same:
            assert same is session


@runs("concurrency.md", *APP)
async def test_pool_that_is_hardly_large_enough_is_told_of_once(
    example, serve, make_database, caplog
):
    """G14: the arithmetic is in the log when half of the connections wait for a second one."""
    small = make_database(2)
    async with serve(example.app), small.session_scope() as session:
        await session.scalar(example.select(1))
        for _ in range(2):
            async with small.transactional("REQUIRES_NEW") as second:
                await second.scalar(example.select(1))

    [told] = [each.message for each in caplog.records if "second connection" in each.message]
    assert "2 * n for none to wait" in told


@runs("concurrency.md", *APP)
async def test_circle_of_waiting_is_opened(example, serve, make_database):
    """G14: where all hold one connection and wait for another, one is refused, the others go on."""
    small = make_database(2)
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=small)
    both = asyncio.Barrier(2)

    @app.get("/")
    async def endpoint() -> None:
        await small.session.scalar(example.select(1))
        await both.wait()
        async with small.transactional("REQUIRES_NEW") as second:
            await second.scalar(example.select(1))

    async with serve(example.app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            responses = await asyncio.gather(client.get("/"), client.get("/"))

    assert [200, 500] == sorted(response.status_code for response in responses)


@runs("concurrency.md", *APP)
async def test_gather_without_places_is_an_error(example, serve, make_database):
    """G14: a level of nested `gather()` for which the pool has no connection is refused."""
    small = make_database(1)

    async def descend() -> None:
        async def nothing() -> None: ...

        await small.gather(nothing())

    async with serve(example.app):
        with pytest.raises(PoolTooSmallError, match="depth 2"):
            await small.gather(descend())
