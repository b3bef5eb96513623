"""The app that every server serves: each endpoint is one way to use a session.

``DBSCOPE_SERVED_URL`` names a PostgreSQL database, ``DBSCOPE_SERVED_FILE`` an SQLite file.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import sqlalchemy as sa
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.routing import Route

from asgi_dbscope import Database
from tests.fix_database import Base, Child, Item
from tests.fix_frameworks import added, wrapped
from tests.messages import MALFORMED_HEADS
from tests.server.channel import Channel, Observed

THIS_FILE = Path(__file__)

MEGABYTES = 16
"""What a response must have so that no kernel's buffers swallow it."""

HELD = "held"
"""The note of an item whose COMMIT waits for the test's lock."""

ANSWER_TO_FAILURES = "/asyncpg/rendered"
"""Where the app has an answer of its own to a COMMIT that failed."""


def make_databases(channel: Channel) -> dict[str, Database[Any]]:
    """PostgreSQL by an asynchronous and a synchronous engine, and by one of our own; SQLite."""
    url = sa.make_url(os.environ["DBSCOPE_SERVED_URL"])
    size = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 30}
    asyncpg = create_async_engine(url.set(drivername="postgresql+asyncpg"), **size)
    psycopg = sa.create_engine(url.set(drivername="postgresql+psycopg"), **size)
    sqlite = create_async_engine(f"sqlite+aiosqlite:///{os.environ['DBSCOPE_SERVED_FILE']}")
    owned = Database(url.set(drivername="postgresql+asyncpg"), name="owned")
    assert isinstance(owned.owned_engine, AsyncEngine)
    for engine in (asyncpg.sync_engine, psycopg, owned.owned_engine.sync_engine):
        channel.watch(engine)
    sa.event.listen(sqlite.sync_engine, "connect", _keep_to_foreign_keys)
    return {
        "asyncpg": Database(asyncpg, name="asyncpg"),
        "psycopg": Database(psycopg, name="psycopg"),
        "sqlite": Database(sqlite, name="sqlite"),
        "owned": owned,
    }


def _keep_to_foreign_keys(connection: Any, record: object) -> None:
    connection.cursor().execute("PRAGMA foreign_keys = ON")


def make_app() -> Observed:
    """The app under the middleware, and watched."""
    channel = Channel()
    databases = make_databases(channel)
    schema = sa.create_engine(f"sqlite:///{os.environ['DBSCOPE_SERVED_FILE']}")
    Base.metadata.create_all(schema)
    schema.dispose()

    app = FastAPI()
    for name in ("asyncpg", "sqlite", "owned"):
        app.include_router(basic_routes(databases[name]), prefix=f"/{name}")
    app.include_router(threaded_routes(databases["psycopg"]), prefix="/psycopg")
    db = databases["asyncpg"]
    for routes in (response_routes, body_routes, later_routes, other_routes):
        app.include_router(routes(db, channel), prefix="/asyncpg")
    for path, endpoint in raw_endpoints(db, channel).items():
        app.router.routes.append(Route(f"/asyncpg{path}", endpoint))

    def render(scope: Any, error: BaseException) -> Any:
        if scope["path"].startswith(ANSWER_TO_FAILURES):
            return JSONResponse({"detail": "conflict"}, 409)
        return None

    in_order = [databases[name] for name in ("asyncpg", "psycopg", "sqlite", "owned")]
    framework = added(app, databases=in_order, commit_error_response=render)
    plain = wrapped(Plain(db), database=db)

    async def choose(scope: Any, receive: Any, send: Any) -> Any:
        is_plain = scope.get("path", "").startswith("/plain/")
        return await (plain if is_plain else framework)(scope, receive, send)

    return Observed(choose, channel)


# --------------------------------------------------------------------------------------
# On each database
# --------------------------------------------------------------------------------------


def basic_routes(db: Database[Any]) -> APIRouter:
    """What is tried on each asynchronous database."""
    routes = APIRouter()
    session_type = Annotated[Any, Depends(db.get_session)]

    @routes.post("/items/{item_id}", status_code=201)
    async def create(item_id: int, session: session_type) -> dict[str, int]:
        session.add(Item(id=item_id))
        return {"id": item_id}

    @routes.post("/orphans/{item_id}", status_code=201)
    async def orphan(item_id: int, session: session_type) -> dict[str, int]:
        session.add(Item(id=item_id))
        await session.execute(sa.insert(Child).values(id=item_id, item_id=-1))
        return {"id": item_id}

    @routes.post("/refused/{item_id}")
    async def refuse(item_id: int, session: session_type) -> None:
        session.add(Item(id=item_id))
        await session.flush()
        raise HTTPException(409)

    return routes


def threaded_routes(db: Database[Any]) -> APIRouter:
    """The same for synchronous sessions, in worker threads."""
    routes = APIRouter()

    @routes.post("/items/{item_id}", status_code=201)
    def create(item_id: int) -> dict[str, int]:
        db.session.add(Item(id=item_id))
        return {"id": item_id}

    @routes.post("/orphans/{item_id}", status_code=201)
    def orphan(item_id: int) -> dict[str, int]:
        db.session.add(Item(id=item_id))
        db.session.execute(sa.insert(Child).values(id=item_id, item_id=-1))
        return {"id": item_id}

    @routes.post("/refused/{item_id}")
    def refuse(item_id: int) -> None:
        db.session.add(Item(id=item_id))
        db.session.flush()
        raise HTTPException(409)

    return routes


# --------------------------------------------------------------------------------------
# The response and its transaction
# --------------------------------------------------------------------------------------


def response_routes(db: Database[Any], channel: Channel) -> APIRouter:
    """Ways to the head."""
    routes = APIRouter()

    @routes.post("/held/{item_id}", status_code=201)
    async def held(item_id: int) -> dict[str, int]:
        db.session.add(Item(id=item_id, note=HELD))
        return {"id": item_id}

    @routes.post("/slow/{item_id}", status_code=201)
    async def slow(item_id: int) -> dict[str, int]:
        db.session.add(Item(id=item_id))
        await db.session.flush()
        channel.say("written")
        await channel.wait(f"slow/{item_id}")
        return {"id": item_id}

    @routes.post("/upload/{item_id}", status_code=201)
    @routes.post("/timed-upload/{item_id}", status_code=201)
    async def upload(item_id: int, request: Request) -> int:
        if "timed" in request.url.path:
            db.scope.configure(timeout=1.0)
        db.session.add(Item(id=item_id))
        await db.session.flush()
        channel.say("written")
        return len(await request.body())

    @routes.post("/promised/{item_id}", status_code=201)
    @routes.post("/rendered/{item_id}", status_code=201)
    async def promise(item_id: int, tasks: BackgroundTasks) -> dict[str, int]:
        db.session.add(Item(id=item_id))
        await db.session.execute(sa.insert(Child).values(id=item_id, item_id=-1))
        tasks.add_task(channel.say, "background")
        return {"id": item_id}

    @routes.post("/raised/{item_id}")
    async def raise_error(item_id: int) -> None:
        db.session.add(Item(id=item_id))
        await db.session.flush()
        raise LookupError

    @routes.post("/returned/{item_id}/{status}")
    async def return_status(item_id: int, status: int) -> Response:
        db.session.add(Item(id=item_id))
        await db.session.flush()
        return JSONResponse({"status": status}, status)

    @routes.post("/preview/{item_id}")
    async def preview(item_id: int) -> dict[str, int]:
        db.session.add(Item(id=item_id))
        await db.session.flush()
        db.set_rollback_only()
        return {"id": item_id}

    @routes.post("/swallowed/{item_id}", status_code=201)
    async def swallow(item_id: int) -> None:
        db.session.add(Item(id=item_id))
        try:
            async with db.transactional():
                raise LookupError
        except LookupError:
            pass

    @routes.api_route("/looked/{item_id}", methods=["GET", "HEAD"])
    async def look(item_id: int) -> Response:
        db.session.add(Item(id=item_id))
        return Response(b"0123456789")

    @routes.get("/not-modified/{item_id}")
    async def not_modified(item_id: int) -> Response:
        db.session.add(Item(id=item_id))
        return Response(status_code=304)

    @routes.get("/together")
    async def together() -> int:
        def in_thread() -> int:
            return id(db.session)

        async def in_task() -> int:
            await asyncio.sleep(0)
            return id(db.session)

        found = await asyncio.gather(in_task(), anyio.to_thread.run_sync(in_thread))
        return len({*found, id(db.session)})

    return routes


# --------------------------------------------------------------------------------------
# The body
# --------------------------------------------------------------------------------------


def body_routes(db: Database[Any], channel: Channel) -> APIRouter:
    """Bodies: large ones, and ones that write."""
    routes = APIRouter()

    @routes.get("/large/{item_id}")
    async def large(item_id: int) -> Response:
        db.session.add(Item(id=item_id))
        return Response(b"x" * (MEGABYTES << 20))

    @routes.get("/large-stream/{item_id}")
    async def large_stream(item_id: int) -> StreamingResponse:
        db.session.add(Item(id=item_id))

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(MEGABYTES):
                yield b"x" * (1 << 20)

        return StreamingResponse(chunks())

    @routes.get("/stream/{item_id}")
    async def stream(item_id: int) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "first\n"
            db.session.add(Item(id=item_id))
            yield "last\n"

        return StreamingResponse(lines())

    @routes.get("/torn/{item_id}")
    async def torn(item_id: int) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            db.session.add(Item(id=item_id))
            await db.session.execute(sa.insert(Child).values(id=item_id, item_id=-1))
            yield "line\n"

        return StreamingResponse(lines())

    @routes.get("/heavy/{item_id}")
    async def heavy(item_id: int) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            db.session.add(Item(id=item_id))
            await db.session.flush()
            channel.say("written")
            yield b"x" * (MEGABYTES << 20)
            await channel.wait("never")

        return StreamingResponse(chunks())

    @routes.get("/endless/{item_id}")
    async def endless(item_id: int) -> StreamingResponse:
        db.session.add(Item(id=item_id))

        async def lines() -> AsyncIterator[str]:
            db.session.add(Item(id=-item_id))
            await db.session.flush()
            channel.say("written")
            yield "line\n"
            await channel.wait("never")

        return StreamingResponse(lines())

    return routes


def raw_endpoints(db: Database[Any], channel: Channel) -> dict[str, Any]:
    """Endpoints in plain ASGI, which don't hear what the server says."""
    return {
        "/deaf/{item_id}": Deaf(db, channel, [b"first\n"]),
        "/between/{item_id}": Deaf(db, channel, []),
        "/file/{item_id}": SentFile(db),
    }


class Deaf:
    """Send a head and some pieces, wait for the test, write, and send the rest of the body."""

    def __init__(self, db: Database[Any], channel: Channel, pieces: list[bytes]) -> None:
        self.db = db
        self.channel = channel
        self.pieces = pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        item_id = int(scope["path_params"]["item_id"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        self.channel.say("waiting")
        await self.channel.wait(f"deaf/{item_id}")
        self.db.session.add(Item(id=item_id))
        await self.db.session.flush()
        await send({"type": "http.response.body", "body": b"middle\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"last\n", "more_body": False})


class SentFile:
    """Send this file, by the server where it can do that."""

    def __init__(self, db: Database[Any]) -> None:
        self.db = db
        self.content = THIS_FILE.read_bytes()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.db.session.add(Item(id=int(scope["path_params"]["item_id"])))
        headers = [(b"content-length", str(len(self.content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if "http.response.pathsend" in scope.get("extensions", ()):
            await send({"type": "http.response.pathsend", "path": str(THIS_FILE)})
        else:
            await send({"type": "http.response.body", "body": self.content})


class Plain:
    """An app without a framework, and so without an answer of its own to an error."""

    def __init__(self, db: Database[Any]) -> None:
        self.db = db

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        _, _, kind, number = scope["path"].split("/")
        item_id = int(number)
        if kind == "refused":
            with contextlib.suppress(TypeError, ValueError, KeyError):
                await send({"type": "http.response.start", "status": 200, "headers": [("a", "b")]})
                return  # a server that takes it
            self.db.session.add(Item(id=item_id))
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        self.db.session.add(Item(id=item_id))
        if kind == "malformed":
            await send(list(MALFORMED_HEADS.values())[item_id]())
        await self.db.session.execute(sa.insert(Child).values(id=item_id, item_id=-1))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"created"})


# --------------------------------------------------------------------------------------
# After the body, and other than HTTP
# --------------------------------------------------------------------------------------


def later_routes(db: Database[Any], channel: Channel) -> APIRouter:
    """Work that goes on when the client has its answer."""
    routes = APIRouter()
    kept: list[Any] = []

    @routes.post("/background/{item_id}")
    async def background(item_id: int, tasks: BackgroundTasks) -> None:
        async def write() -> None:
            channel.say("idle")
            await channel.wait(f"begin/{item_id}")
            db.session.add(Item(id=item_id))
            await db.session.flush()
            channel.say("written")
            await channel.wait(f"end/{item_id}")

        db.session.add(Item(id=-item_id))
        tasks.add_task(write)

    @routes.post("/failing-background/{item_id}")
    async def failing_background(item_id: int, tasks: BackgroundTasks) -> None:
        async def write() -> None:
            await db.session.execute(sa.insert(Child).values(id=item_id, item_id=-1))

        db.session.add(Item(id=item_id))
        tasks.add_task(write)

    @routes.post("/outlived/{item_id}")
    async def outlive(item_id: int) -> None:
        async def go_on() -> None:
            await channel.wait(f"outlived/{item_id}")
            await refuse(lambda: db.session.scalar(sa.select(1)))
            await refuse(lambda: session.scalar(sa.select(1)))

        async def refuse(use: Callable[[], Any]) -> None:
            try:
                await use()
            except Exception as error:
                channel.say("refused", error=type(error).__name__)

        session = db.session
        session.add(Item(id=item_id))
        kept.append(asyncio.create_task(go_on()))

    return routes


def other_routes(db: Database[Any], channel: Channel) -> APIRouter:
    """A websocket; and what needs no session."""
    routes = APIRouter()

    @routes.get("/ping")
    async def ping() -> str:
        return "pong"

    @routes.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            async with db.session_scope() as session:
                session.add(Item(id=int(text)))
                await session.flush()
                if int(text) < 0:
                    channel.say("written")
                    await websocket.receive_text()
            await websocket.send_text(f"{text} committed")

    return routes
