"""In doubt: each example does what the page says."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asgi_dbscope import ConfigurationError, Database, DBSessionMiddleware
from bench.proxy import Proxy, after_commit
from tests.docs.blocks import find_block, runs
from tests.fix_asgi import body, start
from tests.fix_database import Item

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")


@runs("in-doubt.md", *APP, "answer")
async def test_client_is_told_that_nobody_knows(example, serve, monkeypatch):
    """G15: the app's own handler answers where a COMMIT is in doubt."""

    @example.app.post("/orders")
    async def place(item: str) -> None:
        example.db.session.add(example.Order(item=item))

    def be_lost(connection: Any) -> None:
        raise ConnectionResetError("gone")

    async with serve(example.app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(example.engine.sync_engine.dialect, "do_commit", be_lost)
            response = await client.post("/orders", params=TEA)

    assert 500 == response.status_code
    assert "not known whether this was done" in response.json()["detail"]


@runs("in-doubt.md", *APP, "key")
async def test_request_with_a_key_is_done_once(example, serve, query):
    """G15: a request that is repeated with its key finds what the first one did."""
    async with serve(example.app) as client:
        answers = [(await client.put("/orders/k1", params=TEA)).json() for _ in range(2)]
        other = await client.put("/orders/k2", params=TEA)

    assert [{"id": 1}, {"id": 1}] == answers
    assert {"id": 2} == other.json()
    assert ["tea", "tea"] == query(ORDERS)


@pytest.fixture
async def proxied(proxy: Proxy) -> AsyncIterator[AsyncEngine]:
    """An engine that reaches PostgreSQL by the proxy."""
    engine = create_async_engine(proxy.url)
    yield engine
    await engine.dispose()


@runs("in-doubt.md", "resolve")
@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_response_goes_out_when_the_server_says_committed(proxied, proxy, drive, rows):
    """G15: with the page's one option, a COMMIT whose answer was lost is found out."""
    names: dict[str, Any] = {"Database": Database, "engine": proxied}
    exec(find_block("in-doubt.md", "resolve").code, names)

    async def app(scope, receive, send):
        names["db"].session.add(Item(id=1))
        proxy.arm("cut", after_commit)
        await send(start(201))
        await send(body(b"placed"))

    exchange = await drive(DBSessionMiddleware(app, database=names["db"]))

    assert (201, b"placed") == (exchange.status, exchange.body)
    assert [1] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_resolving_is_refused_where_nobody_can_be_asked(engine):
    """G15: on another database the option is an error that says so, when the app is built."""
    with pytest.raises(ConfigurationError, match="sqlite can't be asked"):
        Database(engine, resolve_in_doubt=True)
