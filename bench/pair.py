"""A measure of two contestants, the second beside the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.contestants import by_name
from bench.measure import Bench, Json, Table, Unit
from bench.race import OTHER, OWN, Budget, in_processes, median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.race import Raced


@dataclass(frozen=True)
class Pair:
    """A measure of two contestants in one process: microseconds of the processor, their ratio.

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
        first, second = map(by_name, self.names)
        racing = {second: dict.fromkeys(self.routes, first)}
        budget = Budget(
            starts=int(bench.budget(3, 2)),
            rounds=int(bench.budget(25, 3)),
            batch_seconds=bench.budget(0.006, 0.002),
        )

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            return in_processes(bench, racing, budget, tell=tell)

        return [Unit("asyncio", self.names, budget.seconds(racing), run)]

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        return [
            Table(
                "Microseconds of the processor",
                (*self.columns, "ratio"),
                {
                    title: self._row(routes[route][self.names[1]])
                    for route, title in self.routes.items()
                },
            )
            for routes in found.values()
        ]

    def _row(self, processes: Sequence[Raced]) -> list[str]:
        return [
            *(f"{median(processes, 'cpu', which):,.2f}" for which in (OTHER, OWN)),
            ratio(processes, "cpu").told("{:.2f}"),
        ]
