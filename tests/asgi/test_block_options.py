"""The options of transactional blocks: isolation, read-only, timeout, rollback rules, label."""

import asyncio
import time
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBScopeError,
    DBSessionMiddleware,
    RollbackOnlyError,
    TransactionForbiddenError,
    TransactionMismatchError,
    TransactionRequiredError,
    TransactionTimeoutError,
    session_options,
)
from tests.fix_asgi import respond
from tests.fix_database import POSTGRES_DRIVERS, Item

ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)
ON_ASYNCPG = pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


class ServiceError(Exception):
    """What a service raises."""


class MildError(ServiceError):
    """What is no reason to give up."""


class GraveError(MildError):
    """A mild error that is one all the same."""


async def write(session, row):
    """Write a row, in the database."""
    session.add(Item(id=row))
    await session.flush()


async def setting(session, name):
    """A setting of PostgreSQL, as this transaction has it."""
    statement = sa.text("SELECT setting FROM pg_settings WHERE name = :name")
    return await session.scalar(statement, {"name": name})


def isolation_level(session):
    """The isolation level that the database has in this transaction."""
    if session.bind.dialect.name == "postgresql":
        return setting(session, "transaction_isolation")
    return session.scalar(sa.text("PRAGMA read_uncommitted"))


LEVELS = {"sqlite": ("READ UNCOMMITTED", 1), "postgresql": ("SERIALIZABLE", "serializable")}
DEFAULTS = {"sqlite": 0, "postgresql": "read committed"}


# --------------------------------------------------------------------------------------
# isolation_level
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["REQUIRED", "REQUIRES_NEW", "NESTED"])
@pytest.mark.parametrize("mode", ["autocommit", None])
async def test_isolation_level_holds_in_the_block_and_not_after(db, engine, mode, propagation):
    """G20: The database has the level inside the block; the next transaction has its own."""
    wanted, seen = LEVELS[engine.dialect.name]
    block = db.transactional(propagation, isolation_level=wanted)

    if mode is None:
        async with block as session:
            assert seen == await isolation_level(session)
    else:
        async with db.session_scope(mode=mode):
            async with block as session:
                assert seen == await isolation_level(session)
            async with db.transactional():
                assert DEFAULTS[engine.dialect.name] == await isolation_level(db.session)
    async with db.session_scope() as session:
        assert DEFAULTS[engine.dialect.name] == await isolation_level(session)


async def test_isolation_level_of_the_first_joined_block_begins_the_request_that_way(
    db, engine, drive
):
    """G20: A block that joins before the first statement gives the transaction its level."""
    wanted, seen = LEVELS[engine.dialect.name]
    levels = []

    async def app(scope, receive, send):
        async with db.transactional(isolation_level=wanted):
            levels.append(await isolation_level(db.session))
        levels.append(await isolation_level(db.session))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert None is exchange.error
    assert [seen, seen] == levels


async def test_isolation_level_that_the_transaction_has_joins(db, engine):
    """A block that demands what the transaction has joins it, however it is spelled."""
    wanted, _ = LEVELS[engine.dialect.name]

    async with db.session_scope(isolation_level=wanted) as session:
        await write(session, 1)
        async with db.transactional(isolation_level=wanted.lower().replace(" ", "_")) as joined:
            assert joined is session


@pytest.mark.parametrize("propagation", ["REQUIRED", "NESTED", "SUPPORTS", "MANDATORY"])
async def test_isolation_level_that_the_transaction_has_not_is_an_error_that_names_both(
    db, rows, engine, propagation
):
    """Joining a transaction of another level is refused, naming both; the transaction goes on."""
    wanted, _ = LEVELS[engine.dialect.name]

    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(TransactionMismatchError) as caught:
            async with db.transactional(propagation, isolation_level=wanted, label="report"):
                pass

    told = str(caught.value)
    assert f"report demands isolation_level={wanted!r}" in told
    assert "session_scope()>, which has isolation_level=None" in told
    assert "propagation='REQUIRES_NEW'" in told
    assert [1] == await rows()


async def test_isolation_level_of_a_block_is_what_the_next_one_is_measured_by(db, engine):
    """A block inside of a block is measured by that block's transaction, not the scope's."""
    wanted, _ = LEVELS[engine.dialect.name]

    async with db.session_scope(mode="autocommit"):
        block = db.transactional(isolation_level=wanted)
        async with block, block:
            pass
        async with db.transactional():
            with pytest.raises(TransactionMismatchError):
                async with db.transactional(isolation_level=wanted):
                    pass


async def test_isolation_level_that_the_database_has_not_is_told(db, engine):
    """G20: A level that the database doesn't know is an error where it is asked for."""
    with pytest.raises(ConfigurationError, match="isolation_level='SNAPSHOT' is none of"):
        db.transactional(isolation_level="SNAPSHOT")
    with pytest.raises(ConfigurationError, match="isolation_level='SNAPSHOT' is none of"):
        db.session_scope(isolation_level="SNAPSHOT")


async def test_isolation_level_is_told_late_where_the_database_is_known_late(engine, rows):
    """G20: With a session class that chooses its engine it is an error at the first statement."""

    class Choosing(Session):
        def get_bind(self, *args, **kwargs):
            return engine.sync_engine

    db = Database(async_sessionmaker(sync_session_class=Choosing))
    block = db.transactional(isolation_level="SNAPSHOT")

    with pytest.raises(ConfigurationError, match="isolation_level='SNAPSHOT' is none of"):
        async with block as session:
            await write(session, 1)

    assert [] == await rows()


# --------------------------------------------------------------------------------------
# read_only
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_read_only_block_is_enforced_by_the_database_and_not_after(db, rows):
    """G20: The database refuses a write in the block, and takes it after."""
    with pytest.raises(sa.exc.DBAPIError, match=r"read-?only"):
        async with db.transactional(read_only=True) as session:
            assert 0 == await session.scalar(sa.select(sa.func.count(Item.id)))
            await write(session, 1)
    async with db.session_scope(mode="autocommit") as session:
        with pytest.raises(sa.exc.DBAPIError, match=r"read-?only"):
            async with db.transactional(read_only=True):
                await write(session, 2)
        session.expunge_all()
        async with db.transactional(read_only=False):
            await write(session, 3)
        await write(session, 4)

    assert [3, 4] == await rows()


async def test_read_only_block_in_a_writing_transaction_is_an_error_that_names_both(db, rows):
    """A read-only block doesn't join a transaction that may write, nor the other way round."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(TransactionMismatchError) as caught:
            async with db.transactional(read_only=True, label="report"):
                pass
    assert "report demands read_only=True" in str(caught.value)
    assert "has read_only=False" in str(caught.value)

    async with db.session_scope(read_only=True) as session:
        await session.scalar(sa.select(1))
        with pytest.raises(TransactionMismatchError, match="demands read_only=False"):
            async with db.transactional(read_only=False):
                pass


async def test_read_only_block_joins_a_read_only_request(db, drive):
    """A block that demands read-only joins an endpoint that is."""

    async def app(scope, receive, send):
        await session_options(read_only=True).apply()
        await db.session.scalar(sa.select(1))
        async with db.transactional(read_only=True) as session:
            assert session is db.session
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (200, None) == (exchange.status, exchange.error)


async def test_write_after_a_read_only_block_that_joined_first_says_who_made_it_so(db):
    """A transaction that a joined block began read-only says so where a write is refused."""
    with pytest.raises(sa.exc.DBAPIError) as caught:
        async with db.session_scope() as session:
            async with db.transactional(read_only=True, label="report"):
                await session.scalar(sa.select(1))
            await write(session, 1)

    assert "begun read-only by report" in "\n".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("first", "second"),
    [({"read_only": True}, {"read_only": False}), ({"read_only": False}, {"read_only": True})],
)
@pytest.mark.parametrize("is_scope", [True, False])
async def test_demand_made_before_the_first_statement_is_not_overridden(
    db, first, second, is_scope
):
    """What a scope or a block has demanded, a block that joins later can't change silently."""
    outer = db.session_scope(**first) if is_scope and first["read_only"] else db.session_scope()

    async with outer, db.transactional(**first):
        with pytest.raises(TransactionMismatchError):
            async with db.transactional(**second):
                pass
    async with outer:
        if not is_scope:
            async with db.transactional(**first):
                pass
        elif not first["read_only"]:
            return
        with pytest.raises(TransactionMismatchError):
            async with db.transactional(**second):
                pass


async def test_isolation_level_demanded_before_the_first_statement_is_not_overridden(db, engine):
    """Two blocks that join before anything has begun can't each have a level of their own."""
    wanted, _ = LEVELS[engine.dialect.name]
    other = "SERIALIZABLE" if engine.dialect.name == "sqlite" else "REPEATABLE READ"

    async with db.session_scope(), db.transactional(isolation_level=wanted):
        with pytest.raises(TransactionMismatchError, match="demands isolation_level"):
            async with db.transactional(isolation_level=other):
                pass


# --------------------------------------------------------------------------------------
# timeout
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "autocommit"])
async def test_block_that_waits_too_long_is_cancelled_and_rolled_back(db, rows, mode):
    """A block past its timeout is cut off where it waits, rolled back, and says so."""
    block = db.transactional(timeout=0.05, label="slow")

    async def work():
        with pytest.raises(TransactionTimeoutError) as caught:
            async with block as session:
                await write(session, 1)
                await asyncio.Event().wait()
        return caught.value

    if mode is None:
        error = await work()
    else:
        async with db.session_scope(mode=mode) as session:
            error = await work()
            await write(session, 2)

    assert "slow took longer than its timeout of 0.05 seconds" in str(error)
    assert isinstance(error, TimeoutError)
    assert isinstance(error, DBScopeError)
    assert ([] if mode is None else [2]) == await rows()


async def test_block_that_blocks_the_event_loop_is_late_and_rolled_back(db, rows):
    """A body that never gives control back is found late at its end."""
    with pytest.raises(TransactionTimeoutError):
        async with db.transactional(timeout=0.02) as session:
            session.add(Item(id=1))
            time.sleep(0.03)  # noqa: ASYNC251 - that is the point

    assert [] == await rows()


async def test_block_that_blocks_the_event_loop_goes_no_further_than_its_next_statement(db, rows):
    """The statement after the deadline is refused or cut off; nothing is kept."""
    with pytest.raises(TransactionTimeoutError):
        async with db.session_scope(mode="autocommit"), db.transactional(timeout=0.02) as session:
            time.sleep(0.03)  # noqa: ASYNC251 - that is the point
            await write(session, 1)

    assert [] == await rows()


async def test_timeout_error_of_another_kind_stays_what_it_is(db, rows):
    """An error of the body's own comes out as it is, also if the block is late as well."""
    with pytest.raises(ServiceError):
        async with db.transactional(timeout=0.02) as session:
            session.add(Item(id=1))
            time.sleep(0.03)  # noqa: ASYNC251 - that is the point
            raise ServiceError
    with pytest.raises(TimeoutError) as caught:
        async with db.transactional(timeout=60):
            raise TimeoutError("the payment service")

    assert "the payment service" == str(caught.value)
    assert [] == await rows()


async def test_late_block_is_rolled_back_also_for_errors_that_commit(db, rows):
    """`no_rollback_for` doesn't keep the work of a block that took too long."""
    with pytest.raises(MildError):
        async with db.transactional(timeout=0.02, no_rollback_for=MildError) as session:
            session.add(Item(id=1))
            time.sleep(0.03)  # noqa: ASYNC251 - that is the point
            raise MildError

    assert [] == await rows()


async def test_cancellation_from_outside_is_no_timeout(db, rows):
    """G10: A task that is cancelled inside a block with a timeout is cancelled, not late."""
    is_inside = asyncio.Event()

    async def work():
        async with db.transactional(timeout=60) as session:
            await write(session, 1)
            is_inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await is_inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert [] == await rows()


async def test_block_within_its_timeout_is_committed(db, rows):
    """A block that is in time notices nothing; the one after it has a timer of its own."""
    block = db.transactional(timeout=60)

    for row in (1, 2):
        async with block as session:
            await write(session, row)

    assert [1, 2] == await rows()


@ON_POSTGRES
@pytest.mark.parametrize("mode", [None, "autocommit"])
async def test_server_limits_the_transaction_too_and_not_the_next(db, engine, mode):
    """G20: PostgreSQL has both timeouts (idle: a second more) in the block, and none after."""

    async def settings(session):
        names = ("statement_timeout", "idle_in_transaction_session_timeout")
        return [int(await setting(session, name)) for name in names]

    def is_limit(settings):
        statement, idle = settings  # in milliseconds
        return 0 < statement <= 60_000 and idle == statement + 1000

    if mode is None:
        async with db.transactional(timeout=60) as session:
            assert is_limit(await settings(session))
    else:
        async with db.session_scope(mode=mode) as session:
            async with db.transactional(timeout=60):
                assert is_limit(await settings(session))
            assert [0, 0] == await settings(session)
    async with engine.connect() as connection:
        assert [0, 0] == await settings(connection)
        assert 0 == engine.pool.checkedin()


@ON_POSTGRES
async def test_statement_timeout_of_the_users_own_stays_what_it_is(db, rows):
    """A statement that PostgreSQL ends before the block is late is the database's own error."""
    with pytest.raises(sa.exc.DBAPIError, match="canceling statement due to statement timeout"):
        async with db.transactional(timeout=60) as session:
            await write(session, 1)
            await session.execute(sa.text("SET LOCAL statement_timeout = 20"))
            await session.execute(sa.select(sa.func.pg_sleep(30)))

    assert [] == await rows()


@pytest.mark.parametrize("propagation", ["REQUIRED", "NESTED", "SUPPORTS", "MANDATORY"])
async def test_timeout_on_a_block_that_joins_is_an_error_and_nothing_is_lost(db, rows, propagation):
    """A joined block can't end the transaction, so its timeout is refused, naming both."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(TransactionMismatchError) as caught:
            async with db.transactional(propagation, timeout=5, label="slow"):
                pass
        assert "slow demands timeout=5.0 and joins the transaction of" in str(caught.value)

    assert [1] == await rows()


async def test_timeout_of_requires_new_inside_is_its_own(db, rows):
    """A REQUIRES_NEW block that is late takes the outer transaction nowhere."""
    async with db.session_scope() as session:
        with pytest.raises(TransactionTimeoutError):
            async with db.transactional("REQUIRES_NEW", timeout=0.02) as other:
                await write(other, 2)
                await asyncio.Event().wait()
        await write(session, 1)

    assert [1] == await rows()


async def test_timeout_in_a_request_is_an_error_response(engine, drive, rows):
    """A block that took too long fails the request: 504, where the app says nothing else."""
    db = Database(engine, mode="autocommit")

    async def app(scope, receive, send):
        async with db.transactional(timeout=0.02):
            await write(db.session, 1)
            await asyncio.Event().wait()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (None, 504) == (exchange.error, exchange.status)
    assert [] == await rows()


# --------------------------------------------------------------------------------------
# rollback_for, no_rollback_for
# --------------------------------------------------------------------------------------

RULES = [
    pytest.param({}, MildError, False, id="every exception rolls back"),
    pytest.param({"no_rollback_for": MildError}, MildError, True, id="named"),
    pytest.param({"no_rollback_for": [MildError]}, GraveError, True, id="a subclass of it"),
    pytest.param({"no_rollback_for": (MildError,)}, ServiceError, False, id="a class above it"),
    pytest.param(
        {"no_rollback_for": MildError, "rollback_for": GraveError}, GraveError, False, id="nearer"
    ),
    pytest.param(
        {"no_rollback_for": MildError, "rollback_for": GraveError}, MildError, True, id="farther"
    ),
    pytest.param(
        {"no_rollback_for": GraveError, "rollback_for": MildError}, GraveError, True, id="excepted"
    ),
    pytest.param({"no_rollback_for": LookupError}, KeyError, True, id="a built-in one"),
]


@pytest.mark.parametrize(("rules", "error", "is_kept"), RULES)
@pytest.mark.parametrize("kind", ["own scope", "begun", "nested"])
async def test_rollback_rules_decide_by_the_nearest_class(db, rows, kind, rules, error, is_kept):
    """The nearest class of the exception's that a rule names decides; the error comes out."""
    mode = "autocommit" if kind == "begun" else "transaction"
    block = db.transactional("NESTED" if kind == "nested" else "REQUIRED", **rules)

    async def work():
        with pytest.raises(error):
            async with block as session:
                await write(session, 1)
                raise error

    if kind == "own scope":
        await work()
    else:
        async with db.session_scope(mode=mode):
            await work()

    assert ([1] if is_kept else []) == await rows()


async def test_joined_block_that_forgives_its_error_marks_nothing(db, rows):
    """G4: An error that a joined block names in `no_rollback_for` may be swallowed."""
    async with db.session_scope() as session:
        with suppress(MildError):
            async with db.transactional(no_rollback_for=MildError):
                await write(session, 1)
                raise MildError
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            with suppress(GraveError):
                async with db.transactional(no_rollback_for=MildError, rollback_for=[GraveError]):
                    await write(session, 2)
                    raise GraveError

    assert [1] == await rows()


async def test_cancellation_rolls_back_whatever_the_rules_say(db, rows):
    """G10: A rule for every Exception leaves a cancellation out."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            async with db.transactional(no_rollback_for=Exception) as session:
                await write(session, 1)
                timeout.reschedule(0)
                await asyncio.Event().wait()

    assert [] == await rows()


# --------------------------------------------------------------------------------------
# label
# --------------------------------------------------------------------------------------


@ON_SQLITE
async def test_label_is_shown_in_errors(db):
    """Each error names the block by its label, or by the function that it decorates."""
    with pytest.raises(TransactionRequiredError, match=r"^pay has propagation='MANDATORY'"):
        async with db.transactional("MANDATORY", label="pay"):
            pass

    @db.transactional("NEVER")
    async def poll():
        pass

    async with db.session_scope():
        with pytest.raises(TransactionForbiddenError, match=r"poll\(\) has propagation='NEVER'"):
            await poll()
        with pytest.raises(TransactionForbiddenError, match=r"^transactional\(NEVER\) has"):
            async with db.transactional("NEVER"):
                pass


@ON_SQLITE
async def test_label_is_shown_in_logs(db, caplog):
    """The scope of a block is called by its label in the debug log."""
    caplog.set_level("DEBUG", "asgi_dbscope")

    async with db.transactional(label="nightly report") as session:
        await session.scalar(sa.select(1))

    assert "nightly report: IDLE -> ACTIVE" in caplog.text


def own_activity(column):
    """What PostgreSQL shows others of this connection."""
    return sa.text(f"SELECT {column} FROM pg_stat_activity WHERE pid = pg_backend_pid()")


@ON_POSTGRES
async def test_label_is_shown_as_application_name(engine, drive):
    """`label_transactions='application_name'`: PostgreSQL shows whose transaction it is."""
    db = Database(engine, label_transactions="application_name")
    names = []

    async def note():
        names.append(await db.session.scalar(own_activity("application_name")))

    async def app(scope, receive, send):
        await note()
        async with db.transactional("REQUIRES_NEW", label="x" * 80):
            await note()
        await respond(send)

    await drive(DBSessionMiddleware(app, database=db))
    async with db.session_scope(mode="autocommit"), db.transactional(label="pay"):
        await note()
    async with db.session_scope():
        await note()
    async with engine.connect() as connection:
        names.append(await connection.scalar(own_activity("application_name")))

    assert ["GET /", "x" * 63, "pay", "session_scope()"] == names[:4]
    assert names[4] not in names[:4]


@pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_label_is_shown_as_an_sql_comment(engine):
    """`label_transactions='comment'`: each statement says in SQL which block it is from."""
    db = Database(engine, label_transactions="comment")
    Database(engine, label_transactions="comment")  # a second one doesn't comment twice
    seen = []

    @sa.event.listens_for(engine.sync_engine, "after_cursor_execute")
    def note(connection, cursor, statement, *more):
        seen.append(statement)

    async with db.transactional(label="pay */ 100% /* now") as session:
        await session.scalar(sa.select(1))
        async with db.transactional("NESTED", label="inner"):
            assert 1 == await session.scalar(sa.select(sa.literal(1)))
    async with db.session_scope(mode="autocommit") as session:
        await session.scalar(sa.select(1))
        async with db.transactional(label="begun"):
            await session.scalar(sa.select(1))
    async with engine.connect() as connection:
        await connection.scalar(sa.select(1))

    comments = [each.partition("/*")[2] for each in seen if each.startswith("SELECT")]
    comments = [each.replace("%%", "%") for each in comments]
    assert [" pay / 100% / now */", " inner */", "", " begun */", ""] == comments


@ON_ASYNCPG
async def test_comment_is_what_the_server_shows(engine):
    """The comment is in `pg_stat_activity`, where a slow query is looked for."""
    db = Database(engine, label_transactions="comment")

    async with db.transactional(label="pay") as session:
        query = await session.scalar(own_activity("query"))

    assert query.endswith("/* pay */")


async def test_wrong_label_transactions_is_told_at_once(engine):
    """`label_transactions` knows its two values, and where each is to be had."""
    with pytest.raises(ConfigurationError, match="label_transactions must be one of"):
        Database(engine, label_transactions="name")  # type: ignore[call-overload]
    if engine.dialect.name == "sqlite":
        with pytest.raises(ConfigurationError, match="is PostgreSQL's; on sqlite use 'comment'"):
            Database(engine, label_transactions="application_name")


@pytest.mark.parametrize("factory", [sessionmaker, async_sessionmaker])
def test_label_transactions_needs_an_engine_to_label(factory):
    """A session factory that is bound to no engine can't have `label_transactions`."""
    with pytest.raises(ConfigurationError, match="bound to an engine"):
        Database(factory(), label_transactions="comment")


# --------------------------------------------------------------------------------------
# Demands where there is no transaction, and deadlines around savepoints
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("demand", [{"read_only": True}, {"isolation_level": "SERIALIZABLE"}])
async def test_demand_without_a_transaction_is_refused(db, rows, demand):
    """What goes without a transaction can't be read-only: it says so instead of writing."""
    with pytest.raises(TransactionMismatchError, match="goes without a transaction"):
        async with db.transactional("SUPPORTS", **demand) as session:
            await write(session, 1)
    async with db.session_scope(mode="autocommit"):
        with pytest.raises(TransactionMismatchError, match="goes without a transaction"):
            async with db.transactional("SUPPORTS", **demand) as session:
                await write(session, 1)
        with pytest.raises(TransactionMismatchError, match="timeout"):
            async with db.transactional("SUPPORTS", timeout=1.0) as session:
                await write(session, 1)
    for never in ("NOT_SUPPORTED", "NEVER"):
        with pytest.raises(ConfigurationError, match="never has a transaction"):
            db.transactional(never, **demand)

    assert [] == await rows()


async def test_savepoint_inside_leaves_the_timeout_of_its_block(db, rows):
    """A block that takes too long is told, also where a savepoint in it has ended before."""
    with pytest.raises(TransactionTimeoutError):
        async with db.transactional(timeout=0.2) as session:
            async with db.transactional("NESTED"):
                await write(session, 1)
            time.sleep(0.3)  # noqa: ASYNC251 - work that blocks, so that no timer fires

    assert [] == await rows()


async def test_label_cannot_end_its_comment(engine):
    """A label with the ends of a comment in it, or NUL, stays a comment."""
    db = Database(engine, label_transactions="comment")

    for label in ("a **// b", "a //** b", "a\0b", "100%"):
        async with db.transactional(label=label) as session:
            assert 1 == await session.scalar(sa.select(1))


@ON_POSTGRES
async def test_label_without_what_postgresql_cannot_keep(engine):
    """What isn't printable ASCII is escaped by us, since the server has several ways to do it."""
    db = Database(engine, label_transactions="application_name")

    async with db.transactional(label="GET /a\0b\n\u202eö") as session:
        shown = await session.scalar(sa.text("SHOW application_name"))

    assert r"GET /a\x00b\n\u202e\xf6" == shown
