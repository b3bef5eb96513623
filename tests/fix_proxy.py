"""Pytest plugin: the proxy before the database of a test."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from bench.proxy import Proxy


@pytest.fixture
async def proxy(engine: AsyncEngine) -> AsyncIterator[Proxy]:
    """A proxy to the server of the engine."""
    async with Proxy(engine.url) as proxy:
        yield proxy
