"""What `Database(reads=...)` saves: one SELECT, with the server near by and far away."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from bench.apps import Setup
from bench.contestants import by_name
from bench.delay import delayed
from bench.measure import Bench, Json, Table, Unit
from bench.measures.instructions import at_once
from bench.race import KINDS, Budget, in_processes, median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.race import Raced

CONTESTANTS = ("asgi.by_hand", "asgi.ours", "asgi.ours_reads")
DELAYS = {"a unix socket": 0.0, "1 ms more to the server": 0.001}
COUNTED = "instructions"


class Reads:
    name = "reads"
    title = "Reads in one round trip"
    about = (
        "One SELECT: the session opened by hand, `DBSessionMiddleware`, and the same with "
        "[`reads`](reads.md), in microseconds, and beside the session opened by hand in the same "
        "process, as above. The second table has a proxy in between, which holds each packet to "
        "the server back for a millisecond."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        units = [self._unit(bench, where, delay) for where, delay in DELAYS.items()]
        if shutil.which("valgrind"):
            units.append(Unit(COUNTED, CONTESTANTS, 10 * len(CONTESTANTS), self._count))
        return units

    def _count(self, bench: Bench, _tell: Callable[[float], None]) -> Json:
        return at_once(bench, [{by_name(each): ["select"]} for each in CONTESTANTS])

    def _unit(self, bench: Bench, where: str, delay: float) -> Unit:
        by_hand = by_name(CONTESTANTS[0])
        racing = {by_name(each): {"select": by_hand} for each in CONTESTANTS}
        budget = Budget(
            starts=int(bench.budget(3, 2)),
            rounds=int(bench.budget(25, 3)),
            batch_seconds=0.005 + 25 * delay,
        )

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            with contextlib.ExitStack() as stack:
                url = stack.enter_context(delayed(bench.url, delay)) if delay else bench.url
                return in_processes(bench, racing, budget, setup=Setup(url), tell=tell)

        return Unit(where, CONTESTANTS, budget.seconds(racing), run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        columns = ("time", "CPU", "time, by hand = 1", "CPU, by hand = 1")
        tables = [
            Table(where, columns, _rows(found[where]["select"]))
            for where in DELAYS
            if where in found
        ]
        if COUNTED in found:
            counted = {name: routes["select"] for name, routes in found[COUNTED].items()}
            rows = {
                by_name(name).title: [f"{count:,.0f}", f"{count / counted[CONTESTANTS[0]]:.2f}"]
                for name, count in counted.items()
            }
            tables.append(Table(COUNTED, ("a SELECT", "by hand = 1"), rows))
        return tables


def _rows(found: Mapping[str, Sequence[Raced]]) -> dict[str, list[str]]:
    return {
        by_name(name).title: [
            *(f"{median(processes, kind):,.0f}" for kind in KINDS),
            *(ratio(processes, kind).told("{:.2f}") for kind in KINDS),
        ]
        for name, processes in found.items()
    }


MEASURE = Reads()
