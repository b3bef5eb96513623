"""taskiq: each message has a session scope, committed before its result and its acknowledgement.

The broker is taskiq's in-memory one with its real receiver; its messages can be acknowledged, as
those of a broker with a queue are, and what becomes of them is put on the timeline.
"""

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import (
    AckableMessage,
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
)
from taskiq.acks import AcknowledgeType
from taskiq.message import BrokerMessage

from asgi_dbscope import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    EventLoopMismatchError,
    TransactionAbortedError,
    current_scope,
    current_session,
)
from asgi_dbscope.integrations.taskiq import SessionScopeMiddleware
from tests.fix_asgi import body, start
from tests.fix_database import Base, Child, Item, Timeline

COMMITTED = ["checkout", "begin", "commit", "checkin"]
ROLLED_BACK = ["checkout", "begin", "rollback", "checkin"]
ANSWERED = ["saved", "ack"]

on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
"""What the broker does, whichever database it is."""


class Broker(InMemoryBroker):
    """The in-memory broker, whose messages are acknowledged and whose results are saved.

    A task is run where it is kicked; an exception that goes through the receiver itself is kept.
    """

    def __init__(self, timeline: Timeline) -> None:
        super().__init__(max_async_tasks=10)
        self.errors: list[BaseException] = []
        self._timeline = timeline
        save = self.result_backend.set_result

        async def save_and_tell(task_id: str, result: TaskiqResult[Any]) -> None:
            await save(task_id, result)
            timeline.append("saved")

        self.result_backend.set_result = save_and_tell  # type: ignore[method-assign]

    async def kick(self, message: BrokerMessage) -> None:
        delivery = AckableMessage(data=message.message, ack=lambda: self._timeline.append("ack"))
        worker = asyncio.create_task(self.receiver.callback(delivery))
        try:
            await worker
        except Exception as error:
            self.errors.append(error)


@pytest.fixture
def given_back(engine):
    """Set when a connection has come back to the pool."""
    event = asyncio.Event()
    sa.event.listen(engine.sync_engine, "checkin", lambda *args: event.set())
    return event


@pytest.fixture
def make_broker(timeline):
    """Make a broker with middlewares; its threads are ended after the test."""
    made: list[Broker] = []

    def make(*middlewares: TaskiqMiddleware) -> Broker:
        broker = Broker(timeline)
        broker.add_middlewares(*middlewares)
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.executor.shutdown()


@pytest.fixture
def broker(make_broker, db) -> Broker:
    """A broker whose messages have scopes."""
    made: Broker = make_broker(SessionScopeMiddleware(db))
    return made


async def test_commits_before_the_result_and_the_ack(broker, rows, timeline):
    """G1: COMMIT is answered, and the connection is back, before anybody hears of the task."""

    @broker.task
    async def place(number: int) -> int:
        current_session().add(Item(id=number))
        return number

    kicked = await place.kiq(1)

    assert [*COMMITTED, *ANSWERED] == timeline
    assert 1 == (await kicked.get_result()).return_value
    assert [1] == await rows()


@pytest.mark.parametrize("early", ["when_received", "when_executed"])
@on_sqlite
async def test_no_ack_type_of_the_worker_is_before_the_commit(early, broker, timeline):
    """G1: a worker with another `--ack-type` acknowledges after the commit all the same."""
    broker.receiver.ack_time = AcknowledgeType(early)

    @broker.task
    async def place(number: int) -> None:
        current_session().add(Item(id=number))

    await place.kiq(1)

    assert [*COMMITTED, *ANSWERED] == timeline


@pytest.mark.parametrize("early", ["when_received", "when_executed"])
@on_sqlite
async def test_no_ack_type_of_a_task_is_before_the_commit(early, broker, timeline, caplog):
    """G1: a task's own early `ack_type` is overruled, and the log says so."""

    @broker.task(ack_type=early)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))

    await place.kiq(1)

    assert [*COMMITTED, *ANSWERED] == timeline
    assert f"ack_type='{early}'" in caplog.text


@on_sqlite
async def test_manual_ack_stays_the_tasks_own(broker, timeline):
    """A task with `ack_type="manual"` acknowledges by itself; nobody else does."""

    @broker.task(ack_type="manual")
    async def place(number: int, context: Annotated[Context, TaskiqDepends()]) -> None:
        current_session().add(Item(id=number))
        await current_session().commit()
        await context.ack()

    await place.kiq(1)

    assert [*COMMITTED, "ack", "saved"] == timeline


async def test_rolls_back_when_the_task_raises(broker, rows, timeline):
    """G3: a task that raises is rolled back before its error is saved."""

    @broker.task
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        raise LookupError

    kicked = await place.kiq(1)

    assert [*ROLLED_BACK, *ANSWERED] == timeline
    assert isinstance((await kicked.get_result()).error, LookupError)
    assert [] == await rows()


async def test_failed_commit_is_the_tasks_failure(broker, rows, caplog):
    """G2: when COMMIT fails the result is the database's error, and never a success."""

    @broker.task
    async def place(number: int) -> int:
        current_session().add(Item(id=number))
        current_session().add(Child(id=number, item_id=404))
        return number

    result = await (await place.kiq(1)).get_result()

    assert (True, None) == (result.is_err, result.return_value)
    assert isinstance(result.error, IntegrityError)
    assert "its session scope ended with an error" in caplog.text
    assert [] == await rows()


@pytest.mark.parametrize("failure", ["task", "commit"])
async def test_failed_transaction_is_tried_again(failure, make_broker, db, rows, timeline):
    """G2, G3: taskiq's retries see a failed COMMIT as they see a task that raises."""
    broker = make_broker(SimpleRetryMiddleware(), SessionScopeMiddleware(db))
    attempts = []

    @broker.task(retry_on_error=True)
    async def place(number: int) -> None:
        attempts.append(number)
        current_session().add(Item(id=number))
        await current_session().flush()
        if len(attempts) == 1:
            if failure == "task":
                raise ConnectionError
            current_session().add(Child(id=number, item_id=404))

    await place.kiq(1)

    assert [1, 1] == attempts
    assert ["saved", "ack", "ack"] == [each for each in timeline if each in ANSWERED]
    assert [1] == await rows()


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_transaction_that_was_aborted_is_no_success(broker):
    """G21: after a swallowed SQL error the task is not taken for done."""

    @broker.task
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        with suppress(DBAPIError):
            await current_session().execute(sa.text("SELECT 1 / 0"))

    result = await (await place.kiq(1)).get_result()

    assert isinstance(result.error, TransactionAbortedError)


@on_sqlite
async def test_requeued_task_is_rolled_back(broker, rows, timeline):
    """G3: `context.requeue()` ends a task by an exception, so it starts afresh."""
    attempts = []

    @broker.task
    async def place(number: int, context: Annotated[Context, TaskiqDepends()]) -> None:
        attempts.append(number)
        if len(attempts) == 1:
            current_session().add(Item(id=99))
            await context.requeue()
        current_session().add(Item(id=number))

    await place.kiq(1)

    assert [1, 1] == attempts
    assert [*COMMITTED, "saved", "ack", "ack"] == timeline
    assert [1] == await rows()


async def test_timeout_rolls_back(broker, rows):
    """G10: a task that runs out of its `timeout` is rolled back."""

    @broker.task(timeout=0.05)
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        await asyncio.Event().wait()

    result = await (await place.kiq(1)).get_result()

    assert isinstance(result.error, TimeoutError)
    assert [] == await rows()


async def test_cancelled_task_is_rolled_back_and_not_acknowledged(broker, rows, timeline):
    """G10: a worker that is stopped leaves the message to be delivered again."""
    inside = asyncio.Event()

    @broker.task
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()
        inside.set()
        await asyncio.Event().wait()

    worker = asyncio.create_task(place.kiq(1))
    await inside.wait()
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker

    assert ROLLED_BACK == timeline
    assert [] == await rows()


async def test_task_and_dependencies_share_the_session(broker, db, rows):
    """G11: every way to the session gives the message's, down to the exits of dependencies."""
    seen = []

    async def audited():
        yield
        seen.append(current_session())
        current_session().add(Item(id=2))

    @broker.task
    async def place(
        number: int,
        session: Annotated[AsyncSession, TaskiqDepends(current_session)],
        audit: Annotated[Any, TaskiqDepends(audited)],
    ) -> None:
        session.add(Item(id=number))
        async with db.get_session() as again:
            seen.extend([session, again, db.session, current_session(), current_scope().session])

    result = await (await place.kiq(1)).get_result()

    assert result.error is None
    assert 6 == len(seen)
    assert 1 == len({id(each) for each in seen})
    assert [1, 2] == await rows()


@on_sqlite
async def test_def_task_sees_the_scope_from_its_thread(broker, rows):
    """G11: a `def` task may add to the session; a query in its thread is refused."""

    @broker.task
    def place(number: int) -> None:
        current_session().add(Item(id=number))
        if number == 2:
            current_session().scalar(sa.select(Item.id)).send(None)

    assert (await (await place.kiq(1)).get_result()).error is None
    refused = (await (await place.kiq(2)).get_result()).error

    assert isinstance(refused, EventLoopMismatchError)
    assert [1] == await rows()


async def test_concurrent_messages_have_sessions_of_their_own(broker, rows):
    """G12: two tasks that run at the same time don't share a session."""
    sessions = []
    both = asyncio.Barrier(2)

    @broker.task
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        sessions.append(current_session())
        await both.wait()
        if number == 2:
            raise LookupError

    await asyncio.gather(place.kiq(1), place.kiq(2))

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


@on_sqlite
async def test_message_without_a_statement_costs_no_connection(broker, timeline):
    """G5: a task that leaves the database alone takes no connection."""

    @broker.task
    async def place(number: int) -> None: ...

    await place.kiq(1)

    assert ANSWERED == timeline


@on_sqlite
async def test_tasks_run_where_they_are_kicked_nest(db, rows):
    """G12: with `await_inplace` a task kicked by a task has a session of its own."""
    broker = InMemoryBroker(await_inplace=True).with_middlewares(SessionScopeMiddleware(db))
    sessions = []

    @broker.task
    async def inner(number: int) -> None:
        sessions.append(current_session())
        current_session().add(Item(id=number))

    @broker.task
    async def outer(number: int) -> None:
        sessions.append(current_session())
        await inner.kiq(number)
        assert current_session() is sessions[0]
        raise LookupError

    await outer.kiq(1)
    broker.executor.shutdown()

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


async def test_dependency_that_fails_at_its_exit_is_rolled_back(broker, given_back, rows, timeline):
    """G3: what taskiq does not report to middlewares is rolled back too, and not acknowledged."""

    async def failing():
        yield
        raise ConnectionError

    @broker.task
    async def place(number: int, failing: Annotated[Any, TaskiqDepends(failing)]) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()

    await place.kiq(1)
    await given_back.wait()

    assert [ConnectionError] == [type(each) for each in broker.errors]
    assert ROLLED_BACK == timeline
    assert [] == await rows()


class ExchangeMessage(TaskiqMiddleware):
    """A middleware that hands on another message than it was given."""

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        return TaskiqMessage.model_validate_json(message.model_dump_json())


@on_sqlite
async def test_middleware_after_ours_that_loses_the_scope_is_told_of(
    make_broker, db, given_back, timeline
):
    """G1: a scope that was lost before it could be committed is an error, and no success."""
    broker = make_broker(SessionScopeMiddleware(db), ExchangeMessage())

    @broker.task
    async def place(number: int) -> None:
        current_session().add(Item(id=number))
        await current_session().flush()

    result = await (await place.kiq(1)).get_result()
    await given_back.wait()

    assert isinstance(result.error, ConfigurationError)
    assert "commit" not in timeline


async def test_options_are_the_scopes(make_broker, db, rows):
    """G20: `read_only` and `isolation_level` are those of every message's transaction."""
    broker = make_broker(SessionScopeMiddleware(db, read_only=True, isolation_level="SERIALIZABLE"))
    seen = []

    @broker.task
    async def place(number: int) -> None:
        seen.append((db.scope.options.read_only, db.scope.options.isolation_level))
        current_session().add(Item(id=number))

    result = await (await place.kiq(1)).get_result()

    assert isinstance(result.error, DBAPIError)
    assert [(True, "SERIALIZABLE")] == seen
    assert [] == await rows()


@on_sqlite
async def test_each_database_has_a_middleware(make_broker, db, tmp_path, rows):
    """G11: two databases are two middlewares, and both are rolled back or committed."""
    reports = Database(f"sqlite+aiosqlite:///{tmp_path / 'reports.db'}", name="reports")
    async with reports.session_scope() as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    broker = make_broker(SessionScopeMiddleware(db), SessionScopeMiddleware(reports))

    @broker.task
    async def place(number: int) -> None:
        db.session.add(Item(id=number))
        reports.session.add(Item(id=number))
        await reports.session.flush()
        if number == 2:
            raise LookupError

    await place.kiq(1)
    await place.kiq(2)

    async with reports.session_scope() as session:
        assert [1] == list(await session.scalars(sa.select(Item.id)))
    assert [1] == await rows()
    await reports.dispose()


@on_sqlite
async def test_message_in_a_request_is_independent_of_it(broker, db, drive, rows):
    """G12: a task that runs inside of a request has a transaction and a session of its own."""
    sessions = []

    @broker.task
    async def place(number: int) -> None:
        sessions.append(current_session())
        current_session().add(Item(id=number))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(current_session())
        await place.kiq(1)
        await send(start(500))
        await send(body())

    await drive(DBSessionMiddleware(app, database=db))

    assert sessions[0] is not sessions[1]
    assert [1] == await rows()


def answering(status: int, *, work: Any) -> Any:
    """An app that does some work and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work()
        await send(start(status))
        await send(body())

    return app


@pytest.fixture
def kicked(make_broker, timeline):
    """A task that leaves the database alone, and puts itself on the timeline."""

    @make_broker().task
    async def ship(number: int) -> None:
        timeline.append(f"ship {number}")

    return ship


async def test_job_is_enqueued_after_the_commit_of_its_request(kicked, db, drive, timeline):
    """G1: `db.on_commit(task.kiq, ...)` enqueues when COMMIT is answered, before the head."""

    async def work() -> None:
        current_session().add(Item(id=1))
        db.on_commit(kicked.kiq, 1)

    await drive(DBSessionMiddleware(answering(201, work=work), database=db))

    assert [*COMMITTED, "ship 1", *ANSWERED, "start 201", "last body"] == timeline


@on_sqlite
async def test_job_need_not_delay_the_response(kicked, db, drive, timeline):
    """G1: with `when="after_response"` the client doesn't wait for the broker."""

    async def work() -> None:
        current_session().add(Item(id=1))
        db.on_commit(kicked.kiq, 1, when="after_response")

    await drive(DBSessionMiddleware(answering(201, work=work), database=db))

    assert [*COMMITTED, "start 201", "last body", "ship 1", *ANSWERED] == timeline


@pytest.mark.parametrize("failure", ["status", "exception", "commit", "rollback_only"])
async def test_job_of_a_request_that_is_rolled_back_is_not_enqueued(
    failure, kicked, db, drive, rows, timeline
):
    """G3: no end of a request but a real COMMIT enqueues its jobs."""

    async def work() -> None:
        db.on_commit(kicked.kiq, 1)
        db.on_commit(kicked.kiq, 2, when="after_response")
        current_session().add(Item(id=1))
        await current_session().flush()
        if failure == "exception":
            raise LookupError
        if failure == "commit":
            current_session().add(Child(id=1, item_id=404))
        if failure == "rollback_only":
            db.set_rollback_only()

    status = 500 if failure == "status" else 201
    await drive(DBSessionMiddleware(answering(status, work=work), database=db))

    assert not [each for each in timeline if each.startswith("ship")]
    assert [] == await rows()


@on_sqlite
async def test_job_of_a_savepoint_that_is_rolled_back_is_not_enqueued(kicked, db, timeline):
    """G3: what is enqueued under a savepoint follows the savepoint."""
    async with db.session_scope() as session:
        session.add(Item(id=1))
        db.on_commit(kicked.kiq, 1)
        with pytest.raises(LookupError):
            async with db.transactional("NESTED"):
                db.on_commit(kicked.kiq, 2)
                raise LookupError

    assert ["ship 1"] == [each for each in timeline if each.startswith("ship")]


@on_sqlite
async def test_manual_ack_by_a_hook_is_after_the_commit(broker, db, timeline):
    """G1, G3: `db.on_commit(context.ack)` acknowledges after COMMIT; a failed task stays queued."""

    @broker.task(ack_type="manual")
    async def place(number: int, context: Annotated[Context, TaskiqDepends()]) -> None:
        db.on_commit(context.ack)
        current_session().add(Item(id=number))
        await current_session().flush()
        if number == 2:
            raise LookupError

    await place.kiq(1)
    await place.kiq(2)

    assert [*COMMITTED, "ack", "saved", *ROLLED_BACK, "saved"] == timeline


@on_sqlite
async def test_def_task_on_a_synchronous_engine_is_decorated(make_broker, engine, rows, timeline):
    """G1: `@db.session_scope()` on a `def` task commits in its thread, before the result."""
    sync_engine = sa.create_engine(engine.url.set(drivername="sqlite"))
    timeline.watch(SimpleNamespace(sync_engine=sync_engine))
    sync_db = Database(sync_engine)

    @make_broker().task(ack_type="when_executed")
    @sync_db.session_scope()
    def place(number: int) -> None:
        sync_db.session.add(Item(id=number))

    result = await (await place.kiq(1)).get_result()
    sync_engine.dispose()

    assert result.error is None
    assert [*COMMITTED, "ack", "saved"] == timeline
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
