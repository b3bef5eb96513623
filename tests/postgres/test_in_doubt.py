"""A COMMIT without an answer, and PostgreSQL asked what became of it."""

import asyncio
import contextlib
import logging
import os
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from asgi_dbscope import (
    CommitInDoubtError,
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    Outcome,
    Retry,
    current_scope,
)
from bench.proxy import after_commit, before_commit
from tests.fix_asgi import body, respond, start
from tests.fix_database import POSTGRES_DRIVERS, Child, Item
from tests.fix_in_doubt import MakeDatabase

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)

LOST = pytest.mark.parametrize(
    ("place", "committed"), [(before_commit, []), (after_commit, [1])], ids=["commit", "answer"]
)
"""What gets lost: COMMIT itself, or its answer; and what is committed then."""

COUNT = int(os.environ.get("DBSCOPE_TEST_LOST_COMMITS", "40"))
"""How many COMMITs get lost in one test."""


@pytest.fixture
def db(make_db: MakeDatabase) -> Database[Any]:
    """A database that asks."""
    return make_db()


async def write(session, number=1):
    """Write a row."""
    session.add(Item(id=number))
    await session.flush()


def told(caplog, level):
    """What the log says, at this level."""
    return [each.message for each in caplog.records if each.levelno == level]


class Hooks(list[Any]):
    """Which hooks have run."""

    def register(self, db):
        """One of each."""
        db.on_commit(self.append, "committed")
        db.on_rollback(self.append, "rolled back")
        db.on_completion(self.append)


AS_COMMITTED = ["committed", Outcome.COMMITTED]
AS_ROLLED_BACK = ["rolled back", Outcome.ROLLED_BACK]


@LOST
async def test_request_ends_as_its_lost_commit_did(
    db, proxy, drive, rows, place, committed, caplog
):
    """G15, G1: asked on another connection, the server says what became; so goes the response."""
    scopes, hooks = [], Hooks()

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await write(db.session)
        hooks.register(db)
        proxy.arm("cut", place)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert committed == await rows()
    [warning] = told(caplog, logging.WARNING)
    assert str(scopes[0].transaction_id) in warning
    if committed:
        assert exchange.error is None
        assert (201, b"ok") == (exchange.status, exchange.body)
        assert Outcome.COMMITTED is scopes[0].outcome
        assert AS_COMMITTED == hooks
        assert "is committed" in warning
        assert not scopes[0].was_commit_lost
    else:
        assert isinstance(exchange.error, sa.exc.DBAPIError)
        assert [] == exchange.messages
        assert Outcome.ROLLED_BACK is scopes[0].outcome
        assert AS_ROLLED_BACK == hooks
        assert "is aborted" in warning
        assert "nothing of it was kept" in exchange.error.__notes__[0]
        assert scopes[0].was_commit_lost


async def lose_many(make_db, proxy, place, count):
    """Lose as many COMMITs, ten at a time; which requests say that they are committed, or not."""
    db = make_db(pool_size=10, pool_timeout=30)
    scopes: dict[Any, Any] = {}
    places = asyncio.Semaphore(10)

    async def job(number):
        async with places:
            with contextlib.suppress(sa.exc.DBAPIError):
                async with db.session_scope() as session:
                    scopes[number] = db.scope
                    await write(session, number)

    fault = proxy.arm("cut", place, times=None)
    await asyncio.gather(*(job(number) for number in range(count)))
    assert count == len(fault.struck)
    return {number: scope.outcome for number, scope in sorted(scopes.items())}


@pytest.mark.parametrize(
    ("place", "outcome"),
    [(before_commit, Outcome.ROLLED_BACK), (after_commit, Outcome.COMMITTED)],
    ids=["commit", "answer"],
)
@pytest.mark.once
async def test_every_lost_commit_is_resolved_rightly(make_db, proxy, rows, place, outcome):
    """G15: of many COMMITs that get lost, or whose answers do, each is resolved, none wrongly."""
    outcomes = await lose_many(make_db, proxy, place, COUNT)

    assert dict.fromkeys(range(COUNT), outcome) == outcomes
    assert ([] if outcome is Outcome.ROLLED_BACK else list(range(COUNT))) == await rows()


# --------------------------------------------------------------------------------------
# Wherever COMMIT comes from
# --------------------------------------------------------------------------------------


async def by_session_commit(db, number):
    """Your own commit, in the middle of a scope."""
    async with db.session_scope() as session:
        await write(session, number)
        await session.commit()


async def by_session_begin(db, number):
    """The end of your own transaction."""
    async with db.session_scope(mode="manual") as session, session.begin():
        await write(session, number)


async def by_release(db, number):
    """The connection given back early."""
    async with db.session_scope() as session:
        await write(session, number)
        await db.release()


async def by_job(db, number):
    """The end of a scope."""
    async with db.session_scope() as session:
        await write(session, number)


async def by_block(db, number):
    """The end of a transactional block with a transaction of its own."""
    async with db.session_scope(mode="autocommit"), db.transactional() as session:
        await write(session, number)


async def by_new_transaction(db, number):
    """The end of a block with a session of its own."""
    async with db.session_scope(), db.transactional("REQUIRES_NEW") as session:
        await write(session, number)


async def by_branch(db, number):
    """The end of a branch."""
    async with db.session_scope(), db.branch() as session:
        await write(session, number)


async def by_connection(db, number):
    """A statement past the session, of which only its connection knows."""
    async with db.session_scope() as session:
        connection = await session.connection()
        await connection.execute(sa.insert(Item).values(id=number))


WAYS = pytest.mark.parametrize(
    "commit",
    [
        by_session_commit,
        by_session_begin,
        by_release,
        by_job,
        by_block,
        by_new_transaction,
        by_branch,
        by_connection,
    ],
)


@WAYS
async def test_whoever_commits_hears_what_became_of_it(db, proxy, rows, commit):
    """G15: an answer that was lost is found out, and who committed goes on as if it had come."""
    proxy.arm("cut", after_commit)

    await commit(db, 1)

    assert [1] == await rows()


@WAYS
async def test_whoever_commits_hears_that_it_was_lost(db, proxy, rows, commit):
    """G15: a COMMIT that was lost is the database's own error, and nothing is there."""
    proxy.arm("cut", before_commit)

    with pytest.raises(sa.exc.DBAPIError) as raised:
        await commit(db, 1)

    assert raised.value.connection_invalidated
    assert "nothing of it was kept" in raised.value.__notes__[0]
    assert [] == await rows()


@WAYS
async def test_whoever_commits_hears_that_nobody_knows(make_db, proxy, rows, commit):
    """G15: without the option each way to commit ends in the same error, and so does the log."""
    db = make_db(resolve_in_doubt=False)
    proxy.arm("cut", after_commit)

    with pytest.raises(CommitInDoubtError) as raised:
        await commit(db, 1)

    assert isinstance(raised.value.__cause__, sa.exc.DBAPIError)
    assert raised.value.transaction_id is None
    assert [1] == await rows()


@pytest.mark.parametrize("way", ["commit", "begin"])
async def test_session_goes_on_after_a_commit_that_was_found_out(db, proxy, rows, way):
    """G15: what was written stays in the session, unexpired; hooks have run; it goes on."""
    hooks = Hooks()
    async with db.session_scope(mode="manual") as session:
        if way == "commit":
            hooks.register(db)
            old = Item(id=1, note="old")
            session.add(old)
            await session.commit()
            proxy.arm("cut", after_commit)
            hooks.clear()
            hooks.register(db)
            new = Item(id=2, note="new")
            session.add(new)
            old.note = "changed"
            await session.commit()
        else:
            proxy.arm("cut", after_commit)
            async with session.begin():
                hooks.register(db)
                old = Item(id=1, note="changed")
                new = Item(id=2, note="new")
                session.add_all([old, new])
        assert AS_COMMITTED == hooks
        assert ["changed", "new"] == [old.note, new.note]
        assert sa.inspect(new).persistent
        assert Outcome.COMMITTED is db.scope.outcome
        assert ["changed", "new"] == list(
            await session.scalars(sa.select(Item.note).order_by(Item.id))
        )
        await write(session, 3)
        await session.commit()

    assert [1, 2, 3] == await rows()


async def test_commit_asked_of_the_connection_is_the_drivers_error(db, proxy, rows, caplog):
    """G15: past the session nobody can find out: the outcome is in doubt, and the log says so."""
    hooks = Hooks()
    async with db.session_scope() as session:
        await write(session)
        hooks.register(db)
        connection = await session.connection()
        proxy.arm("cut", after_commit)
        with pytest.raises(sa.exc.DBAPIError):
            await connection.commit()
        assert Outcome.IN_DOUBT is db.scope.outcome
        await session.rollback()
        assert Outcome.IN_DOUBT is db.scope.outcome

    assert [Outcome.IN_DOUBT] == hooks
    [error] = told(caplog, logging.ERROR)
    assert "may or may not have been committed" in error
    assert [1] == await rows()


class Discreet(Session):
    """Keeps what goes wrong in COMMIT to itself."""

    def commit(self) -> None:
        with contextlib.suppress(sa.exc.DBAPIError):
            super().commit()


async def test_loss_that_was_kept_secret_is_in_doubt(proxy, rows):
    """G15: where a session class swallows the error, the rollback after it claims nothing."""
    engine = create_async_engine(proxy.url)
    factory = async_sessionmaker(engine, sync_session_class=Discreet)
    db = Database(factory, resolve_in_doubt=True)
    async with db.session_scope() as session:
        await write(session)
        proxy.arm("cut", after_commit)
        await session.commit()
        await session.rollback()
        assert Outcome.IN_DOUBT is db.scope.outcome
    await engine.dispose()

    assert [1] == await rows()


@LOST
async def test_body_ends_as_its_lost_commit_did(db, proxy, drive, rows, place, committed):
    """G15, G7: a body's last message goes out if its COMMIT was done, else the body ends torn."""

    async def app(scope, receive, send):
        await send(start(200))
        await write(db.session)
        proxy.arm("cut", place)
        await send(body(b"chunk", more=True))
        await send(body(b"end"))

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert committed == await rows()
    assert bool(committed) == exchange.is_complete
    assert committed or isinstance(exchange.error, sa.exc.DBAPIError)


@LOST
async def test_background_work_ends_as_its_lost_commit_did(
    db, proxy, drive, rows, place, committed, caplog
):
    """G15, G8: work after the response is committed or not, and the log tells which."""
    hooks = Hooks()

    async def app(scope, receive, send):
        await respond(send)
        await write(db.session)
        hooks.register(db)
        proxy.arm("cut", place)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert exchange.error is None
    assert committed == await rows()
    assert (AS_COMMITTED if committed else AS_ROLLED_BACK) == hooks
    assert bool(committed) == ([] == told(caplog, logging.ERROR))


async def test_databases_after_the_one_in_doubt_are_rolled_back(
    make_db, engine, proxy, drive, rows
):
    """G15: of several databases, what comes after one that is in doubt isn't committed."""
    first = make_db(resolve_in_doubt=False)
    second = Database(engine, name="second")
    outcomes: dict[Any, Any] = {}

    async def app(scope, receive, send):
        for db in (first, second):
            db.on_completion(lambda outcome, name=db.name: outcomes.update({name: outcome}))
        await write(first.session, 1)
        await write(second.session, 2)
        proxy.arm("cut", after_commit)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages
    assert {"default": Outcome.IN_DOUBT, "second": Outcome.ROLLED_BACK} == outcomes
    assert [1] == await rows()


async def test_databases_after_one_that_was_found_out_are_committed(
    make_db, engine, proxy, drive, rows
):
    """G15: where the first turns out to be committed, the second is committed as well."""
    first, second = make_db(), Database(engine, name="second")

    async def app(scope, receive, send):
        await write(first.session, 1)
        await write(second.session, 2)
        proxy.arm("cut", after_commit)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# The transaction's number
# --------------------------------------------------------------------------------------


@pytest.fixture
def asked(db: Database[Any]) -> list[str]:
    """The statements that ask for a transaction's number."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        if "pg_current_xact_id" in statement:
            found.append(statement)

    bind = db.session_factory.kw["bind"].sync_engine
    sa.event.listen(bind, "before_cursor_execute", note)
    return found


async def test_reader_is_not_asked_for_its_number(db, asked):
    """G15: a transaction that only reads, or writes nothing durable, costs no round trip more."""
    async with db.session_scope() as session:
        await session.scalar(sa.select(Item.id))
    async with db.session_scope(mode="autocommit") as session:
        await session.execute(sa.insert(Item).values(id=1))
    async with db.session_scope() as session:
        await write(session, 2)
        await session.rollback()

    assert [] == asked


async def test_writer_is_asked_once(db, asked):
    """G15: a transaction that has written is asked for its number once, before its COMMIT."""
    async with db.session_scope() as session:
        await write(session)
        await session.connection()
        assert [] == asked
        await session.commit()
        assert 1 == len(asked)
        assert isinstance(db.scope.transaction_id, int)
        await session.scalar(sa.select(Item.id))
        await session.connection()  # its user may write with it
        await session.commit()
        assert 2 == len(asked)
        assert db.scope.transaction_id is None


@LOST
async def test_transaction_without_a_number_stays_in_doubt(db, proxy, place, committed, rows):
    """G15: what wrote no row has no number to ask for: a notification, a read."""
    for statement in ("NOTIFY somebody", "SELECT 1"):
        proxy.arm("cut", place)
        with pytest.raises(CommitInDoubtError) as raised:
            async with db.session_scope() as session:
                await session.execute(sa.text(statement))
        assert raised.value.transaction_id is None


async def test_number_of_an_earlier_transaction_says_nothing(db, proxy):
    """G15: a COMMIT without a number isn't taken for the scope's earlier one, which was done."""
    with pytest.raises(CommitInDoubtError) as raised:
        async with db.session_scope() as session:
            await write(session)
            await session.commit()
            await session.execute(sa.select(1))
            proxy.arm("cut", before_commit)

    assert raised.value.transaction_id is None


async def test_several_commits_of_one_session_stay_in_doubt(engine, proxy, rows):
    """G15: a session with two engines has two COMMITs, and one number can't answer for both."""
    proxied = create_async_engine(proxy.url)
    factory = async_sessionmaker(proxied, binds={Child: engine})
    db = Database(factory, resolve_in_doubt=True)
    proxy.arm("cut", before_commit)
    with pytest.raises(CommitInDoubtError) as raised:
        async with db.session_scope() as session:
            await write(session)
            await session.scalar(sa.select(Child.id))
    await proxied.dispose()

    assert raised.value.transaction_id is None


def test_option_is_checked_when_the_database_is_made(engine):
    """G15: what isn't a switch is refused, and so is a session factory of no single engine."""
    wrong: Any = "yes"
    with pytest.raises(ConfigurationError, match="must be True or False"):
        Database(engine, resolve_in_doubt=wrong)
    with pytest.raises(ConfigurationError, match="bound to an engine"):
        Database(async_sessionmaker(binds={Item: engine}), resolve_in_doubt=True)


# --------------------------------------------------------------------------------------
# Done again
# --------------------------------------------------------------------------------------


@LOST
async def test_lost_commit_is_done_again_where_retry_is_on(
    db, proxy, drive, rows, place, committed
):
    """G15, G16: what was lost for sure is replayed, what was committed is not: one row."""
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope())
        await write(db.session)
        if len(attempts) == 1:
            proxy.arm("cut", place)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(base=0.0)))

    assert (201, b"ok") == (exchange.status, exchange.body)
    assert (1 if committed else 2) == len(attempts)
    assert [1] == await rows()


async def test_commit_in_doubt_is_never_done_again(make_db, proxy, drive, rows):
    """G15, G16: what may be committed is not replayed, whatever was asked for."""
    db = make_db(resolve_in_doubt=False)
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope())
        await write(db.session)
        proxy.arm("cut", before_commit)
        await respond(send, 201)

    exchange = await drive(DBSessionMiddleware(app, database=db, retry=Retry(base=0.0)))

    assert isinstance(exchange.error, CommitInDoubtError)
    assert [] == exchange.messages
    assert 1 == len(attempts)
    assert [] == await rows()
