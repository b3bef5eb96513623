"""Labels in SQL: whatever is in them, the statement does just what it does without."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database, DBSessionMiddleware
from tests.fix_asgi import body, http_scope, start
from tests.fix_database import Item
from tests.labels import LABELS, STATEMENTS

Loop = asyncio.AbstractEventLoop
Source = AsyncEngine | sa.Engine

SETTINGS = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An event loop for all examples."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(params=["aiosqlite", "asyncpg", "async psycopg", "sqlite", "psycopg"])
def source(
    request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine], loop: Loop
) -> Iterator[Source]:
    """An engine of every way to write a parameter, on an empty schema."""
    if request.param in {"sqlite", "psycopg"}:
        yield request.getfixturevalue("make_sync_engine")(request.param)
        return
    drivers = {"aiosqlite": "sqlite", "async psycopg": "psycopg"}
    engine = make_engine(drivers.get(request.param, request.param))
    yield engine
    loop.run_until_complete(engine.dispose())


@pytest.fixture
def execute(source: Source, loop: Loop) -> Callable[[Database[Any], str], list[Any]]:
    """Run the statements in a block of that label; return what they find."""
    numbers = itertools.count(1)

    def write(session: Any) -> Any:
        rows = [{"id": next(numbers), "note": note} for note in ("100%", "2")]
        session.execute(sa.insert(Item), rows)
        session.flush()
        return [
            list(session.scalars(statement, parameters)) for statement, parameters in STATEMENTS
        ]

    async def execute_async(db: Database[Any], label: str) -> list[Any]:
        async with db.transactional(label=label) as session:
            async with db.transactional("NESTED", label=label):
                found = await session.run_sync(write)
            await session.rollback()
        return found  # type: ignore[no-any-return]

    def execute(db: Database[Any], label: str) -> list[Any]:
        nonlocal numbers
        numbers = itertools.count(1)
        if not db.is_sync:
            return loop.run_until_complete(execute_async(db, label))
        with db.transactional(label=label) as session:
            with db.transactional("NESTED", label=label):
                found = write(session)
            session.rollback()
        return found  # type: ignore[no-any-return]

    return execute


@pytest.mark.once
def test_statement_does_what_it_does_without_a_label(source, execute):
    """Quotes, comments, line breaks, parameters, 64 KiB: nothing of a label is SQL."""
    expected = execute(Database(source), "plain")
    labelled = [Database(source, label_transactions="comment")]
    if source.dialect.name == "postgresql":
        labelled.append(Database(source, label_transactions="application_name"))
    engine = source.sync_engine if isinstance(source, AsyncEngine) else source
    statements: list[str] = []
    sa.event.listen(engine, "after_cursor_execute", lambda *args: statements.append(args[2]))

    @SETTINGS
    @given(LABELS)
    def check(label: str) -> None:
        for db in labelled:
            assert expected == execute(db, label)

    check()

    assert [["a:x %s ? $1"], [1], [1], [1], [1]] == expected
    assert all(each.isascii() for each in statements)
    assert 3000 >= max(map(len, statements))


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("path", ["/a'; DROP TABLE item; --", "/\0\n*/", "/ä\ud800", "/" * 65536])
async def test_path_of_any_kind_is_only_a_name(engine, drive, rows, path):
    """The path of a request, shown as `application_name`, is a parameter and no SQL."""
    db = Database(engine, label_transactions="application_name")
    names: list[str] = []

    async def app(scope, receive, send):
        names.append(await db.session.scalar(sa.text("SHOW application_name")))
        db.session.add(Item(id=1))
        await send(start())
        await send(body())

    scope = {**http_scope(), "path": path}
    exchange = await drive(DBSessionMiddleware(app, database=db), scope)

    assert exchange.error is None
    assert [1] == await rows()
    assert names[0].startswith("GET /")
    assert 63 >= len(names[0])


@pytest.mark.parametrize(
    ("driver", "connect_args"), [("asyncpg", {}), ("psycopg", {"prepare_threshold": 0})]
)
@pytest.mark.once
async def test_labels_that_differ_do_not_pile_up_in_the_driver(make_engine, driver, connect_args):
    """A label made from data makes each statement another one; those prepared stay bounded."""
    engine = make_engine(driver, connect_args=connect_args)
    db = Database(engine, label_transactions="comment")
    prepared = sa.text("SELECT count(*) FROM pg_prepared_statements")
    counts = []

    for number in range(150):
        async with db.transactional(label=f"import {number}") as session:
            counts.append(await session.scalar(prepared))
    await engine.dispose()

    assert 90 <= counts[-1] <= 110
