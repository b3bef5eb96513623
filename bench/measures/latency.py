"""How long a request takes: in process, all contestants of a framework by turns."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from bench.measure import GROUPS, Bars, Bench, Json, Table, Unit, quartiles
from bench.worker import LOOPS, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.contestant import Contestant
    from bench.served import Served

ROUTES = {
    "none": "no database",
    "unused": "session obtained, not used",
    "select": "one SELECT",
    "insert": "one INSERT, committed",
}
ABOVE = ("none", "unused")
"""The routes that are told by what they take above the bare app; the others beside by hand."""

RACES = {"asyncio": GROUPS, "uvloop": ("asgi", "fastapi")}
"""By event loop: the groups that are measured on it."""

ROUNDS = {"asyncio": 40, "uvloop": 20}
WARM = 20
"""Requests before it counts."""


async def prepare(served: Served, route: str, batch_seconds: float) -> int:
    """Warm up; how many requests make a batch."""
    answer = await served.ask(route)
    if answer.status != HTTPStatus.OK or b"item" not in answer.body:
        raise RuntimeError(f"{route}: {answer}")
    await served.serve(route, WARM)
    start = time.perf_counter()
    await served.serve(route, WARM)
    gc.collect()
    return max(1, round(WARM * batch_seconds / (time.perf_counter() - start)))


async def batch(served: Served, route: str, requests: int) -> tuple[float, float]:
    """Microseconds for one request: with the waiting, and the processor's alone."""
    wall, cpu = time.perf_counter(), time.process_time()
    await served.serve(route, requests)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return wall / requests * 1e6, cpu / requests * 1e6


class Latency:
    name = "latency"
    title = "Time"
    about = (
        "Microseconds for one request, in process, without a server: medians. In brackets, without "
        "a statement: how many more than the bare app; with one: the ratio to by hand, with its "
        "quartiles. Both are of pairs of one round, as the contestants of a framework take turns. "
        "*Wall* is with the wait for the database, *cpu* is this process's alone. Each contestant "
        "is one process, and processes of the same code differ: without a database *by hand* is "
        "the bare app, so what they differ by there is no difference. Trust the instructions more."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        if bench.is_quick:
            return [self._unit(bench, "asyncio", "asgi")]
        return [self._unit(bench, loop, group) for loop in LOOPS for group in RACES[loop]]

    def _unit(self, bench: Bench, loop: str, group: str) -> Unit:
        contestants = bench.group(group)
        rounds = int(bench.budget(ROUNDS[loop], 3))
        batch_seconds = bench.budget(0.015, 0.002)

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            with contextlib.ExitStack() as stack:
                workers = [
                    stack.enter_context(bench.worker(each, loop=loop)) for each in contestants
                ]
                found: dict[str, Json] = {}
                for done, route in enumerate(ROUTES):
                    found[route] = interleave(workers, route, rounds, batch_seconds)
                    tell((done + 1) / len(ROUTES))
            return found

        seconds = len(contestants) * (1.5 + len(ROUTES) * rounds * batch_seconds * 1.2)
        return Unit(f"{loop} {group}", [each.name for each in contestants], seconds, run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                f"{unit.partition(' ')[2]}, {unit.partition(' ')[0]}, {kind}",
                list(ROUTES.values()),
                rows(routes, kind),
                charts=charts(unit, routes) if kind == "cpu" else (),
            )
            for unit, routes in found.items()
            for kind in ("wall", "cpu")
        ]


def takes_part(contestant: Contestant, route: str) -> bool:
    return route in ABOVE or contestant.way != "bare"


def interleave(
    workers: Sequence[Worker], route: str, rounds: int, batch_seconds: float
) -> dict[str, Any]:
    """Let them take turns: A B C ... C B A ...; what disturbs the machine disturbs all of them."""
    racing = [each for each in workers if takes_part(each.contestant, route)]
    sizes = [each.call(prepare, route, batch_seconds) for each in racing]
    samples: dict[str, Any] = {each.contestant.name: {"wall": [], "cpu": []} for each in racing}
    turns = list(zip(racing, sizes, strict=True))
    for number in range(rounds):
        for worker, size in reversed(turns) if number % 2 else turns:
            wall, cpu = worker.call(batch, route, size)
            samples[worker.contestant.name]["wall"].append(round(wall, 3))
            samples[worker.contestant.name]["cpu"].append(round(cpu, 3))
    return samples


def charts(unit: str, routes: Mapping[str, Any]) -> list[Bars]:
    """What a request with a statement takes, on the event loop that Python has."""
    loop, _, group = unit.partition(" ")
    return [
        Bars(
            f"latency-{group}-{route}",
            f"{ROUTES[route]}, {group}: microseconds of the processor",
            {name: statistics.median(times["cpu"]) for name, times in routes[route].items()},
            {name: quartiles(times["cpu"]) for name, times in routes[route].items()},
        )
        for route in ("select", "insert")
        if loop == "asyncio"
    ]


def rows(routes: Mapping[str, Any], kind: str) -> dict[str, list[str]]:
    """Medians; in brackets what the pairs of one round say, and their quartiles."""
    names = dict.fromkeys(name for samples in routes.values() for name in samples)
    return {
        name: [
            _cell(routes, route, name, kind) if name in routes[route] else "" for route in routes
        ]
        for name in names
    }


def _cell(routes: Mapping[str, Any], route: str, name: str, kind: str) -> str:
    own = routes[route][name][kind]
    group, _, _ = name.partition(".")
    told = f"{statistics.median(own):,.1f}"
    if route in ABOVE:
        other = routes[route].get(f"{group}.bare")
        if other is None or name == f"{group}.bare":
            return told
        more = [a - b for a, b in zip(own, other[kind], strict=True)]
        return f"{told} ({statistics.median(more):+,.1f})"
    other = routes[route].get(f"{group}.by_hand")
    if other is None or name == f"{group}.by_hand":
        return told
    ratios = [a / b for a, b in zip(own, other[kind], strict=True)]
    low, high = quartiles(ratios)
    return f"{told} ({statistics.median(ratios):.3f}: {low:.3f} to {high:.3f})"


MEASURE = Latency()
