"""How long a request takes: in process, beside its control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.contestants import by_name
from bench.measure import GROUPS, Bars, Bench, Json, Table, Unit
from bench.race import KINDS, Budget, Processes, above, in_processes, median, ratio
from bench.worker import LOOPS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.contestant import Contestant

ROUTES = {
    "none": "no database",
    "unused": "session obtained, not used",
    "select": "one SELECT",
    "insert": "one INSERT, committed",
}
ABOVE = ("none", "unused")
"""The routes that are told by what they take above the bare app; the others beside by hand."""

RACES = {"asyncio": GROUPS, "uvloop": GROUPS[:1]}
"""By event loop: the groups that are measured on it. Servers have uvloop for all of them."""


class Latency:
    name = "latency"
    title = "Time"
    about = (
        "Microseconds for one request, in process, without a server: medians. In brackets, without "
        "a statement: how many more than the bare app; with one: the ratio to by hand. Both are "
        "paired: the bare app, or by hand, is in the same process, in the same framework, with an "
        "engine of its own, and they take turns of a few milliseconds, each round by chance. Each "
        "contestant has at least three processes, with other hash seeds and its apps made in "
        "another order, and the interval reaches over what each of them says with 95 %: also over "
        "what processes differ by. *The bare app* and *by hand* are themselves beside a second one "
        "of the same: what their rows are off 0 and 1 is what the method is off.\n\n"
        "*Wall* is with the wait for the database, *cpu* is this process's alone. The garbage "
        "collector is on. What there is after the warm-up is frozen (`gc.freeze()`), so that no "
        "collection looks at the imports; a turn begins with none of another's garbage, and has "
        "what it leaves behind collected in its own time."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        if bench.is_quick:
            return [self._unit(bench, "asyncio", "asgi")]
        return [self._unit(bench, loop, group) for loop in LOOPS for group in RACES[loop]]

    def _unit(self, bench: Bench, loop: str, group: str) -> Unit:
        racing = {each: controls(each) for each in bench.group(group)}
        # The targets are those of the first: it has more.
        is_first = (loop, group) == ("asyncio", GROUPS[0])
        budget = Budget(
            starts=int(bench.budget(6 if is_first else 3, 2)),
            rounds=int(bench.budget(30 if is_first else 20, 3)),
            batch_seconds=bench.budget(0.005, 0.002),
        )

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            return in_processes(bench, racing, budget, loop=loop, tell=tell)

        names = [each.name for each in racing]
        return Unit(f"{loop} {group}", names, budget.seconds(racing), run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                f"{unit.partition(' ')[2]}, {unit.partition(' ')[0]}, {kind}",
                list(ROUTES.values()),
                rows(routes, kind),
                charts=charts(unit, routes) if kind == "cpu" else (),
            )
            for unit, routes in found.items()
            for kind in KINDS
        ]


def takes_part(contestant: Contestant, route: str) -> bool:
    return route in ABOVE or contestant.way != "bare"


def controls(contestant: Contestant) -> dict[str, Contestant]:
    """By route, what it is compared with, in its own framework."""
    bare, by_hand = (by_name(f"{contestant.group}.{way}") for way in ("bare", "by_hand"))
    return {
        route: bare if route in ABOVE else by_hand
        for route in ROUTES
        if takes_part(contestant, route)
    }


def charts(unit: str, routes: Processes) -> list[Bars]:
    """What a request with a statement takes, on the event loop that Python has."""
    loop, _, group = unit.partition(" ")
    ratios = {
        route: {name: ratio(processes, "cpu") for name, processes in routes[route].items()}
        for route in ("select", "insert")
        if loop == "asyncio"
    }
    return [
        Bars(
            f"latency-{group}-{route}",
            f"{ROUTES[route]}, {group}: the processor's time, by hand = 1",
            {name: each.value for name, each in found.items()},
            {name: (each.low, each.high) for name, each in found.items()},
            shown="{:.3f}",
        )
        for route, found in ratios.items()
    ]


def rows(routes: Processes, kind: str) -> dict[str, list[str]]:
    """Medians; in brackets what the pairs of one round say."""
    names = dict.fromkeys(name for processes in routes.values() for name in processes)
    return {
        name: [
            _cell(route, routes[route][name], kind) if name in routes[route] else ""
            for route in routes
        ]
        for name in names
    }


def _cell(route: str, processes: Sequence[Json], kind: str) -> str:
    told = (
        above(processes, kind).told("{:+,.2f}")
        if route in ABOVE
        else ratio(processes, kind).told("{:.3f}")
    )
    return f"{median(processes, kind):,.2f} ({told})"


MEASURE = Latency()
