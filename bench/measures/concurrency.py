"""How long a request takes among others: 1 to 1,000 at the same time, on a pool of ten."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any

from bench.apps import Setup
from bench.measure import Bench, Json, Lines, Table, Unit
from bench.measures.latency import ROUTES, takes_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.served import Served

LEVELS = (1, 10, 100, 1_000)
POOL = {"pool_size": 10, "max_overflow": 0, "pool_timeout": 60}
RACES = ("none", "select")


async def crowd(served: Served, route: str, concurrent: int, requests: int) -> float:
    """Microseconds of the processor for a request, so many being served at the same time."""
    await served.serve(route, 20)
    before = time.process_time()
    each = max(1, requests // concurrent)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrent):
            tasks.create_task(served.serve(route, each))
    return (time.process_time() - before) / (each * concurrent) * 1e6


class Concurrency:
    name = "concurrency"
    title = "Many at the same time"
    about = (
        "Microseconds of the processor for one request, the more of them there are at the same "
        "time, in process, with a pool of ten connections: medians of rounds by turns. Each "
        "contestant is one process: read a row from left to right, and not beside the others."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        contestants = bench.group("asgi")
        rounds = int(bench.budget(3, 1))
        requests = int(bench.budget(600, 100))

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            found: dict[str, dict[str, Any]] = {route: {} for route in RACES}
            with contextlib.ExitStack() as stack:
                workers = [
                    stack.enter_context(bench.worker(each, Setup(bench.url, POOL)))
                    for each in contestants
                ]
                cells = [(route, level) for route in RACES for level in LEVELS]
                for done, (route, level) in enumerate(cells):
                    racing = [each for each in workers if takes_part(each.contestant, route)]
                    times: dict[str, list[float]] = {each.contestant.name: [] for each in racing}
                    for _ in range(rounds):
                        for each in racing:
                            taken = each.call(crowd, route, level, requests)
                            times[each.contestant.name].append(taken)
                    for name, taken_by in times.items():
                        median = statistics.median(taken_by)
                        found[route].setdefault(name, {})[str(level)] = median
                    tell((done + 1) / len(cells))
            return found

        seconds = len(contestants) * (2 + rounds * requests * len(LEVELS) * 1.2e-3)
        return [Unit("asgi", [each.name for each in contestants], seconds, run)]

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                f"{ROUTES[route]}, {group}",
                [f"{level:,}" for level in LEVELS],
                {
                    name: [f"{levels[str(level)]:,.1f}" for level in LEVELS]
                    for name, levels in counted.items()
                },
                charts=[
                    Lines(
                        f"concurrency-{group}-{route}",
                        f"{ROUTES[route]}, {group}: microseconds of the processor",
                        "requests at the same time",
                        {
                            name: {int(level): each for level, each in levels.items()}
                            for name, levels in counted.items()
                        },
                    )
                ],
            )
            for group, routes in found.items()
            for route, counted in routes.items()
        ]


MEASURE = Concurrency()
