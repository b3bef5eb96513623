"""Throughput behind a real uvicorn under wrk, and the CPU time that the server takes for it."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from bench.measure import GROUPS, Bars, Bench, Json, Table, Unit, by_group, quartiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.servers import Server

ROUTES = {"none": "no database", "select": "one SELECT", "insert": "one INSERT, committed"}

CLIENTS = 4
"""Fewer than the pool has connections: nobody waits for one."""


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


class Throughput:
    name = "throughput"
    title = "Behind a server"
    about = (
        "uvicorn (uvloop, httptools) under wrk with four connections, Python's garbage collector "
        "as it is by default. *CPU* is what the server's process takes for one request, in "
        "microseconds: the honest column, because wrk and PostgreSQL share the cores with it. "
        "The contestants take turns of a second; medians of the turns, and the ratio is that of "
        "the turns of one round."
    )
    needs: Sequence[str] = ("wrk",)

    def units(self, bench: Bench) -> list[Unit]:
        if bench.is_quick:
            return self._units(bench, GROUPS, {"select": 1})
        # Without a framework in the way there is more to see.
        frameworks = [group for group in GROUPS if group != "asgi"]
        return [
            *self._units(bench, ["asgi"], {"none": 2, "select": 8, "insert": 4}),
            *self._units(bench, frameworks, {"select": 2}),
        ]

    def _units(self, bench: Bench, groups: Sequence[str], rounds: Mapping[str, int]) -> list[Unit]:
        async def measure(servers: Sequence[Server], tell: Callable[[float], None]) -> Json:
            found: dict[str, Json] = {each.name: {} for each in servers}
            turns = [
                (server, route)
                for number in range(max(rounds.values()))
                for route in rounds
                if number < rounds[route]
                for server in servers
                if route == "none" or ".bare" not in server.name
            ]
            for server, route in dict.fromkeys(turns):
                await server.warm(route)
            for done, (server, route) in enumerate(turns):
                found[server.name].setdefault(route, []).append(await slice_of(server, route))
                tell((done + 1) / len(turns))
            return found

        return by_group(bench, groups, sum(rounds.values()) * 1.2 + 1, measure)

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
                    name: _cells(samples, _by_hand(contestants), _routes(contestants))
                    for name, samples in contestants.items()
                    if samples
                },
                charts=_charts(group, contestants),
            )
            for group, contestants in found.items()
        ]


def _charts(group: str, contestants: Mapping[str, Json]) -> list[Bars]:
    cpu = {
        name: [each["cpu"] for each in samples["select"]]
        for name, samples in contestants.items()
        if "select" in samples
    }
    return [
        Bars(
            f"throughput-{group}",
            f"Server's CPU for one SELECT, {group}: microseconds",
            {name: statistics.median(times) for name, times in cpu.items()},
            {name: quartiles(times) for name, times in cpu.items()},
        )
    ]


def _by_hand(contestants: Mapping[str, Json]) -> Json:
    return next((each for name, each in contestants.items() if ".by_hand" in name), {})


def ratio(ours: Sequence[Json], theirs: Sequence[Json]) -> float:
    """Of the CPU times of the turns of one round: the median."""
    ratios: list[float] = [a["cpu"] / b["cpu"] for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios)


def _routes(contestants: Mapping[str, Json]) -> list[str]:
    return [route for route in ROUTES if any(route in each for each in contestants.values())]


def _cells(
    samples: Mapping[str, Json], by_hand: Mapping[str, Json], routes: Sequence[str]
) -> list[str]:
    cells = []
    for route in routes:
        turns = samples.get(route)
        if turns is None:
            cells += ["", "", ""]
            continue
        cells.append(f"{statistics.median(each['cpu'] for each in turns):,.0f}")
        cells.append(f"{ratio(turns, by_hand[route]):.2f}" if route in by_hand else "")
        cells.append(f"{statistics.median(each['rate'] for each in turns):,.0f}")
    return cells


MEASURE = Throughput()
