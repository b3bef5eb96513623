"""Coming from other frameworks: what the pages put in place of their verbs does what is said."""

import logging

import pytest
import sqlalchemy as sa

from asgi_dbscope import DBScopeError, TransactionForbiddenError, TransactionRequiredError
from tests.docs.blocks import runs

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
TABLES = "tutorial.md/tables"
DJANGO = "coming-from/django.md"
SPRING = "coming-from/spring.md"
PYRAMID = "coming-from/pyramid-tm.md"
FLASK = "coming-from/flask-sqlalchemy.md"


@pytest.fixture
def example(example):
    """The page's module; its synchronous engines are disposed of."""
    yield example
    for value in list(vars(example).values()):
        if isinstance(value, sa.Engine):
            value.dispose()


# --------------------------------------------------------------------------------------
# Django
# --------------------------------------------------------------------------------------


@runs(DJANGO, TABLES, "app")
async def test_django_request_is_atomic(example, serve, query):
    """G1: the order is committed without the extra of its savepoint, and its hook has run."""
    async with serve(example.app) as client:
        response = await client.post("/orders", params=TEA)

    assert (200, {"id": 1}) == (response.status_code, response.json())
    assert [1] == example.outbox
    assert ["tea"] == query(ORDERS)


@runs(DJANGO, TABLES, "app")
async def test_django_non_atomic_request_keeps_what_came_before_an_error(example, serve, query):
    """In mode `autocommit` each transactional block is durable by itself."""
    async with serve(example.app) as client:
        assert 500 == (await client.post("/imports", params={"items": "a,,b"})).status_code

    assert ["a"] == query(ORDERS)


@runs(DJANGO, TABLES, "app")
async def test_django_durable_block_is_outermost_or_refused(example, serve, query):
    """`NEVER` above a transactional block commits outside of any other, and is refused inside."""
    async with serve(example.app) as client:
        await example.command()
        assert 500 == (await client.post("/close")).status_code
    async with example.db.session_scope():
        with pytest.raises(TransactionForbiddenError):
            await example.close_the_day()

    assert ["the day is closed"] == query(ORDERS)


@runs(DJANGO, TABLES, "app", "careless")
async def test_django_swallowed_failure_is_an_error(example, serve, query):
    """G4: what `savepoint=False` loses silently is a 500; a preview goes out as it is."""
    async with serve(example.app) as client:
        careless = await client.post("/careless", params=TEA)
        preview = await client.post("/preview", params=TEA)

    assert 500 == careless.status_code
    assert (200, TEA) == (preview.status_code, preview.json())
    assert [] == query(ORDERS)


@runs(DJANGO, TABLES, "app", "sync")
async def test_django_synchronous_view_is_atomic(example, serve, query):
    """G1: a `def` endpoint with a synchronous session commits before its response."""
    async with serve(example.sync_app) as client:
        response = await client.post("/orders", params=TEA)

    assert (200, {"id": 1}) == (response.status_code, response.json())
    assert ["tea", "wrapping"] == query(ORDERS)


# --------------------------------------------------------------------------------------
# Spring
# --------------------------------------------------------------------------------------


@runs(SPRING, TABLES, "app")
async def test_spring_service_is_transactional(example, serve, query):
    """G1: the log is independent, the order's block commits, and then the mail is sent."""
    async with serve(example.app) as client:
        placed = await client.post("/orders", params=TEA)
        counted = await client.get("/orders")
        await example.job()

    assert ({"id": 2}, 2) == (placed.json(), counted.json())
    assert [2, 4] == example.mail.sent
    assert ["log: asked for tea", "tea"] * 2 == query(ORDERS)


@runs(SPRING, TABLES, "app")
async def test_spring_no_rollback_for_keeps_what_was_written(example, serve, query):
    """An exception that is named in `no_rollback_for` commits the block, in requests and jobs."""
    async with serve(example.app) as client:
        assert 409 == (await client.post("/reservations", params=TEA)).status_code
        with pytest.raises(example.SoldOutError):
            await example.orders.reserve("coffee")

    assert ["waiting: tea", "waiting: coffee"] == query(ORDERS)


@runs(SPRING, TABLES, "app", "propagation")
async def test_spring_propagations_refuse(example, serve, query):
    """`MANDATORY` asks for a transaction, `NEVER` for none."""
    async with serve(example.app) as client:
        statuses = [
            (await client.post(path, params=TEA)).status_code
            for path in ("/charges", "/careless-charges", "/bank")
        ]
        with pytest.raises(TransactionRequiredError):
            await example.charge("tea")
        with pytest.raises(TransactionForbiddenError):
            await example.ask_the_bank("tea")
        await example.call_the_bank("tea")

    assert [200, 500, 500] == statuses
    assert ["charged: tea"] == query(ORDERS)


@pytest.mark.parametrize(
    ("name", "left_outside", "left_inside"),
    [
        ("REQUIRED", ["block"], []),
        ("SUPPORTS", ["block"], []),
        ("MANDATORY", "TransactionRequiredError", []),
        ("REQUIRES_NEW", ["block"], ["block"]),
        ("NOT_SUPPORTED", ["block"], ["block"]),
        ("NEVER", ["block"], "TransactionForbiddenError"),
        ("NESTED", ["block"], []),
    ],
)
@runs(SPRING, TABLES, "app", "propagation")
async def test_spring_table_of_propagations(example, query, name, left_outside, left_inside):
    """What a block wrote stays, or goes with the transaction around it, as the table says."""
    db = example.db

    async def write():
        async with db.transactional(propagation=name) as session:
            await session.execute(sa.insert(example.Order).values(item="block"))

    async def write_inside(block):
        async with block:
            await write()
            raise KeyError

    async def left_by(call):
        try:
            await call
        except KeyError:
            pass
        except DBScopeError as error:
            return type(error).__name__
        left = query(ORDERS)
        async with db.session_scope() as session:
            await session.execute(sa.delete(example.Order))
        return left

    async with example.lifespan(None):
        assert left_outside == await left_by(write())
        assert left_outside == await left_by(write_inside(db.session_scope(mode="autocommit")))
        assert left_inside == await left_by(write_inside(db.session_scope(mode="transaction")))
        assert left_inside == await left_by(write_inside(db.transactional()))


@runs(SPRING, TABLES, "app", "hooks")
async def test_spring_hooks_write_in_transactions_of_their_own(example, serve, query):
    """On commit, on rollback, on completion: each runs for its outcome, and keeps what it wrote."""
    async with serve(example.app) as client:
        placed = await client.post("/noted", params=TEA)
        failed = await client.post("/noted", params={"item": "coffee"})

    assert (200, 500) == (placed.status_code, failed.status_code)
    assert ["COMMITTED", "ROLLED_BACK"] == example.seen
    assert ["tea", "committed tea", "rolled back coffee"] == query(ORDERS)


# --------------------------------------------------------------------------------------
# pyramid_tm
# --------------------------------------------------------------------------------------


@runs(PYRAMID, TABLES, "app")
async def test_pyramid_request_is_a_transaction(example, serve, query):
    """G1, G4: a savepoint undoes its part, a hook runs after the COMMIT, what is doomed is gone."""
    async with serve(example.app) as client:
        placed = await client.post("/orders", params=TEA)
        preview = await client.post("/preview", params={"item": "coffee"})
        await example.script()

    assert (200, 200) == (placed.status_code, preview.status_code)
    assert ["tea"] == example.outbox
    assert ["tea", "by a script"] == query(ORDERS)


@runs(PYRAMID, TABLES, "app", "veto")
async def test_pyramid_header_decides(example, serve, query):
    """G3: the policy that asks `X-Tm` commits a 409 that says so, and not a 200 that doesn't."""
    async with serve(example.app) as client:
        kept = await client.post("/told", params={"item": "kept", "tm": "commit"})
        lost = await client.post("/told", params={"item": "lost", "tm": "abort"})

    assert (409, 200) == (kept.status_code, lost.status_code)
    assert ["kept"] == query(ORDERS)


# --------------------------------------------------------------------------------------
# Flask-SQLAlchemy
# --------------------------------------------------------------------------------------


@runs(FLASK, TABLES, "app")
async def test_flask_views_commit_both_binds(example, serve, query):
    """G1: a `def` view without `commit()` has written to both databases when it answers."""
    async with serve(example.app) as client:
        placed = await client.post("/orders", params=TEA)
        shown = await client.get("/orders/1")
        missing = await client.get("/orders/2")

    assert (200, {"id": 1}) == (placed.status_code, placed.json())
    assert (TEA, 404) == (shown.json(), missing.status_code)
    assert 1 == example.recount()
    assert ["tea"] == query(ORDERS)
    assert ["tea"] == query("SELECT line FROM reports", "reports.db")


@runs(FLASK, TABLES, "app", "manual")
async def test_flask_views_that_commit_by_hand_go_on(example, serve, query, caplog):
    """In mode `manual` a view's own `commit()` is what counts, and a forgotten one is told."""
    async with serve(example.legacy_app) as client:
        await client.post("/orders", params={"item": "kept", "keep": True})
        await client.post("/orders", params={"item": "lost", "keep": False})

    (record,) = (each for each in caplog.records if each.levelno == logging.WARNING)
    assert "POST /orders" in record.getMessage()
    assert ["kept"] == query(ORDERS)


@runs(FLASK, TABLES, "app", "proxy")
async def test_flask_proxy_is_the_session_of_the_request(example, serve):
    """G11: an object that was built at import uses each request's session."""
    async with serve(example.app) as client:
        await client.post("/orders", params=TEA)
        assert ["tea"] == (await client.get("/orders")).json()
