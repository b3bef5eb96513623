"""How many instructions a request takes: counted by callgrind, whatever else the machine does."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bench import callgrind
from bench.measure import Bench, Json, Table, Unit
from bench.measures.latency import ROUTES, takes_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.contestant import Contestant
    from bench.served import Served

REQUESTS = {"none": 100, "unused": 40, "select": 10, "insert": 10}
BATCHES = 5
"""Each of so many requests: the median of these is free of what happens once in a while."""

WARM = 50


async def warm(served: Served, routes: Sequence[str]) -> None:
    """Fill the caches, then begin to count."""
    for route in routes:
        await served.serve(route, WARM)
    gc.collect()
    gc.disable()  # in which batch a collection falls is chance; what it costs is in the times
    callgrind.start()


async def count(served: Served, route: str) -> None:
    """Call the mark before, between and after the batches."""
    callgrind.MARK()
    for _ in range(BATCHES):
        await served.serve(route, REQUESTS[route])
        callgrind.MARK()


def instructions(bench: Bench, contestant: Contestant, routes: Sequence[str]) -> dict[str, float]:
    """Instructions for one request, by route."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        with bench.worker(contestant, wrapper=callgrind.options(str(out))) as worker:
            worker.call(warm, routes)
            for route in routes:
                worker.call(count, route)
        totals = (_total(out.with_name(f"out.{number}")) for number in itertools.count(1))
        found: dict[str, float] = {}
        for route in routes:
            next(totals)  # until its first mark
            batches = [next(totals) for _ in range(BATCHES)]
            found[route] = statistics.median(batches) / REQUESTS[route]
        return found


def _total(dump: Path) -> int:
    lines = dump.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("totals:")).split()[1])


def at_once(bench: Bench, asked: Mapping[Contestant, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Several contestants, one on each core: what else runs doesn't change what is counted."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = {
            each.name: pool.submit(instructions, bench, each, routes)
            for each, routes in asked.items()
        }
        return {name: each.result() for name, each in counted.items()}


class Instructions:
    name = "instructions"
    title = "Instructions"
    about = (
        "Instructions for one request, counted by callgrind, without Python's garbage collector. "
        "They repeat to 0.5 %, whatever else the machine does; CI fails where ours rise by 2 %."
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
            return at_once(bench, asked)

        seconds = len(asked) * (8 if group == "asgi" else 10)
        return Unit(group, [each.name for each in asked], seconds, run)

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
