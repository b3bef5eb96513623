"""Replay over sockets: a counter that many increment at once, and each server's `receive`."""

import asyncio
import os
from collections import Counter

import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Request

from asgi_dbscope import DBSessionMiddleware, Retry, session_options
from tests.fix_database import Item
from tests.fix_server import Observed, connect, serve_hypercorn, serve_process, serve_uvicorn
from tests.server.retrying import retrying

INCREMENTS = int(os.environ.get("DBSCOPE_TEST_INCREMENTS", "64"))
"""How many requests increment the counter; the promise was checked with 2,000."""

CLIENTS = 16

GRANIAN = [
    *("granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", "{port}"),
    "tests.server.retrying:app",
]

PAUSING = Retry(base=0.05)

ON_POSTGRES = pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)


@ON_POSTGRES
@pytest.mark.timeout(1200)
async def test_counter_equals_the_successes(db, engine):
    """G16, G1: under SERIALIZABLE each 200 is one increment, and all others are an honest 503."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=db, retry=Retry(attempts=8, base=0.02))

    @app.post("/increments")
    @session_options(isolation_level="SERIALIZABLE")
    async def increment(request: Request) -> int:
        amount = int(await request.body())
        count = int(await db.session.scalar(sa.select(Item.note).where(Item.id == 1)) or 0)
        changed = sa.update(Item).where(Item.id == 1).values(note=str(count + amount))
        await db.session.execute(changed)
        return count + amount

    async with engine.begin() as connection:
        await connection.execute(sa.insert(Item).values(id=1, note="0"))
    statuses: Counter[int] = Counter()
    answers: list[int] = []

    async def go_on_incrementing(port: int) -> None:
        async with connect(port) as client:
            while statuses.total() < INCREMENTS:
                statuses[0] += 1  # under way
                client.send("POST", "/increments", body=b"1")
                status, headers = await client.head()
                content = await client.body(headers)
                statuses[0] -= 1
                statuses[status] += 1
                if status == 200:
                    answers.append(int(content))
                else:
                    assert "1" == headers["retry-after"]

    serving = serve_uvicorn(app, timeout_keep_alive=600)
    async with serving as port, asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(go_on_incrementing(port))
    async with engine.connect() as connection:
        count = int(await connection.scalar(sa.select(Item.note)) or 0)

    print(dict(statuses))  # noqa: T201 - how many of the 2,000 were told to come back

    assert INCREMENTS == statuses.total()
    assert {200, 503, 0} >= set(statuses)
    assert statuses[200] == count
    assert list(range(1, count + 1)) == sorted(answers)  # no two were told the same
    assert count > 0
    assert 0 == engine.pool.checkedout()


@ON_POSTGRES
async def test_body_is_replayed_under_uvicorn(db, rows, uvicorn):
    """G16: the pause waits for the client's leaving, and the next attempt reads the body again."""
    async with uvicorn(retrying(db, PAUSING)) as port, connect(port) as client:
        for number in (7, 8):
            client.send("POST", f"/{number}", body=b"x" * 20_000)
            status, headers = await client.head()
            assert (201, b"x" * 20_000 + b" 3") == (status, await client.body(headers))
        assert (201, b" 3") == await client.request("GET", "/9")  # its body is never read

    assert [7, 8, 9] == await rows()


@ON_POSTGRES
async def test_body_is_replayed_under_hypercorn(db, rows):
    """G16: the same; a `receive` that is given up loses nothing."""
    async with serve_hypercorn(retrying(db, PAUSING)) as port, connect(port) as client:
        for number in (7, 8):
            client.send("POST", f"/{number}", body=b"x" * 20_000)
            status, headers = await client.head()
            assert (201, b"x" * 20_000 + b" 3") == (status, await client.body(headers))
        assert (201, b" 3") == await client.request("GET", "/9")

    assert [7, 8, 9] == await rows()


@ON_POSTGRES
async def test_body_is_replayed_under_granian(engine, rows):
    """G16: the same, in a process of its own."""
    url = engine.url.render_as_string(hide_password=False)
    async with (
        serve_process(GRANIAN, DBSCOPE_SERVED_URL=url) as port,
        connect(port) as client,
    ):
        for number in (7, 8):
            client.send("POST", f"/{number}", body=b"x" * 20_000)
            status, headers = await client.head()
            assert (201, b"x" * 20_000 + b" 3") == (status, await client.body(headers))
        assert (201, b" 3") == await client.request("GET", "/9")

    assert [7, 8, 9] == await rows()


@ON_POSTGRES
async def test_client_that_leaves_during_the_pause_ends_it(db, rows, engine, uvicorn):
    """G16: the server tells of the client's leaving while the request waits to be replayed."""
    has_lost = asyncio.Event()
    sa.event.listen(engine.sync_engine, "checkin", lambda *args: has_lost.set())
    app = Observed(retrying(db, Retry(base=600, cap=600, max_elapsed=6000)))
    async with uvicorn(app) as port:
        async with connect(port) as client:
            client.send("POST", "/7", body=b"x")
            await has_lost.wait()
            client.leave()
        await app.wait_for_end_of("/7")

    assert isinstance(app.errors["/7"], sa.exc.DBAPIError)
    assert [] == await rows()
