"""What a pool can give, and the worker threads of a synchronous database."""

import asyncio
from math import inf
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool

from asgi_dbscope import Database
from asgi_dbscope._pool import THREADS, ThreadWork, pool_capacity

SIZES: list[tuple[dict[str, Any], float]] = [
    ({"poolclass": QueuePool, "pool_size": 2, "max_overflow": 0}, 2),
    ({"poolclass": QueuePool, "pool_size": 2, "max_overflow": 3}, 5),
    ({"poolclass": QueuePool, "pool_size": 2, "max_overflow": -1}, inf),
    ({"poolclass": QueuePool, "pool_size": 0}, inf),
    ({"poolclass": NullPool}, inf),
    ({"poolclass": StaticPool}, 1),
    ({"poolclass": SingletonThreadPool}, 1),
]
WORKS: list[ThreadWork] = ["end", "begin and end", "hooks"]


@pytest.mark.parametrize(("options", "capacity"), SIZES)
def test_capacity_is_what_can_be_out_at_once(options: dict[str, Any], capacity: float) -> None:
    """A pool's capacity is its size and overflow; a shared connection counts once."""
    engine = sa.create_engine("sqlite://", **options)

    assert capacity == pool_capacity(engine)


def test_capacity_of_what_has_no_pool_is_not_limited() -> None:
    """A session factory that is bound to nothing, or to a connection, has no pool to ask."""
    assert inf == pool_capacity(None)


@pytest.mark.parametrize(("options", "capacity"), SIZES)
async def test_endings_never_wait_for_a_thread(options: dict[str, Any], capacity: float) -> None:
    """G14: there are as many threads that give connections back as there are connections."""
    db: Database[Session] = Database(sa.create_engine("sqlite://", **options))

    assert capacity == db.limiter("end").total_tokens


async def test_kinds_of_work_have_threads_of_their_own() -> None:
    """G14: who waits for a connection, and whose hooks wait for anything, is limited apart."""
    db: Database[Session] = Database(sa.create_engine("sqlite://"))

    limiters = [db.limiter(work) for work in WORKS]

    assert 3 == len(set(map(id, limiters)))
    assert [THREADS, THREADS] == [limiter.total_tokens for limiter in limiters[1:]]
    assert limiters == [db.limiter(work) for work in WORKS]


def test_each_event_loop_has_limiters_of_its_own() -> None:
    """A limiter belongs to its event loop, and goes with it."""
    db: Database[Session] = Database(sa.create_engine("sqlite://"))

    async def limiter() -> object:
        return db.limiter("end")

    first, second = asyncio.run(limiter()), asyncio.run(limiter())

    assert first is not second
