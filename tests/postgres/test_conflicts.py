"""Transactions that really get in each other's way: one of them is told, and served again."""

import asyncio
import threading

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_dbscope import (
    CommitInDoubtError,
    Database,
    DBSessionMiddleware,
    Retry,
    current_scope,
    session_options,
)
from bench.proxy import before_commit
from tests.fix_asgi import http_scope, respond
from tests.fix_database import POSTGRES_DRIVERS, Item

AT_ONCE = Retry(attempts=3, base=0)

ON_POSTGRES = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


@pytest.fixture
async def two_items(engine):
    """Two rows, each of which says how often it was changed."""
    async with engine.begin() as connection:
        for number in (1, 2):
            await connection.execute(sa.insert(Item).values(id=number, note=""))


async def notes(engine):
    """What the rows say."""
    async with engine.connect() as connection:
        return list(await connection.scalars(sa.select(Item.note).order_by(Item.id)))


def append(number, sign):
    """Change a row so that it shows."""
    return sa.update(Item).where(Item.id == number).values(note=Item.note + sign)


class Meeting:
    """Where the first attempts of two requests meet; later ones pass by."""

    def __init__(self):
        self._barrier = asyncio.Barrier(2)
        self.attempts = []

    async def of_first_attempts(self):
        """Wait for the other one."""
        self.attempts.append(current_scope().attempt)
        if current_scope().attempt == 1:
            await self._barrier.wait()


async def drive_both(drive, app):
    """Two requests at the same time; both are answered."""
    both = await asyncio.gather(*(drive(app, http_scope(path)) for path in ("/1", "/2")))

    assert [None, None] == [each.error for each in both]
    assert [200, 200] == [each.status for each in both]


@ON_POSTGRES
async def test_changed_row_under_repeatable_read(db, engine, drive, two_items):
    """G16: who changes a row that was changed since its snapshot loses at that statement."""
    meeting = Meeting()

    @session_options(isolation_level="REPEATABLE READ")
    async def app(scope, receive, send):
        await db.session.execute(sa.select(Item))
        await meeting.of_first_attempts()
        await db.session.execute(append(1, "+"))
        await respond(send)

    await drive_both(drive, DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 1, 2] == meeting.attempts
    assert ["++", ""] == await notes(engine)


@ON_POSTGRES
async def test_write_skew_that_only_commit_finds(db, engine, drive, two_items):
    """G16: under SERIALIZABLE each reads what the other writes: the second COMMIT is refused."""
    meeting = Meeting()
    seen = []

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        mine, other = (1, 2) if scope["path"] == "/1" else (2, 1)
        seen.append(await db.session.scalar(sa.select(Item.note).where(Item.id == other)))
        await db.session.execute(append(mine, f"{mine}"))
        await meeting.of_first_attempts()
        await respond(send)

    await drive_both(drive, DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 1, 2] == meeting.attempts
    assert ["", ""] == seen[:2]
    assert seen[2] in {"1", "2"}  # what the winner has written
    assert ["1", "2"] == await notes(engine)


@ON_POSTGRES
async def test_deadlock(db, engine, drive, two_items):
    """G16: of two that wait for each other's row the server stops one, which is served again."""
    meeting = Meeting()

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SET LOCAL deadlock_timeout = '20ms'"))
        mine, other = (1, 2) if scope["path"] == "/1" else (2, 1)
        await db.session.execute(append(mine, "+"))
        await meeting.of_first_attempts()
        await db.session.execute(append(other, "+"))
        await respond(send)

    await drive_both(drive, DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 1, 2] == meeting.attempts[:3]  # the two may meet again
    assert ["++", "++"] == await notes(engine)


@ON_POSTGRES
async def test_deadlock_in_a_savepoint_is_still_the_transactions(db, engine, drive, two_items):
    """G16: a conflict that goes through a savepoint uncaught is the request's to do again."""
    meeting = Meeting()

    async def app(scope, receive, send):
        await db.session.execute(sa.text("SET LOCAL deadlock_timeout = '20ms'"))
        mine, other = (1, 2) if scope["path"] == "/1" else (2, 1)
        await db.session.execute(append(mine, "+"))
        await meeting.of_first_attempts()
        async with db.transactional("NESTED"):
            await db.session.execute(append(other, "+"))
        await respond(send)

    await drive_both(drive, DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 1, 2] == meeting.attempts[:3]  # the two may meet again
    assert ["++", "++"] == await notes(engine)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
async def test_snapshot_that_is_too_old_on_sqlite(db, engine, drive, two_items):
    """G16: on SQLite a reader that wants to write what was changed meanwhile is told BUSY."""
    meeting = Meeting()
    has_written = asyncio.Event()

    async def app(scope, receive, send):
        await db.session.connection()  # begins: else each read has a snapshot of its own
        await db.session.execute(sa.select(Item))
        await meeting.of_first_attempts()
        if scope["path"] == "/2":
            await has_written.wait()
        await db.session.execute(append(1, "+"))
        await respond(send)
        has_written.set()

    await drive_both(drive, DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    assert [1, 1, 2] == meeting.attempts
    assert ["++", ""] == await notes(engine)


@pytest.mark.parametrize("sync_engine", ["psycopg"], indirect=True)
def test_threads_that_conflict(sync_db, sync_engine, sync_rows):
    """G16: functions of a synchronous engine, decorated, in two threads."""
    meeting = threading.Barrier(2)
    attempts, counts = [], []

    @sync_db.transactional(isolation_level="SERIALIZABLE", retry=AT_ONCE)
    def add(number):
        counts.append(sync_db.session.scalar(sa.select(sa.func.count()).select_from(Item)))
        attempts.append(current_scope().attempt)
        if current_scope().attempt == 1:
            meeting.wait(30)
        sync_db.session.execute(sa.insert(Item).values(id=number))

    threads = [threading.Thread(target=add, args=[number]) for number in (1, 2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert [1, 1, 2] == attempts
    assert [0, 0, 1] == counts
    assert [1, 2] == sync_rows()


@ON_POSTGRES
async def test_unique_key_that_two_take_at_once(engine, drive, rows):
    """G16: SERIALIZABLE may report a duplicate key for a conflict; `also` takes it for one."""
    db = Database(engine)
    meeting = Meeting()

    @session_options(isolation_level="SERIALIZABLE")
    async def app(scope, receive, send):
        count = await db.session.scalar(sa.select(sa.func.count()).select_from(Item))
        await meeting.of_first_attempts()
        db.session.add(Item(id=count))
        await respond(send)

    retry = Retry(base=0, also=sa.exc.IntegrityError)
    await drive_both(drive, DBSessionMiddleware(app, database=db, retry=retry))

    assert [1, 1, 2] == meeting.attempts
    assert [0, 1] == await rows()


@ON_POSTGRES
@pytest.mark.parametrize("resolves", [True, False])
async def test_commit_that_got_lost_is_replayed_if_the_server_says_so(
    resolves, drive, rows, proxy, engine
):
    """G16, G15: a COMMIT in doubt is never replayed; one of which nothing was kept is."""
    through = create_async_engine(proxy.url)
    db = Database(through, resolve_in_doubt=resolves)
    attempts = []

    async def app(scope, receive, send):
        attempts.append(current_scope().attempt)
        db.session.add(Item(id=len(attempts)))
        await db.session.flush()
        await respond(send)

    proxy.arm("cut", before_commit)
    exchange = await drive(DBSessionMiddleware(app, database=db, retry=AT_ONCE))

    if resolves:
        assert [1, 2] == attempts
        assert 200 == exchange.status
        assert [2] == await rows()
    else:
        assert [1] == attempts
        assert isinstance(exchange.error, CommitInDoubtError)
    await through.dispose()


@ON_POSTGRES
async def test_function_whose_commit_got_lost_is_called_again(rows, proxy, engine):
    """G16, G15: the same for a decorated function."""
    through = create_async_engine(proxy.url)
    db = Database(through, resolve_in_doubt=True)
    attempts = []

    @db.transactional(retry=AT_ONCE)
    async def place():
        attempts.append(current_scope().attempt)
        await db.session.execute(sa.insert(Item).values(id=len(attempts)))

    proxy.arm("cut", before_commit)
    await place()

    assert [1, 2] == attempts
    assert [2] == await rows()
    await through.dispose()
