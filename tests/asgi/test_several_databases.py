"""Several databases in one middleware."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asgi_dbscope import (
    AmbiguousDatabaseError,
    Database,
    DBSessionMiddleware,
    Outcome,
    SessionScopeClosedError,
    current_scope,
    current_session,
)
from tests.fix_asgi import body, start
from tests.fix_database import Child, Item

BOTH_COMMITTED = ["first begin", "second begin", "first commit", "second commit"]


@pytest.fixture
async def second_engine(make_engine):
    """A second database, on SQLite, with the same schema."""
    engine = make_engine("sqlite", file="second.db")
    yield engine
    assert 0 == engine.pool.checkedout()
    await engine.dispose()


@pytest.fixture
def first(engine):
    """The first database, under the name of default."""
    return Database(engine)


@pytest.fixture
def second(second_engine):
    """The second database."""
    return Database(second_engine, name="second")


@pytest.fixture
def events(engine, second_engine):
    """Which database began, committed and rolled back, in order."""
    happened: list[str] = []
    for name, each in (("first", engine), ("second", second_engine)):
        for event in ("begin", "commit", "rollback"):

            def note(*args, told=f"{name} {event}"):
                happened.append(told)

            sa.event.listen(each.sync_engine, event, note)
    return happened


async def second_rows(engine: AsyncEngine) -> list[int]:
    """What is committed in the second database."""
    async with engine.connect() as connection:
        return list(await connection.scalars(sa.select(Item.id).order_by(Item.id)))


async def answer(send, status=200):
    """Send a whole response."""
    await send(start(status))
    await send(body(b"ok"))


@pytest.mark.parametrize("nested", [False, True])
async def test_databases_commit_in_their_order(
    first, second, second_engine, drive, rows, events, nested
):
    """G1: At the head the databases are committed in the order in which they were named."""

    async def app(scope, receive, send):
        second.session.add(Item(id=2))
        first.session.add(Item(id=1))
        await first.session.flush()
        await second.session.flush()
        await answer(send)

    async def on_send(message):
        assert BOTH_COMMITTED == events

    middleware = (
        DBSessionMiddleware(DBSessionMiddleware(app, database=first), database=second)
        if nested
        else DBSessionMiddleware(app, databases=[first, second])
    )
    exchange = await drive(middleware, on_send=on_send)

    assert exchange.error is None
    assert 2 == len(exchange.messages)
    assert [1] == await rows()
    assert [2] == await second_rows(second_engine)


async def test_database_that_is_not_used_costs_nothing(first, second, drive, rows, events):
    """G5: Of several databases only the one that is used begins anything."""

    async def app(scope, receive, send):
        first.session.add(Item(id=1))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert ["first begin", "first commit"] == events
    assert [1] == await rows()


async def test_second_commit_that_fails_keeps_the_first(
    first, second, second_engine, drive, rows, events
):
    """G2: The second COMMIT fails: no success is sent, though the first has been committed."""

    async def app(scope, receive, send):
        await first.session.execute(sa.insert(Item).values(id=1))
        await second.session.execute(sa.insert(Item).values(id=2))
        await second.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert BOTH_COMMITTED == events[:4]
    assert [1] == await rows()
    assert [] == await second_rows(second_engine)
    assert "was rolled back" in "".join(exchange.error.__notes__)


async def test_first_commit_that_fails_rolls_back_the_rest(
    first, second, second_engine, drive, rows, events
):
    """G2: The first COMMIT fails: the databases after it are rolled back."""

    async def app(scope, receive, send):
        await first.session.execute(sa.insert(Item).values(id=1))
        await first.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await second.session.execute(sa.insert(Item).values(id=2))
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert [] == exchange.messages
    assert "second commit" not in events
    assert "second rollback" in events
    assert [] == await rows()
    assert [] == await second_rows(second_engine)


@pytest.mark.parametrize("raised", [False, True])
async def test_error_rolls_back_every_database(
    first, second, second_engine, drive, rows, events, raised
):
    """G3: An exception, or a 500, rolls back every database."""

    async def app(scope, receive, send):
        await first.session.execute(sa.insert(Item).values(id=1))
        await second.session.execute(sa.insert(Item).values(id=2))
        if raised:
            raise LookupError
        await answer(send, 500)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert isinstance(exchange.error, LookupError) == raised
    assert ["first rollback", "second rollback"] == events[2:]
    assert [] == await rows()
    assert [] == await second_rows(second_engine)


async def test_rollback_only_is_of_one_database(first, second, second_engine, drive, rows):
    """G4: `set_rollback_only()` of one database leaves the other alone."""

    async def app(scope, receive, send):
        first.session.add(Item(id=1))
        second.session.add(Item(id=2))
        await first.session.flush()
        first.set_rollback_only()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert [] == await rows()
    assert [2] == await second_rows(second_engine)


async def test_release_is_of_one_database(engine, first, second, second_engine, drive, rows):
    """G6: `release()` of one database leaves the other's transaction open."""

    async def app(scope, receive, send):
        await first.session.execute(sa.insert(Item).values(id=1))
        await second.session.execute(sa.insert(Item).values(id=2))
        await first.release()
        assert 0 == engine.pool.checkedout()
        assert 1 == second_engine.pool.checkedout()
        await answer(send, 500)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert [1] == await rows()
    assert [] == await second_rows(second_engine)


async def test_body_and_background_of_several_databases(
    first, second, second_engine, drive, rows, timeline
):
    """G7, G8: What body and background work write is committed in each database."""

    async def app(scope, receive, send):
        await send(start())
        first.session.add(Item(id=1))
        second.session.add(Item(id=1))
        await first.session.flush()
        await second.session.flush()
        await send(body())
        assert [1] == await rows()
        assert [1] == await second_rows(second_engine)
        first.session.add(Item(id=2))
        second.session.add(Item(id=2))
        await first.session.flush()
        await second.session.flush()

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert exchange.is_complete
    assert [1, 2] == await rows()
    assert [1, 2] == await second_rows(second_engine)


async def test_body_whose_first_commit_fails_rolls_back_the_rest(
    first, second, second_engine, drive, rows
):
    """G7: The body's first COMMIT fails: the body ends torn, the second database rolls back."""

    async def app(scope, receive, send):
        await send(start())
        await first.session.execute(sa.insert(Child).values(id=1, item_id=404))
        await second.session.execute(sa.insert(Item).values(id=2))
        await send(body(b"ok"))

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert isinstance(exchange.error, sa.exc.IntegrityError)
    assert ["http.response.start"] == [each["type"] for each in exchange.messages]
    assert [] == await second_rows(second_engine)


async def test_cancelled_request_ends_every_database(
    engine, first, second, second_engine, drive, rows
):
    """G10: A cancelled request rolls every database back and gives each connection back."""
    written = asyncio.Event()

    async def app(scope, receive, send):
        await first.session.execute(sa.insert(Item).values(id=1))
        await second.session.execute(sa.insert(Item).values(id=2))
        written.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(drive(DBSessionMiddleware(app, databases=[first, second])))
    await written.wait()
    task.cancel()
    exchange = await task

    assert isinstance(exchange.error, asyncio.CancelledError)
    assert 0 == engine.pool.checkedout()
    assert 0 == second_engine.pool.checkedout()
    assert [] == await rows()
    assert [] == await second_rows(second_engine)


async def test_names_lead_to_their_databases(first, second, drive):
    """G11: Each way to a session leads to the database that was asked for."""

    async def app(scope, receive, send):
        assert first.session is current_session("default")
        assert second.session is current_session("second")
        assert second.scope is current_scope("second")
        assert first.session is not second.session
        for database in (first, second):
            session = database.session
            assert session is await database.get_session()
            async with database.get_session() as same:
                assert session is same
            assert session is database.session_proxy()
        with pytest.raises(AmbiguousDatabaseError):
            current_session()
        with pytest.raises(AmbiguousDatabaseError):
            current_scope()
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None


async def test_block_inside_a_request_is_the_innermost_of_its_database(first, second, drive, rows):
    """G11: A block of one database hides that database's request scope, not the other's."""

    async def app(scope, receive, send):
        of_first, of_second = first.session, second.session
        async with first.session_scope() as session:
            assert session is first.session
            assert session is current_session("default")
            assert session is not of_first
            assert of_second is second.session
            session.add(Item(id=1))
        assert of_first is first.session
        await answer(send, 500)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert [1] == await rows()


async def test_session_of_another_app_may_be_used_where_its_database_has_none(
    first, second, drive, rows
):
    """G11: In a request that has no session of that database another request's is no mix-up."""
    is_open, is_used = asyncio.Event(), asyncio.Event()
    lent = []

    async def lending(scope, receive, send):
        lent.append(first.session)
        is_open.set()
        await is_used.wait()
        await answer(send)

    async def borrowing(scope, receive, send):
        lent[0].add(Item(id=1))
        await lent[0].flush()
        await answer(send)

    task = asyncio.create_task(drive(DBSessionMiddleware(lending, database=first)))
    await is_open.wait()
    borrower = await drive(DBSessionMiddleware(borrowing, database=second))
    assert [] == await rows()
    is_used.set()
    lender = await task

    assert (None, None) == (borrower.error, lender.error)
    assert [1] == await rows()


async def test_session_proxy_of_each_database(first, second, second_engine, drive, rows):
    """G11: Objects built at import hold a proxy, and write through it to their own database."""

    class Repository:
        def __init__(self, session: AsyncSession) -> None:
            self.session = session

        async def save(self, number: int) -> None:
            self.session.add(Item(id=number))
            await self.session.flush()

    repositories = [Repository(each.session_proxy) for each in (first, second)]
    assert first.session_proxy is first.session_proxy

    async def app(scope, receive, send):
        for number, repository in enumerate(repositories, 1):
            await repository.save(number)
        await answer(send)

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert [1] == await rows()
    assert [2] == await second_rows(second_engine)


async def test_outcomes_are_of_each_database(first, second, drive):
    """G1: Each database's scope tells what became of its own transaction."""
    outcomes = []

    async def app(scope, receive, send):
        await first.session.execute(sa.insert(Item).values(id=1))
        await answer(send)
        outcomes.extend([first.scope.outcome, second.scope.outcome])

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))

    assert exchange.error is None
    assert [Outcome.COMMITTED, Outcome.NOT_BEGUN] == outcomes


async def test_database_first_asked_for_while_the_request_closes_is_refused(
    first, second, engine, drive
):
    """G9, G22: a child task gets no scope of a second database once the first one is closing."""
    is_committing = asyncio.Event()
    sa.event.listen(engine.sync_engine, "commit", lambda connection: is_committing.set())
    refusals: list[BaseException] = []
    tasks: list[asyncio.Task[None]] = []

    async def child():
        await is_committing.wait()
        try:
            await second.session.execute(sa.insert(Item).values(id=2))
        except SessionScopeClosedError as error:
            refusals.append(error)

    async def app(scope, receive, send):
        await send(start())
        await send(body())
        first.session.add(Item(id=1))
        tasks.append(asyncio.create_task(child()))

    exchange = await drive(DBSessionMiddleware(app, databases=[first, second]))
    await tasks[0]

    assert exchange.error is None
    assert [SessionScopeClosedError] == [type(each) for each in refusals]
