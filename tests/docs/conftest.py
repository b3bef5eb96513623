"""Fixtures that run the documentation's code blocks as their reader would."""

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database
from tests.docs.blocks import find_block

Serve = Callable[[Any], AbstractAsyncContextManager[httpx.AsyncClient]]
Query = Callable[..., list[Any]]


@pytest.fixture
async def example(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ModuleType]:
    """A module of the blocks that the test names with `runs`, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    for page, name in request.function.blocks:
        block = find_block(page, name)
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(block.page), "exec"), module.__dict__)
    yield module
    for value in list(vars(module).values()):
        if isinstance(value, (AsyncEngine, Database)):
            await value.dispose()


@pytest.fixture
def serve() -> Serve:
    """Start an app, as a server does, and give a client to it."""

    @asynccontextmanager
    async def serve(app: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            _lifespan(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            yield client

    return serve


@asynccontextmanager
async def _lifespan(app: Any) -> AsyncIterator[None]:
    to_app: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    to_server: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, to_app.get, to_server.put))
    await to_app.put({"type": "lifespan.startup"})
    assert "lifespan.startup.complete" == (await to_server.get())["type"]
    try:
        yield
    finally:
        await to_app.put({"type": "lifespan.shutdown"})
        assert "lifespan.shutdown.complete" == (await to_server.get())["type"]
        await task


@pytest.fixture
def query() -> Query:
    """Ask the examples' SQLite file what is committed in it."""

    def query(sql: str, file: str = "shop.db") -> list[Any]:
        connection = sqlite3.connect(file)
        try:
            return [row[0] if len(row) == 1 else row for row in connection.execute(sql)]
        finally:
            connection.close()

    return query
