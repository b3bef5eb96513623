"""What is an answer to COMMIT, and what is none."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from asgi_dbscope import (
    CommitInDoubtError,
    Outcome,
)
from bench.proxy import after_commit
from tests.fix_database import POSTGRES_DRIVERS, Child, Item
from tests.fix_in_doubt import run_job

pytestmark = pytest.mark.parametrize("engine", POSTGRES_DRIVERS, indirect=True)


async def test_commit_that_the_server_refused_is_in_no_doubt(make_db, rows):
    """G15, G2: a constraint that fails at COMMIT is an answer: rolled back, and nobody is asked."""
    db = make_db()
    with pytest.raises(sa.exc.IntegrityError):
        async with db.session_scope() as session:
            scope = db.scope
            session.add(Item(id=1))
            session.add(Child(id=1, item_id=404))

    assert Outcome.ROLLED_BACK is scope.outcome
    assert not scope.was_commit_lost
    assert [] == await rows()


def fatal(sqlstate: str) -> bytes:
    """What a server says last."""
    fields = [b"SFATAL", b"VFATAL", b"C" + sqlstate.encode(), b"Mgoing down"]
    content = b"\0".join(fields) + b"\0\0"
    return b"E" + (len(content) + 4).to_bytes(4) + content


@pytest.mark.parametrize("sqlstate", ["57P01", "57P02", "08006", "XX000"])
@pytest.mark.parametrize("resolve", [True, False])
async def test_last_words_of_a_server_are_no_answer(make_db, proxy, rows, sqlstate, resolve):
    """G15: a server that is shut down may say so after a COMMIT that it has done."""
    db = make_db(resolve_in_doubt=resolve)
    committing: list[Any] = []

    def say():
        fault = proxy.arm("swallow", after_commit)

        async def speak():
            await fault.wait()
            (link,) = fault.struck
            link.client.transport.write(fatal(sqlstate))
            link.close()

        committing.append(asyncio.create_task(speak()))

    outcome, error = await run_job(db, say)
    await committing[0]

    assert [1] == await rows()
    if resolve:
        assert (Outcome.COMMITTED, None) == (outcome, error)
    else:
        assert Outcome.IN_DOUBT is outcome
        assert isinstance(error, CommitInDoubtError)
