"""Frameworks: each example does what the page says."""

import pytest

from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders"
TABLES = "tutorial.md/tables"


@runs("frameworks.md", TABLES, "ways")
async def test_every_way_to_install_answers(example, serve):
    """G18: added, defined or wrapped, an app without routes answers its own 404."""
    apps = [example.starlette, example.litestar, example.quart, example.anything]

    for app in apps:
        async with serve(app) as client:
            assert 404 == (await client.get("/")).status_code


@runs("frameworks.md", TABLES, "ways", "quart")
async def test_policy_rolls_back_what_quart_hides(example, serve, query):
    """G3: where exceptions are hidden, `commit_on_success` rolls a raised 4xx back."""
    async with example.lifespan(None), serve(example.app) as client:
        assert 409 == (await client.post("/orders/tea")).status_code

    assert [] == query(ORDERS)


@pytest.mark.filterwarnings("ignore:BaseHTTPMiddleware is a BaseHTTPMiddleware inside")
@runs("frameworks.md", TABLES, "ways", "tutorial.md/fastapi", "tutorial.md/raises", "order")
async def test_hidden_4xx_is_rolled_back(example, serve, query):
    """G3: behind a `BaseHTTPMiddleware` a returned 404 is taken for a raised one."""
    async with serve(example.ordered) as client:
        assert 404 == (await client.get("/returned", params={"item": "tea"})).status_code

    assert [] == query(ORDERS)
