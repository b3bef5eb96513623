"""Frameworks: each example does what the page says."""

from typing import Any

import pytest
from litestar import Litestar, Response
from litestar import post as litestar_post
from litestar.di import Provide
from litestar.exceptions import NotFoundException
from litestar.middleware import DefineMiddleware
from quart import Quart, abort
from sqlalchemy.exc import IntegrityError

from asgi_dbscope import DBSessionMiddleware, current_session
from tests.docs.blocks import runs
from tests.fix_asgi import http_scope
from tests.fix_database import Child, Item

ORDERS = "SELECT item FROM orders"
TABLES = "tutorial.md/tables"


@runs("frameworks.md", TABLES, "ways")
async def test_every_way_to_install_answers(example, serve):
    """G18: added, defined or wrapped, an app without routes answers its own 404."""
    apps = [example.starlette, example.litestar, example.quart, example.anything]

    for app in apps:
        async with serve(app) as client:
            assert 404 == (await client.get("/")).status_code


@runs("frameworks.md", TABLES, "ways", "quart")
async def test_policy_rolls_back_what_quart_hides(example, serve, query):
    """G3: where exceptions are hidden, `commit_on_success` rolls a raised 4xx back."""
    async with example.lifespan(None), serve(example.app) as client:
        assert 409 == (await client.post("/orders/tea")).status_code

    assert [] == query(ORDERS)


@pytest.mark.filterwarnings("ignore:BaseHTTPMiddleware is a BaseHTTPMiddleware inside")
@runs("frameworks.md", TABLES, "ways", "tutorial.md/fastapi", "tutorial.md/raises", "order")
async def test_hidden_4xx_is_rolled_back(example, serve, query):
    """G3: behind a `BaseHTTPMiddleware` a returned 404 is taken for a raised one."""
    async with serve(example.ordered) as client:
        assert 404 == (await client.get("/returned", params={"item": "tea"})).status_code

    assert [] == query(ORDERS)


# --------------------------------------------------------------------------------------
# What can be seen where
# --------------------------------------------------------------------------------------


def in_litestar(db, handler, *, is_wrapped, **options):
    """An app of Litestar's with this handler, and the middleware on it one way or the other."""
    if is_wrapped:
        return DBSessionMiddleware(Litestar([handler], **options), database=db)
    define = DefineMiddleware(DBSessionMiddleware, database=db)
    return Litestar([handler], middleware=[define], **options)


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["defined", "wrapped"])
async def test_litestar_shows_what_was_raised(db, drive, rows, is_wrapped):
    """G3: a 4xx that was raised in Litestar is rolled back, as middleware and wrapped whole."""

    @litestar_post("/")
    async def refuse() -> None:
        current_session().add(Item(id=1))
        await current_session().flush()
        raise NotFoundException

    exchange = await drive(in_litestar(db, refuse, is_wrapped=is_wrapped), http_scope("/", "POST"))

    assert 404 == exchange.status
    assert [] == await rows()


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["defined", "wrapped"])
async def test_litestar_renders_a_failed_commit(db, drive, is_wrapped):
    """G2: Litestar's own exception handler for the database's error answers a failed commit."""

    @litestar_post("/")
    async def answer() -> None:
        current_session().add(Child(id=1, item_id=404))

    def refuse(request: Any, error: Exception) -> Response[dict[str, str]]:
        return Response({"detail": "that conflicts"}, status_code=409)

    app = in_litestar(
        db, answer, is_wrapped=is_wrapped, exception_handlers={IntegrityError: refuse}
    )
    exchange = await drive(app, http_scope("/", "POST"))

    assert (409, b'{"detail":"that conflicts"}') == (exchange.status, exchange.body)


@pytest.mark.filterwarnings("ignore:.*Inferred dependency field")
@pytest.mark.parametrize(
    ("is_wrapped", "before_the_head"),
    [(False, [1, 2]), (True, [1, 2, 3])],
    ids=["defined", "wrapped"],
)
async def test_litestar_hooks_and_generators_write_where_the_page_says(
    db, drive, rows, is_wrapped, before_the_head
):
    """G1, G7: generators and hooks of Litestar are in the transaction that the page names."""
    seen = []

    async def generator():
        yield 1
        current_session().add(Item(id=1))

    def after_request(response):
        current_session().add(Item(id=2))
        return response

    async def before_send(message, scope):
        if message["type"] == "http.response.start":
            current_session().add(Item(id=3))

    @litestar_post("/", dependencies={"one": Provide(generator)}, after_request=after_request)
    async def answer(one: int) -> dict[str, int]:
        return {"one": one}

    async def look(message):
        if message["type"] == "http.response.start":
            seen.append(await rows())

    app = in_litestar(db, answer, is_wrapped=is_wrapped, before_send=[before_send])
    await drive(app, http_scope("/", "POST"), on_send=look)

    assert [before_the_head] == seen
    assert [1, 2, 3] == await rows()


async def test_quart_hides_what_was_raised(db, drive, rows):
    """In Quart the status decides: an aborted 409 commits, an exception is a 500 and doesn't."""
    quart = Quart(__name__)

    @quart.post("/<int:number>")
    async def refuse(number):
        current_session().add(Item(id=number))
        if number == 1:
            abort(409)
        raise ValueError

    app = DBSessionMiddleware(quart, database=db)
    statuses = [(await drive(app, http_scope(f"/{each}", "POST"))).status for each in (1, 2)]

    assert [409, 500] == statuses
    assert [1] == await rows()
