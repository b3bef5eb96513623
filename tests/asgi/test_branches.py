"""Branches: sessions of their own for work at the same time, bounded by the pool."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    NoSessionScopeError,
    PoolTooSmallError,
    SessionScopeClosedError,
)
from tests.fix_asgi import respond
from tests.fix_database import Child, Item

ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
ON_ASYNCPG = pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)


class ServiceError(Exception):
    """What a service raises."""


async def write(session, row):
    """Write a row, in the database."""
    session.add(Item(id=row))
    await session.flush()


@pytest.fixture
async def make_db(engine, make_engine):
    """Make a database whose pool has so many connections; its schema is there."""
    made = []

    def make(size, **options: Any):
        driver = "sqlite" if engine.dialect.name == "sqlite" else engine.dialect.driver
        made.append(make_engine(driver, pool_size=size, max_overflow=0, pool_timeout=30))
        return Database(made[-1], **options)

    yield make
    for each in made:
        assert each.pool is None or 0 == each.pool.checkedout()
        await each.dispose()


# --------------------------------------------------------------------------------------
# One branch: db.branch()
# --------------------------------------------------------------------------------------


async def test_branch_has_a_session_and_a_transaction_of_its_own(db, rows):
    """A branch commits by itself, and the scope around it is the current one again after."""
    with suppress(ServiceError):
        async with db.session_scope() as session:
            async with db.branch() as branch:
                assert branch is not session
                assert branch is db.session
                await write(branch, 1)
            assert [1] == await rows()
            assert session is db.session
            await write(session, 2)
            raise ServiceError

    assert [1] == await rows()


async def test_branch_that_raises_is_rolled_back_alone(db, rows):
    """A branch that fails leaves nothing, and the scope around it goes on."""
    async with db.session_scope() as session:
        with pytest.raises(ServiceError):
            async with db.branch() as branch:
                await write(branch, 1)
                raise ServiceError
        await write(session, 2)

    assert [2] == await rows()


async def test_branch_outside_of_any_scope_works(db, rows):
    """A branch needs no scope around it."""
    async with db.branch() as branch:
        await write(branch, 1)

    with pytest.raises(SessionScopeClosedError):
        await branch.scalar(sa.select(1))
    with pytest.raises(NoSessionScopeError):
        db.session  # noqa: B018
    assert [1] == await rows()


async def test_branch_whose_commit_fails_says_so(db, rows):
    """G2: A branch's COMMIT that fails comes out of its block."""
    with pytest.raises(sa.exc.IntegrityError):
        async with db.branch() as branch:
            branch.add(Child(id=1, item_id=99))

    assert [] == await rows()


async def test_branch_begins_its_transaction_as_the_scope_around_it(db, rows):
    """G20: A branch of a read-only scope is read-only."""
    async with db.session_scope(read_only=True):
        with pytest.raises(sa.exc.DBAPIError, match=r"read-?only"):
            async with db.branch() as branch:
                await write(branch, 1)

    assert [] == await rows()


async def test_branch_in_autocommit_mode_is_a_transaction(db, rows):
    """A branch is a transaction also in a scope that has none."""
    async with db.session_scope(mode="autocommit"):
        with suppress(ServiceError):
            async with db.branch() as branch:
                await write(branch, 1)
                raise ServiceError

    assert [] == await rows()


@ON_SQLITE
async def test_branch_is_entered_once(db):
    """One branch object is one branch; a second entry is told, and the first goes on."""
    branch = db.branch()

    async with branch as session:
        with pytest.raises(ConfigurationError, match="entered already"):
            async with branch:
                pass
        assert session is db.session


async def test_branch_of_a_database_that_can_make_no_session_leaves_no_scope(engine):
    """Where the session's class refuses to be made, the scope around it is the current one."""

    def refuse(**options):
        raise ServiceError

    db = Database(engine)
    db.session_factory.class_ = refuse
    with pytest.raises(ServiceError):
        async with db.branch():
            pass

    with pytest.raises(NoSessionScopeError):
        db.scope  # noqa: B018


async def test_branch_of_a_synchronous_database_is_refused(tmp_path):
    """Branches are for tasks; a synchronous database has threads."""
    db: Any = Database(f"sqlite:///{tmp_path / 'sync.db'}")

    with pytest.raises(ConfigurationError, match="is synchronous"):
        async with db.branch():
            pass
    with pytest.raises(ConfigurationError, match="is synchronous"):
        await db.gather()
    await db.dispose()


async def test_branch_that_is_cancelled_is_rolled_back(db, rows):
    """G10: A branch cut off leaves nothing, and the cancellation goes on."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout, db.branch() as branch:
            await write(branch, 1)
            timeout.reschedule(0)
            await asyncio.Event().wait()

    assert [] == await rows()


# --------------------------------------------------------------------------------------
# Several at once: db.gather()
# --------------------------------------------------------------------------------------


async def test_gather_gives_results_in_order_each_from_a_session_of_its_own(db, rows):
    """Results come in the order of the coroutines, also if the last is done first."""
    sessions = set()
    is_last_done = asyncio.Event()

    async def find(row):
        sessions.add(db.session)
        if row == 3:
            is_last_done.set()
        await is_last_done.wait()
        await write(db.session, row)
        return row

    async with db.session_scope() as session:
        assert [1, 2, 3] == await db.gather(find(1), find(2), find(3))
        assert session is db.session

    assert 3 == len(sessions - {session})
    assert [1, 2, 3] == await rows()


async def test_gather_outside_of_any_scope_works(db, rows):
    """`db.gather()` needs no scope around it; with nothing to do it does nothing."""

    @db.transactional("MANDATORY")
    async def service(row):
        await write(db.session, row)

    assert [None, None] == await db.gather(service(1), service(2))
    assert [] == await db.gather()
    assert [1, 2] == await rows()


async def test_first_error_of_a_gather_cancels_the_rest_and_is_raised_as_it_is(db, rows):
    """The others are cancelled and rolled back; what was committed by then stays."""
    error = ServiceError()
    is_committed, is_inside = asyncio.Event(), asyncio.Event()
    seen = []

    async def quick():
        await write(db.session, 1)
        db.on_commit(is_committed.set)

    async def failing():
        await is_committed.wait()
        await is_inside.wait()
        raise error

    async def waiting():
        await is_committed.wait()
        await write(db.session, 2)
        is_inside.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as cancellation:
            seen.append(cancellation)
            raise

    async with db.session_scope():
        with pytest.raises(ServiceError) as caught:
            await db.gather(quick(), failing(), waiting())

    assert error is caught.value
    assert 1 == len(seen)
    assert [1] == await rows()


async def test_commit_of_a_branch_that_fails_is_the_gathers_error(db, rows):
    """G2: A branch whose COMMIT fails fails the gather."""

    async def orphan():
        db.session.add(Child(id=1, item_id=99))

    with pytest.raises(sa.exc.IntegrityError):
        await db.gather(orphan())

    assert [] == await rows()


@pytest.mark.parametrize("limit", [1, 3])
async def test_limit_says_how_many_branches_run_at_once(db, limit):
    """No more than *limit* branches run at the same time, and as many do."""
    running = most = 0

    async def work():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await db.session.scalar(sa.select(1))
        running -= 1

    await db.gather(*(work() for _ in range(10)), limit=limit)

    assert limit == most


@pytest.mark.parametrize("is_held", [True, False])
async def test_gather_is_bounded_by_the_pool(make_db, is_held):
    """G14: 40 branches on a pool of 5 never wait for the pool's timeout, nor does another user."""
    db = make_db(5)
    most = 0
    engine = db.session_factory.kw["bind"]

    async def work():
        nonlocal most
        await db.session.scalar(sa.select(1))
        most = max(most, engine.pool.checkedout())

    async with db.session_scope() as session:
        if is_held:
            await session.scalar(sa.select(1))
        await db.gather(*(work() for _ in range(40)))
        await session.scalar(sa.select(1))

    assert 2 <= most <= 5


async def test_gathers_of_many_requests_share_the_pool(make_db, drive):
    """G14: 20 requests at once that each gather four branches, on a pool of 8, all get through."""
    db = make_db(8)

    async def work(number):
        await db.session.scalar(sa.select(1))
        return number

    async def app(scope, receive, send):
        assert [0, 1, 2, 3] == await db.gather(*map(work, range(4)))
        await respond(send)

    async with asyncio.timeout(30):
        exchanges = await asyncio.gather(
            *(drive(DBSessionMiddleware(app, database=db)) for _ in range(20))
        )

    assert {(200, None)} == {(each.status, each.error) for each in exchanges}


async def test_gather_nested_in_a_gather_on_a_pool_of_three_does_not_deadlock(make_db):
    """G14: Branches that gather themselves get through on three connections."""
    db = make_db(3)

    async def leaf(number):
        await db.session.scalar(sa.select(1))
        return number

    async def tree(number):
        await db.session.scalar(sa.select(1))  # it holds its connection meanwhile
        return number, await db.gather(leaf(1), leaf(2), leaf(3))

    async with asyncio.timeout(20):
        results = await db.gather(*map(tree, range(5)))

    assert [(number, [1, 2, 3]) for number in range(5)] == results


async def test_gather_deeper_than_the_pool_is_told_at_once(make_db):
    """G14: A depth that the pool can't hold is an error that says so, not a wait for ever."""
    db = make_db(2)

    async def dive(depth):
        await db.session.scalar(sa.select(1))
        if depth:
            await db.gather(dive(depth - 1))

    async with asyncio.timeout(20):
        with pytest.raises(PoolTooSmallError, match=r"at depth \d needs more connections"):
            await db.gather(dive(5))


@ON_SQLITE
async def test_gather_on_a_pool_without_a_limit_runs_ten_at_once(engine, make_engine):
    """Where the pool has no limit, `gather()` has one of its own."""
    other = make_engine("sqlite", max_overflow=-1)
    db = Database(other)
    running = most = 0

    async def work():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await db.session.scalar(sa.select(1))
        running -= 1

    await db.gather(*(work() for _ in range(30)))
    await other.dispose()

    assert 10 == most


async def test_gather_that_is_cancelled_cancels_its_branches(db, rows):
    """G10: A gather cut off rolls every branch back, and leaves no coroutine behind."""
    is_inside = asyncio.Event()
    began = []

    async def work(row):
        began.append(row)
        await write(db.session, row)
        is_inside.set()
        await asyncio.Event().wait()

    async def job():
        await db.gather(*map(work, range(3)), limit=1)

    task = asyncio.create_task(job())
    await is_inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert [0] == began
    assert [] == await rows()


async def test_branch_does_not_begin_after_another_has_failed(db):
    """Those that wait for a place when one fails never begin, and leave no warning."""
    began = []

    async def work(number):
        began.append(number)
        raise ServiceError

    with pytest.raises(ServiceError):
        await db.gather(work(1), work(2), work(3), limit=1)

    assert [1] == began


@ON_SQLITE
async def test_future_is_refused(db):
    """A task runs already, in the session it was started in: it can't be given another."""

    async def work():
        return 1

    task = asyncio.ensure_future(work())
    with pytest.raises(ConfigurationError, match="runs already, outside of any branch"):
        await db.gather(work(), task)
    assert 1 == await task


@ON_SQLITE
async def test_what_is_not_awaitable_is_refused(db):
    """A function in the place of its coroutine is told; the coroutines given are closed."""

    async def work():
        """Do nothing."""

    with pytest.raises(ConfigurationError, match=r"db\.gather\(\) takes coroutines; got"):
        await db.gather(work(), work)


@ON_SQLITE
@pytest.mark.parametrize("limit", [0, -1, 1.5, "2"])
async def test_wrong_limit_is_told(db, limit):
    """`limit` is a whole number above 0."""

    async def work():
        """Do nothing."""

    with pytest.raises(ConfigurationError, match="limit must be a whole number above 0"):
        await db.gather(work(), limit=limit)


@ON_SQLITE
async def test_awaitable_object_is_gathered(db):
    """Whatever can be awaited is: an object with `__await__`, say."""

    class Query:
        def __await__(self):
            return db.session.scalar(sa.select(sa.literal(7))).__await__()

    assert [7, 7] == await db.gather(Query(), Query())


async def test_gather_in_a_request_serves_dashboards(db, drive, rows):
    """An endpoint that reads several things at once answers with all of them."""

    async def number(value):
        return await db.session.scalar(sa.select(sa.literal(value)))

    async def app(scope, receive, send):
        await write(db.session, sum(await db.gather(number(1), number(2), number(3))))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (200, None) == (exchange.status, exchange.error)
    assert [6] == await rows()


async def test_cause_of_a_branchs_error_is_kept(db):
    """The error of a branch arrives with the error it was raised from."""
    cause = KeyError()

    async def fail():
        raise ServiceError from cause

    with pytest.raises(ServiceError) as caught:
        await db.gather(fail())

    assert cause is caught.value.__cause__
