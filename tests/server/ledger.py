"""The app that the servers serve: each endpoint is one way to use a session."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from asgi_dbscope import Database, current_session
from tests.fix_database import Child, Item
from tests.fix_frameworks import added
from tests.fix_server import Observed

MEGABYTES = 16
"""What a response must have so that no kernel's buffers swallow it."""


class Ledger(FastAPI):
    """The app of these tests; `events` are what its endpoints wait for, and say."""

    def __init__(self, db: Database[Any], **options: Any) -> None:
        super().__init__(**options)
        self.db = db
        self.events: dict[str, asyncio.Event] = {}
        for name in ("written", "go", "streaming"):
            self.events[name] = asyncio.Event()
        session_type = Annotated[AsyncSession, Depends(db.get_session)]
        events = self.events

        @self.post("/items/{item_id}", status_code=201)
        async def create(item_id: int, session: session_type) -> dict[str, int]:
            session.add(Item(id=item_id))
            return {"id": item_id}

        @self.post("/sync/{item_id}", status_code=201)
        def create_in_thread(item_id: int) -> dict[str, int]:
            current_session().add(Item(id=item_id))
            return {"id": item_id}

        @self.get("/items")
        async def count(session: session_type) -> int:
            return await session.scalar(sa.select(sa.func.count()).select_from(Item)) or 0

        @self.post("/orphans", status_code=201)
        async def orphan(session: session_type) -> dict[str, bool]:
            session.add(Item(id=1))
            await session.execute(sa.insert(Child).values(id=1, item_id=404))
            return {"created": True}

        @self.post("/refused/{item_id}")
        async def refuse(item_id: int, session: session_type) -> None:
            session.add(Item(id=item_id))
            await session.flush()
            raise HTTPException(409)

        @self.post("/slow/{item_id}", status_code=201)
        async def slow(item_id: int, session: session_type) -> dict[str, int]:
            session.add(Item(id=item_id))
            await session.flush()
            events["written"].set()
            await events["go"].wait()
            return {"id": item_id}

        @self.get("/large")
        async def large(session: session_type) -> Response:
            session.add(Item(id=1))
            return Response(b"x" * (MEGABYTES << 20))

        @self.get("/large-stream")
        async def large_stream(session: session_type) -> StreamingResponse:
            session.add(Item(id=1))

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(MEGABYTES):
                    yield b"x" * (1 << 20)
                    events["streaming"].set()

            return StreamingResponse(chunks())

        @self.get("/torn")
        async def torn(session: session_type) -> StreamingResponse:
            async def lines() -> AsyncIterator[str]:
                session.add(Item(id=1))
                await session.execute(sa.insert(Child).values(id=1, item_id=404))
                yield "line\n"

            return StreamingResponse(lines())

        @self.get("/endless/{item_id}")
        async def endless(item_id: int, session: session_type) -> StreamingResponse:
            session.add(Item(id=item_id))

            async def lines() -> AsyncIterator[str]:
                session.add(Item(id=-item_id))
                await session.flush()
                events["streaming"].set()
                yield "line\n"
                await asyncio.Event().wait()

            return StreamingResponse(lines())

        @self.post("/background/{item_id}")
        async def background(item_id: int, session: session_type, tasks: BackgroundTasks) -> None:
            async def write() -> None:
                session.add(Item(id=item_id))
                await session.flush()
                events["written"].set()
                await events["go"].wait()

            tasks.add_task(write)

        @self.post("/failing-background")
        async def failing_background(session: session_type, tasks: BackgroundTasks) -> None:
            async def write() -> None:
                await session.execute(sa.insert(Child).values(id=1, item_id=404))

            tasks.add_task(write)

        @self.websocket("/echo")
        async def echo(websocket: WebSocket) -> None:
            await websocket.accept()
            while True:
                text = await websocket.receive_text()
                async with db.session_scope() as session:
                    session.add(Item(id=int(text)))
                await websocket.send_text(f"{text} committed")


def ledger(db: Database[Any], **options: Any) -> tuple[Observed, dict[str, asyncio.Event]]:
    """The app under the middleware, observed, and its events."""
    app = Ledger(db, **options)
    return Observed(added(app, database=db)), app.events


def served() -> Any:
    """The app for a server in a process of its own; `DBSCOPE_SERVED_URL` names its database."""
    engine = create_async_engine(os.environ["DBSCOPE_SERVED_URL"], pool_size=5, max_overflow=0)
    app = Ledger(Database(engine))

    @app.get("/pool")
    async def pool() -> int:
        found: Any = engine.pool
        return int(found.checkedout())

    @app.get("/events/{name}")
    async def wait_for_event(name: str) -> None:
        await app.events[name].wait()

    @app.post("/events/{name}")
    async def set_event(name: str) -> None:
        app.events[name].set()

    observed = Observed(added(app, database=app.db))

    @app.get("/ended")
    async def wait_for_end(path: str) -> str:
        await observed.wait_for_end_of(path)
        return type(observed.errors.get(path)).__name__

    return observed


_served: list[Any] = []


async def app(scope: Any, receive: Any, send: Any) -> Any:
    """The same, made when the first message comes: old servers call no factory."""
    if not _served:
        _served.append(served())
    return await _served[0](scope, receive, send)
