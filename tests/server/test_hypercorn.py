"""FastAPI on a real database under hypercorn, driven over sockets."""

from asyncio import IncompleteReadError

import pytest
import sqlalchemy as sa
from fastapi import Request
from fastapi.responses import JSONResponse

from tests.fix_server import connect, serve_hypercorn
from tests.server.ledger import ledger


async def test_row_is_visible_when_the_head_arrives(db, rows):
    """G1: as the client gets the 201 another connection finds the row."""
    app, _ = ledger(db)
    async with serve_hypercorn(app) as port, connect(port) as client:
        client.send("POST", "/items/7")
        status, headers = await client.head()
        assert (201, [7]) == (status, await rows())
        assert b'{"id":7}' == await client.body(headers)


async def test_failed_commit_is_a_500_and_no_row(engine, db, rows):
    """G2: the client gets a 500, and the next request is served as if nothing had been."""
    app, _ = ledger(db)
    async with serve_hypercorn(app) as port:
        async with connect(port) as client:
            assert 500 == (await client.request("POST", "/orphans"))[0]
        assert isinstance(app.errors["/orphans"], sa.exc.IntegrityError)
        assert 0 == engine.pool.checkedout()
        async with connect(port) as client:
            assert 201 == (await client.request("POST", "/items/2"))[0]
    assert [2] == await rows()


async def test_failed_commit_is_rendered_and_the_connection_lives(db, rows):
    """G2: with a handler of the app's own the connection is good for the next request."""

    async def render(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    app, _ = ledger(db, exception_handlers={sa.exc.IntegrityError: render})
    async with serve_hypercorn(app) as port, connect(port) as client:
        assert (409, b"{}") == await client.request("POST", "/orphans")
        assert 201 == (await client.request("POST", "/items/2"))[0]
    assert [2] == await rows()


async def test_raised_error_leaves_no_row(db, rows):
    """G3: an HTTPException is rolled back before the client hears of it."""
    app, _ = ledger(db)
    async with serve_hypercorn(app) as port, connect(port) as client:
        client.send("POST", "/refused/1")
        assert 409 == (await client.head())[0]
        assert [] == await rows()


async def test_client_that_does_not_read_holds_no_connection(engine, db, rows):
    """G6: while sixteen megabytes wait for their reader the pool is complete."""
    app, events = ledger(db)
    async with serve_hypercorn(app) as port, connect(port) as client:
        client.send("GET", "/large-stream")
        status, headers = await client.head()
        await events["streaming"].wait()
        assert (200, [1], 0) == (status, await rows(), engine.pool.checkedout())
        assert 16 << 20 == len(await client.body(headers))


async def test_body_whose_commit_fails_is_torn(engine, db, rows):
    """G7: the client sees a chunked body without its end, and a connection that is closed."""
    app, _ = ledger(db)
    async with serve_hypercorn(app) as port, connect(port) as client:
        client.send("GET", "/torn")
        assert 200 == (await client.head())[0]
        assert b"line\n" == await client.chunk()
        with pytest.raises(IncompleteReadError):
            await client.chunk()
        await app.wait_for_end_of("/torn")
    assert isinstance(app.errors["/torn"], sa.exc.IntegrityError)
    assert ([], 0) == (await rows(), engine.pool.checkedout())


async def test_client_that_leaves(engine, db, rows):
    """G7, G9: before the head the endpoint runs on; in mid-stream the body is rolled back."""
    app, events = ledger(db)
    async with serve_hypercorn(app) as port:
        async with connect(port) as client:
            client.send("POST", "/slow/7")
            await events["written"].wait()
            client.leave()
        events["go"].set()
        await app.wait_for_end_of("/slow/7")
        assert ([7], 0) == (await rows(), engine.pool.checkedout())
        async with connect(port) as client:
            client.send("GET", "/endless/1")
            await client.head()
            assert b"line\n" == await client.chunk()
            client.leave()
        await app.wait_for_end_of("/endless/1")
        assert ([1, 7], 0) == (await rows(), engine.pool.checkedout())


async def test_connection_lives_on_after_a_failed_background_commit(db, rows, caplog):
    """G8: a late failure is logged, and the next request on the connection is answered."""
    app, _ = ledger(db)
    async with serve_hypercorn(app) as port, connect(port) as client:
        assert 200 == (await client.request("POST", "/failing-background"))[0]
        assert 201 == (await client.request("POST", "/items/2"))[0]
    assert [2] == await rows()
    assert ["asgi_dbscope"] == [each.name for each in caplog.records if each.levelname == "ERROR"]
