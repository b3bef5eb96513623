"""What a client reads of an error: no SQL, no values, no URL, whoever answers."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from litestar import Litestar, get
from quart import Quart
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_dbscope import (
    Database,
    DBScopeError,
    DBSessionMiddleware,
    current_scope,
    current_session,
    transactional,
)
from tests.fix_asgi import Exchange, http_scope
from tests.fix_database import Child, Item
from tests.fix_frameworks import answering_disconnect

SECRET = "s3cr3t"  # a value of a statement, and the password of a URL
NUMBER = 20351  # a value that the database itself tells of, in the detail of its error
UNREACHABLE = f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:1/shop?password={SECRET}"

TELLTALES = (
    *(SECRET, str(NUMBER), "SELECT", "INSERT", "INTO", "item_id", "constraint", "://", "127.0.0.1"),
    *("sqlalchemy", "asyncpg", "psycopg", "sqlite", "asgi_dbscope", "Traceback", "sqlalche.me"),
)

VALUES = (SECRET, str(NUMBER), "INSERT", "VALUES", "item_id", "[SQL", "://")

Work = Callable[[], Any]


async def fail_at_commit() -> None:
    """A row whose parent isn't there, which the database finds at COMMIT."""
    current_session().add(Child(id=1, item_id=NUMBER))


async def fail_at_a_statement() -> None:
    """A statement that the database refuses."""
    statement = sa.text("INSERT INTO nowhere VALUES (:value)")
    await current_session().execute(statement, {"value": SECRET})


async def abort_and_go_on() -> None:
    """A statement that the database refuses, swallowed: PostgreSQL aborts the transaction."""
    session = current_session()
    session.add(Item(id=NUMBER, note=SECRET))
    await session.flush()
    with contextlib.suppress(sa.exc.IntegrityError):
        await session.execute(sa.insert(Item).values(id=NUMBER, note=SECRET))


async def fail_in_a_block() -> None:
    """The same in a block, which makes the scope rollback-only."""
    with contextlib.suppress(sa.exc.IntegrityError):
        async with transactional(database="default") as session:
            await session.execute(sa.insert(Item), [{"id": NUMBER, "note": SECRET}] * 2)


async def close_by_hand() -> None:
    """Changes that are closed away."""
    session = current_session()
    session.add(Item(id=NUMBER, note=SECRET))
    await session.flush()
    await session.close()


async def decide_nothing() -> None:
    """A commit policy that answers neither yes nor no."""
    current_scope().configure(commit_policy=lambda head: SECRET)
    current_session().add(Item(id=NUMBER, note=SECRET))


WORKS: dict[str, Work] = {
    "commit": fail_at_commit,
    "statement": fail_at_a_statement,
    "aborted": abort_and_go_on,
    "block": fail_in_a_block,
    "closed": close_by_hand,
    "policy": decide_nothing,
}


@pytest.fixture
async def unreachable() -> AsyncIterator[Database[Any]]:
    """A database that refuses the connection, with a password in its URL."""
    db: Database[Any] = Database(UNREACHABLE, name="unreachable")
    yield db
    await db.dispose()


def starlette(work: Work) -> Any:
    """The work in Starlette."""

    async def endpoint(request: Request) -> PlainTextResponse:
        await work()
        return PlainTextResponse("done")

    return Starlette(routes=[Route("/", endpoint)])


def fastapi(work: Work) -> Any:
    """The work in FastAPI."""
    app = FastAPI()

    @app.get("/")
    async def endpoint() -> str:
        await work()
        return "done"

    return app


def litestar(work: Work) -> Any:
    """The work in Litestar."""

    @get("/")
    async def endpoint() -> str:
        await work()
        return "done"

    return Litestar([endpoint], logging_config=None, openapi_config=None)


def quart(work: Work) -> Any:
    """The work in Quart."""
    app = Quart(__name__)

    @app.get("/")
    async def endpoint() -> str:
        await work()
        return "done"

    return app


def told(exchange: Exchange) -> str:
    """All that the client reads."""
    heads = [str(each.get("headers", "")) for each in exchange.messages]
    return "".join(heads) + exchange.body.decode()


FRAMEWORKS = [starlette, fastapi, litestar, quart]


@pytest.mark.parametrize("make", FRAMEWORKS)
@pytest.mark.parametrize("name", WORKS)
async def test_client_reads_nothing_of_the_database(db, drive, make, name):
    """G2: an error is a status and a phrase to the client: no SQL, no values."""
    app = answering_disconnect(DBSessionMiddleware(make(WORKS[name]), database=db))

    exchange = await drive(app)

    is_fine = name == "aborted" and db.session_factory.kw["bind"].dialect.name == "sqlite"
    assert (200 if is_fine else 500) == (exchange.status or 500)
    assert [] == [each for each in TELLTALES if each.lower() in told(exchange).lower()]


@pytest.mark.parametrize("make", FRAMEWORKS)
async def test_client_reads_nothing_of_the_url(unreachable, drive, make):
    """A database that isn't there is an error without its address, and notes without password."""

    async def connect() -> None:
        await unreachable.session.execute(sa.text("SELECT 1"))

    app = answering_disconnect(DBSessionMiddleware(make(connect), database=unreachable))

    exchange = await drive(app)

    assert 500 == (exchange.status or 500)
    assert [] == [each for each in TELLTALES if each.lower() in told(exchange).lower()]
    assert SECRET not in repr(exchange.error) + "".join(getattr(exchange.error, "__notes__", []))


@pytest.mark.parametrize("name", ["aborted", "block", "closed", "policy"])
async def test_message_of_our_errors_may_be_shown(db, drive, name):
    """An app that shows `str(error)` of ours shows no SQL, and nothing of the database's detail."""

    def show(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(f"{type(error).__name__}: {error}", 500)

    app = starlette(WORKS[name])
    app.add_exception_handler(DBScopeError, show)
    app = answering_disconnect(DBSessionMiddleware(app, database=db))

    exchange = await drive(app, http_scope(query_string=SECRET.encode()))

    is_fine = name == "aborted" and db.session_factory.kw["bind"].dialect.name == "sqlite"
    assert (200 if is_fine else 500) == exchange.status
    assert [] == [each for each in VALUES if each in told(exchange)]
