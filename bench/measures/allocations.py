"""What a request has allocated when its response begins: memory blocks, and their size."""

from __future__ import annotations

import gc
import statistics
import sys
import tracemalloc
from typing import TYPE_CHECKING

from bench.measure import Bench, Json, Table, Unit
from bench.measures.latency import ROUTES, takes_part
from bench.served import receive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.apps import Message
    from bench.contestant import Contestant
    from bench.served import Served

WARM, REQUESTS = 50, 51


async def allocated(served: Served, route: str) -> dict[str, float]:
    """Blocks and bytes that are there at the response's head, and weren't before the request."""
    await served.serve(route, WARM)
    gc.collect()
    gc.disable()
    blocks = [await _grown(served, route, sys.getallocatedblocks) for _ in range(REQUESTS)]
    tracemalloc.start()
    await served.serve(route, WARM)
    sizes = [await _grown(served, route, _traced) for _ in range(REQUESTS)]
    tracemalloc.stop()
    gc.enable()
    return {"count": statistics.median(blocks), "bytes": statistics.median(sizes)}


def _traced() -> int:
    return tracemalloc.get_traced_memory()[0]


async def _grown(served: Served, route: str, read: Callable[[], int]) -> int:
    before = at_head = 0

    async def send(message: Message) -> None:
        nonlocal at_head
        if message["type"] == "http.response.start":
            at_head = read()

    scope = served.scope(route)
    before = read()
    await served.app(scope, receive, send)
    return at_head - before


class Allocations:
    name = "allocations"
    title = "Allocations"
    about = (
        "Memory blocks that a request has allocated when its response begins, above the bare app; "
        "in brackets their size in KiB. The median of 51 requests, without the garbage collector."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        groups = ("asgi",) if bench.is_quick else ("asgi", "fastapi")
        return [self._unit(bench, group) for group in groups]

    def _unit(self, bench: Bench, group: str) -> Unit:
        contestants = bench.group(group)

        def run(bench: Bench, _tell: Callable[[float], None]) -> Json:
            return {each.name: self._run(bench, each) for each in contestants}

        return Unit(group, [each.name for each in contestants], 2.5 * len(contestants), run)

    def _run(self, bench: Bench, contestant: Contestant) -> dict[str, dict[str, float]]:
        with bench.worker(contestant) as worker:
            return {
                route: worker.call(allocated, route)
                for route in ROUTES
                if takes_part(contestant, route)
            }

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                group,
                list(ROUTES.values()),
                {
                    name: [
                        above(routes[route], counted[f"{group}.bare"]["none"])
                        if route in routes
                        else ""
                        for route in ROUTES
                    ]
                    for name, routes in counted.items()
                },
            )
            for group, counted in found.items()
        ]


def above(found: Mapping[str, float], bare: Mapping[str, float]) -> str:
    """A cell."""
    count, size = (found[each] - bare[each] for each in ("count", "bytes"))
    return f"{count:,.0f} ({size / 1024:,.1f})"


MEASURE = Allocations()
