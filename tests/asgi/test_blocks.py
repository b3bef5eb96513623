"""Transactional blocks: what each propagation does in each situation, and how blocks end."""

import asyncio
import inspect
import itertools
from contextlib import AsyncExitStack, suppress
from contextvars import copy_context
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only

from asgi_dbscope import (
    ConcurrentSessionUseError,
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    Outcome,
    Propagation,
    RollbackOnlyError,
    SessionScopeClosedError,
    State,
    TransactionForbiddenError,
    TransactionRequiredError,
    _current,
    current_scope,
    current_session,
    transactional,
)
from tests.fix_asgi import respond
from tests.fix_cancel import ENOUGH, MOMENTS, Cut
from tests.fix_database import Child, Item

ALL_DRIVERS = pytest.mark.parametrize("engine", ["sqlite", "asyncpg", "psycopg"], indirect=True)


class ServiceError(Exception):
    """What a service raises."""


async def write(session, row):
    """Write a row, in the database."""
    session.add(Item(id=row))
    await session.flush()


async def count(session):
    """Read."""
    return await session.scalar(sa.select(sa.func.count(Item.id)))


# --------------------------------------------------------------------------------------
# Seven propagations, wherever they are entered
# --------------------------------------------------------------------------------------

WITHOUT = ("no scope", "websocket")
IDLE = ("autocommit", "manual")
WITHIN = ("transaction", "request", "block", "begin()")

TABLE = {
    "REQUIRED": ("a transaction of its own", "begins", "joins"),
    "REQUIRES_NEW": ("a transaction of its own",) * 3,
    "NESTED": ("a transaction of its own", "begins", "savepoint"),
    "SUPPORTS": ("autocommit of its own", "as it is", "joins"),
    "NOT_SUPPORTED": ("autocommit of its own", "as it is", "autocommit of its own"),
    "MANDATORY": ("TransactionRequiredError", "TransactionRequiredError", "joins"),
    "NEVER": ("autocommit of its own", "as it is", "TransactionForbiddenError"),
}
COLUMNS = (WITHOUT, IDLE, WITHIN)
CELLS = [
    pytest.param(propagation, situation, expected, id=f"{propagation}-{situation}")
    for propagation, row in TABLE.items()
    for situations, expected in zip(COLUMNS, row, strict=True)
    for situation in situations
]


class Attempt:
    """A block that writes row 2 and raises, in code that catches that and writes row 1.

    Attributes:
        refusal: The name of the error that kept the block from being entered.

        is_same: Whether the block had the session around it.
    """

    def __init__(self, db, propagation):
        self.db = db
        self.propagation = propagation
        self.refusal = None
        self.is_same = False

    async def run(self, outer):
        """Make the attempt; *outer* is the session around it."""
        if outer is not None:
            await count(outer)  # so a transaction has autobegun in every mode
        try:
            async with self.db.transactional(self.propagation) as session:
                self.is_same = session is outer
                await write(session, 2)
                raise ServiceError
        except (TransactionRequiredError, TransactionForbiddenError) as error:
            self.refusal = type(error).__name__
        except ServiceError:
            pass
        if outer is not None:
            await write(outer, 1)

    def told(self, *, rows, timeline, is_refused):
        """What the block did, in the words of the table."""
        if self.refusal is not None:
            return self.refusal
        if not self.is_same:
            return "autocommit of its own" if 2 in rows else "a transaction of its own"
        if is_refused:
            return "joins" if rows == [] else "?"
        if 2 in rows:
            return "as it is"
        return "savepoint" if "rollback_savepoint" in timeline else "begins"


async def run_in(situation, db, engine, drive, attempt):
    """Run *attempt* in a *situation*; whether a success was refused at its end."""
    if situation == "no scope":
        await attempt.run(None)
        return False
    if situation in {"request", "websocket"}:

        async def app(scope, receive, send):
            await attempt.run(db.session if situation == "request" else None)
            if situation == "request":
                await respond(send)

        scope = {"type": "websocket", "path": "/"} if situation == "websocket" else None
        exchange = await drive(DBSessionMiddleware(app, database=db), scope)
        assert exchange.error is None or isinstance(exchange.error, RollbackOnlyError)
        return exchange.error is not None
    mode = situation if situation in {"manual", "transaction"} else "autocommit"
    try:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(db.session_scope(mode=mode))
            if situation == "block":
                await stack.enter_async_context(db.transactional())
            elif situation == "begin()":
                await stack.enter_async_context(session.begin())
            await attempt.run(session)
            if situation == "manual":
                await session.commit()
    except RollbackOnlyError as error:
        return isinstance(error.__cause__, ServiceError)
    return False


@pytest.mark.parametrize(("propagation", "situation", "expected"), CELLS)
async def test_propagation_does_what_the_table_says(
    db, engine, drive, rows, timeline, propagation, situation, expected
):
    """Each propagation begins, joins, steps aside or refuses as documented, in each situation."""
    attempt = Attempt(db, propagation)

    is_refused = await run_in(situation, db, engine, drive, attempt)

    found = await rows()
    assert expected == attempt.told(rows=found, timeline=timeline, is_refused=is_refused)
    if situation not in WITHOUT and expected != "joins":
        assert 1 in found


@pytest.mark.parametrize("propagation", list(Propagation))
async def test_propagation_is_given_as_a_member_or_by_its_name(db, propagation):
    """A member and its name are the same."""
    assert propagation is db.transactional(propagation).propagation
    assert propagation is db.transactional(propagation.value).propagation


@pytest.mark.parametrize("propagation", ["REQUIRED", "NESTED", "REQUIRES_NEW"])
async def test_block_outside_of_any_scope_opens_one(db, rows, propagation):
    """Outside of any scope a block commits at its end, and its session is shut then."""
    async with db.transactional(propagation) as session:
        assert session is db.session
        session.add(Item(id=1))

    with pytest.raises(NoSessionScopeError):
        db.session  # noqa: B018
    with pytest.raises(SessionScopeClosedError):
        await count(session)
    assert [1] == await rows()


async def test_block_outside_of_any_scope_that_raises_is_rolled_back(db, rows, timeline):
    """G3: Outside of any scope a block that raises leaves nothing, and the error comes out."""
    error = ServiceError()

    with pytest.raises(ServiceError) as caught:
        async with db.transactional() as session:
            await write(session, 1)
            raise error

    assert error is caught.value
    assert ["checkout", "begin", "rollback", "checkin"] == timeline
    assert [] == await rows()


async def test_block_whose_commit_fails_raises_what_the_database_said(db, rows):
    """G2: A COMMIT that fails at a block's end comes out of it, rolled back."""
    with pytest.raises(sa.exc.IntegrityError) as caught:
        async with db.transactional() as session:
            session.add(Item(id=1))
            session.add(Child(id=1, item_id=99))

    assert "was rolled back" in "\n".join(caught.value.__notes__)
    assert [] == await rows()


async def test_block_that_never_uses_its_session_costs_nothing(db, timeline):
    """G5: A block that runs no statement takes no connection."""
    async with db.transactional(), db.transactional(), db.transactional("SUPPORTS"):
        pass

    assert [] == timeline


async def test_requires_new_keeps_its_work_whatever_becomes_of_the_outer(db, rows):
    """A REQUIRES_NEW block is committed by itself, on a session and connection of its own."""
    with pytest.raises(ServiceError):
        async with db.transactional() as outer:
            async with db.transactional("REQUIRES_NEW") as inner:
                assert inner is not outer
                assert inner is db.session
                inner.add(Item(id=2))
            assert outer is db.session
            await write(outer, 1)
            raise ServiceError

    assert [2] == await rows()


async def test_block_refuses_with_on_an_asynchronous_database(db):
    """`with` on an asynchronous database says to use `async with`."""
    with pytest.raises(ConfigurationError, match="use `async with"), db.transactional():
        pass


async def test_block_in_a_closed_scope_is_refused(db):
    """G9: A task that outlives its scope can't begin a block in it."""
    has_ended = asyncio.Event()

    async def work():
        await has_ended.wait()
        async with db.transactional():
            pass

    async with db.session_scope():
        task = asyncio.create_task(work())
    has_ended.set()

    with pytest.raises(SessionScopeClosedError):
        await task


async def test_block_that_outlives_its_scope_claims_no_success(db, rows):
    """G9: A block that is still open when its scope ends raises at its own end, if it had work."""
    is_inside, has_ended = asyncio.Event(), asyncio.Event()

    async def work():
        async with db.transactional() as session:
            session.add(Item(id=1))
            is_inside.set()
            await has_ended.wait()

    with pytest.raises(ConcurrentSessionUseError, match="open in a child task"):
        async with db.session_scope(mode="autocommit"):
            task = asyncio.create_task(work())
            await is_inside.wait()
    has_ended.set()

    with pytest.raises(SessionScopeClosedError):
        await task
    assert [] == await rows()


async def test_block_that_outlives_its_scope_and_raises_raises_just_that(db):
    """G9: A block's own error isn't replaced by the news that its scope has ended."""
    is_inside, has_ended = asyncio.Event(), asyncio.Event()

    async def work():
        async with db.transactional():
            is_inside.set()
            await has_ended.wait()
            raise ServiceError

    with pytest.raises(ConcurrentSessionUseError):
        async with db.session_scope(mode="autocommit"):
            task = asyncio.create_task(work())
            await is_inside.wait()
    has_ended.set()

    with pytest.raises(ServiceError):
        await task


async def test_block_whose_session_cannot_be_made_leaves_no_scope(engine):
    """Where the session's class refuses to be made, nothing is left open."""

    def refuse(**options):
        raise ServiceError

    db = Database(engine)
    db.session_factory.class_ = refuse
    with pytest.raises(ServiceError):
        async with db.transactional():
            pass

    with pytest.raises(NoSessionScopeError):
        db.scope  # noqa: B018


# --------------------------------------------------------------------------------------
# One object: a context manager and a decorator, entered as often as you like
# --------------------------------------------------------------------------------------


class Service:
    """No function."""


async def test_decorated_functions_methods_and_class_methods_run_in_a_block(db, rows):
    """A coroutine function, a method, a class method and a static method are decorated alike."""

    @db.transactional
    async def function(row):
        """Say so."""
        db.session.add(Item(id=row))
        return row

    class Repository:
        @db.transactional()
        async def method(self, row):
            return self, await function(row)

        @db.transactional("REQUIRES_NEW")
        @classmethod
        async def class_method(cls, row):
            return cls, await function(row)

        @classmethod
        @db.transactional()
        async def class_method_inside(cls, row):
            return cls, await function(row)

        @db.transactional()
        @staticmethod
        async def static_method(row):
            return await function(row)

    repository = Repository()
    assert 1 == await function(1)
    assert (repository, 2) == await repository.method(2)
    assert (Repository, 3) == await Repository.class_method(3)
    assert (Repository, 4) == await repository.class_method_inside(4)
    assert 5 == await Repository.static_method(5)
    assert [1, 2, 3, 4, 5] == await rows()
    assert "Say so." == function.__doc__
    assert "(row)" == str(inspect.signature(function))
    assert inspect.iscoroutinefunction(function)


async def test_decorated_function_that_raises_is_rolled_back_and_can_be_called_again(db, rows):
    """A call that failed leaves nothing on the decorator."""

    @db.transactional()
    async def write_or_fail(row, *, fails):
        await write(db.session, row)
        if fails:
            raise ServiceError

    with pytest.raises(ServiceError):
        await write_or_fail(1, fails=True)
    await write_or_fail(2, fails=False)

    assert [2] == await rows()


async def test_one_block_object_is_entered_inside_itself(db, rows):
    """One object is re-entrant: each level has a savepoint of its own."""
    nested = db.transactional("NESTED")

    async with nested as session:
        await write(session, 1)
        async with nested:
            await write(session, 2)
            with pytest.raises(ServiceError):
                async with nested:
                    await write(session, 3)
                    raise ServiceError
        async with nested:
            await write(session, 4)

    assert [1, 2, 4] == await rows()


async def test_recursive_decorated_function_is_one_transaction(db, rows, timeline):
    """A decorated function that calls itself joins its own transaction."""

    @db.transactional()
    async def write_down(row):
        await write(db.session, row)
        if row > 1:
            await write_down(row - 1)

    await write_down(3)

    assert ["checkout", "begin", "commit", "checkin"] == timeline
    assert [1, 2, 3] == await rows()


async def test_one_block_object_is_shared_by_50_tasks(db, rows):
    """G12: 50 tasks in one block object at once have 50 sessions, and each its own ending."""
    block = db.transactional()
    sessions = set()
    waiting = asyncio.Barrier(50)

    async def work(row):
        async with block as session:
            sessions.add(session)
            await waiting.wait()  # all 50 are inside
            await write(session, row)
            if row % 2:
                raise ServiceError(row)

    results = await asyncio.gather(*map(work, range(50)), return_exceptions=True)

    assert 50 == len(sessions)
    assert list(range(0, 50, 2)) == await rows()
    assert [row % 2 == 1 for row in range(50)] == [
        isinstance(each, ServiceError) for each in results
    ]


async def test_one_decorated_function_in_50_tasks_of_one_scope_joins_it(db, rows):
    """A decorated function called by child tasks, one after the other, is one transaction."""
    turn = asyncio.Lock()

    @db.transactional()
    async def work(row):
        async with turn:
            await write(db.session, row)

    async with db.session_scope():
        await asyncio.gather(*map(work, range(50)))

    assert list(range(50)) == await rows()


async def test_block_is_left_in_another_context_than_it_was_entered_in(db, rows):
    """A fixture's or generator's exit may run in another context: the block ends all the same."""
    block = db.transactional()
    session = await asyncio.create_task(block.__aenter__())
    session.add(Item(id=1))
    await asyncio.create_task(block.__aexit__(None, None, None))

    assert [1] == await rows()


async def test_block_that_is_left_before_the_one_inside_it_ends_alone(db, rows):
    """Exits may run in the wrong order (two fixtures, two generators): each ends its own block."""
    outer, inner = db.transactional(), db.transactional("REQUIRES_NEW")

    first = await outer.__aenter__()
    second = await inner.__aenter__()
    first.add(Item(id=1))
    await outer.__aexit__(None, None, None)
    assert [1] == await rows()
    second.add(Item(id=2))
    await inner.__aexit__(None, None, None)
    async with db.transactional() as third:
        third.add(Item(id=3))

    assert [1, 2, 3] == await rows()


async def test_block_that_was_not_entered_here_and_is_open_twice_is_told(db, rows):
    """Where nobody can know which entry is meant, leaving is an error and nothing is ended."""
    block = db.transactional()
    contexts = []

    async def enter(row):
        session = await block.__aenter__()
        session.add(Item(id=row))
        contexts.append(copy_context())

    await asyncio.gather(enter(1), enter(2))
    with pytest.raises(ConfigurationError, match="left in a context in which it was not entered"):
        await block.__aexit__(None, None, None)
    for context in contexts:
        await asyncio.create_task(block.__aexit__(None, None, None), context=context)

    assert [1, 2] == await rows()


async def test_block_whose_release_ended_in_a_listener_s_error_keeps_nothing(db, rows):
    """G4: An error raised once the savepoint is released fails the whole transaction."""

    def fail(session, transaction):
        if transaction.nested:
            raise ServiceError

    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            await write(session, 1)
            sa.event.listen(session.sync_session, "after_transaction_end", fail)
            with suppress(ServiceError):
                async with db.transactional("NESTED"):
                    await write(session, 2)

    assert [] == await rows()


async def test_block_left_in_a_copy_of_its_context_leaves_nothing_there(db, rows):
    """Entered in a context and left in a copy of it, a block is no longer the copy's."""
    block = db.transactional()

    async def leave():
        await block.__aexit__(None, None, None)
        async with db.transactional() as session:
            session.add(Item(id=2))

    (await block.__aenter__()).add(Item(id=1))
    await asyncio.create_task(leave())

    assert [1, 2] == await rows()


async def test_generator_that_is_dropped_ends_no_block_but_its_own(db, rows):
    """G12: An abandoned generator is closed in some other task, maybe inside the same block."""
    block = db.transactional()
    is_inside, may_end = asyncio.Event(), asyncio.Event()

    async def numbers():
        async with block as session:
            await session.scalar(sa.select(1))
            yield 1

    async def drop():
        generator = numbers()
        await anext(generator)
        return generator

    async def work():
        async with block as session:
            session.add(Item(id=2))
            is_inside.set()
            await may_end.wait()

    generator = await asyncio.create_task(drop())
    worker = asyncio.create_task(work())
    await is_inside.wait()
    await asyncio.create_task(generator.aclose())
    may_end.set()
    await worker

    assert [2] == await rows()


async def test_transactional_of_the_module_finds_the_one_database(engine, rows, monkeypatch):
    """`transactional()` outside of any scope is the block of the only database there is."""
    monkeypatch.setattr(_current, "known", WeakSet())
    db = Database(engine)

    @transactional
    async def first():
        db.session.add(Item(id=1))

    @transactional(Propagation.REQUIRES_NEW, label="second")
    async def second():
        current_session().add(Item(id=2))

    await first()
    await second()
    async with transactional() as session:
        session.add(Item(id=3))

    assert [1, 2, 3] == await rows()


async def test_transactional_of_the_module_uses_the_innermost_open_scope(
    make_engine, db, rows, monkeypatch
):
    """`transactional()` inside a scope joins that scope; by name it finds another database."""
    monkeypatch.setattr(_current, "known", WeakSet())
    other = Database(make_engine("sqlite"), name="other, by name")

    async with db.session_scope() as session:
        async with transactional() as joined:
            assert joined is session
            session.add(Item(id=1))
        async with transactional(database="other, by name") as second:
            assert second is not session
            assert second is other.session

    assert [1] == await rows()


async def test_transactional_of_the_module_says_where_there_is_no_database(monkeypatch):
    """`transactional()` with no database to be found is an error when it is entered."""
    monkeypatch.setattr(_current, "known", WeakSet())
    block = transactional()

    with pytest.raises(NoSessionScopeError):
        async with block:
            pass


# --------------------------------------------------------------------------------------
# Ownership: what a statement began by itself is nobody's transaction
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["autocommit", "manual"])
@pytest.mark.parametrize("propagation", ["REQUIRED", "NESTED"])
async def test_read_that_autobegan_does_not_make_the_block_a_joiner(
    db, rows, timeline, mode, propagation
):
    """A block after a read commits at its own end, on the same session."""
    async with db.session_scope(mode=mode) as session:
        assert 0 == await count(session)
        async with db.transactional(propagation) as inner:
            assert inner is session
            inner.add(Item(id=1))
        assert [1] == await rows()

    assert "savepoint" not in timeline


async def test_block_in_autocommit_is_a_real_transaction_and_autocommit_returns(db, rows):
    """In mode autocommit a block begins a transaction on the session, and autocommit follows."""
    async with db.session_scope(mode="autocommit") as session:
        await write(session, 1)
        assert [1] == await rows()
        with pytest.raises(ServiceError):
            async with db.transactional() as inner:
                assert inner is session
                await write(session, 2)
                assert [1] == await rows()
                raise ServiceError
        await write(session, 3)
        assert [1, 3] == await rows()
        async with db.transactional():
            await write(session, 4)
            await write(session, 5)
            assert [1, 3] == await rows()
        await session.execute(sa.delete(Item).where(Item.id == 5))
        assert [1, 3, 4] == await rows()


async def test_objects_live_on_through_the_blocks_of_one_session(db):
    """An object loaded in autocommit is the same object in the block, and after it."""
    async with db.session_scope(mode="autocommit") as session:
        item = Item(id=1, note="before")
        session.add(item)
        await session.flush()
        async with db.transactional():
            assert item is await session.get(Item, 1)
            item.note = "inside"
        await session.refresh(item)

        assert "inside" == item.note


async def test_block_in_a_request_in_autocommit_mode_commits_at_its_end(engine, drive, rows):
    """An endpoint in mode autocommit is transactional where it says so."""
    db = Database(engine, mode="autocommit")

    async def app(scope, receive, send):
        with suppress(ServiceError):
            async with db.transactional():
                await write(db.session, 1)
                raise ServiceError
        async with db.transactional():
            await write(db.session, 2)
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert 200 == exchange.status
    assert [2] == await rows()


@pytest.mark.parametrize("is_flushed", [True, False])
async def test_block_over_open_changes_in_manual_mode_is_refused_and_loses_nothing(
    db, rows, is_flushed
):
    """In mode manual a block doesn't commit changes that nobody decided about: it is an error."""
    async with db.session_scope(mode="manual") as session:
        session.add(Item(id=1))
        if is_flushed:
            await session.flush()
        with pytest.raises(ConfigurationError, match="mode='manual' and open changes"):
            async with db.transactional():
                pass
        await session.commit()
        async with db.transactional():
            session.add(Item(id=2))

    assert [1, 2] == await rows()


async def test_block_in_manual_mode_leaves_later_changes_to_the_user(db, rows):
    """In mode manual a block commits its own work only."""
    async with db.session_scope(mode="manual") as session:
        async with db.transactional():
            session.add(Item(id=1))
        await write(session, 2)
        await session.rollback()

    assert [1] == await rows()


async def test_block_whose_beginning_fails_leaves_the_scope_as_it_was(db, rows, engine):
    """Where the COMMIT of what autobegan fails, the block isn't entered and the scope goes on."""
    async with db.session_scope(mode="autocommit") as session:
        await count(session)
        session.add(Child(id=1, item_id=99))
        session.add(Item(id=1, note=5))
        with pytest.raises(sa.exc.DBAPIError):
            async with db.transactional():
                pass
        assert not db.scope.boundaries
        async with db.transactional():
            session.add(Item(id=2))

    assert 2 in await rows()


# --------------------------------------------------------------------------------------
# NESTED: savepoints, on SQLite too
# --------------------------------------------------------------------------------------


@ALL_DRIVERS
async def test_nested_block_rolls_back_alone(db, rows):
    """A NESTED block that fails takes back its own work only."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(ServiceError):
            async with db.transactional("NESTED"):
                await write(session, 2)
                raise ServiceError
        await write(session, 3)

    assert [1, 3] == await rows()


@ALL_DRIVERS
async def test_nested_block_that_comes_first_is_inside_the_transaction(db, rows):
    """G3: A savepoint released before any other statement isn't a COMMIT: SQLite's trap."""
    with pytest.raises(ServiceError):
        async with db.session_scope() as session:
            async with db.transactional("NESTED"):
                await write(session, 1)
            raise ServiceError

    assert [] == await rows()


@ALL_DRIVERS
async def test_nested_block_survives_an_error_of_the_database(db, rows):
    """G21: A constraint that fails in a NESTED block leaves the outer transaction whole."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(sa.exc.IntegrityError):
            async with db.transactional("NESTED"):
                await session.execute(sa.insert(Item).values(id=1))
        await write(session, 2)

    assert [1, 2] == await rows()


async def test_nested_block_whose_flush_fails_at_its_end_is_rolled_back(db, rows):
    """G2: What fails at a NESTED block's own end comes out of it; the outer goes on."""
    async with db.session_scope() as session:
        await write(session, 1)
        session.expunge_all()
        with pytest.raises(sa.exc.IntegrityError) as caught:
            async with db.transactional("NESTED"):
                session.add(Item(id=1))
        assert "rolled back to the savepoint" in "\n".join(caught.value.__notes__)
        await write(session, 2)

    assert [1, 2] == await rows()


async def test_nested_blocks_nest(db, rows, timeline):
    """The inner savepoint goes with the outer one."""
    async with db.session_scope() as session:
        await write(session, 1)
        with suppress(ServiceError):
            async with db.transactional("NESTED"):
                async with db.transactional("NESTED"):
                    await write(session, 2)
                raise ServiceError

    assert 2 == timeline.count("savepoint")
    assert [1] == await rows()


async def test_nested_block_forgets_objects_that_it_added(db):
    """After the rollback to the savepoint the session doesn't hold what was added in it."""
    async with db.session_scope() as session:
        with suppress(ServiceError):
            async with db.transactional("NESTED"):
                item = Item(id=1)
                await write(session, 2)
                session.add(item)
                await session.flush()
                raise ServiceError

        assert item not in session
        assert 0 == await count(session)


async def test_nested_block_with_its_transaction_ended_inside_is_no_error(db, rows):
    """A `session.commit()` in a NESTED block keeps what was done, and the block ends well."""
    async with db.session_scope() as session:
        async with db.transactional("NESTED"):
            await write(session, 1)
            await session.commit()
        await write(session, 2)

    assert [1, 2] == await rows()


async def test_nested_block_that_fails_after_a_commit_inside_is_not_kept(db, rows):
    """G4: What a NESTED block did after a `commit()` in it is rolled back with the scope."""
    with pytest.raises(RollbackOnlyError) as caught:
        async with db.session_scope() as session:
            with suppress(ServiceError):
                async with db.transactional("NESTED"):
                    await write(session, 1)
                    await session.commit()
                    await write(session, 2)
                    raise ServiceError

    assert isinstance(caught.value.__cause__, ServiceError)
    assert [1] == await rows()


@pytest.mark.parametrize("is_inner", [True, False])
async def test_nested_block_set_rollback_only_after_a_commit_inside_is_not_kept(db, rows, is_inner):
    """G4: A quiet rollback whose savepoint is gone is the quiet rollback of what is around."""
    async with db.session_scope(mode="autocommit" if is_inner else "transaction") as session:
        outer = db.transactional("REQUIRED" if is_inner else "SUPPORTS")
        async with outer, db.transactional("NESTED"):
            await write(session, 1)
            await session.commit()
            db.set_rollback_only()
            await write(session, 2)

    assert [1] == await rows()


@pytest.mark.parametrize("fails", [False, True])
async def test_savepoint_that_another_task_is_rolling_back_is_waited_for(db, engine, rows, fails):
    """A NESTED block that ends in the middle of another task's rollback() leaves it that."""
    is_reached, may_go_on = asyncio.Event(), asyncio.Event()

    def wait(*args):
        is_reached.set()
        await_only(may_go_on.wait())

    async with db.session_scope() as session:
        await write(session, 1)
        sa.event.listen(engine.sync_engine, "rollback_savepoint", wait)
        with suppress(ServiceError):
            async with db.transactional("NESTED"):
                await write(session, 2)
                other = asyncio.create_task(session.rollback())
                await is_reached.wait()
                asyncio.get_running_loop().call_soon(may_go_on.set)  # as the block is ending
                if fails:
                    raise ServiceError
        assert other.done()
        await other
        await write(session, 3)

    assert [3] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
async def test_savepoint_that_cannot_be_rolled_back_to_fails_the_transaction(db, rows, caplog):
    """G21: Where ROLLBACK TO SAVEPOINT fails, nothing of the whole transaction is committed."""
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            await write(session, 1)
            with suppress(ServiceError):
                async with db.transactional("NESTED"):
                    await write(session, 2)
                    connection = await session.connection()
                    await connection.exec_driver_sql("ROLLBACK")
                    raise ServiceError

    assert "ROLLBACK TO SAVEPOINT failed" in caplog.text
    assert [] == await rows()


# --------------------------------------------------------------------------------------
# Joined blocks that fail
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["REQUIRED", "SUPPORTS", "MANDATORY"])
async def test_swallowed_failure_of_a_joined_block_is_told_at_the_end(db, rows, propagation):
    """G4: An outer block that swallows a joined block's error gets RollbackOnlyError from it."""
    error = ServiceError("no stock")

    with pytest.raises(RollbackOnlyError, match="ServiceError") as caught:
        async with db.transactional() as session:
            await write(session, 1)
            with suppress(ServiceError):
                async with db.transactional(propagation):
                    raise error

    assert error is caught.value.__cause__
    assert "propagation='NESTED'" in str(caught.value)
    assert [] == await rows()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_swallowed_failure_makes_a_success_an_error_response(db, drive, rows, has_begun):
    """G4, G1: The 200 that would have claimed success never goes out; the error does."""
    error = ServiceError()

    async def app(scope, receive, send):
        if has_begun:
            await write(db.session, 1)
        with suppress(ServiceError):
            async with db.transactional():
                raise error
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert [] == exchange.messages
    assert isinstance(exchange.error, RollbackOnlyError)
    assert error is exchange.error.__cause__
    assert [] == await rows()


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_swallowed_failure_lets_an_error_response_out(db, drive, rows, status):
    """G4: A response that tells of an error itself goes out as it is, after the rollback."""

    async def app(scope, receive, send):
        await write(db.session, 1)
        with suppress(ServiceError):
            async with db.transactional():
                raise ServiceError
        await respond(send, status)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert None is exchange.error
    assert status == exchange.status
    assert [] == await rows()


async def test_first_of_several_failures_is_the_cause(db):
    """G4: Of several swallowed failures the first one is named."""
    first = ServiceError("first")

    with pytest.raises(RollbackOnlyError) as caught:
        async with db.session_scope():
            for error in (first, ServiceError("second")):
                with suppress(ServiceError):
                    async with db.transactional():
                        raise error

    assert first is caught.value.__cause__


@pytest.mark.parametrize("is_nested_block", [True, False])
async def test_savepoint_around_the_failed_block_heals(db, rows, is_nested_block):
    """G4: Rolled back to a savepoint around the failed block, the rest is committed."""
    async with db.session_scope() as session:
        await write(session, 1)
        around = db.transactional("NESTED") if is_nested_block else session.begin_nested()
        with suppress(ServiceError):
            async with around, db.transactional():
                await write(session, 2)
                raise ServiceError

    assert [1] == await rows()


async def test_failure_swallowed_inside_a_savepoint_fails_that_block_only(db, rows):
    """G4: A NESTED block that swallowed a joined failure raises; what is around is healed."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(RollbackOnlyError):
            async with db.transactional("NESTED"):
                await write(session, 2)
                with suppress(ServiceError):
                    async with db.transactional():
                        raise ServiceError

    assert [1] == await rows()


async def test_failure_outside_of_a_nested_block_does_not_fail_it(db, rows):
    """G4: A NESTED block after a swallowed failure ends well; the transaction does not."""
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError
            async with db.transactional("NESTED"):
                await write(session, 1)

    assert [] == await rows()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_rollback_of_the_users_own_heals(db, rows, has_begun):
    """G4: After `session.rollback()` nothing of the failed block is left, so all is well."""
    async with db.session_scope() as session:
        if has_begun:
            await write(session, 1)
        with suppress(ServiceError):
            async with db.transactional():
                raise ServiceError
        await session.rollback()
        await write(session, 2)

    assert [2] == await rows()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_commit_of_the_users_own_after_a_failure_is_refused(db, rows, has_begun):
    """G4: `session.commit()` in a transaction with a failed block is a RollbackOnlyError."""
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            if has_begun:
                await write(session, 1)
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError
            with pytest.raises(RollbackOnlyError) as caught:
                await session.commit()
            assert isinstance(caught.value.__cause__, ServiceError)

    assert [] == await rows()


async def test_connection_commit_after_a_failure_is_refused(db, rows):
    """G4: A COMMIT past the session, by its connection, is refused as well."""
    with pytest.raises(RollbackOnlyError):
        async with db.session_scope() as session:
            await write(session, 1)
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError
            connection = await session.connection()
            await connection.commit()

    assert [] == await rows()


async def test_error_of_the_outer_block_goes_before_the_refusal(db, rows):
    """G4: A block that raises on its own after a swallowed failure raises just that."""
    with pytest.raises(LookupError):
        async with (
            db.session_scope(mode="autocommit"),
            db.transactional(no_rollback_for=LookupError) as session,
        ):
            await write(session, 1)
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError
            raise LookupError

    assert [] == await rows()


async def test_own_scope_that_raises_what_it_forgives_goes_before_the_refusal(db, rows):
    """G4: The same for a block with a scope of its own."""
    with pytest.raises(LookupError):
        async with db.transactional(no_rollback_for=LookupError) as session:
            await write(session, 1)
            with suppress(ServiceError):
                async with db.transactional():
                    raise ServiceError
            raise LookupError

    assert [] == await rows()


async def test_failure_in_requires_new_is_no_concern_of_the_outer(db, rows):
    """G4: A REQUIRES_NEW block that fails leaves the transaction around it alone."""
    async with db.session_scope() as session:
        with suppress(ServiceError):
            async with db.transactional("REQUIRES_NEW") as other:
                await write(other, 2)
                raise ServiceError
        await write(session, 1)

    assert [1] == await rows()


async def test_failure_in_not_supported_is_no_concern_of_the_outer(db, rows):
    """G4: What a NOT_SUPPORTED block did is durable, and its error marks nothing."""
    async with db.session_scope() as session:
        with suppress(ServiceError):
            async with db.transactional("NOT_SUPPORTED") as other:
                assert not db.scope.is_in_transaction
                await write(other, 2)
                raise ServiceError
        await write(session, 1)

    assert [1, 2] == await rows()


async def test_joined_block_that_fails_as_its_scope_ends_changes_nothing_more(db):
    """G9: A joined block that raises after its scope has ended has nobody left to tell."""
    is_inside, has_ended = asyncio.Event(), asyncio.Event()

    async def work():
        async with db.transactional():
            is_inside.set()
            await has_ended.wait()
            raise ServiceError

    async with db.session_scope():
        task = asyncio.create_task(work())
        await is_inside.wait()
    has_ended.set()

    with pytest.raises(ServiceError):
        await task


# --------------------------------------------------------------------------------------
# set_rollback_only() in a block
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["NESTED", "REQUIRES_NEW"])
async def test_rollback_only_block_is_rolled_back_quietly_and_alone(db, rows, propagation):
    """G4: A block with an end of its own that is set rollback-only is undone; the rest stays."""
    async with db.session_scope() as session:
        async with db.transactional(propagation) as inner:
            await write(inner, 1)
            db.set_rollback_only()
            assert db.scope.is_rollback_only
        assert not db.scope.is_rollback_only
        await write(session, 2)

    assert [2] == await rows()


async def test_rollback_only_block_in_autocommit_is_rolled_back_quietly(db, rows):
    """G4: The block's transaction is undone; statements before and after are durable."""
    async with db.session_scope(mode="autocommit") as session:
        await write(session, 1)
        async with db.transactional():
            await write(session, 2)
            async with db.transactional():  # joins: it's the outer's transaction
                db.set_rollback_only()
        await write(session, 3)

    assert [1, 3] == await rows()


async def test_rollback_only_in_a_joined_block_is_the_scopes(db, drive, rows):
    """G4: In a block that joined the request, the request is rolled back and answers as it is."""

    async def app(scope, receive, send):
        async with db.transactional():
            await write(db.session, 1)
            db.set_rollback_only()
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (200, None) == (exchange.status, exchange.error)
    assert [] == await rows()


async def test_commit_in_a_rollback_only_nested_block_is_refused_whole(db, rows):
    """G4: `session.commit()` there is refused before the savepoint is touched."""
    async with db.session_scope() as session:
        await write(session, 1)
        async with db.transactional("NESTED"):
            await write(session, 2)
            db.set_rollback_only()
            with pytest.raises(RollbackOnlyError):
                await session.commit()

    assert [1] == await rows()


async def test_release_inside_a_block_with_an_end_of_its_own_is_refused(db, rows):
    """`release()` would end the block's transaction before its time, and says so."""
    async with db.session_scope(mode="autocommit"), db.transactional(label="checkout") as session:
        await write(session, 1)
        with pytest.raises(ConfigurationError, match="would commit checkout before its end"):
            await db.release()

    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# Blocks of several tasks on one session
# --------------------------------------------------------------------------------------


async def test_block_of_another_task_on_the_same_session_is_refused(db, rows):
    """G13: A task can't slip into a block that another one has open, and be rolled back with it."""
    is_open, is_tried = asyncio.Event(), asyncio.Event()

    async def first():
        async with db.transactional(label="first"):
            await write(db.session, 1)
            is_open.set()
            await is_tried.wait()

    async def second():
        await is_open.wait()
        try:
            with pytest.raises(ConcurrentSessionUseError) as caught:
                async with db.transactional(label="second"):
                    pass
        finally:
            is_tried.set()
        return str(caught.value)

    async with db.session_scope(mode="autocommit"):
        _, message = await asyncio.gather(first(), second())

    assert "second was entered while another task has first open" in message
    assert [1] == await rows()


async def test_child_task_of_a_block_joins_it(db, rows):
    """G11: A task that the block itself started is inside of it."""

    async def child():
        async with db.transactional("MANDATORY") as session:
            await write(session, 1)

    async with db.session_scope(mode="autocommit"), db.transactional():
        await asyncio.create_task(child())

    assert [1] == await rows()


async def test_child_task_of_a_joined_block_is_inside_of_the_outer_one(db, rows):
    """G11: A task started in a block that joined is inside of the block that it joined."""

    async def child():
        async with db.transactional() as session:
            await write(session, 1)

    async with db.session_scope(mode="autocommit"), db.transactional(), db.transactional():
        await asyncio.create_task(child())

    assert [1] == await rows()


async def test_block_that_ends_before_its_child_tasks_is_told_and_rolled_back(db, rows):
    """G22: A block with a joined block still open in a child task doesn't claim success."""
    is_inside, has_ended = asyncio.Event(), asyncio.Event()

    async def child():
        async with db.transactional():
            await write(db.session, 1)
            is_inside.set()
            await has_ended.wait()

    async with db.session_scope(mode="autocommit"):
        with pytest.raises(ConcurrentSessionUseError, match="outer ends while a block that joined"):
            async with db.transactional(label="outer"):
                task = asyncio.create_task(child())
                await is_inside.wait()
        has_ended.set()
        await task

    assert [] == await rows()


async def test_block_left_open_by_a_finished_task_can_be_joined(db, rows):
    """A block entered by a task that is over (a fixture's set-up) goes on for others."""
    block = db.transactional(label="fixture")

    async with db.session_scope(mode="autocommit") as session:
        await asyncio.create_task(block.__aenter__())
        async with db.transactional("MANDATORY"):
            await write(session, 1)
        await block.__aexit__(None, None, None)
        assert not db.scope.boundaries

    assert [1] == await rows()


# --------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"propagation": "REQUIRES-NEW"}, "one of 'REQUIRED', 'REQUIRES_NEW', 'NESTED'"),
        ({"propagation": "required"}, "got 'required'"),
        ({"propagation": 1}, "got 1"),
        ({"timeout": -1}, "a number of seconds above 0; got -1"),
        ({"timeout": 0}, "got 0"),
        ({"timeout": float("nan")}, "got nan"),
        ({"timeout": float("inf")}, "got inf"),
        ({"timeout": True}, "got True"),
        ({"timeout": "5"}, "got '5'"),
        ({"label": ""}, "label must be a string that is not empty"),
        ({"label": 5}, "got 5"),
        ({"isolation_level": 5}, "isolation_level must be a string"),
        ({"isolation_level": "AUTOCOMMIT"}, "autocommit"),
        ({"read_only": "yes"}, "read_only must be True or False"),
        ({"rollback_for": ServiceError()}, "rollback_for takes classes of Exception"),
        (
            {"no_rollback_for": [int]},
            "Exception; got <class 'int'",
        ),
        ({"no_rollback_for": asyncio.CancelledError}, "A cancellation and the like always"),
        ({"no_rollback_for": BaseException}, "always roll back"),
    ],
)
@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_wrong_argument_is_told_at_once(db, options, told):
    """Arguments are judged where they are given, not at the first entry."""
    for make in (db.transactional, transactional):
        with pytest.raises(ConfigurationError) as caught:
            make(**options)
        assert told in str(caught.value)


def generator():
    """Make rows."""
    yield 1


async def async_generator():
    """Make rows."""
    yield 1


def plain():
    """Block."""


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (generator, "as a context manager inside it"),
        (async_generator, "as a context manager inside it"),
        (plain, "is asynchronous, so db.transactional() decorates coroutine functions"),
        (Service, "decorates functions; got <class"),
        (5, "propagation must be one of"),
    ],
)
@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_decorating_what_cannot_be_decorated_says_what_to_do_instead(db, function, told):
    """A generator, a class, a plain function on an asynchronous database: a clear error."""
    with pytest.raises(ConfigurationError) as caught:
        db.transactional(function)

    assert told in str(caught.value)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_what_is_no_function_cannot_be_decorated(db):
    """Something that can't be called is no function."""
    with pytest.raises(ConfigurationError, match=r"decorates functions; got 5"):
        db.transactional()(5)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_plain_function_decorated_for_any_database_is_told_when_called(db):
    """`transactional()` of the module learns only when it is entered that the database waits."""
    decorated = transactional(plain)

    async with db.session_scope():
        with pytest.raises(ConfigurationError, match="use `async with"):
            decorated()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_block_shows_what_it_is(db):
    """A block's representation is its label, or its propagation."""
    assert "<transactional(NESTED)>" == repr(db.transactional("NESTED"))
    assert "<pay>" == repr(db.transactional(label="pay"))


# --------------------------------------------------------------------------------------
# Cancelled in a block
# --------------------------------------------------------------------------------------


class Cuts:
    """One block after the other, each cut at the next of its suspensions."""

    def __init__(self, db):
        self.engine = db.session_factory.kw["bind"]
        self.observer = create_async_engine(
            self.engine.url, pool_size=1, isolation_level="AUTOCOMMIT"
        )
        self.swept = 0

    async def sweep(self, kind, program, check):
        """Run *program* until no suspension is left to cut."""
        try:
            for moment in MOMENTS:
                for at in itertools.count(1):
                    await self.warm_up()
                    cut = Cut(kind, moment, at)
                    await self.run(cut, program, check, where=f"{moment}, suspension {at}")
                    if cut.was_over:
                        break
                    self.swept += 1
        finally:
            await self.observer.dispose()

    async def warm_up(self):
        """Have two connections in the pool; cut while it connects, aiosqlite leaves a task."""
        async with self.engine.connect(), self.engine.connect():
            pass

    async def run(self, cut, program, check, *, where):
        """Run *program*, cut once; nothing may be left."""
        seen: list[Any] = []
        before = asyncio.all_tasks()
        assert "cancelled" == await cut.run(partial(program, cut, seen)), where
        others = asyncio.all_tasks() - before
        if others:  # the driver's own: asyncpg's request to the server
            _, others = await asyncio.wait(others, timeout=ENOUGH)
        assert not others, where
        assert 0 == self.engine.pool.checkedout(), where
        async with self.observer.connect() as connection:
            check(cut, seen, list(await connection.scalars(sa.select(Item.id))))
            await connection.execute(sa.delete(Item))


def make_program(db, kind_of_block):
    """A program with one block, armed from its entry to its exit."""

    async def alone(cut, seen):
        cut.arm()
        async with db.transactional() as session:
            seen.append(db.scope)
            await write(session, 1)

    async def begun(cut, seen):
        async with db.session_scope(mode="autocommit") as session:
            await count(session)
            cut.arm()
            async with db.transactional():
                await write(session, 1)
                seen.append(db.scope)
            assert Outcome.COMMITTED is db.scope.outcome
            seen.append("left")

    async def nested(cut, seen):
        async with db.session_scope() as session:
            await count(session)
            cut.arm()
            async with db.transactional("NESTED"):
                seen.append(db.scope)
                await write(session, 1)
            seen.append("left")

    async def joined(cut, seen):
        async with db.session_scope() as session:
            cut.arm()
            async with db.transactional():
                seen.append(db.scope)
                await write(session, 1)

    async def new(cut, seen):
        async with db.session_scope() as session:
            await count(session)
            cut.arm()
            async with db.transactional("REQUIRES_NEW") as other:
                seen.append(db.scope)
                await write(other, 1)

    async def limited(cut, seen):
        cut.arm()
        async with db.transactional(timeout=60) as session:
            seen.append(db.scope)
            await write(session, 1)

    async def branch(cut, seen):
        cut.arm()
        async with db.branch() as session:
            seen.append(db.scope)
            await write(session, 1)

    programs = (alone, begun, nested, joined, new, limited, branch)
    return {each.__name__: each for each in programs}[kind_of_block]


KINDS_OF_BLOCK = ("alone", "begun", "nested", "joined", "new", "limited", "branch")
CUT_ONCE = [(each, "once") for each in KINDS_OF_BLOCK]
CUT_OTHERWISE = [
    *(("alone", "scope"), ("nested", "scope"), ("new", "scope")),
    *(("begun", "timeout"), ("nested", "timeout"), ("limited", "timeout")),
]


@pytest.mark.parametrize(("kind_of_block", "kind"), [*CUT_ONCE, *CUT_OTHERWISE])
async def test_block_cancelled_anywhere_ends_truly(db, kind, kind_of_block):
    """G10: Cut at any suspension of its entry, its body or its exit, a block leaks nothing."""

    def check(cut, seen, found):
        scope = seen[0] if seen else None
        assert None is scope or State.CLOSED is scope.state
        if scope is not None and kind_of_block != "begun":
            assert ([1] if scope.outcome is Outcome.COMMITTED else []) == found
        if kind_of_block == "begun" and "left" in seen:
            assert [1] == found
        if cut.was_over:
            assert [1] == found

    cuts = Cuts(db)
    await cuts.sweep(kind, make_program(db, kind_of_block), check)

    assert cuts.swept >= 4


async def test_outer_work_survives_a_nested_block_that_was_cancelled_and_caught(db, rows):
    """G10: After a cancellation that ends with the NESTED block, the outer transaction is whole."""
    async with db.session_scope() as session:
        await write(session, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as timeout, db.transactional("NESTED"):
                await write(session, 2)
                timeout.reschedule(0)
                await asyncio.Event().wait()
        await write(session, 3)

    assert [1, 3] == await rows()


async def test_cancellation_in_a_joined_block_that_is_swallowed_fails_the_transaction(db, rows):
    """G4, G10: A block that was cancelled half-way is a failed one, also if that was caught."""
    with pytest.raises(RollbackOnlyError) as caught:
        async with db.session_scope() as session:
            with suppress(TimeoutError):
                async with asyncio.timeout(0), db.transactional():
                    session.add(Item(id=1))
                    await asyncio.Event().wait()

    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert [] == await rows()


async def test_debug_log_tells_of_the_block_that_a_scope_belongs_to(db, caplog):
    """The scope of a block is called by the block's label."""
    caplog.set_level("DEBUG", "asgi_dbscope")

    @db.transactional()
    async def place_order():
        assert "place_order()" in repr(current_scope())
        await write(db.session, 1)

    await place_order()

    assert "place_order(): IDLE -> ACTIVE" in caplog.text
