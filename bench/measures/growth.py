"""What requests leave behind: memory that grows with their number, and work for the collector."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING

from bench.contestants import by_name
from bench.measure import Bench, Json, Table, Unit
from bench.measures.latency import ROUTES
from bench.memory import resident

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.served import Served

OURS = "asgi.ours"
REQUESTS = {"none": 200_000, "unused": 50_000, "select": 50_000, "insert": 8_000}
SECONDS = {"none": 10, "unused": 10, "select": 50, "insert": 12}
QUICK = 40
"""A quick run serves so many times fewer."""


async def grown(served: Served, route: str, requests: int) -> dict[str, float]:
    """Bytes for each request, and objects that only the cycle collector frees."""
    await served.serve(route, max(20, requests // 10))  # caches fill
    gc.collect()
    before = resident()
    await served.serve(route, requests)
    gc.collect()
    kept = (resident() - before) / requests
    few = max(10, requests // 20)
    tracemalloc.start()
    await served.serve(route, few)
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0]
    await served.serve(route, few)
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    gc.disable()
    await served.serve(route, few)
    cyclic = gc.collect()
    gc.enable()
    return {
        "requests": requests,
        "resident": kept,
        "traced": traced / few,
        "cyclic": cyclic / few,
    }


class Growth:
    name = "growth"
    title = "Memory"
    about = (
        "What each request leaves behind: bytes as Python's allocator sees them, bytes of resident "
        "memory, and objects that only the cycle collector would free. A dozen resident bytes are "
        "one block that the C library took once."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        return [self._unit(bench, route) for route in REQUESTS]

    def _unit(self, bench: Bench, route: str) -> Unit:
        requests = int(bench.budget(REQUESTS[route], REQUESTS[route] / QUICK))

        def run(bench: Bench, _tell: Callable[[float], None]) -> Json:
            with bench.worker(by_name(OURS)) as worker:
                return worker.call(grown, route, requests)

        return Unit(route, [OURS], bench.budget(SECONDS[route], 2), run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        columns = ("requests", "bytes", "resident bytes", "cyclic objects")
        rows = {
            ROUTES[route]: [
                f"{each['requests']:,}",
                *(f"{each[what]:.2f}" for what in ("traced", "resident", "cyclic")),
            ]
            for route, each in found.items()
        }
        return [Table("For each request", columns, rows)]


MEASURE = Growth()
