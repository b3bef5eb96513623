"""What `Database(resolve_in_doubt=True)` costs a request, beside the same without it.

The harness is that of `overhead.py`: contestants in one interleaved run, paired ratios, callgrind.
In what it prints "by hand" is the middleware without the option, "ours" the one with it.
It needs PostgreSQL. `docs/costs.md` has the numbers and what they mean.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set

import overhead
from overhead import HAND, OURS, SELECT, App, Contestant, Item, answer

from asgi_dbscope import Database, DBSessionMiddleware, current_session

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncEngine

ROWS = {
    "none": "no database",
    "select": "one SELECT, committed",
    "insert": "one INSERT, committed",
}


def apps(engine: AsyncEngine, *, resolve_in_doubt: bool) -> dict[str, App]:
    database = Database(engine, resolve_in_doubt=resolve_in_doubt)

    async def none(_scope: Any, _receive: Any, send: Any) -> None:
        await answer(send, b"item")

    async def select(_scope: Any, _receive: Any, send: Any) -> None:
        name = await current_session().scalar(SELECT)
        await answer(send, name.encode())

    async def insert(_scope: Any, _receive: Any, send: Any) -> None:
        current_session().add(Item(name="item"))
        await answer(send, b"item")

    endpoints = {"none": none, "select": select, "insert": insert}
    return {row: DBSessionMiddleware(app, database=database) for row, app in endpoints.items()}


def contestants(without: AsyncEngine, with_it: AsyncEngine, rows: list[str]) -> list[Contestant]:
    columns = {
        HAND: apps(without, resolve_in_doubt=False),
        OURS: apps(with_it, resolve_in_doubt=True),
    }
    return [Contestant(row, column, columns[column][row]) for row in rows for column in columns]


if __name__ == "__main__":
    # The harness runs these contestants, and this script where it counts instructions.
    overhead.ROWS, overhead.contestants, overhead.__file__ = ROWS, contestants, __file__
    overhead.main()
