"""Response heads that can't be understood, sent to real servers, of which some would take them."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from asgi_dbscope import DBSessionMiddleware, MalformedMessageError
from tests.fix_asgi import body
from tests.fix_database import Item
from tests.fix_server import Observed, Serve, connect, serve_hypercorn, serve_uvicorn
from tests.malformed import MALFORMED_HEADS

SERVERS: dict[str, Callable[..., AbstractAsyncContextManager[int]]] = {
    "uvicorn, h11": lambda app: serve_uvicorn(app, http="h11"),
    "uvicorn, httptools": lambda app: serve_uvicorn(app, http="httptools"),
    "hypercorn": serve_hypercorn,
}


@pytest.fixture(params=SERVERS)
def serve(request: pytest.FixtureRequest) -> Serve:
    """Serve an app."""
    return SERVERS[request.param]


async def test_head_that_cannot_be_understood_is_a_500_and_no_row(db, rows, serve):
    """G1: whatever the server would have made of it, the client hears of no success."""
    names = list(MALFORMED_HEADS)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = int(scope["path"][1:])
        db.session.add(Item(id=number))
        await send(MALFORMED_HEADS[names[number]]())
        await send(body(b"done"))

    observed = Observed(DBSessionMiddleware(app, database=db))
    async with serve(observed) as port:
        for number in range(len(names)):
            async with connect(port) as client:
                client.send("POST", f"/{number}")
                status, _ = await client.head()
            await observed.wait_for_end_of(f"/{number}")

            assert 500 == status
            assert isinstance(observed.errors[f"/{number}"], MalformedMessageError)
    assert [] == await rows()
