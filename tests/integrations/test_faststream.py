"""FastStream: each message has a session scope, committed before it is acknowledged.

The brokers are FastStream's own in-memory ones: its real pipeline of middlewares, with what a
message would tell the broker put on the timeline.
"""

import asyncio
import logging
from contextlib import suppress
from types import SimpleNamespace
from typing import Annotated, Any

import anyio.from_thread
import pytest
import sqlalchemy as sa
from faststream import AckPolicy, Depends, ExceptionMiddleware
from faststream.exceptions import AckMessage, NackMessage, RejectMessage
from faststream.kafka import KafkaBroker, TestKafkaBroker
from faststream.kafka.message import KafkaAckableMessage
from faststream.rabbit import RabbitBroker, RabbitMessage, TestRabbitBroker
from faststream.rabbit import message as rabbit_message
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    Outcome,
    TransactionAbortedError,
    current_scope,
    current_session,
)
from asgi_dbscope.integrations.faststream import SessionScopeMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import Base, Child, Item

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]

on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
"""What the broker does, whichever database it is."""


@pytest.fixture(autouse=True)
def _broker_on_the_timeline(monkeypatch, timeline):
    def recorder(verb: str, original: Any) -> Any:
        async def record(message: Any, **options: Any) -> None:
            is_first = message.committed is None
            await original(message, **options)
            if is_first:
                timeline.append(verb)

        return record

    for message_class in (rabbit_message.RabbitMessage, KafkaAckableMessage):
        for verb in ("ack", "nack", "reject"):
            original = getattr(message_class, verb)
            monkeypatch.setattr(message_class, verb, recorder(verb, original))


@pytest.fixture
def broker(db) -> RabbitBroker:
    """A broker whose messages have scopes."""
    return RabbitBroker(middlewares=[SessionScopeMiddleware(db)])


async def test_commits_before_the_ack(broker, rows, timeline):
    """G1: COMMIT is answered, and the connection is back, before the message is acknowledged."""

    @broker.subscriber("orders")
    async def place(number: int) -> None:
        current_session().add(Item(id=number))

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert [*COMMITTED, "ack"] == timeline
    assert [1] == await rows()


@on_sqlite
async def test_commits_before_the_result_is_published(broker, timeline):
    """G1: what a handler returned goes out after COMMIT, as a response's head does."""

    @broker.subscriber("orders")
    @broker.publisher("placed")
    async def place(number: int) -> int:
        current_session().add(Item(id=number))
        return number

    @broker.subscriber("placed")
    async def ship(number: int) -> None:
        timeline.append(f"placed {number}")

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert [*COMMITTED, "placed 1", "ack", "ack"] == timeline


@pytest.mark.parametrize(
    ("policy", "answer"),
    [
        (AckPolicy.NACK_ON_ERROR, "nack"),
        (AckPolicy.REJECT_ON_ERROR, "reject"),
        (AckPolicy.ACK, "ack"),
    ],
    ids=["nack_on_error", "reject_on_error", "ack"],
)
async def test_rolls_back_before_the_broker_hears_of_an_exception(
    policy, answer, broker, rows, timeline
):
    """G3: a handler that raises is rolled back, and then the policy has its way."""

    @broker.subscriber("orders", ack_policy=policy)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        raise LookupError

    async with TestRabbitBroker(broker):
        with pytest.raises(LookupError):
            await broker.publish(1, "orders")

    assert [*ROLLED_BACK, answer] == timeline
    assert [] == await rows()


async def test_failed_commit_is_a_failed_message(broker, rows, timeline):
    """G2: when COMMIT fails nothing is published, and the broker is told to deliver it again."""

    @broker.subscriber("orders", ack_policy=AckPolicy.NACK_ON_ERROR)
    @broker.publisher("placed")
    async def place(number: int) -> int:
        current_session().add(Child(id=number, item_id=404))
        return number

    @broker.subscriber("placed")
    async def ship(number: int) -> None:
        timeline.append(f"placed {number}")

    async with TestRabbitBroker(broker):
        with pytest.raises(IntegrityError):
            await broker.publish(1, "orders")

    assert "nack" == timeline[-1]
    assert not {"ack", "placed 1"} & set(timeline)


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_transaction_that_was_aborted_is_not_acknowledged(broker, timeline):
    """G21: after a swallowed SQL error the message is not taken for done."""

    @broker.subscriber("orders", ack_policy=AckPolicy.NACK_ON_ERROR)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        with suppress(DBAPIError):
            await current_session().execute(sa.text("SELECT 1 / 0"))

    async with TestRabbitBroker(broker):
        with pytest.raises(TransactionAbortedError):
            await broker.publish(1, "orders")

    assert "nack" == timeline[-1]


async def test_redelivered_message_starts_afresh(broker, rows):
    """G3: what a message left undone is done when it comes again."""
    deliveries = []

    @broker.subscriber("orders", ack_policy=AckPolicy.NACK_ON_ERROR)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        deliveries.append(number)
        if len(deliveries) == 1:
            raise ConnectionError

    async with TestRabbitBroker(broker):
        with pytest.raises(ConnectionError):
            await broker.publish(1, "orders")
        await broker.publish(1, "orders")

    assert [1, 1] == deliveries
    assert [1] == await rows()


@on_sqlite
@pytest.mark.parametrize(
    ("raised", "expected", "kept"),
    [
        (AckMessage, [*COMMITTED, "ack"], [1]),
        (NackMessage, [*ROLLED_BACK, "nack"], []),
        (RejectMessage, [*ROLLED_BACK, "reject"], []),
    ],
    ids=["ack", "nack", "reject"],
)
async def test_raised_answers_end_the_transaction_as_they_say(
    raised, expected, kept, broker, rows, timeline
):
    """G3: `AckMessage` calls the message done and commits, the others roll back; no result."""

    @broker.subscriber("orders")
    @broker.publisher("placed")
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        raise raised

    @broker.subscriber("placed")
    async def ship(number: int | None) -> None:
        timeline.append("placed")

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert expected == timeline
    assert kept == await rows()


@on_sqlite
async def test_ack_message_whose_commit_fails_is_not_acknowledged(broker, timeline):
    """G2: the broker isn't told of an `AckMessage` that could not be committed."""

    @broker.subscriber("orders", ack_policy=AckPolicy.NACK_ON_ERROR)
    async def place(number: int) -> None:
        current_session().add(Child(id=number, item_id=404))
        raise AckMessage

    async with TestRabbitBroker(broker):
        with pytest.raises(IntegrityError):
            await broker.publish(1, "orders")

    assert "nack" == timeline[-1]
    assert "ack" not in timeline


@on_sqlite
@pytest.mark.parametrize("verb", ["nack", "reject"])
async def test_message_that_was_refused_by_hand_is_rolled_back(verb, broker, rows, timeline):
    """G4: a handler that answers `nack()` and returns must not leave half of its work."""

    @broker.subscriber("orders", ack_policy=AckPolicy.MANUAL)
    async def place(number: int, message: RabbitMessage) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        await getattr(message, verb)()

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert "rollback" in timeline
    assert "commit" not in timeline
    assert [] == await rows()


@on_sqlite
async def test_refused_by_hand_in_autocommit_mode(db, rows):
    """In mode `autocommit` there is nothing to roll back, and no error because of that."""
    broker = RabbitBroker(middlewares=[SessionScopeMiddleware(db, mode="autocommit")])

    @broker.subscriber("orders", ack_policy=AckPolicy.MANUAL)
    async def place(number: int, message: RabbitMessage) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        await message.nack()

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert [1] == await rows()


@on_sqlite
async def test_ack_by_hand_is_warned_of_once(broker, caplog, timeline):
    """G1: `message.ack()` in the handler comes before the commit, and the log says so."""

    @broker.subscriber("orders", ack_policy=AckPolicy.MANUAL)
    async def place(number: int, message: RabbitMessage) -> None:
        current_session().add(Item(id=number))
        await message.ack()

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")
        await broker.publish(2, "orders")

    [warning] = [each for each in caplog.messages if "before the commit" in each]
    assert warning.startswith("Place: ")
    assert "db.on_commit(message.ack)" in warning


@on_sqlite
async def test_acknowledgement_on_receipt_is_warned_of(broker, caplog):
    """G1: a subscriber with `ACK_FIRST` may lose messages, and the log says what to do."""

    @broker.subscriber("orders", ack_policy=AckPolicy.ACK_FIRST)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert ["WARNING"] == [each.levelname for each in caplog.records if each.name == "asgi_dbscope"]
    assert "NACK_ON_ERROR" in caplog.text


@on_sqlite
async def test_kafka_acknowledges_first_unless_told_otherwise(db, caplog, timeline):
    """G1: Kafka's default is warned of; with a policy its offset is committed after ours."""
    broker = KafkaBroker(middlewares=[SessionScopeMiddleware(db)])

    @broker.subscriber("early")
    async def place_early(number: int) -> None:
        current_session().add(Item(id=number))

    @broker.subscriber("late", ack_policy=AckPolicy.NACK_ON_ERROR, group_id="shop")
    async def place_late(number: int) -> None:
        current_session().add(Item(id=number))

    async with TestKafkaBroker(broker):
        await broker.publish(1, "early")
        await broker.publish(2, "late")

    assert [*COMMITTED, *COMMITTED, "ack"] == timeline
    [warning] = [each for each in caplog.messages if "before the commit" in each]
    assert warning.startswith("PlaceEarly: ")


async def test_handler_and_dependencies_share_the_session(broker, db, rows):
    """G11: every way to the session gives the message's, down to the exits of dependencies."""
    seen = []

    async def audited():
        yield
        seen.append(current_session())
        current_session().add(Item(id=2))

    @broker.subscriber("orders")
    async def place(
        number: int,
        session: Annotated[AsyncSession, Depends(db.get_session)],
        audit: Annotated[Any, Depends(audited)],
    ) -> None:
        session.add(Item(id=number))
        async with db.get_session() as again:
            seen.extend([session, again, db.session, current_session(), current_scope().session])

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert 6 == len(seen)
    assert 1 == len({id(each) for each in seen})
    assert [1, 2] == await rows()


@on_sqlite
async def test_def_handler_sees_the_scope_from_its_thread(broker, rows):
    """G11: a `def` handler adds from its worker thread, and queries by way of the loop."""
    found = []

    @broker.subscriber("orders")
    def place(number: int) -> None:
        session = current_session()
        session.add(Item(id=number))
        found.append(anyio.from_thread.run(session.scalar, sa.select(Item.id)))

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert [1] == found
    assert [1] == await rows()


async def test_concurrent_messages_have_sessions_of_their_own(broker, rows):
    """G12: two handlers that run at the same time don't share a session."""
    sessions = []
    both = asyncio.Barrier(2)

    @broker.subscriber("orders")
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        sessions.append(current_session())
        await both.wait()
        if number == 2:
            raise LookupError

    async with TestRabbitBroker(broker):
        await asyncio.gather(
            broker.publish(1, "orders"), broker.publish(2, "orders"), return_exceptions=True
        )

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


@on_sqlite
async def test_message_without_a_statement_costs_no_connection(broker, timeline):
    """G5: a handler that leaves the database alone takes no connection."""

    @broker.subscriber("orders")
    async def place(number: int) -> None: ...

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert ["ack"] == timeline


async def test_cancelled_handler_is_rolled_back_and_not_acknowledged(broker, rows, timeline):
    """G10: a consumer that is stopped leaves the message to be delivered again."""
    inside = asyncio.Event()

    @broker.subscriber("orders", ack_policy=AckPolicy.NACK_ON_ERROR)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        inside.set()
        await asyncio.Event().wait()

    async with TestRabbitBroker(broker):
        consumer = asyncio.create_task(broker.publish(1, "orders"))
        await inside.wait()
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer

    assert ROLLED_BACK == timeline[:4]
    assert set(timeline[4:]) <= {"nack"}  # older FastStream says so, newer leaves it to the broker
    assert [] == await rows()


@on_sqlite
async def test_exception_middleware_before_ours_hides_nothing(db, rows, timeline):
    """G3: listed before ours it answers for an exception that has rolled back."""
    fallback = ExceptionMiddleware(publish_handlers={LookupError: lambda error: "none"})
    broker = RabbitBroker(middlewares=[fallback, SessionScopeMiddleware(db)])

    @broker.subscriber("orders")
    async def place(number: int) -> str:
        current_session().add(Item(id=number))
        await current_session().flush()
        raise LookupError

    async with TestRabbitBroker(broker):
        answer = await broker.request(1, "orders")

    assert "none" == await answer.decode()
    assert [*ROLLED_BACK, "ack"] == timeline
    assert [] == await rows()


async def test_options_are_the_scopes(db, rows):
    """G20: `read_only` and `isolation_level` are those of every message's transaction."""
    broker = RabbitBroker(
        middlewares=[SessionScopeMiddleware(db, read_only=True, isolation_level="SERIALIZABLE")]
    )
    seen = []

    @broker.subscriber("orders")
    async def place(number: int) -> None:
        seen.append((db.scope.options.read_only, db.scope.options.isolation_level))
        current_session().add(Item(id=number))

    async with TestRabbitBroker(broker):
        with pytest.raises(DBAPIError):
            await broker.publish(1, "orders")

    assert [(True, "SERIALIZABLE")] == seen
    assert [] == await rows()


@on_sqlite
async def test_each_database_has_a_middleware(db, engine, tmp_path, rows):
    """G11: two databases are two middlewares, and both are rolled back or committed."""
    reports = Database(f"sqlite+aiosqlite:///{tmp_path / 'reports.db'}", name="reports")
    async with reports.session_scope() as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    broker = RabbitBroker(middlewares=[SessionScopeMiddleware(db), SessionScopeMiddleware(reports)])

    @broker.subscriber("orders")
    async def place(number: int) -> None:
        db.session.add(Item(id=number))
        reports.session.add(Item(id=number))
        await reports.session.flush()
        if number == 2:
            raise LookupError

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")
        with pytest.raises(LookupError):
            await broker.publish(2, "orders")

    async with reports.session_scope() as session:
        assert [1] == list(await session.scalars(sa.select(Item.id)))
    assert [1] == await rows()
    await reports.dispose()


@on_sqlite
async def test_ack_by_a_hook_is_after_the_commit(broker, db, caplog, timeline):
    """G1: `db.on_commit(message.ack)` is after COMMIT, and nothing is warned of."""

    @broker.subscriber("orders", ack_policy=AckPolicy.MANUAL)
    async def place(number: int, message: RabbitMessage) -> None:
        db.on_commit(message.ack)
        current_session().add(Item(id=number))

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")

    assert [*COMMITTED, "ack"] == timeline
    assert [] == [each for each in caplog.records if each.name == "asgi_dbscope"]


@on_sqlite
async def test_handlers_messages_wait_for_its_commit(broker, db, timeline):
    """G1: `db.on_commit(broker.publish, ...)` publishes after COMMIT, and not after a rollback."""

    @broker.subscriber("orders")
    async def place(number: int) -> None:
        db.on_commit(broker.publish, number, "placed")
        current_session().add(Item(id=number))
        if number == 2:
            raise LookupError

    @broker.subscriber("placed")
    async def ship(number: int) -> None:
        timeline.append(f"ship {number}")

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")
        with pytest.raises(LookupError):
            await broker.publish(2, "orders")

    assert [*COMMITTED, "ship 1", "ack", "ack", "reject"] == timeline


@on_sqlite
async def test_message_in_a_request_is_independent_of_it(broker, db, drive, rows):
    """G12: a handler that runs inside of a request has a transaction and a session of its own."""
    sessions = []

    @broker.subscriber("orders")
    async def place(number: int) -> None:
        sessions.append(current_session())
        current_session().add(Item(id=number))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(current_session())
        await broker.publish(1, "orders")
        assert current_session() is sessions[0]
        await send(start(500))
        await send(body())

    async with TestRabbitBroker(broker):
        await drive(DBSessionMiddleware(app, database=db))

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


@on_sqlite
async def test_answer_to_a_request_is_nobodys_message(broker, caplog):
    """What `broker.request()` receives goes through the middleware, and means nothing to it."""
    outcomes = []

    @broker.subscriber("orders")
    async def place(number: int) -> int:
        outcomes.append(current_scope().outcome)
        return number

    async with TestRabbitBroker(broker):
        answer = await broker.request(1, "orders")

    assert 1 == await answer.decode()
    assert [Outcome.NOT_BEGUN] == outcomes
    assert [] == [each for each in caplog.records if each.levelno > logging.INFO]


@on_sqlite
async def test_def_handler_on_a_synchronous_engine_is_decorated(engine, rows, timeline):
    """G1: `@db.session_scope()` on a `def` handler commits in its thread, before the ack."""
    sync_engine = sa.create_engine(engine.url.set(drivername="sqlite"))
    timeline.watch(SimpleNamespace(sync_engine=sync_engine))
    sync_db = Database(sync_engine)
    broker = RabbitBroker()

    @broker.subscriber("orders")
    @sync_db.session_scope()
    def place(number: int) -> None:
        sync_db.session.add(Item(id=number))

    async with TestRabbitBroker(broker):
        await broker.publish(1, "orders")
    sync_engine.dispose()

    assert [*COMMITTED, "ack"] == timeline
    assert [1] == await rows()


@on_sqlite
def test_wrong_options_are_an_error_at_once(db):
    """A wrong option is told when the middleware is made, not at the first message."""
    with pytest.raises(ConfigurationError, match="mode must be one of"):
        SessionScopeMiddleware(db, mode="sometimes")  # type: ignore[arg-type]


def test_synchronous_database_is_refused():
    """G13: a `Session` must not be shared with the event loop, so a decorator is asked for."""
    with pytest.raises(ConfigurationError, match="Decorate the `def`"):
        SessionScopeMiddleware(Database(sa.create_engine("sqlite://")))
