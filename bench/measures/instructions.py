"""How many instructions a request takes: counted by callgrind, whatever else the machine does."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import statistics
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bench import callgrind
from bench.measure import Bench, Json, Table, Unit
from bench.measures.latency import ROUTES, takes_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.contestant import Contestant
    from bench.served import Served

Asked = Mapping["Contestant", "Sequence[str]"]
"""Of each contestant its routes."""

Counts = dict[str, dict[str, float]]
"""Instructions for one request, by contestant and route."""

REQUESTS = {"none": 100, "unused": 40, "select": 10, "insert": 10}
"""What is counted at once."""

REPEATS = 0.01
"""By how much of it a count may differ from another one of the same."""

WARM = 120
"""Requests after which Python's interpreter has specialized all that it will."""


async def count(served: Served, name: str, route: str, shuffles: int) -> None:
    """Call the mark before and after each count, of this contestant or of one beside it."""
    counted = served.beside.get(name, served)
    gc.disable()  # in which count a collection falls is chance; what it costs is in the times
    for _ in range(shuffles):
        callgrind.stop()
        _shuffle()
        await counted.serve(route, WARM)
        callgrind.start()
        callgrind.MARK()
        await counted.serve(route, REQUESTS[route])
        callgrind.MARK()


def _shuffle() -> None:
    """Have Python number its classes anew.

    It looks attributes up in a table, where numbers and addresses say which of them get in each
    other's way: chance, of which a request takes 1 % more or less.
    """
    for each in {*_below(object)}:
        with contextlib.suppress(TypeError):  # written in C
            type.__setattr__(each, "__bench__", None)


def _below(base: type) -> Iterator[type]:
    classes: list[type] = type.__subclasses__(base)
    for each in classes:
        yield each
        if each is not type:
            yield from _below(each)


def instructions(bench: Bench, asked: Asked, shuffles: int) -> Counts:
    """Instructions for one request, the median of several counts: of contestants in one process."""
    first, *others = asked
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        wrapper = callgrind.options(str(out))
        with bench.worker(first, wrapper=wrapper, beside=others) as worker:
            for contestant, routes in asked.items():
                for route in routes:
                    worker.call(count, contestant.name, route, shuffles)
        # Each count has two dumps: until its first mark, and until its second.
        totals = (_total(out.with_name(f"out.{2 * number}")) for number in itertools.count(1))
        return {
            contestant.name: {
                route: statistics.median(itertools.islice(totals, shuffles)) / REQUESTS[route]
                for route in routes
            }
            for contestant, routes in asked.items()
        }


def _total(dump: Path) -> int:
    lines = dump.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("totals:")).split()[1])


def apart(asked: Asked) -> list[Asked]:
    """Each contestant in a process of its own."""
    return [{contestant: routes} for contestant, routes in asked.items()]


def at_once(bench: Bench, processes: Sequence[Asked], shuffles: int = 1) -> Counts:
    """Several processes, one on each core: what else runs doesn't change what is counted."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = [pool.submit(instructions, bench, asked, shuffles) for asked in processes]
        return {name: found for each in counted for name, found in each.result().items()}


class Instructions:
    name = "instructions"
    title = "Instructions"
    about = (
        "Instructions for one request, counted by callgrind, without Python's garbage collector. "
        f"They repeat to {100 * REPEATS:.0f} %, whatever else the machine does; CI fails where "
        "ours rise by 2 %."
    )
    needs: Sequence[str] = ("valgrind",)

    def units(self, bench: Bench) -> list[Unit]:
        groups = ("asgi",) if bench.is_quick else ("asgi", "fastapi")
        return [self._unit(bench, group) for group in groups]

    def _unit(self, bench: Bench, group: str) -> Unit:
        routes = list(ROUTES)[:: 3 if bench.is_quick else 1]
        asked = {
            each: [route for route in routes if takes_part(each, route)]
            for each in bench.group(group)
        }

        def run(bench: Bench, _tell: Callable[[float], None]) -> Json:
            if group == "asgi":
                return at_once(bench, apart(asked), 1 if bench.is_quick else 4)
            # To import a framework takes longer than all else where it is counted.
            together: dict[str, dict[Contestant, Sequence[str]]] = {}
            for each, own in asked.items():
                together.setdefault(each.environment, {})[each] = own
            return at_once(bench, [*together.values()])

        return Unit(group, [each.name for each in asked], len(asked) * 8.0, run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                group,
                list(ROUTES.values()),
                {
                    name: [f"{routes[each]:,.0f}" if each in routes else "" for each in ROUTES]
                    for name, routes in counted.items()
                },
            )
            for group, counted in found.items()
        ]


MEASURE = Instructions()
