"""Cancelled anywhere on MariaDB: at each suspension of a request or job."""

import sys
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbscope import Database
from tests.asgi import test_cancellation as sweeps
from tests.fix_cancel import KINDS, Kind
from tests.fix_database import Item
from tests.fix_mariadb import LIMITS

pytestmark = pytest.mark.parametrize("engine", ["asyncmy"], indirect=True)


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_anywhere_before_the_head_it_ends_truly(db, kind):
    """G10, G1: cancelled at any suspension up to the head, it leaves nothing and tells no lie."""
    assert await sweeps.sweep(db, sweeps.handler_window, kind, check=sweeps.check_handler) >= 5


# asyncmy connects inside asyncio.wait_for(), which before Python 3.12 may lose a cancellation that
# comes in the moment of success; the next one arrives.
@pytest.mark.parametrize(
    "kind", ["repeatedly", *(["once", "timeout"] if sys.version_info >= (3, 12) else [])]
)
async def test_cancelled_while_connecting_it_ends_truly(db, kind):
    """G10: cancelled at any suspension where the pool is empty, it ends as cleanly."""
    swept = await sweeps.sweep(
        db, sweeps.handler_window, kind, check=sweeps.check_handler, is_cold=True
    )

    assert swept >= 5


async def test_cancelled_anywhere_in_the_body_it_ends_truly(db):
    """G10, G7: cancelled in mid-stream, the body is torn and its transaction rolled back."""
    assert await sweeps.sweep(db, sweeps.stream_window, "once", check=sweeps.check_stream) >= 5


@pytest.mark.parametrize("kind", ["once", "repeatedly"])
async def test_cancelled_anywhere_its_settings_are_taken_back(engine: AsyncEngine, kind: Kind):
    """G10, G20: cancelled while settings are put on or taken back, no other user has them."""
    db: Database[Any] = Database(engine)

    async def window(db, run):
        run.cut.arm()
        async with db.transactional(read_only=True, isolation_level="SERIALIZABLE", timeout=30):
            await db.session.scalar(sa.select(sa.func.count(Item.id)))

    def check(run, rows):
        assert [] == rows

    assert await sweeps.sweep(db, window, kind, check=check) >= 5
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Item).values(id=1))
        assert [] == (await connection.execute(LIMITS)).all()


@pytest.mark.parametrize("kind", ["once", "repeatedly"])
async def test_cancelled_anywhere_in_autocommit_it_leaves_transactions(
    engine: AsyncEngine, kind: Kind
):
    """G10, G20: cancelled in mode "autocommit", the connection's next user has transactions."""
    db: Database[Any] = Database(engine, mode="autocommit")

    async def window(db, run):
        async with db.session_scope() as session:
            run.cut.arm()
            await session.scalar(sa.select(sa.func.count(Item.id)))

    def check(run, rows):
        assert [] == rows

    assert await sweeps.sweep(db, window, kind, check=check) >= 5
    async with engine.connect() as connection:
        assert 0 == await connection.scalar(sa.text("SELECT @@autocommit"))
