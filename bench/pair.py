"""A measure of two contestants, the second beside the first."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.contestants import by_name
from bench.measure import Bench, Json, Table, Unit, quartiles
from bench.measures.latency import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Pair:
    """A measure of two contestants, by turns: microseconds of the processor, and their ratio.

    Attributes:
        names: Of the two.

        columns: What the table calls them.

        routes: What its rows are called.
    """

    name: str
    title: str
    about: str
    names: tuple[str, str]
    columns: tuple[str, str]
    routes: Mapping[str, str]
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        rounds = int(bench.budget(50, 3))
        batch_seconds = bench.budget(0.015, 0.002)

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            found: dict[str, Json] = {}
            with contextlib.ExitStack() as stack:
                workers = [stack.enter_context(bench.worker(by_name(name))) for name in self.names]
                for done, route in enumerate(self.routes):
                    found[route] = interleave(workers, route, rounds, batch_seconds)
                    tell((done + 1) / len(self.routes))
            return found

        seconds = 2 * (1.5 + len(self.routes) * rounds * batch_seconds * 1.2)
        return [Unit("asyncio", self.names, seconds, run)]

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                "Microseconds of the processor",
                (*self.columns, "ratio"),
                {title: self._row(routes[route]) for route, title in self.routes.items()},
            )
            for routes in found.values()
        ]

    def _row(self, samples: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
        first, second = (samples[name]["cpu"] for name in self.names)
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        low, high = quartiles(ratios)
        return [
            *(f"{statistics.median(each):,.2f}" for each in (first, second)),
            f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
        ]
