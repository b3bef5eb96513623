"""FastAPI on a real database under granian, in a process of its own, driven over sockets."""

from asyncio import IncompleteReadError
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.fix_server import Client, connect, serve_process

GRANIAN = [
    *("granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", "{port}"),
    "tests.server.ledger:app",
]


@pytest.fixture
async def granian(engine: AsyncEngine) -> AsyncIterator[int]:
    """The app under granian; the port."""
    url = engine.url.render_as_string(hide_password=False)
    async with serve_process(GRANIAN, DBSCOPE_SERVED_URL=url) as port:
        yield port


@pytest.fixture
async def client(granian: int) -> AsyncIterator[Client]:
    """A connection to it, and one request after the other on it."""
    async with connect(granian) as client:
        yield client


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_requests_of_every_kind(engine, granian, client, rows):
    """G1, G2, G3, G7: the row is there with the 201; a failed commit is a 500 or a torn body."""
    client.send("POST", "/items/7")
    status, headers = await client.head()
    assert (201, [7]) == (status, await rows())
    assert b'{"id":7}' == await client.body(headers)

    async with connect(granian) as other:
        assert 500 == (await other.request("POST", "/orphans"))[0]
    assert b'"IntegrityError"' == (await client.request("GET", "/ended?path=/orphans"))[1]
    assert 409 == (await client.request("POST", "/refused/1"))[0]
    assert [7] == await rows()

    async with connect(granian) as other:
        other.send("GET", "/torn")
        assert 200 == (await other.head())[0]
        assert b"line\n" == await other.chunk()
        with pytest.raises(IncompleteReadError):
            await other.chunk()
    assert b'"IntegrityError"' == (await client.request("GET", "/ended?path=/torn"))[1]
    assert [7] == await rows()

    assert 200 == (await client.request("POST", "/failing-background"))[0]
    assert b'"NoneType"' == (await client.request("GET", "/ended?path=/failing-background"))[1]
    assert (200, b"0") == await client.request("GET", "/pool")


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_clients_that_do_not_read_and_clients_that_leave(engine, granian, client, rows):
    """G6, G7, G9: whoever stalls or leaves holds no connection; the body is rolled back."""
    async with connect(granian) as other:
        other.send("GET", "/large-stream")
        assert 200 == (await other.head())[0]
        await client.request("GET", "/events/streaming")
        assert (200, b"0") == await client.request("GET", "/pool")
        other.leave()
    async with connect(granian) as other:
        other.send("POST", "/slow/7")
        await client.request("GET", "/events/written")
        other.leave()
    await client.request("POST", "/events/go")
    await client.request("GET", "/ended?path=/slow/7")
    assert [1, 7] == await rows()
    async with connect(granian) as other:
        other.send("GET", "/endless/3")
        await other.head()
        assert b"line\n" == await other.chunk()
        other.leave()
    await client.request("GET", "/ended?path=/endless/3")
    assert [1, 3, 7] == await rows()
    assert (200, b"0") == await client.request("GET", "/pool")
