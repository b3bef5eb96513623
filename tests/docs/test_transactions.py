"""Transactions in code: each block and each call does what the page says."""

import pytest
from sqlalchemy.exc import InvalidRequestError

from asgi_dbscope import (
    ConfigurationError,
    DBSessionMiddleware,
    RollbackOnlyError,
    TransactionMismatchError,
    TransactionTimeoutError,
)
from tests.docs.blocks import runs
from tests.fix_asgi import body, start
from tests.fix_database import Child, Item

ORDERS = "SELECT item FROM orders ORDER BY id"
TEA = {"item": "tea"}
APP = ("tutorial.md/tables", "app")
COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]


# --------------------------------------------------------------------------------------
# The examples: transactional blocks
# --------------------------------------------------------------------------------------


@runs("transactions.md", *APP, "block")
async def test_blocks_are_committed_together(example, serve, query):
    """Called from a script, the outer block commits what all of its blocks did."""
    async with serve(example.app):
        await example.place_both("tea", "milk")

        assert ["tea", "milk"] == query(ORDERS)


@runs("transactions.md", *APP, "block")
async def test_blocks_are_undone_together(example, serve, query):
    """An outer block that raises undoes the inner blocks that had ended well."""
    async with serve(example.app):
        with pytest.raises(ZeroDivisionError):
            async with example.db.transactional():
                await example.place_both("tea", "milk")
                raise ZeroDivisionError

        assert [] == query(ORDERS)


@runs("transactions.md", *APP, "block", "nested")
async def test_nested_block_is_rolled_back_alone(example, serve, query):
    """G4: a NESTED block that fails is undone, and what is around it commits."""
    async with serve(example.app) as client:
        response = await client.post("/orders/with-nested-extra", params=TEA)

    assert 200 == response.status_code
    assert ["tea"] == query(ORDERS)


@runs("transactions.md", *APP, "joined-failure")
async def test_swallowed_failure_of_a_joined_block_is_no_success(example, serve, query):
    """G4: an endpoint that swallows the error of a joined block answers with an error."""
    async with serve(example.app) as client:
        response = await client.post("/orders/careless", params=TEA)

    assert 500 == response.status_code
    assert [] == query(ORDERS)


@runs("transactions.md", *APP, "joined-failure")
async def test_swallowed_failure_of_a_joined_block_is_raised_at_the_end(example, serve, query):
    """G4: in a script the outer block raises `RollbackOnlyError`, caused by the inner error."""
    async with serve(example.app):
        with pytest.raises(RollbackOnlyError) as raised:
            async with example.db.transactional():
                await example.careless("tea")

        assert "sold out" == str(raised.value.__cause__)
        assert [] == query(ORDERS)


@runs("transactions.md", *APP, "rules")
async def test_rules_decide_which_exceptions_roll_back(example, serve, query):
    """What `no_rollback_for` names is committed, but for what `rollback_for` takes back."""
    async with serve(example.app):
        with pytest.raises(example.Refused):
            await example.charge("old")
        with pytest.raises(example.Stolen):
            await example.charge("stolen")

        assert ["tried: old"] == query(ORDERS)


@runs("transactions.md", *APP, "block", "demands")
async def test_block_with_demands_has_them(example, serve):
    """G20: a block that asks for `read_only` can't write, and one that may write can't join it."""
    async with serve(example.app):
        await example.place("tea")

        assert 1 == await example.count_orders()
        with pytest.raises(TransactionMismatchError, match=r"read_only=True .*read_only=False"):
            async with example.db.session_scope() as session:
                await session.get(example.Order, 1)
                async with example.db.transactional(read_only=True):
                    raise AssertionError


@runs("transactions.md", *APP, "timeout")
async def test_block_that_takes_too_long_is_rolled_back(example, serve, query):
    """A block is cancelled after its timeout, and raises an error that is a `TimeoutError` too."""
    async with serve(example.app):
        with pytest.raises(TransactionTimeoutError, match=r"slow\(\) took longer") as raised:
            await example.slow()

        assert isinstance(raised.value, TimeoutError)
        assert [] == query(ORDERS)


@runs("transactions.md", *APP, "block", "dry-run")
async def test_dry_run_rolls_back_its_block_only(example, serve, query):
    """G4: `set_rollback_only()` in a NESTED block undoes that block quietly."""
    async with serve(example.app) as client:
        response = await client.post("/orders/preview", params=TEA)

    assert {"would_be": 1} == response.json()
    assert [] == query(ORDERS)


@runs("transactions.md", *APP)
async def test_release_inside_a_block_is_refused(example, serve):
    """`release()` doesn't commit half of a block that has a transaction of its own."""
    async with (
        serve(example.app),
        example.db.session_scope(mode="autocommit"),
        example.db.transactional(label="billing"),
    ):
        with pytest.raises(ConfigurationError, match=r"release\(\) would commit billing"):
            await example.db.release()


@runs("transactions.md", *APP)
async def test_manual_changes_are_not_committed_by_a_block(example, serve, query):
    """In mode manual a block refuses to begin over changes that nobody has committed."""
    async with serve(example.app), example.db.session_scope(mode="manual") as session:
        session.add(example.Order(item="tea"))
        with pytest.raises(ConfigurationError, match="open changes"):
            async with example.db.transactional():
                raise AssertionError
        session.expunge_all()

    assert [] == query(ORDERS)


# --------------------------------------------------------------------------------------
# The examples: SQLAlchemy's own calls
# --------------------------------------------------------------------------------------


@runs("transactions.md", *APP, "begin")
async def test_block_commits_for_itself(example, serve, query):
    """G3: a closed block stays committed where the response is an error, the rest doesn't."""
    async with serve(example.app) as client:
        response = await client.post("/orders/two-steps", params=TEA)

    assert 500 == response.status_code
    assert ["tea"] == query(ORDERS)


@runs("transactions.md", *APP, "savepoint")
async def test_savepoint_undoes_its_part(example, serve, query):
    """A savepoint's block that raises is undone, the rest is committed with the response."""
    async with serve(example.app) as client:
        response = await client.post("/orders/with-extra", params=TEA)

    assert 200 == response.status_code
    assert ["tea"] == query(ORDERS)


@runs("transactions.md", *APP, "commit")
async def test_commit_and_rollback_in_mid_request(example, serve, query):
    """G3: what was committed in mid-request stays, what was rolled back is gone."""
    async with serve(example.app) as client:
        failed = await client.post("/orders/commit-first", params={"item": "first"})
        placed = await client.post("/orders/roll-back-first", params={"item": "second"})

    assert (502, 200) == (failed.status_code, placed.status_code)
    assert ["first", "second"] == query(ORDERS)


@runs("transactions.md", *APP, "release")
async def test_release_gives_the_connection_back_in_mid_request(example, serve, query, monkeypatch):
    """G6: after `release()` no connection is held, and the session goes on."""
    held = []

    async def ask_shipper(item):
        held.append((example.engine.pool.checkedout(), query(ORDERS)))
        return "parcel 7"

    monkeypatch.setattr(example, "ask_shipper", ask_shipper)
    async with serve(example.app) as client:
        response = await client.post("/orders/shipped", params=TEA)

    assert {"item": "tea, parcel 7"} == response.json()
    assert [(0, ["tea"])] == held
    assert ["tea, parcel 7"] == query(ORDERS)


@runs("transactions.md", *APP, "across")
async def test_dependency_around_begin_is_ended_by_the_scope(example, serve, query):
    """G1: a `yield` dependency around `session.begin()` neither delays nor repeats the commit."""
    async with serve(example.app) as client:
        response = await client.post("/orders/across", params=TEA)

    assert 200 == response.status_code
    assert ["tea"] == query(ORDERS)


@runs("transactions.md", *APP, "audit")
async def test_scope_of_its_own_survives_the_requests_rollback(example, serve, query):
    """G11: `db.session_scope()` inside a request is committed whatever becomes of the request."""
    async with serve(example.app) as client:
        response = await client.post("/orders/audited", params=TEA)

    assert 409 == response.status_code
    assert ["tried: tea"] == query(ORDERS)


@runs("transactions.md", *APP, "closed")
async def test_session_closed_by_hand_with_changes_is_no_success(example, serve, query):
    """G1: changes that closing the session threw away are never answered with a success."""
    async with serve(example.app) as client:
        response = await client.post("/orders/closed", params=TEA)

    assert 500 == response.status_code
    assert [] == query(ORDERS)


# --------------------------------------------------------------------------------------
# The table, message by message
# --------------------------------------------------------------------------------------


async def test_block_after_a_read_is_refused_by_sqlalchemy(db, drive, timeline):
    """`session.begin()` after the session was used raises, and nothing is committed."""

    async def app(scope, receive, send):
        await db.session.get(Item, 1)
        async with db.session.begin():
            raise AssertionError

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, InvalidRequestError)
    assert ROLLED_BACK == timeline


async def test_block_after_release_begins_anew(db, drive, rows):
    """`session.begin()` is fine after `release()`."""

    async def app(scope, receive, send):
        await db.session.get(Item, 1)
        await db.release()
        async with db.session.begin():
            db.session.add(Item(id=1))
        await send(start())
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [1] == await rows()


@pytest.mark.parametrize("status", [200, 500])
async def test_block_open_across_the_head_is_ended_before_it(db, drive, rows, timeline, status):
    """G1, G3: a block open across the head is settled as the scope's own, and only once."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
            await db.session.flush()
            await send(start(status))
            await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    ended = COMMITTED if status == 200 else ROLLED_BACK
    assert [*ended, f"start {status}", "last body"] == timeline
    assert ([1] if status == 200 else []) == await rows()
    assert exchange.error is None


async def test_block_open_across_the_head_that_fails_to_commit(db, drive, rows):
    """G2: where the open block's COMMIT fails no head goes out."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Child(id=1, item_id=404))
            await db.session.flush()
            await send(start())
            await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert "IntegrityError" == type(exchange.error).__name__
    assert [] == exchange.messages


async def test_statement_in_a_block_that_the_scope_has_ended_raises(db, drive, rows, timeline):
    """G1: in a block that was ended with the head nothing more can be written."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
            await send(start())
            db.session.add(Item(id=2))
            await db.session.flush()

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, InvalidRequestError)
    assert [*COMMITTED, "start 200"] == timeline
    assert [1] == await rows()


async def test_savepoint_open_across_the_head_is_committed_with_the_rest(db, drive, rows, timeline):
    """G1: a `begin_nested()` still open at the head is part of what is committed there."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        async with db.session.begin_nested():
            db.session.add(Item(id=2))
            await send(start())
            await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert ["checkout", "begin", "savepoint", "commit", "checkin"] == timeline[:5]
    assert ["start 200", "last body"] == timeline[5:]
    assert [1, 2] == await rows()
    assert exchange.error is None


async def test_session_closed_after_reading_is_harmless(db, drive, timeline):
    """G18: a session that was only read from may be closed by hand."""

    async def app(scope, receive, send):
        async with db.session as session:
            await session.get(Item, 1)
        await send(start())
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert [*ROLLED_BACK, "start 200", "last body"] == timeline


@pytest.mark.parametrize("way", ["commit", "begin"])
async def test_commit_in_a_rollback_only_scope_is_refused(db, drive, rows, way):
    """G4: the user's own commit in a rollback-only scope raises, and commits nothing."""

    async def app(scope, receive, send):
        db.set_rollback_only()
        if way == "begin":
            async with db.session.begin():
                db.session.add(Item(id=1))
        else:
            db.session.add(Item(id=1))
            await db.session.commit()

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, RollbackOnlyError)
    assert [] == await rows()
