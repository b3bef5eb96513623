"""Many at once: the same decorated function, and random programs, with no state that crosses.

`DBSCOPE_TEST_ROUNDS=100` asks for more rounds of programs, and for new ones at each run.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database
from tests.block_model import Model
from tests.block_programs import Oops, Program, jobs, requests
from tests.block_runner import SPAN, Blocks, Run
from tests.fix_asgi import Drive
from tests.fix_database import Item

pytestmark = pytest.mark.once

CALLS = 500
TASKS = 50
ROUNDS = os.environ.get("DBSCOPE_TEST_ROUNDS")
"""How many times to run 50 programs at once, where somebody asked for it."""

Rows = Callable[[], Awaitable[list[int]]]


def fails(number: int) -> bool:
    """Whether the call of that number raises."""
    return number % 7 == 0


SUCCEEDING = [number for number in range(CALLS) if not fails(number)]
FAILING = [number for number in range(CALLS) if fails(number)]


@pytest.fixture
async def small_pool(
    engine: AsyncEngine, make_engine: Callable[..., AsyncEngine]
) -> AsyncIterator[AsyncEngine]:
    """The test's database, with five connections."""
    driver = "sqlite" if engine.dialect.name == "sqlite" else "asyncpg"
    small = make_engine(driver, pool_size=5, max_overflow=0, pool_timeout=60)
    yield small
    checked_out = small.pool.checkedout()  # type: ignore[attr-defined]
    await small.dispose()
    assert 0 == checked_out


# --------------------------------------------------------------------------------------
# One function, 500 times at once
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["asyncpg"], indirect=True)
async def test_one_decorated_function_500_times_at_once(small_pool, rows):
    """G12: 500 calls of one function, five connections: each has a session and hooks of its own."""
    db = Database(small_pool)
    in_use: set[Any] = set()
    committed: list[int] = []
    rolled_back: list[int] = []

    @db.transactional()
    async def call(number: int) -> int:
        session = db.session
        assert session not in in_use
        in_use.add(session)
        db.on_commit(committed.append, number)
        db.on_rollback(rolled_back.append, number)
        await session.execute(sa.insert(Item).values(id=number))
        await inner(number)
        assert session is db.session
        in_use.remove(session)
        return number

    @db.transactional("NESTED")
    async def inner(number: int) -> None:
        assert number == await db.session.scalar(sa.select(Item.id).where(Item.id == number))
        if fails(number):
            in_use.remove(db.session)
            raise Oops(number)

    came = await asyncio.gather(*map(call, range(CALLS)), return_exceptions=True)

    assert SUCCEEDING == [each for each in came if isinstance(each, int)]
    assert FAILING == [each.args[0] for each in came if isinstance(each, Oops)]
    assert SUCCEEDING == await rows() == sorted(committed)
    assert FAILING == sorted(rolled_back)


async def test_one_block_object_500_times_at_once(small_pool, rows):
    """G12: one block object that 500 tasks enter, twice each, keeps their errors apart."""
    db = Database(small_pool)
    block = db.transactional()
    causes: dict[int, object] = {}

    async def call(number: int) -> None:
        try:
            async with block as session:
                await session.execute(sa.insert(Item).values(id=number))
                with suppress(Oops):
                    async with block:
                        await asyncio.sleep(0)
                        if fails(number):
                            raise Oops(number)
        except Exception as error:
            causes[number] = error.__cause__

    await asyncio.gather(*map(call, range(CALLS)))

    assert FAILING == sorted(causes)
    for number, cause in causes.items():
        assert isinstance(cause, Oops)
        assert (number,) == cause.args
    assert SUCCEEDING == await rows()


async def test_one_decorated_function_500_times_in_threads(make_sync_engine):
    """G12, G14: the same with synchronous sessions in 40 threads, and five connections."""
    engine = make_sync_engine("psycopg", max_overflow=0, pool_timeout=60)
    db = Database(engine)
    committed: list[int] = []
    rolled_back: list[int] = []

    @db.transactional()
    def call(number: int) -> int:
        session = db.session
        db.on_commit(committed.append, number)
        db.on_rollback(rolled_back.append, number)
        session.execute(sa.insert(Item).values(id=number))
        inner(number)
        assert session is db.session
        return number

    @db.transactional("NESTED")
    def inner(number: int) -> None:
        if fails(number):
            raise Oops(number)

    def outcome(number: int) -> int | Oops:
        try:
            return call(number)
        except Oops as error:
            return error

    def call_all() -> list[int | Oops]:
        with ThreadPoolExecutor(40) as threads:
            return list(threads.map(outcome, range(CALLS)))

    came = await asyncio.to_thread(call_all)

    assert SUCCEEDING == [each for each in came if isinstance(each, int)]
    assert FAILING == [each.args[0] for each in came if isinstance(each, Oops)]
    assert SUCCEEDING == await take_rows(db) == sorted(committed)
    assert FAILING == sorted(rolled_back)


# --------------------------------------------------------------------------------------
# Fifty programs at once
# --------------------------------------------------------------------------------------


def model_of(program: Program, *, is_sync: bool) -> Model:
    """What *program* has to do."""
    model = Model(is_sync=is_sync, has_single_writer=False)
    model.run(program)
    return model


def some_programs(strategy: Any, number: int) -> list[Program]:
    """Random programs that need no more than two connections each."""
    found: list[Program] = []

    def keep(program: Program) -> None:
        if len(found) < number and model_of(program, is_sync=False).connections <= 2:
            found.append(program)

    chosen = settings(
        max_examples=3 * number,
        derandomize=ROUNDS is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(program=strategy)(keep))()
    assert number == len(found)
    return found


@pytest.fixture(params=["asyncpg", "psycopg"])
async def large_pool(
    request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine]
) -> AsyncIterator[Blocks]:
    """PostgreSQL with a connection for each of 50 tasks, and some more for their inner blocks.

    So whoever holds one and waits for a second gets it.
    """
    options = {"pool_size": TASKS + 10, "max_overflow": 0}
    if request.param == "psycopg":
        yield Blocks(Database(request.getfixturevalue("make_sync_engine")("psycopg", **options)))
        return
    engine = make_engine("asyncpg", **options)
    yield Blocks(Database(engine))
    checked_out = engine.pool.checkedout()  # type: ignore[attr-defined]
    await engine.dispose()
    assert 0 == checked_out


async def run_at_once(blocks: Blocks, programs: list[Program], drive: Drive) -> None:
    """Run *programs* at once, and assert that each did what its model says."""
    models = [model_of(each, is_sync=blocks.db.is_sync) for each in programs]
    runs = [Run(blocks, number * SPAN) for number, model in enumerate(models)]
    await asyncio.gather(
        *(run.run(program, drive) for run, program in zip(runs, programs, strict=True))
    )

    for program, model, run in zip(programs, models, runs, strict=True):
        assert model.log == run.log, program
        assert model.status == run.status, program
    committed = [
        number * SPAN + each for number, model in enumerate(models) for each in model.committed
    ]
    assert sorted(committed) == await take_rows(blocks.db)


async def take_rows(db: Database[Any]) -> list[int]:
    """What is in the database; after this, nothing."""
    taking = sa.delete(Item).returning(Item.id)
    if db.is_sync:
        with db.session_scope() as session:
            return sorted(session.scalars(taking))
    async with db.session_scope() as session:
        return sorted(await session.scalars(taking))


async def test_fifty_programs_at_once_know_nothing_of_each_other(large_pool, drive):
    """G12: 25 jobs and 25 requests, all with blocks, interleaved: each does what it should."""
    rounds = int(ROUNDS or 1)
    programs = some_programs(jobs(), rounds * TASKS // 2)
    programs += some_programs(requests(), rounds * TASKS // 2)

    for each in range(rounds):
        await run_at_once(large_pool, programs[each::rounds], drive)

    logging.getLogger(__name__).info("%d programs without a difference", rounds * TASKS)


async def test_one_program_in_fifty_tasks(large_pool, drive):
    """G12: one program that runs in 50 tasks at once does the same in each of them."""
    rounds = int(ROUNDS or 1)
    for program in some_programs(jobs(), rounds) + some_programs(requests(), rounds):
        await run_at_once(large_pool, [program] * TASKS, drive)
