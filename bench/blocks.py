"""What a transactional block costs, beside the plain SQLAlchemy that it stands for.

The harness is that of `overhead.py`: contestants in one interleaved run, paired ratios, callgrind.
A "request" is here one block, inside a transaction that is open on both sides.
`docs/costs.md` has the numbers and what they mean.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set

import overhead
from overhead import HAND, OURS, SELECT, App, Contestant
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from asgi_dbscope import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROWS = {
    "none": "no block",
    "joined": "joined, around nothing",
    "decorated": "joined, as a decorator",
    "read": "joined, around one SELECT",
    "nested": "NESTED, around one SELECT",
    "new": "REQUIRES_NEW, around one SELECT",
}


async def nothing(*_: Any) -> str:
    return "item"


def blocks_by_hand(
    factory: async_sessionmaker[AsyncSession], outer: AsyncSession
) -> dict[str, App]:
    """What one writes without transactional blocks; to join is to go on with the same session."""

    async def read(*_: Any) -> str | None:
        return await outer.scalar(SELECT)

    async def nested(*_: Any) -> str | None:
        async with outer.begin_nested():
            return await outer.scalar(SELECT)

    async def new(*_: Any) -> str | None:
        async with factory.begin() as session:
            return await session.scalar(SELECT)

    return {
        "none": nothing,
        "joined": nothing,
        "decorated": nothing,
        "read": read,
        "nested": nested,
        "new": new,
    }


def our_blocks(database: Database[AsyncSession]) -> dict[str, App]:
    joins = database.transactional()
    nests = database.transactional("NESTED")
    begins = database.transactional("REQUIRES_NEW")

    async def joined(*_: Any) -> str:
        async with joins:
            return "item"

    async def read(*_: Any) -> str | None:
        async with joins as session:
            return await session.scalar(SELECT)

    async def nested(*_: Any) -> str | None:
        async with nests as session:
            return await session.scalar(SELECT)

    async def new(*_: Any) -> str | None:
        async with begins as session:
            return await session.scalar(SELECT)

    return {
        "none": nothing,
        "joined": joined,
        "decorated": joins(nothing),
        "read": read,
        "nested": nested,
        "new": new,
    }


table = overhead.contest


@contextlib.asynccontextmanager
async def contest(url: str, only: list[str]) -> AsyncIterator[list[Contestant]]:
    """Begin a transaction on either side, each with an engine of its own; give the contestants."""
    engines = create_async_engine(url), create_async_engine(url)
    factory, database = async_sessionmaker(engines[0]), Database(engines[1])
    async with table(url, []), contextlib.AsyncExitStack() as stack:
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        outer = await stack.enter_async_context(factory.begin())
        await outer.scalar(SELECT)
        session = await stack.enter_async_context(database.session_scope())
        await session.scalar(SELECT)
        columns = {HAND: blocks_by_hand(factory, outer), OURS: our_blocks(database)}
        running = [
            Contestant(row, column, columns[column][row]) for row in only for column in columns
        ]
        for each in running:
            assert await each.app() == "item", each.key
        yield running


if __name__ == "__main__":
    # The harness runs these contestants, and this script where it counts instructions.
    overhead.ROWS, overhead.contest, overhead.__file__ = ROWS, contest, __file__
    overhead.main()
