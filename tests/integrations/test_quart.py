"""Quart: `app.asgi_app` wrapped; the status decides, since Quart tells nobody what was raised."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from quart import Quart, Response, abort

from asgi_dbscope import DBSessionMiddleware, commit_on_success, current_session, session_options
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item
from tests.fix_frameworks import answering_disconnect


def serve(app: Quart, **options: Any) -> Any:
    """The app as a server would have it, under the middleware."""
    app.asgi_app = DBSessionMiddleware(app.asgi_app, **options)  # type: ignore[method-assign]
    return answering_disconnect(app)


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_commits_before_the_head(sync, db, drive, rows, timeline):
    """G1, G11: a view, in a thread or not, has the request's session, committed at the head."""
    app = Quart(__name__)

    @app.post("/async")
    async def create() -> tuple[str, int]:
        current_session().add(Item(id=1))
        await db.session.flush()
        return "created", 201

    @app.post("/sync")
    def create_in_thread() -> tuple[str, int]:
        current_session().add(Item(id=1))
        return "created", 201

    path = "/sync" if sync else "/async"
    exchange = await drive(serve(app, database=db), http_scope(path, "POST"))

    assert (201, b"created", None) == (exchange.status, exchange.body, exchange.error)
    assert ["checkout", "begin", "commit", "checkin", "start 201"] == timeline[:5]
    assert [1] == await rows()


async def test_status_decides(db, drive, rows):
    """G3: a 5xx rolls back, a 4xx commits, raised or returned; a policy can say otherwise."""
    app = Quart(__name__)

    @app.post("/raised/<int:status>")
    async def raised(status: int) -> str:
        db.session.add(Item(id=status))
        await db.session.flush()
        abort(status)

    @app.post("/returned/<int:status>")
    @session_options(commit_policy=commit_on_success)
    async def returned(status: int) -> tuple[str, int]:
        db.session.add(Item(id=status))
        await db.session.flush()
        return "", status

    @app.post("/broken")
    async def broken() -> str:
        db.session.add(Item(id=1))
        await db.session.flush()
        raise LookupError

    served = serve(app, database=db)

    for path, status in [
        ("/raised/404", 404),
        ("/raised/503", 503),
        ("/returned/409", 409),
        ("/returned/201", 201),
        ("/broken", 500),
    ]:
        assert status == (await drive(served, http_scope(path, "POST"))).status
    assert [201, 404] == await rows()


async def test_failed_commit_is_never_a_success(db, drive, rows):
    """G2: no head goes out; the database's own error surfaces, for the server's 500."""
    app = Quart(__name__)

    @app.post("/")
    async def create() -> str:
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        return "created"

    exchange = await drive(serve(app, database=db), http_scope("/", "POST"))

    assert [] == exchange.messages
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == await rows()


async def test_failed_commit_is_rendered_where_asked_for(db, drive, rows):
    """G2: `commit_error_response` answers in the app's place."""
    app = Quart(__name__)

    @app.post("/")
    async def create() -> str:
        await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        return "created"

    async def conflict(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 409, "headers": []})
        await send({"type": "http.response.body", "body": b"conflict"})

    served = serve(app, database=db, commit_error_response=lambda scope, error: conflict)
    exchange = await drive(served, http_scope("/", "POST"))

    assert (409, b"conflict", None) == (exchange.status, exchange.body, exchange.error)
    assert [] == await rows()


async def test_stream_has_a_transaction_of_its_own(db, drive, rows, timeline):
    """G7: the body's transaction is committed before its last message."""
    app = Quart(__name__)

    @app.get("/")
    async def stream() -> Any:
        session = db.session
        session.add(Item(id=1))

        async def lines() -> AsyncIterator[bytes]:
            session.add(Item(id=2))
            await session.flush()
            yield b"line\n"

        return lines(), 200

    exchange = await drive(serve(app, database=db))

    assert (b"line\n", True) == (exchange.body, exchange.is_complete)
    assert ["commit", "start 200", "body", "commit", "last body"] == [
        each for each in timeline if each in {"commit", "start 200", "body", "last body"}
    ]
    assert [1, 2] == await rows()


async def test_stream_whose_commit_fails_ends_torn(db, drive, rows):
    """G7: the client never sees a clean end of a body whose transaction didn't commit."""
    app = Quart(__name__)

    @app.get("/")
    async def stream() -> Any:
        session = db.session

        async def lines() -> AsyncIterator[bytes]:
            await session.execute(sa.insert(Child).values(id=1, item_id=404))
            yield b"line\n"

        return lines(), 200

    exchange = await drive(serve(app, database=db))

    assert (200, b"line\n", False) == (exchange.status, exchange.body, exchange.is_complete)
    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == await rows()


async def test_stream_that_runs_out_of_time_is_rolled_back(engine, db, drive, rows, monkeypatch):
    """G7, G10: Quart's own response timeout cancels the stream; what it wrote is gone."""
    app = Quart(__name__)
    cancelled = asyncio.Event()
    loop = asyncio.get_running_loop()

    @app.get("/")
    async def stream() -> Any:
        session = db.session

        async def lines() -> AsyncIterator[bytes]:
            session.add(Item(id=1))
            await session.flush()
            yield b"line\n"
            # The line is out: the loop's clock goes on by an hour.
            monkeypatch.setattr(loop, "time", lambda: time.monotonic() + 3600)
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        response = Response(lines())
        response.timeout = 1800
        return response

    served = serve(app, database=db)

    async def leaving(scope: Any, receive: Any, send: Any) -> None:
        async def receive_until_cancelled() -> Any:  # on Python 3.13 Quart waits for the client
            await cancelled.wait()
            return {"type": "http.disconnect"}

        await served(scope, receive_until_cancelled, send)

    exchange = await drive(leaving)

    assert (b"line\n", False) == (exchange.body, exchange.is_complete)
    assert [] == await rows()
    assert 0 == engine.pool.checkedout()


async def test_background_task_needs_a_scope_of_its_own(db, drive, rows):
    """G9: Quart's background tasks outlive the request; `session_scope()` is theirs."""
    app = Quart(__name__)

    async def job() -> None:
        async with db.session_scope() as session:
            session.add(Item(id=1))

    @app.post("/")
    async def create() -> str:
        app.add_background_task(job)
        return ""

    exchange = await drive(serve(app, database=db), http_scope("/", "POST"))
    await asyncio.gather(*app.background_tasks)

    assert 200 == exchange.status
    assert [1] == await rows()
