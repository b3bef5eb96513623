"""Throughput behind a real uvicorn under wrk, and the CPU time that the server takes for it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.contestants import by_name
from bench.measure import GROUPS, Bars, Bench, Json, Table, Unit, asked
from bench.race import median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.contestant import Contestant
    from bench.race import Raced
    from bench.servers import Server

ROUTES = {"none": "no database", "select": "one SELECT", "insert": "one INSERT, committed"}

CLIENTS = 4
"""Fewer than the pool has connections: nobody waits for one."""

STARTS, TURNS = 3, {"none": 1, "select": 2, "insert": 1}
"""Servers of each contestant, and by route the turns of each of them: without a framework, where
there is more to see."""

FRAMEWORK_TURNS = {"select": 3}
"""With one, of one server each."""

Crew = tuple["Server", "Sequence[Server]"]
"""By hand, and one or two that have their turns before and after it."""


async def slice_of(server: Server, route: str) -> dict[str, float]:
    """A turn of one second: requests per second, and microseconds of the server's CPU for each."""
    before = await server.idle_state()
    start = time.perf_counter()
    await server.wrk(route, clients=CLIENTS, seconds=1)
    elapsed = time.perf_counter() - start
    after = await server.idle_state()
    served = after["requests"] - before["requests"]
    cpu = (after["cpu"] - before["cpu"]) / served * 1e6
    return {"rate": round(served / elapsed, 1), "cpu": round(cpu, 2)}


async def load(crews: Sequence[Crew], turns: Mapping[str, int]) -> dict[str, dict[str, Raced]]:
    """By contestant and route: what it took, and by hand beside it."""
    found: dict[str, dict[str, Raced]] = {}
    for by_hand, others in crews:
        for server, route in ((each, route) for each in (by_hand, *others) for route in turns):
            if has(server.name, route):
                await server.warm(route)
    for route, by_hand, others in (
        (route, *crew) for route, times in turns.items() for _ in range(times) for crew in crews
    ):
        racing = [each for each in others if has(each.name, route)]
        if not racing:
            continue
        own = [await slice_of(racing[0], route)]
        beside = await slice_of(by_hand, route)
        own += [await slice_of(each, route) for each in racing[1:]]
        for server, taken in zip(racing, own, strict=True):
            raced = found.setdefault(server.name, {}).setdefault(route, {})
            for kind in taken:
                pair = raced.setdefault(kind, [[], []])
                for samples, each in zip(pair, (taken, beside), strict=True):
                    samples.append(each[kind])
    return found


def has(name: str, route: str) -> bool:
    """Whether the contestant has that route: the bare app has no database."""
    return route == "none" or ".bare" not in name


class Throughput:
    name = "throughput"
    title = "Behind a server"
    about = (
        "uvicorn (uvloop, httptools) under wrk with four connections, Python's garbage collector "
        "as it is by default. *CPU* is what the server's process takes for one request, in "
        "microseconds: the honest column, because wrk and PostgreSQL share the cores with it. "
        "A turn takes a second, and right before or after it a server by hand has its turn, in the "
        "same environment. Without a framework each contestant has three servers, one after the "
        "other, with other hash seeds; with one it has one server, and three turns. Told are "
        "medians of the turns, and the ratio to by hand in these pairs: the median, the lowest and "
        "the highest. *By hand* itself is beside a second server of the same: what its row is off "
        "1 is what the method is off."
    )
    needs: Sequence[str] = ("wrk",)

    def units(self, bench: Bench) -> list[Unit]:
        groups = GROUPS[:1] if bench.is_quick else GROUPS
        return [self._unit(bench, group) for group in groups if bench.group(group)]

    def _unit(self, bench: Bench, group: str) -> Unit:
        starts, turns = (STARTS, TURNS) if group == GROUPS[0] else (1, FRAMEWORK_TURNS)
        if bench.is_quick:
            starts, turns = 1, {"select": 1}
        contestants = [
            each for each in bench.group(group) if any(has(each.name, route) for route in turns)
        ]

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            found: dict[str, dict[str, list[Raced]]] = {each.name: {} for each in contestants}
            for start in range(starts):
                with contextlib.ExitStack() as stack:
                    crews = list(_crews(bench, contestants, stack, start))
                    loaded = asked(group, load(crews, turns))
                for name, routes in loaded.items():
                    for route, raced in routes.items():
                        found[name].setdefault(route, []).append(raced)
                tell((start + 1) / starts)
            return found

        seconds = starts * len(contestants) * (1.8 * sum(turns.values()) + 1.0)
        return Unit(group, [each.name for each in contestants], seconds, run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                f"Server's CPU and throughput: {group}",
                [
                    cell
                    for route in _routes(contestants)
                    for cell in (f"{ROUTES[route]}: CPU", "to by hand", "requests a second")
                ],
                {
                    name: [
                        cell
                        for route in _routes(contestants)
                        for cell in _cells(samples.get(route))
                    ]
                    for name, samples in contestants.items()
                },
                charts=_charts(group, contestants),
            )
            for group, contestants in found.items()
        ]


def _crews(
    bench: Bench, contestants: Sequence[Contestant], stack: contextlib.ExitStack, start: int
) -> Iterator[Crew]:
    """Start their servers, and one by hand in each of their environments."""

    def started(contestant: Contestant) -> Server:
        return stack.enter_context(bench.new_server(contestant, start))

    for environment in dict.fromkeys(each.environment for each in contestants):
        own = [started(each) for each in contestants if each.environment == environment]
        by_hand = by_name(f"{contestants[0].group}.by_hand")
        beside = started(replace(by_hand, environment=environment))
        for first in range(0, len(own), 2):
            yield beside, own[first : first + 2]


def _charts(group: str, contestants: Mapping[str, Json]) -> list[Bars]:
    ratios = {
        name: ratio(samples["select"], "cpu")
        for name, samples in contestants.items()
        if "select" in samples
    }
    return [
        Bars(
            f"throughput-{group}",
            f"Server's CPU for one SELECT, {group}: by hand = 1",
            {name: each.value for name, each in ratios.items()},
            {name: (each.low, each.high) for name, each in ratios.items()},
            shown="{:.2f}",
        )
    ]


def _routes(contestants: Mapping[str, Json]) -> list[str]:
    return [route for route in ROUTES if any(route in each for each in contestants.values())]


def _cells(processes: Sequence[Raced] | None) -> list[str]:
    if processes is None:
        return ["", "", ""]
    return [
        f"{median(processes, 'cpu'):,.0f}",
        ratio(processes, "cpu").told("{:.2f}"),
        f"{median(processes, 'rate'):,.0f}",
    ]


MEASURE = Throughput()
