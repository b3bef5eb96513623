"""Nothing is reachable that the app hasn't mounted: no route, no header, no answer of ours."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from litestar import Litestar, get
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_dbscope import DBSessionMiddleware
from asgi_dbscope._demo import command, server
from asgi_dbscope._demo.command import Demo
from tests.fix_asgi import http_scope
from tests.fix_database import Item
from tests.fix_frameworks import answering_disconnect

PATHS = (
    *("/", "/nowhere", "/health", "/healthz", "/metrics", "/status", "/debug", "/admin", "/demo"),
    *("/db", "/dbscope", "/asgi_dbscope", "/_dbscope", "/_asgi_dbscope", "/__dbscope__", "/pool"),
    *("/session", "/sessions", "/scope", "/transactions", "/rollback", "/release", "/sql"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")

Make = Callable[[Callable[[], None]], Any]


def starlette(work: Callable[[], None]) -> Any:
    """One route, in Starlette."""

    async def endpoint(request: Request) -> PlainTextResponse:
        work()
        return PlainTextResponse("home")

    return Starlette(routes=[Route("/", endpoint)])


def fastapi(work: Callable[[], None]) -> Any:
    """One route, in FastAPI, and no documentation."""
    app = FastAPI(openapi_url=None)

    @app.get("/")
    async def endpoint() -> str:
        work()
        return "home"

    return app


def litestar(work: Callable[[], None]) -> Any:
    """One route, in Litestar, and no documentation."""

    @get("/")
    async def endpoint() -> str:
        work()
        return "home"

    return Litestar([endpoint], openapi_config=None, logging_config=None)


@pytest.mark.parametrize("make", [starlette, fastapi, litestar])
@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_every_answer_is_the_apps_to_the_byte(db, drive, make):
    """G18: with the middleware and without: the same status, headers and body, for any path."""
    numbers = iter(range(1000))
    bare = answering_disconnect(make(lambda: None))
    served = answering_disconnect(
        DBSessionMiddleware(make(lambda: db.session.add(Item(id=next(numbers)))), database=db)
    )

    for path in PATHS:
        for method in METHODS:
            expected = await drive(bare, http_scope(path, method))
            actual = await drive(served, http_scope(path, method))

            assert expected.messages == actual.messages
            assert type(expected.error) is type(actual.error)
    assert 0 < next(numbers)


def test_demo_is_reached_from_its_own_machine_only():
    """The demo's servers listen on loopback, whatever port they are given."""
    with server.bind(0) as listener:
        assert "127.0.0.1" == listener.getsockname()[0]


def mode_of(path: Path) -> int:
    """Who may do what with it."""
    return stat.S_IMODE(path.stat().st_mode)


async def test_files_of_the_demo_are_its_owners(monkeypatch):
    """The demo's database is in a directory with a name to nobody's guess, closed to others."""
    seen: list[tuple[str, int]] = []

    async def serve(demo: Demo, directory: Path) -> None:
        seen.append((directory.name, mode_of(directory)))

    monkeypatch.setattr(command.Demo, "_serve", serve)
    for _ in range(2):
        await Demo(None, 0, once=True, keep=False)._run()

    (first, first_mode), (second, second_mode) = seen
    assert first != second
    assert {0o700} == {first_mode, second_mode}
