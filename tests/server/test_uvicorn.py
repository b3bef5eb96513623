"""FastAPI on a real database under a real uvicorn, driven over sockets."""

import asyncio
from asyncio import IncompleteReadError

import pytest
import sqlalchemy as sa
import websockets
from fastapi import Request
from fastapi.responses import JSONResponse

from asgi_dbscope import Database
from tests.fix_database import Item
from tests.fix_frameworks import added, wrapped
from tests.fix_server import PATIENCE, Observed, connect, serve_uvicorn
from tests.server.ledger import MEGABYTES, Ledger, ledger

# --------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("path", ["/items/7", "/sync/7"])
async def test_row_is_visible_when_the_head_arrives(engine, path, db, uvicorn, rows):
    """G1: as the client gets the 201 another connection finds the row."""
    app, _ = ledger(db)
    async with uvicorn(app) as port, connect(port) as client:
        client.send("POST", path)
        status, headers = await client.head()
        assert (201, [7]) == (status, await rows())
        assert b'{"id":7}' == await client.body(headers)


@pytest.mark.parametrize("way", [added, wrapped])
async def test_failed_commit_is_a_500_and_no_row(way, engine, db, uvicorn, rows):
    """G2: the client gets a 500 and the next request is served as if nothing had been."""
    app = Observed(way(Ledger(db), database=db))
    async with uvicorn(app) as port:
        async with connect(port) as client:
            status, body = await client.request("POST", "/orphans")
            assert (500, b"Internal Server Error") == (status, body)
        assert [] == await rows()
        assert 0 == engine.pool.checkedout()
        assert isinstance(app.errors["/orphans"], sa.exc.IntegrityError)
        async with connect(port) as client:
            assert 201 == (await client.request("POST", "/items/2"))[0]
    assert [2] == await rows()


async def test_failed_commit_is_rendered_and_the_connection_lives(db, uvicorn, rows):
    """G2: with a handler of the app's own the connection is good for the next request."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "conflict"}, status_code=409)

    app, _ = ledger(db, exception_handlers={sa.exc.IntegrityError: render})
    async with uvicorn(app) as port, connect(port) as client:
        assert (409, b'{"detail":"conflict"}') == await client.request("POST", "/orphans")
        assert 201 == (await client.request("POST", "/items/2"))[0]
    assert [2] == await rows()


async def test_raised_error_leaves_no_row(db, uvicorn, rows):
    """G3: an HTTPException is rolled back before the client hears of it."""
    app, _ = ledger(db)
    async with uvicorn(app) as port, connect(port) as client:
        client.send("POST", "/refused/1")
        assert 409 == (await client.head())[0]
        assert [] == await rows()


# --------------------------------------------------------------------------------------
# Slow clients and torn bodies
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "engine"),
    [("/large", "sqlite"), ("/large-stream", "asyncpg")],
    indirect=["engine"],
)
async def test_client_that_does_not_read_holds_no_connection(path, engine, db, uvicorn, rows):
    """G6: while sixteen megabytes wait for their reader the pool is complete."""
    app, events = ledger(db)
    async with uvicorn(app) as port, connect(port) as client:
        client.send("GET", path)
        status, headers = await client.head()
        assert (200, [1]) == (status, await rows())
        if path == "/large-stream":
            await events["streaming"].wait()
            with pytest.raises(TimeoutError):  # the app itself is held up
                await asyncio.wait_for(app.end_of(path).wait(), 0.1)
        assert 0 == engine.pool.checkedout()
        assert MEGABYTES << 20 == len(await client.body(headers))
        await app.wait_for_end_of(path)


async def test_body_whose_commit_fails_is_torn(engine, db, uvicorn, rows):
    """G7: the client sees a chunked body without its end, and a connection that is closed."""
    app, _ = ledger(db)
    async with uvicorn(app) as port, connect(port) as client:
        client.send("GET", "/torn")
        status, headers = await client.head()
        assert (200, "chunked") == (status, headers["transfer-encoding"])
        assert b"line\n" == await client.chunk()
        with pytest.raises(IncompleteReadError):
            await client.chunk()
        await app.wait_for_end_of("/torn")
    assert isinstance(app.errors["/torn"], sa.exc.IntegrityError)
    assert [] == await rows()
    assert 0 == engine.pool.checkedout()


# --------------------------------------------------------------------------------------
# Clients that leave
# --------------------------------------------------------------------------------------


async def test_client_that_leaves_before_the_head(engine, db, uvicorn, rows):
    """G9: the endpoint runs to its end and is committed, as if the client had waited."""
    app, events = ledger(db)
    async with uvicorn(app) as port:
        async with connect(port) as client:
            client.send("POST", "/slow/1")
            await events["written"].wait()
            client.leave()
        events["go"].set()
        await app.wait_for_end_of("/slow/1")
        assert 0 == engine.pool.checkedout()
        assert {} == app.errors
        async with connect(port) as client:
            assert (200, b"1") == await client.request("GET", "/items")
    assert [1] == await rows()


async def test_client_that_leaves_in_mid_stream(engine, db, uvicorn, rows):
    """G7: what the stream wrote is rolled back, what came before its head stays."""
    app, _ = ledger(db)
    async with uvicorn(app) as port:
        async with connect(port) as client:
            client.send("GET", "/endless/1")
            await client.head()
            assert b"line\n" == await client.chunk()
            assert 1 == engine.pool.checkedout()
            client.leave()
        await app.wait_for_end_of("/endless/1")
        assert 0 == engine.pool.checkedout()
        async with connect(port) as client:
            assert (200, b"1") == await client.request("GET", "/items")
    assert [1] == await rows()


async def test_client_that_leaves_during_the_background_task(engine, db, uvicorn, rows):
    """G8: the task runs on and is committed: the client had its whole answer."""
    app, events = ledger(db)
    async with uvicorn(app) as port:
        async with connect(port) as client:
            assert 200 == (await client.request("POST", "/background/1"))[0]
            await events["written"].wait()
            assert [] == await rows()
            client.leave()
        events["go"].set()
        await app.wait_for_end_of("/background/1")
        assert 0 == engine.pool.checkedout()
    assert [1] == await rows()


async def test_connection_lives_on_after_a_failed_background_commit(db, uvicorn, rows, caplog):
    """G8: a late failure is logged, and the next request on the connection is answered."""
    app, _ = ledger(db)
    async with uvicorn(app) as port, connect(port) as client:
        client.send("POST", "/failing-background")
        client.send("POST", "/items/2")  # it is on the connection before the failure
        status, headers = await client.head()
        await client.body(headers)
        assert 200 == status
        assert 201 == (await client.head())[0]
    assert [2] == await rows()
    (record,) = [each for each in caplog.records if "asgi_dbscope" == each.name]
    assert "POST /failing-background" in record.getMessage()


# --------------------------------------------------------------------------------------
# Load, shutdown, websockets
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_burst_of_requests_on_a_small_pool(engine, make_engine):
    """G12, G14: two hundred connections at once on a pool of five: each row once, none lost."""
    driver = engine.url.get_driver_name().replace("aiosqlite", "sqlite")
    small = make_engine(driver, pool_size=5, max_overflow=0, pool_timeout=PATIENCE)
    db = Database(small)
    app, _ = ledger(db)

    async def create(port: int, item_id: int) -> int:
        async with connect(port) as client:
            return (await client.request("POST", f"/items/{item_id}"))[0]

    async with serve_uvicorn(app) as port:
        statuses = await asyncio.gather(*(create(port, each) for each in range(200)))
        assert 0 == small.pool.checkedout()
    async with db.session_scope() as session:
        found = sorted(await session.scalars(sa.select(Item.id)))
    await small.dispose()

    assert {201} == set(statuses)
    assert list(range(200)) == found


@pytest.mark.parametrize("engine", ["psycopg"], indirect=True)
async def test_graceful_shutdown_disposes_of_an_engine_of_our_own(engine, uvicorn, rows):
    """G17: after the server's shutdown the database has no connection of the app's left."""
    db = Database(engine.url.update_query_dict({"application_name": "dbscope_owned"}))
    app, _ = ledger(db)

    async def connections() -> int:
        async with engine.connect() as connection:
            found = await connection.scalar(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dbscope_owned'"
                    " AND datname = current_database()"
                )
            )
        return found or 0

    async with uvicorn(app, lifespan="on") as port, connect(port) as client:
        assert 201 == (await client.request("POST", "/items/1"))[0]
        assert 1 == await connections()
    async with asyncio.timeout(PATIENCE):
        while await connections():  # PostgreSQL's own processes take a moment to go
            pass
    assert [1] == await rows()


async def test_shutdown_in_mid_request_rolls_back(engine, db, uvicorn, rows):
    """G10: a request that the server cancels at the end of its patience leaves nothing behind."""
    app, events = ledger(db)
    async with uvicorn(app, timeout_graceful_shutdown=0.1) as port, connect(port) as client:
        client.send("POST", "/slow/1")
        await events["written"].wait()
        assert 1 == engine.pool.checkedout()
    await app.wait_for_end_of("/slow/1")
    assert isinstance(app.errors["/slow/1"], asyncio.CancelledError)
    assert 0 == engine.pool.checkedout()
    assert [] == await rows()


async def test_websocket_commits_each_message_before_its_answer(engine, db, rows, monkeypatch):
    """G17: over a real websocket, each message is a scope; between them no connection is held."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    app, _ = ledger(db)
    async with serve_uvicorn(app) as port:
        async with websockets.connect(f"ws://127.0.0.1:{port}/echo") as websocket:
            for number in (1, 2):
                await websocket.send(str(number))
                assert f"{number} committed" == await websocket.recv()
                assert list(range(1, number + 1)) == await rows()
                assert 0 == engine.pool.checkedout()
        await app.wait_for_end_of("/echo")
