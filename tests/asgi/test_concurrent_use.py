"""Two tasks in one session: an error that names both, or a queue."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    ConcurrentSessionUseError,
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    RollbackOnlyError,
)
from tests.fix_asgi import respond
from tests.fix_database import POSTGRES_DRIVERS, Item

ALL_DRIVERS = pytest.mark.parametrize("engine", ["sqlite", *POSTGRES_DRIVERS], indirect=True)


async def write(session, row):
    """Write a row, in the database."""
    session.add(Item(id=row))
    await session.flush()


async def load_orders(db):
    """Use the session."""
    return await db.session.scalar(sa.select(1))


async def load_customer(db):
    """Use the session, too."""
    return await db.session.scalar(sa.select(sa.literal(2)))


# --------------------------------------------------------------------------------------
# The error
# --------------------------------------------------------------------------------------


@ALL_DRIVERS
async def test_two_tasks_in_one_session_are_both_named(db, rows):
    """G13: The error names the two tasks, what each runs and where; the first one goes on."""
    async with db.session_scope() as session:
        await write(session, 1)
        first = asyncio.create_task(load_orders(db), name="orders")
        second = asyncio.create_task(load_customer(db), name="customer")
        await asyncio.wait([first, second])
        assert 1 == first.result()
        error = second.exception()

    assert isinstance(error, ConcurrentSessionUseError)
    told = str(error)
    assert "task 'customer', load_customer (asgi/test_concurrent_use.py:" in told
    assert "uses the session while task 'orders', load_orders (asgi/test_concurrent_use.py:" in told
    assert "now at " in told
    assert "db.branch()" in told
    assert "concurrency='serialize'" in told
    assert [1] == await rows()


@ALL_DRIVERS
async def test_gather_on_one_session_fails_clearly_and_the_scope_ends_well(db, engine, rows):
    """G13, G22: `asyncio.gather()` on one session raises, and its connection stays good."""
    with pytest.raises(ConcurrentSessionUseError):
        async with db.session_scope() as session:
            await write(session, 1)
            await asyncio.gather(load_orders(db), load_customer(db))

    assert 0 == engine.pool.checkedout()
    async with db.session_scope() as session:
        await write(session, 2)
    assert [2] == await rows()


async def test_error_that_was_caught_leaves_the_session_usable(db, rows):
    """G13: The refused operation was never sent, so the transaction is whole."""
    async with db.session_scope() as session:
        await write(session, 1)
        results = await asyncio.gather(load_orders(db), load_customer(db), return_exceptions=True)
        assert 1 == results[0]
        await write(session, 2)

    assert [1, 2] == await rows()


async def test_each_kind_of_operation_is_guarded(db):
    """G13: Whatever awaits the database is refused while another task is inside."""
    async with db.session_scope() as session:
        item = Item(id=1)
        session.add(item)
        await session.flush()
        operations = {
            "execute": lambda: session.execute(sa.select(Item)),
            "scalars": lambda: session.scalars(sa.select(Item)),
            "get": lambda: session.get(Item, 2),
            "refresh": lambda: session.refresh(item),
            "merge": lambda: session.merge(Item(id=1)),
            "commit": session.commit,
            "rollback": session.rollback,
            "connection": session.connection,
            "begin_nested": lambda: session.begin_nested().start(),
        }
        for name, operation in operations.items():
            task = asyncio.create_task(load_orders(db))
            await asyncio.sleep(0)  # now it is inside
            with pytest.raises(ConcurrentSessionUseError):
                await operation()
            assert 1 == await task, name


async def test_in_debug_mode_the_error_says_where_each_task_was_created(db):
    """G13: With asyncio's debug mode the places are in the message."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    try:
        async with db.session_scope():
            tasks = [asyncio.create_task(load(db)) for load in (load_orders, load_customer)]
            await asyncio.wait(tasks)
            error = tasks[1].exception()
    finally:
        loop.set_debug(False)

    assert 2 == str(error).count(", created at asgi/test_concurrent_use.py:")


async def test_change_during_the_flush_of_another_task_is_refused_not_lost(engine, rows):
    """G13, G1: SQLAlchemy would forget such a change at the flush's end, and COMMIT without it."""
    for concurrency in ("error", "serialize"):
        db = Database(engine, concurrency=concurrency)
        with pytest.raises(ConcurrentSessionUseError, match="the change would have been lost"):
            async with db.session_scope() as session:
                item = await session.merge(Item(id=1))
                await session.flush()
                task = asyncio.create_task(write(session, 2))
                await asyncio.sleep(0)  # now it is inside its flush
                item.note = "changed"
                await task

    assert [] == await rows()


async def test_object_added_during_the_flush_of_another_task_is_refused(db, rows):
    """G13: `session.add()` is a use of the session as well."""
    async with db.session_scope() as session:
        task = asyncio.create_task(write(session, 1))
        await asyncio.sleep(0)  # now it is inside its flush
        with pytest.raises(ConcurrentSessionUseError, match="is inside it"):
            session.add(Item(id=2))
        await task

    assert [1] == await rows()


async def test_object_added_by_a_thread_during_the_flush_of_a_task_is_refused(db, rows):
    """G13: A worker thread's `session.add()` is refused too while a task is inside."""
    with ThreadPoolExecutor(1) as pool:
        async with db.session_scope() as session:
            task = asyncio.create_task(write(session, 1))
            await asyncio.sleep(0)  # now it is inside its flush, and the loop waits for the thread
            with pytest.raises(ConcurrentSessionUseError, match="is inside it"):
                pool.submit(session.add, Item(id=2)).result(10)
            await task

    assert [1] == await rows()


class Compiled(Coroutine[Any, Any, Any]):
    """A coroutine that shows neither its code nor its frame, as one of a compiled module."""

    def __init__(self, coroutine):
        self._coroutine = coroutine

    def __await__(self):
        return self._coroutine.__await__()

    def send(self, value):
        return self._coroutine.send(value)

    def throw(self, *error):
        return self._coroutine.throw(*error)

    def close(self):
        self._coroutine.close()


async def test_tasks_that_do_not_show_what_they_run_are_named(db):
    """G13: Of a task whose coroutine is compiled the error tells the name, and nothing more."""
    async with db.session_scope() as session:
        await write(session, 1)
        first = asyncio.create_task(Compiled(load_orders(db)), name="orders")
        second = asyncio.create_task(Compiled(load_customer(db)), name="customer")
        await asyncio.wait([first, second])
        assert 1 == first.result()

    told = str(second.exception())
    assert ": task 'customer' uses the session while task 'orders' is inside it." in told


async def test_tasks_one_after_the_other_may_share_a_session(db, rows):
    """G11: Child tasks that take turns are no error."""

    async def work(row):
        await write(db.session, row)

    async with db.session_scope():
        for row in (1, 2, 3):
            await asyncio.create_task(work(row))

    assert [1, 2, 3] == await rows()


async def test_two_requests_at_once_are_no_concern_of_each_other(db, drive, rows):
    """G12: Each request has a session, so nothing is concurrent in one."""
    barrier = asyncio.Barrier(2)

    async def app(scope, receive, send):
        await barrier.wait()
        await write(db.session, scope["row"])
        await respond(send)

    served = DBSessionMiddleware(app, database=db)
    await asyncio.gather(
        *(drive(served, {"type": "http", "method": "GET", "path": "/", "row": n}) for n in (1, 2))
    )

    assert [1, 2] == await rows()


# --------------------------------------------------------------------------------------
# A queue, by concurrency="serialize"
# --------------------------------------------------------------------------------------


@ALL_DRIVERS
async def test_serialize_lets_20_tasks_of_a_gather_share_one_session(engine, rows):
    """G13: 20 tasks at one session queue, and each gets its own result."""
    db = Database(engine, concurrency="serialize")
    sessions = set()

    async def work(row):
        sessions.add(db.session)
        await db.session.execute(sa.insert(Item).values(id=row))
        return await db.session.scalar(sa.select(sa.literal(row)))

    async with db.session_scope():
        assert list(range(20)) == await asyncio.gather(*map(work, range(20)))

    assert 1 == len(sessions)
    assert list(range(20)) == await rows()


async def test_serialize_takes_what_is_added_during_the_flush_of_another(engine, rows):
    """G13: What 20 tasks add and flush at once is all there."""
    db = Database(engine, concurrency="serialize")

    async def work(row):
        await write(db.session, row)

    async with db.session_scope():
        await asyncio.gather(*map(work, range(20)))

    assert list(range(20)) == await rows()


async def test_serialize_serves_resolvers_as_graphql_runs_them(engine, drive, rows):
    """G13: Resolvers of one request, nested and at once, read from one session."""
    db = Database(engine, concurrency="serialize")
    async with db.session_scope() as session:
        session.add_all(Item(id=number, note=f"note {number}") for number in range(5))
    answers = []

    async def resolve_note(number):
        item = await db.session.get(Item, number)
        return item.note

    async def resolve_item(number):
        found = await db.session.scalar(sa.select(Item.id).where(Item.id == number))
        note, again = await asyncio.gather(resolve_note(number), resolve_note(number))
        return found, note, note == again

    async def app(scope, receive, send):
        answers.extend(await asyncio.gather(*map(resolve_item, range(5))))
        await respond(send)

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert (200, None) == (exchange.status, exchange.error)
    assert [(number, f"note {number}", True) for number in range(5)] == answers


async def test_serialize_waiter_that_is_cancelled_leaves_the_queue(engine, rows):
    """G10, G13: A task cancelled in the queue gives its turn up; the others go on."""
    db = Database(engine, concurrency="serialize")

    async def work(row):
        await db.session.execute(sa.insert(Item).values(id=row))

    async with db.session_scope():
        tasks = [asyncio.create_task(work(row)) for row in range(4)]
        await asyncio.sleep(0)  # the first is inside, the others wait
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert [False, True, False, False] == [each.cancelled() for each in tasks]

    assert [0, 2, 3] == await rows()


async def test_serialize_lets_the_next_one_in_after_an_error(engine, rows):
    """G13: A statement that fails gives its turn on."""
    db = Database(engine, concurrency="serialize", mode="autocommit")

    async def work(statement):
        with suppress(sa.exc.DBAPIError):
            await db.session.execute(statement)

    insert = sa.insert(Item)
    async with db.session_scope():
        await asyncio.gather(
            work(insert.values(id=1)), work(insert.values(id=1)), work(insert.values(id=2))
        )

    assert [1, 2] == await rows()


async def test_serialize_refuses_whoever_comes_after_the_end(engine):
    """G9: A task that waits in the queue while the scope ends is told, and nothing hangs."""
    db = Database(engine, concurrency="serialize", cleanup_timeout=5)
    tasks = []

    async def work(row):
        await db.session.execute(sa.insert(Item).values(id=row))

    async with db.session_scope():
        tasks += [asyncio.create_task(work(row)) for row in range(3)]
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await asyncio.wait(tasks)

    for task in tasks:
        assert task.done()
        task.exception()


async def test_serialize_does_not_let_a_task_into_anothers_block(engine, rows):
    """G4, G13: Queueing statements doesn't mix transactions: the other task's block is refused."""
    db = Database(engine, concurrency="serialize", mode="autocommit")
    is_open, is_tried = asyncio.Event(), asyncio.Event()

    async def first():
        async with db.transactional():
            await write(db.session, 1)
            is_open.set()
            await is_tried.wait()

    async def second():
        await is_open.wait()
        try:
            with pytest.raises(ConcurrentSessionUseError):
                async with db.transactional():
                    pass
        finally:
            is_tried.set()

    async with db.session_scope():
        await asyncio.gather(first(), second())

    assert [1] == await rows()


async def test_serialized_task_that_fails_in_a_joined_block_fails_the_transaction(engine, rows):
    """G4: Failures of child tasks' blocks are the transaction's, queue or no queue."""
    db = Database(engine, concurrency="serialize")

    @db.transactional()
    async def work(row):
        await db.session.execute(sa.insert(Item).values(id=row))
        if row == 2:
            raise LookupError

    with pytest.raises(RollbackOnlyError):
        async with db.session_scope():
            await asyncio.gather(*map(work, range(4)), return_exceptions=True)

    assert [] == await rows()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_wrong_concurrency_is_told_at_once(engine):
    """`concurrency` knows two values."""
    with pytest.raises(ConfigurationError, match="concurrency must be one of 'error', 'serialize'"):
        Database(engine, concurrency="queue")  # type: ignore[call-overload]


# --------------------------------------------------------------------------------------
# Another task's transactional block
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("does", ["executes", "adds"])
@pytest.mark.parametrize("mode", ["transaction", "autocommit"])
async def test_statement_inside_another_tasks_block_is_refused(db, rows, mode, does):
    """G13: What a sibling does in between would be rolled back with a block that isn't its own."""
    is_inside, may_end = asyncio.Event(), asyncio.Event()

    async def block(session):
        with suppress(ValueError):
            async with db.transactional("NESTED"):
                await write(session, 1)
                is_inside.set()
                await may_end.wait()
                raise ValueError

    async with db.session_scope(mode=mode) as session:
        task = asyncio.create_task(block(session))
        await is_inside.wait()
        with pytest.raises(ConcurrentSessionUseError, match="rolled back with"):
            if does == "adds":
                session.add(Item(id=2))
            else:
                await session.execute(sa.insert(Item).values(id=2))
        may_end.set()
        await task
        await write(session, 3)

    assert [3] == await rows()


async def test_child_task_of_a_block_is_inside_of_it(db, rows):
    """G11: A task that a block starts takes part in it."""
    async with db.session_scope() as session, db.transactional("NESTED"):
        await asyncio.create_task(write(session, 1))

    assert [1] == await rows()


async def test_head_in_the_middle_of_a_child_tasks_block_is_an_error(db, drive, rows):
    """G1, G4: Half of a block is never committed by a response."""
    is_inside, may_end = asyncio.Event(), asyncio.Event()

    async def block():
        async with db.transactional("NESTED"):
            await write(db.session, 1)
            is_inside.set()
            await may_end.wait()

    async def app(scope, receive, send):
        task = asyncio.create_task(block())
        await is_inside.wait()
        try:
            await respond(send)
        finally:
            may_end.set()
            await asyncio.wait([task])
            task.exception()

    exchange = await drive(DBSessionMiddleware(app, database=db))

    assert isinstance(exchange.error, ConcurrentSessionUseError)
    assert exchange.status is None
    assert [] == await rows()
