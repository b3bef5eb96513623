"""dramatiq: `@db.session_scope()` on an actor commits before the message is acknowledged.

The broker is dramatiq's in-memory one with its real worker; what becomes of a message is put on
the timeline.
"""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Shutdown
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from asgi_dbscope import Database, DBSessionMiddleware, current_session
from tests.fix_asgi import body, start
from tests.fix_database import Child, Item

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]

on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
"""What the broker does, whichever database it is."""


@pytest.fixture
def worker_db(engine, timeline) -> Iterator[Database[Session]]:
    """A database over a synchronous engine, on the schema of `engine`."""
    driver = "sqlite" if engine.dialect.name == "sqlite" else "postgresql+psycopg"
    sync_engine = sa.create_engine(engine.url.set(drivername=driver))
    if driver == "sqlite":

        @sa.event.listens_for(sync_engine, "connect")
        def enforce_foreign_keys(connection: Any, record: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")

    with sync_engine.connect():
        pass  # what the driver asks a new database is nothing of the test's
    timeline.watch(SimpleNamespace(sync_engine=sync_engine))
    yield Database(sync_engine)
    sync_engine.dispose()


@pytest.fixture
def broker(timeline) -> StubBroker:
    """The in-memory broker; it tells what becomes of its messages."""

    class Broker(StubBroker):
        def consume(self, *args: Any, **kwargs: Any) -> Any:
            consumer: Any = super().consume(*args, **kwargs)
            for verb in ("ack", "nack"):
                setattr(consumer, verb, _recorder(timeline, verb, getattr(consumer, verb)))
            return consumer

    return Broker()


def _recorder(timeline: list[str], verb: str, answer: Any) -> Any:
    def record(message: Any) -> None:
        if not message.queue_name.endswith(".DQ"):  # where messages wait to be tried again
            timeline.append(verb)
        answer(message)

    return record


@pytest.fixture
def work(broker) -> Callable[..., None]:
    """Have all messages processed by a worker."""

    def work(threads: int = 1) -> None:
        worker = dramatiq.Worker(broker, worker_timeout=20, worker_threads=threads)
        worker.start()
        try:
            broker.join("default", timeout=20_000, fail_fast=False)
        finally:
            worker.stop()

    return work


async def test_commits_before_the_ack(broker, work, worker_db, rows, timeline):
    """G1: COMMIT is answered, and the connection is back, before the message is acknowledged."""

    @dramatiq.actor(broker=broker)
    @worker_db.session_scope()
    def place(number: int) -> None:
        current_session().add(Item(id=number))

    place.send(1)
    work()

    assert [*COMMITTED, "ack"] == timeline
    assert [1] == await rows()


@pytest.mark.parametrize("raised", [LookupError, Shutdown], ids=["exception", "shutdown"])
async def test_actor_that_raises_is_rolled_back_and_tried_again(
    raised, broker, work, worker_db, rows, timeline
):
    """G3: an exception, and the end of the worker too, rolls back; the next attempt is fresh."""
    attempts = []

    @dramatiq.actor(broker=broker, min_backoff=1)
    @worker_db.session_scope()
    def place(number: int) -> None:
        attempts.append(number)
        worker_db.session.add(Item(id=number))
        worker_db.session.flush()
        if len(attempts) == 1:
            raise raised

    place.send(1)
    work()

    assert [1, 1] == attempts
    assert [*ROLLED_BACK, "ack", *COMMITTED, "ack"] == timeline
    assert [1] == await rows()


async def test_actor_whose_commit_fails_has_failed(broker, work, worker_db, rows, timeline):
    """G2: when COMMIT fails the message is tried again, and is no success in the end."""

    @dramatiq.actor(broker=broker, min_backoff=1, max_retries=1)
    @worker_db.session_scope()
    def place(number: int) -> None:
        worker_db.session.add(Item(id=number))
        worker_db.session.add(Child(id=number, item_id=404))

    place.send(1)
    work()

    [dead] = broker.dead_letters
    assert isinstance(dead._exception, IntegrityError)
    assert "nack" == timeline[-1]
    assert [] == await rows()


async def test_functions_of_an_actor_join_its_transaction(broker, work, worker_db, rows, timeline):
    """G11: what an actor calls is part of one transaction, whichever way it reaches the session."""
    seen = []

    @worker_db.transactional()
    def add(number: int) -> None:
        seen.extend([current_session(), worker_db.session])
        current_session().add(Item(id=number))

    @dramatiq.actor(broker=broker)
    @worker_db.transactional()
    def place(number: int) -> None:
        seen.append(worker_db.session)
        add(number)
        add(number + 1)

    place.send(1)
    work()

    assert 1 == len({id(each) for each in seen})
    assert [*COMMITTED, "ack"] == timeline
    assert [1, 2] == await rows()


async def test_concurrent_actors_have_sessions_of_their_own(broker, work, worker_db, rows):
    """G12: two threads that run the same actor don't share a session."""
    sessions = []
    both = threading.Barrier(2, timeout=20)

    @dramatiq.actor(broker=broker, max_retries=0)
    @worker_db.session_scope()
    def place(number: int) -> None:
        sessions.append(worker_db.session)
        both.wait()
        worker_db.session.add(Item(id=number))
        if number == 2:
            raise LookupError

    place.send(1)
    place.send(2)
    work(threads=2)

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


@on_sqlite
async def test_next_actor_is_sent_for_after_the_commit(broker, work, worker_db, timeline):
    """G1: `db.on_commit(actor.send, ...)` enqueues after COMMIT, and not after a rollback."""

    @dramatiq.actor(broker=broker)
    def ship(number: int) -> None:
        timeline.append(f"ship {number}")

    @dramatiq.actor(broker=broker, max_retries=0)
    @worker_db.session_scope()
    def place(number: int) -> None:
        worker_db.on_commit(ship.send, number)
        worker_db.session.add(Item(id=number))
        if number == 2:
            raise LookupError

    place.send(1)
    work()
    place.send(2)
    work()

    assert timeline.index("commit") < timeline.index("ship 1")
    assert "ship 2" not in timeline


@on_sqlite
async def test_request_sends_for_an_actor_after_its_commit(broker, db, drive, timeline):
    """G1: a request on an asynchronous engine enqueues when its COMMIT is answered."""

    @dramatiq.actor(broker=broker)
    def ship(number: int) -> None: ...

    def send_for(number: int) -> None:
        ship.send(number)
        timeline.append(f"send {number}")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_session().add(Item(id=1))
        db.on_commit(send_for, 1)
        await send(start(201))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert [*COMMITTED, "send 1", "start 201", "last body"] == timeline
    assert 1 == broker.queues["default"].qsize()
