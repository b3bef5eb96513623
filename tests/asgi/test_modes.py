"""The modes: one transaction per request, none at all, or the user's own."""

import asyncio
import contextlib
import logging

import pytest
import sqlalchemy as sa

from asgi_dbscope import ConfigurationError, Database, DBSessionMiddleware, Outcome, session_options
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Child, Item

HEAD = ["start 200", "last body"]


def insert(number):
    """An INSERT of one item."""
    return sa.insert(Item).values(id=number)


async def answer(send, status=200):
    """Send a whole response."""
    await send(start(status))
    await send(body(b"ok"))


# --------------------------------------------------------------------------------------
# autocommit
# --------------------------------------------------------------------------------------


async def test_autocommit_makes_each_statement_durable_at_once(db, drive, rows):
    """G3: In mode autocommit a statement is there for everybody before the next one runs."""
    seen = []

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        seen.append(await rows())
        await db.session.execute(insert(2))
        seen.append(await rows())
        await answer(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert [[1], [1, 2]] == seen
    assert [1, 2] == await rows()


async def test_autocommit_keeps_what_came_before_an_exception(db, drive, rows):
    """G3: In mode autocommit an exception takes nothing back, and flushes nothing."""

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        db.session.add(Item(id=2))
        raise LookupError

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert isinstance(exchange.error, LookupError)
    assert [1] == await rows()


async def test_autocommit_flushes_at_the_head(db, drive, rows, timeline):
    """G1: In mode autocommit pending objects are written before the head goes out."""
    seen = []

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await answer(send)

    async def on_send(message):
        seen.append(await rows())

    exchange = await drive(
        DBSessionMiddleware(app, database=db, mode="autocommit"), on_send=on_send
    )

    assert exchange.error is None
    assert [[1], [1]] == seen
    assert timeline.index("checkin") < timeline.index("start 200")


async def test_autocommit_flushes_nothing_for_an_error(db, drive, rows):
    """G3: In mode autocommit a response of 500 drops the objects that were not flushed yet."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await answer(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert [] == await rows()


async def test_autocommit_flush_that_fails_is_never_a_success(db, drive, rows):
    """G2: In mode autocommit a flush at the head that fails keeps the head from going out."""

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        db.session.add(Item(id=1))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert [1] == await rows()


async def test_autocommit_survives_a_statement_that_fails(db, drive, rows):
    """G21: In mode autocommit a swallowed error aborts nothing, so later statements count."""

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        with pytest.raises(sa.exc.IntegrityError):
            await db.session.execute(insert(1))
        await db.session.execute(insert(2))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert 200 == exchange.status
    assert [1, 2] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_autocommit_survives_a_statement_that_is_cancelled(db, drive):
    """G21: where the connection outlives that, nothing was aborted, so the response goes out."""

    async def app(scope, receive, send):
        await db.session.scalar(sa.select(sa.literal(1)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await db.session.scalar(sa.select(sa.literal(2)))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert (200, None) == (exchange.status, exchange.error)


async def test_autocommit_gives_a_real_transaction_inside(db, drive, rows):
    """G1: `async with session.begin()` in mode autocommit is a transaction: all or nothing."""
    seen = []

    async def app(scope, receive, send):
        session = db.session
        await session.execute(insert(1))
        async with session.begin():
            await session.execute(insert(2))
            seen.append(await rows())
            session.add(Item(id=3))
        seen.append(await rows())
        with pytest.raises(LookupError):
            async with session.begin():
                await session.execute(insert(4))
                raise LookupError
        await session.execute(insert(5))
        seen.append(await rows())
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert [[1], [1, 2, 3], [1, 2, 3, 5]] == seen


async def test_commit_that_fails_inside_autocommit_is_the_users(db, drive, rows):
    """G2: A real transaction in mode autocommit whose COMMIT fails raises where its block ends."""

    async def app(scope, receive, send):
        with pytest.raises(sa.exc.IntegrityError):
            async with db.session.begin():
                await db.session.execute(insert(1))
                await db.session.execute(sa.insert(Child).values(id=1, item_id=404))
        assert Outcome.ROLLED_BACK is db.scope.outcome
        await db.session.execute(insert(2))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert [2] == await rows()


async def test_transaction_left_open_in_autocommit_is_ended_at_the_head(db, drive, rows, timeline):
    """G1: A real transaction begun by hand and left open is committed before the head goes out."""

    async def app(scope, receive, send):
        await db.session.begin()
        await db.session.execute(insert(1))
        assert [] == await rows()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert ["commit", "checkin", *HEAD] == timeline[-4:]
    assert [1] == await rows()


async def test_savepoint_inside_a_transaction_of_autocommit(db, drive, rows):
    """G3: `begin_nested()` works inside a real transaction of mode autocommit."""

    async def app(scope, receive, send):
        session = db.session
        async with session.begin():
            await session.execute(insert(1))
            with pytest.raises(LookupError):
                async with session.begin_nested():
                    await session.execute(insert(2))
                    raise LookupError
            async with session.begin_nested(), session.begin_nested():
                await session.execute(insert(3))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert exchange.error is None
    assert [1, 3] == await rows()


@pytest.mark.parametrize("used_before", [False, True])
async def test_savepoint_outside_a_transaction_of_autocommit_is_refused(
    db, drive, rows, used_before
):
    """G3: `begin_nested()` with nothing to nest in is refused in mode autocommit, and told."""

    async def app(scope, receive, send):
        if used_before:
            await db.session.execute(insert(1))
        async with db.session.begin_nested():
            await db.session.execute(insert(2))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="autocommit"))

    assert isinstance(exchange.error, ConfigurationError)
    assert "async with session.begin()" in str(exchange.error)
    assert ([1] if used_before else []) == await rows()


async def test_autocommit_does_not_stay_on_the_connection(make_engine, engine, db, drive, rows):
    """G20: The connection's next user has transactions again after a request of mode autocommit."""

    @session_options(mode="autocommit")
    async def quick(scope, receive, send):
        await db.session.execute(insert(1))
        await answer(send)

    async def careful(scope, receive, send):
        await db.session.execute(insert(2))
        await answer(send, 500)

    await drive(DBSessionMiddleware(quick, database=db))
    assert 1 == engine.pool.checkedin()
    await drive(DBSessionMiddleware(careful, database=db))

    assert 1 == engine.pool.checkedin()
    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# manual
# --------------------------------------------------------------------------------------


@pytest.fixture
def warned(caplog):
    """The package's warnings so far."""
    caplog.set_level(logging.WARNING, "asgi_dbscope")
    return lambda: [each.getMessage() for each in caplog.records if each.name == "asgi_dbscope"]


async def test_manual_keeps_what_the_user_committed(db, drive, rows, timeline, warned):
    """G3: In mode manual the user's own COMMIT stands, and nothing is committed besides."""

    async def app(scope, receive, send):
        db.session.add(Item(id=1))
        await db.session.commit()
        await answer(send, 500)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="manual"))

    assert exchange.error is None
    assert ["checkout", "begin", "commit", "checkin", "start 500", "last body"] == timeline
    assert [1] == await rows()
    assert [] == warned()


@pytest.mark.parametrize("write", ["execute", "add", "delete", "text", "change"])
async def test_manual_rolls_back_what_is_open_and_says_so(db, drive, rows, warned, write):
    """G3: In mode manual an open write is rolled back before the head, with a warning."""

    async def app(scope, receive, send):
        session = db.session
        session.add(Item(id=1))
        await session.commit()
        match write:
            case "execute":
                await session.execute(insert(2))
            case "text":
                await session.execute(sa.text("INSERT INTO item (id) VALUES (2)"))
            case "add":
                session.add(Item(id=2))
            case "delete":
                await session.delete(await session.get_one(Item, 1))
            case _:
                (await session.get_one(Item, 1)).note = "changed"
        await answer(send)

    exchange = await drive(
        DBSessionMiddleware(app, database=db, mode="manual"), http_scope("/orders", "POST")
    )

    assert exchange.error is None
    assert [1] == await rows()
    (message,) = warned()
    assert message.startswith("POST /orders: mode is 'manual' and nobody committed")


@pytest.mark.parametrize("wrote_before", [False, True])
async def test_manual_says_nothing_of_reads(db, drive, rows, warned, wrote_before):
    """G3: In mode manual a read that is left open is rolled back without a warning."""

    async def app(scope, receive, send):
        session = db.session
        if wrote_before:
            session.add(Item(id=1))
            await session.commit()
        await session.scalars(sa.select(Item.id))
        await session.get(Item, 1)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="manual"))

    assert exchange.error is None
    assert [] == warned()


async def test_manual_says_nothing_of_what_the_user_rolled_back(db, drive, rows, warned):
    """G3: In mode manual the user's own rollback leaves nothing to warn about."""

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        await db.session.rollback()
        await db.session.scalars(sa.select(Item.id))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="manual"))

    assert exchange.error is None
    assert [] == await rows()
    assert [] == warned()


async def test_manual_block_of_the_users_commits(db, drive, rows, warned):
    """G3: In mode manual `async with session.begin()` commits at its own end."""

    async def app(scope, receive, send):
        async with db.session.begin():
            db.session.add(Item(id=1))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="manual"))

    assert exchange.error is None
    assert [1] == await rows()
    assert [] == warned()


async def test_manual_release_commits(db, drive, rows, warned):
    """G6: In mode manual `release()` commits, for the user's code asked for it."""

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        await db.release()
        assert [1] == await rows()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="manual"))

    assert exchange.error is None
    assert [] == warned()


async def test_manual_body_is_the_users_too(db, drive, rows, warned):
    """G7: In mode manual a streaming body commits by itself, else it is rolled back and told."""

    async def app(scope, receive, send):
        await send(start())
        await db.session.execute(insert(1))
        await db.session.commit()
        await send(body(b"1", more=True))
        await db.session.execute(insert(2))
        await send(body())

    exchange = await drive(DBSessionMiddleware(app, database=db, mode="manual"))

    assert exchange.error is None
    assert exchange.is_complete
    assert [1] == await rows()
    assert 1 == len(warned())


async def test_manual_scope_outside_of_a_request(db, rows, warned):
    """G3: A block of mode manual keeps what its code committed and warns of the rest."""
    async with db.session_scope(mode="manual") as session:
        session.add(Item(id=1))
        await session.commit()
        session.add(Item(id=2))

    assert [1] == await rows()
    assert ["session_scope(): mode is 'manual'"] == [each.split(" and ")[0] for each in warned()]


# --------------------------------------------------------------------------------------
# Which mode holds
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (("transaction", None, None), []),
        (("autocommit", None, None), [1]),
        (("transaction", "autocommit", None), [1]),
        (("autocommit", "transaction", None), []),
        (("transaction", "manual", "autocommit"), [1]),
        (("autocommit", "autocommit", "transaction"), []),
    ],
)
async def test_the_mode_nearest_to_the_endpoint_holds(engine, drive, rows, modes, expected):
    """G20: The endpoint's mode goes before the middleware's, and that before the database's."""
    of_database, of_middleware, of_endpoint = modes
    db = Database(engine, mode=of_database)

    async def app(scope, receive, send):
        await db.session.execute(insert(1))
        await answer(send, 500)

    if of_endpoint is not None:
        app = session_options(mode=of_endpoint)(app)
    exchange = await drive(DBSessionMiddleware(app, database=db, mode=of_middleware))

    assert exchange.error is None
    assert expected == await rows()
