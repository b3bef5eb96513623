"""Databases, drivers, poolers: each example does what the page says."""

import re
import tomllib
from collections.abc import AsyncIterator
from types import ModuleType

import pytest

from asgi_dbscope import Database
from tests.docs.blocks import DOCS, ROOT, find_block, runs


@pytest.fixture
async def pooled() -> AsyncIterator[ModuleType]:
    """The module of the PgBouncer example, with the URL that it takes for granted."""
    module = ModuleType("example")
    module.url = "postgresql+asyncpg://shop@pooler:6432/shop"  # type: ignore[attr-defined]
    exec(find_block("databases.md", "pgbouncer").code, module.__dict__)
    yield module
    await module.engine.dispose()


def test_each_drivers_extra_is_on_the_page():
    """What is to be installed for each driver is an extra of the package, and no other."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    page = (DOCS / "databases.md").read_text()

    assert extras.keys() - {"demo"} == set(re.findall(r"`asgi-dbscope\[(\w+)\]`", page))


@runs("databases.md", "pgbouncer")
async def test_engine_of_ones_own_is_told_of_the_pooler(pooled):
    """The engine has the pool that it was given."""
    assert isinstance(pooled.db, Database)
    assert 20 == pooled.engine.pool.size()
