"""What a client is told when it goes wrong: speed is worth nothing without it."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, func, make_url, select
from sqlalchemy.pool import NullPool

from bench.apps import Item
from bench.measure import GROUPS, Bench, Json, Table, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.contestant import Contestant
    from bench.served import Served

PROBES = {"commit_fails": None, "error": "of a 500", "swallow": "swallowed"}
"""The routes, and the name of the row that each would leave."""


async def probe(served: Served, route: str) -> tuple[int | None, str | None]:
    """The status, and the exception that came out of the app."""
    answer = await served.ask(route)
    return answer.status, answer.error


def is_wrong(route: str, found: Mapping[str, Any]) -> bool:
    """Whether what the client was told isn't what is in the database."""
    if route == "error":
        return bool(found["rows"])
    return found["status"] == HTTPStatus.OK and not found["rows"]


class Correctness:
    name = "correctness"
    title = "Correctness"
    about = (
        "What the client is told, and how many rows are in the database afterwards. In bold: what "
        "the client was told isn't true. *An exception*: the app raised before it had sent "
        "anything, and the server answers 500."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        groups = GROUPS[:1] if bench.is_quick else GROUPS
        return [self._unit(bench, group) for group in groups]

    def _unit(self, bench: Bench, group: str) -> Unit:
        contestants = [each for each in bench.group(group) if each.way != "bare"]

        def run(bench: Bench, _tell: Callable[[float], None]) -> Json:
            return {each.name: probed(bench, each) for each in contestants}

        return Unit(group, [each.name for each in contestants], 1.5 * len(contestants), run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        columns = ("a COMMIT that fails", "a 500 after a write", "an SQL error that was swallowed")
        return [
            Table(
                group,
                columns,
                {
                    name: [
                        _told(route, probes[route]) if route in probes else "" for route in PROBES
                    ]
                    for name, probes in counted.items()
                },
            )
            for group, counted in found.items()
        ]


def probed(bench: Bench, contestant: Contestant) -> dict[str, Any]:
    """Each probe's status, and how many rows of it there are."""
    found: dict[str, Any] = {}
    with bench.worker(contestant) as worker:
        for route, row in PROBES.items():
            before = count(bench.url, row)
            status, error = worker.call(probe, route)
            rows = count(bench.url, row) - before
            found[route] = {"status": status, "error": error, "rows": rows}
    return found


def count(url: str, name: str | None) -> int:
    """How many rows there are of that name."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.connect() as connection:
        wanted = select(func.count()).select_from(Item).where(Item.name == name)
        return connection.scalar(wanted) or 0


def _told(route: str, found: Mapping[str, Any]) -> str:
    rows = {0: "no row", 1: "a row"}.get(found["rows"], f"{found['rows']} rows")
    told = f"{found['status'] or 'an exception'}, {rows}"
    return f"**{told}**" if is_wrong(route, found) else told


MEASURE = Correctness()
