"""Reads in one round trip: each example does what the page says."""

from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import ReadOnlyError
from tests.docs.blocks import find_block, runs

TABLES = ("tutorial.md", "tables")


@pytest.fixture
async def shop(
    request: pytest.FixtureRequest, postgres_schema: sa.Engine
) -> AsyncIterator[ModuleType]:
    """A module of the blocks that the test names, on PostgreSQL, with an order in it."""
    module = ModuleType("example")
    url = postgres_schema.url.set(drivername="postgresql+asyncpg")
    module.url = url.render_as_string(hide_password=False)  # type: ignore[attr-defined]
    for page, name in (TABLES, *request.function.blocks):
        exec(find_block(page, name).code, module.__dict__)
    orders: Any = module.Order.__table__
    orders.create(postgres_schema)
    with postgres_schema.connect() as connection:
        connection.execute(orders.insert().values(item="tea"))
    yield module
    await module.reads.dispose()
    await module.engine.dispose()
    orders.drop(postgres_schema)


def items(shop: ModuleType, postgres_schema: sa.Engine) -> list[str]:
    """What is committed."""
    with postgres_schema.connect() as connection:
        return list(connection.scalars(sa.select(shop.Order.item).order_by(shop.Order.id)))


@runs("reads.md", "app", "transaction")
async def test_read_only_endpoints_read(shop, serve):
    """A read-only endpoint reads; where it asks for a transaction, it has one."""
    async with serve(shop.app) as client:
        assert ["tea"] == (await client.get("/orders")).json()
        assert {"all": 1, "tea": 1} == (await client.get("/report")).json()
        assert "7" == (await client.get("/tenant")).json()


@runs("reads.md", "app", "methods")
async def test_methods_make_requests_read_only(shop, serve, postgres_schema):
    """A GET is read-only, and one that says otherwise writes."""
    async with serve(shop.quick) as client:
        assert ["tea"] == (await client.get("/orders")).json()
        assert 200 == (await client.get("/visits")).status_code

    assert ["tea", "visit"] == items(shop, postgres_schema)


@runs("reads.md", "app", "write")
async def test_write_is_refused_or_goes_elsewhere(shop, serve, postgres_schema):
    """A careless write is a ReadOnlyError, a block of its own writes."""
    errors = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await shop.app(scope, receive, send)
        except ReadOnlyError as error:
            errors.append(error)
            raise

    async with serve(watched) as client:
        assert 500 == (await client.get("/careless")).status_code
        assert 200 == (await client.get("/counted")).status_code

    assert 1 == len(errors)
    assert ["tea", "counted"] == items(shop, postgres_schema)
