"""Synchronous sessions on MariaDB, by PyMySQL."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import Database, DBSessionMiddleware
from asgi_dbscope.errors import TransactionAbortedError, TransactionTimeoutError
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Item
from tests.fix_mariadb import LIMITS


@pytest.fixture
def engine(mariadb_schema: sa.Engine) -> Iterator[sa.Engine]:
    """A synchronous engine with one connection and an overflow of one."""
    engine = sa.create_engine(mariadb_schema.url, pool_size=1, max_overflow=1)
    yield engine
    leaked = engine.pool.checkedout()  # type: ignore[attr-defined]
    engine.dispose()
    with mariadb_schema.connect() as connection:
        connection.execute(sa.delete(Item))
    assert 0 == leaked


@pytest.fixture
def db(engine: sa.Engine) -> Database[Any]:
    """A database over the engine."""
    return Database(engine)


@pytest.fixture
def ids(mariadb_schema: sa.Engine) -> Any:
    """What is committed."""

    def ids() -> list[int]:
        with mariadb_schema.connect() as connection:
            return list(connection.scalars(sa.select(Item.id).order_by(Item.id)))

    return ids


async def test_request_of_a_thread_is_committed_before_its_head(db, drive, ids):
    """G1, G3: what a worker thread has written is committed, or rolled back with a 500."""
    seen = []

    def write(number):
        db.session.add(Item(id=number))

    async def on_send(message):
        seen.append((message["type"].rpartition(".")[2], ids()))

    async def app(scope, receive, send):
        number = int(scope["path"][1:])
        await asyncio.to_thread(write, number)
        await send(start(number))
        await send(body(b"ok"))

    wrapped = DBSessionMiddleware(app, database=db)
    await drive(wrapped, http_scope("/200"), on_send=on_send)
    await drive(wrapped, http_scope("/500"), on_send=on_send)

    assert [("start", [200]), ("body", [200])] * 2 == seen


def test_timeout_is_the_servers(db, ids):
    """A thread can't be interrupted: the server ends the statement, as a TransactionTimeoutError.

    The connection's next user has no such limit.
    """
    began = time.monotonic()
    with pytest.raises(TransactionTimeoutError), db.transactional(timeout=0.1) as session:
        session.add(Item(id=1))
        session.flush()
        session.execute(sa.text("SELECT SLEEP(20)"))
    took = time.monotonic() - began
    with db.session_scope() as session:
        limits = session.execute(LIMITS).all()

    assert took < 10
    assert [] == limits
    assert [] == ids()


def test_swallowed_deadlock_is_not_committed(db, engine, ids):
    """G21: InnoDB has rolled back all of it, and what follows isn't committed either."""
    with db.session_scope() as session:
        session.add_all([Item(id=1), Item(id=2)])

    def write(number: int) -> Any:
        return sa.update(Item).where(Item.id == number).values(note="written")

    with engine.connect() as other:
        other.execute(sa.insert(Item), [{"id": number} for number in range(100, 120)])
        other.execute(write(2))
        # Its own request for the lock is under way in the server when ours completes the circle.
        with pytest.raises(TransactionAbortedError), db.session_scope() as session:
            session.add(Item(id=3))
            session.flush()
            session.execute(write(1))
            driver: Any = other.connection.driver_connection
            driver._execute_command(3, "UPDATE item SET note = 'written' WHERE id = 1")
            with pytest.raises(sa.exc.OperationalError):
                session.execute(write(2))
            driver._read_query_result()
            other.rollback()
            session.add(Item(id=4))

    assert [1, 2] == ids()


@pytest.mark.parametrize("what", ["busy", "idle"])
async def test_request_of_a_thread_is_over_in_time(db, engine, drive, ids, what):
    """A request's `timeout` ends its statement, and where it idles its connection is cut."""

    def work():
        db.session.add(Item(id=1))
        db.session.flush()
        if what == "busy":
            db.session.execute(sa.text("SELECT SLEEP(30)"))

    async def app(scope, receive, send):
        await asyncio.to_thread(work)
        while engine.pool.checkedout():
            await asyncio.sleep(0.01)
        await send(start(200))
        await send(body(b"ok"))

    began = time.monotonic()
    exchange = await drive(DBSessionMiddleware(app, database=db, timeout=0.2))

    assert 504 == exchange.status
    assert time.monotonic() - began < 10
    assert [] == ids()
