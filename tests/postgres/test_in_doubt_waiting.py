"""While PostgreSQL is asked what became of a COMMIT: how long it takes, and who is cancelled."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import pytest

from asgi_dbscope import (
    CommitInDoubtError,
    Outcome,
    State,
)
from bench.proxy import after_commit, before_commit
from tests.fix_cancel import SlowCommit
from tests.fix_clock import LONG
from tests.fix_database import POSTGRES_DRIVERS, Item
from tests.fix_in_doubt import ENOUGH, app_of, run_job

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


async def asked_times(caplog, times):
    """Wait until the server has been asked, and had no answer, so often."""
    async with asyncio.timeout(ENOUGH):
        while times > sum("can't be asked" in each.message for each in caplog.records):
            await asyncio.sleep(0.001)  # the question goes to another process


async def test_commit_that_is_still_under_way_is_waited_for(make_db, engine, proxy, drive, rows):
    """G15: while the server is still at it, it is asked again; then the response goes out."""
    scopes: list[Any] = []
    async with SlowCommit(engine) as held:
        request = asyncio.create_task(drive(app_of(make_db(), scopes)))
        await held.wait_until_reached()
        proxy.cut()
        async with asyncio.timeout(ENOUGH):
            while not scopes[0].is_answer_missing:
                await asyncio.sleep(0.001)
        assert State.COMMITTING is scopes[0].state
        await asyncio.wait([request], timeout=0.1)  # some questions long
        assert not request.done()
        await held.let_through()
        exchange = await request

    assert (201, b"ok") == (exchange.status, exchange.body)
    assert Outcome.COMMITTED is scopes[0].outcome
    assert [1] == await rows()


async def test_server_that_comes_back_is_asked_then(make_db, proxy, drive, rows, caplog):
    """G15: a server that can't be reached at first is asked until it can."""
    caplog.set_level(logging.DEBUG, "asgi_dbscope")
    scopes: list[Any] = []

    def go_down():
        proxy.arm("cut", after_commit)
        proxy.is_down = True

    request = asyncio.create_task(drive(app_of(make_db(), scopes, go_down)))
    await asked_times(caplog, 2)
    proxy.is_down = False
    exchange = await request

    assert (201, b"ok") == (exchange.status, exchange.body)
    assert [1] == await rows()


async def test_question_that_gets_lost_is_asked_again(make_db, proxy, drive, rows):
    """G15: a connection that breaks while the server is asked is one more that is lost."""
    scopes: list[Any] = []

    def lose():
        proxy.arm("cut", after_commit)
        proxy.arm("cut", lambda message: b"pg_xact_status" in message.data)

    exchange = await drive(app_of(make_db(), scopes, lose))

    assert (201, b"ok") == (exchange.status, exchange.body)
    assert [1] == await rows()


async def test_deadline_leaves_it_in_doubt(make_db, proxy, rows, caplog):
    """G15: after `cleanup_timeout` nobody is asked any more; error and log have the number."""
    told: list[Any] = []
    db = make_db(cleanup_timeout=0.3)

    def go_down():
        db.on_completion(told.append)
        proxy.arm("cut", after_commit)
        proxy.is_down = True

    began = time.monotonic()
    outcome, error = await run_job(db, go_down)

    assert 0.3 <= time.monotonic() - began < ENOUGH
    assert Outcome.IN_DOUBT is outcome
    assert isinstance(error, CommitInDoubtError)
    assert isinstance(error.transaction_id, int)
    [line] = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert str(error.transaction_id) in line
    assert [Outcome.IN_DOUBT] == told
    assert [1] == await rows()


async def test_server_that_says_nothing_is_left_at_the_deadline(make_db, proxy, rows):
    """G15: a connection that is taken and never served ends at the deadline, and leaves nothing."""
    db = make_db(cleanup_timeout=0.3)

    def fall_silent():
        proxy.arm("cut", after_commit)
        proxy.arm("swallow", lambda message: not message.kind, times=None)  # all that connect

    outcome, error = await run_job(db, fall_silent)

    assert Outcome.IN_DOUBT is outcome
    assert isinstance(error, CommitInDoubtError)
    assert [1] == await rows()


@contextlib.asynccontextmanager
async def asking(db, drive, proxy, caplog, **options):
    """A request whose COMMIT was done and not answered, while no server can be reached."""
    caplog.set_level(logging.DEBUG, "asgi_dbscope")
    scopes: list[Any] = []

    def go_down():
        proxy.arm("cut", after_commit)
        proxy.is_down = True

    request = asyncio.create_task(drive(app_of(db, scopes, go_down, **options)))
    await asked_times(caplog, 1)
    yield request, scopes[0]
    assert State.CLOSED is scopes[0].state


async def test_cancelled_while_asking_it_still_finds_out(make_db, proxy, drive, rows, caplog):
    """G15, G10: a cancellation waits until the server has said what became; the head goes out."""
    async with asking(make_db(), drive, proxy, caplog) as (request, scope):
        request.cancel()
        await asked_times(caplog, 3)
        assert not request.done()
        proxy.is_down = False
        exchange = await request

    assert 201 == exchange.status
    assert isinstance(exchange.error, asyncio.CancelledError) or exchange.is_complete
    assert Outcome.COMMITTED is scope.outcome
    assert [1] == await rows()


async def test_cancelled_while_asking_it_ends_at_its_deadline(
    make_db, proxy, drive, clock, rows, caplog
):
    """G15, G10: with no server to ask, a cancelled request ends in doubt, and ends."""
    async with asking(make_db(cleanup_timeout=LONG), drive, proxy, caplog) as (request, scope):
        for _ in range(3):
            request.cancel()
            await asyncio.sleep(0)
        clock.forward(LONG)
        exchange = await request

    assert [] == exchange.messages
    assert isinstance(exchange.error, (CommitInDoubtError, asyncio.CancelledError))
    assert Outcome.IN_DOUBT is scope.outcome
    assert [1] == await rows()


@pytest.mark.parametrize("place", [before_commit, after_commit], ids=["commit", "answer"])
async def test_cancelled_at_any_time_it_is_resolved_rightly(make_db, proxy, rows, place):
    """G15, G10: cancelled whenever it may be, COMMIT and questions under way, none ends wrongly."""
    db = make_db()
    number, turns, was_over = 0, 0, False
    while not was_over:
        number += 1
        scopes: list[Any] = []
        is_reached = asyncio.Event()
        fault = proxy.arm("cut", place)

        async def job(number=number, scopes=scopes, is_reached=is_reached):
            async with db.session_scope() as session:
                scopes.append(db.scope)
                session.add(Item(id=number))
                await session.flush()
                is_reached.set()

        task = asyncio.create_task(job())
        await is_reached.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        was_over = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        fault.disarm()
        is_there = number in await rows()
        expected = Outcome.COMMITTED if is_there else Outcome.ROLLED_BACK
        assert expected is scopes[0].outcome, turns
        assert len(fault.struck) or not is_there, turns  # cancelled before its COMMIT was sent
        turns = turns * 2 + 1
    assert 5 <= number


async def test_time_of_the_transaction_does_not_end_the_asking(
    make_db, proxy, drive, clock, rows, caplog
):
    """G10, G15: `timeout` ends with COMMIT; the server is asked as long as a clean-up may last."""
    db = make_db(cleanup_timeout=2 * LONG)
    async with asking(db, drive, proxy, caplog, timeout=LONG) as (request, scope):
        clock.forward(LONG, scope)
        await asked_times(caplog, 3)
        proxy.is_down = False
        exchange = await request

    assert (201, None) == (exchange.status, exchange.error)
    assert [1] == await rows()
