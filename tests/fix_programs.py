"""Pytest plugin: program after program in one event loop, on each kind of driver."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop to run program after program in."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(params=["aiosqlite", "asyncpg", "sqlite", "psycopg"])
def source(
    request: pytest.FixtureRequest,
    make_engine: Callable[..., AsyncEngine],
    loop: asyncio.AbstractEventLoop,
) -> Iterator[AsyncEngine | sa.Engine]:
    """An engine, asynchronous or synchronous, on an empty schema."""
    if request.param in {"sqlite", "psycopg"}:
        yield request.getfixturevalue("make_sync_engine")(request.param)
        return
    engine = make_engine("sqlite" if request.param == "aiosqlite" else request.param)
    yield engine
    loop.run_until_complete(engine.dispose())
