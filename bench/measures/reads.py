"""What `Database(reads=...)` saves: one SELECT, with the server near by and far away."""

from __future__ import annotations

import contextlib
import shutil
import statistics
from typing import TYPE_CHECKING, Any

from bench.apps import Setup
from bench.contestants import by_name
from bench.delay import delayed
from bench.measure import Bench, Json, Table, Unit
from bench.measures.instructions import at_once
from bench.measures.latency import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CONTESTANTS = ("asgi.by_hand", "asgi.ours", "asgi.ours_reads")
DELAYS = {"a unix socket": 0.0, "1 ms more to the server": 0.001}
COUNTED = "instructions"


class Reads:
    name = "reads"
    title = "Reads in one round trip"
    about = (
        "One SELECT: the session opened by hand, `DBSessionMiddleware`, and the same with "
        "[`reads`](reads.md), in microseconds, and beside the session opened by hand (the median "
        "of the ratios within a round). The second table has a proxy in between, which holds each "
        "packet to the server back for a millisecond."
    )
    needs: Sequence[str] = ()

    def units(self, bench: Bench) -> list[Unit]:
        rounds = int(bench.budget(60, 5))
        units = [self._unit(where, delay, rounds) for where, delay in DELAYS.items()]
        if shutil.which("valgrind"):
            units.append(Unit(COUNTED, CONTESTANTS, 10 * len(CONTESTANTS), self._count))
        return units

    def _count(self, bench: Bench, _tell: Callable[[float], None]) -> Json:
        return at_once(bench, {by_name(each): ["select"] for each in CONTESTANTS})

    def _unit(self, where: str, delay: float, rounds: int) -> Unit:
        batch_seconds = 0.02 + 50 * delay

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            with contextlib.ExitStack() as stack:
                url = stack.enter_context(delayed(bench.url, delay)) if delay else bench.url
                workers = [
                    stack.enter_context(bench.worker(by_name(each), Setup(url)))
                    for each in CONTESTANTS
                ]
                found = interleave(workers, "select", rounds, batch_seconds)
            tell(1.0)
            return found

        seconds = len(CONTESTANTS) * (1.5 + rounds * batch_seconds * 1.2)
        return Unit(where, CONTESTANTS, seconds, run)

    def tables(self, found: Mapping[str, Json]) -> list[Table]:
        columns = ("time", "CPU", "time, by hand = 1", "CPU, by hand = 1")
        tables = [Table(where, columns, _rows(found[where])) for where in DELAYS if where in found]
        if COUNTED in found:
            counted = {name: routes["select"] for name, routes in found[COUNTED].items()}
            rows = {
                by_name(name).title: [f"{count:,.0f}", f"{count / counted[CONTESTANTS[0]]:.2f}"]
                for name, count in counted.items()
            }
            tables.append(Table(COUNTED, ("a SELECT", "by hand = 1"), rows))
        return tables


def _rows(samples: Mapping[str, Any]) -> dict[str, list[str]]:
    by_hand = samples[CONTESTANTS[0]]
    return {
        by_name(name).title: [
            *(f"{statistics.median(own[kind]):,.0f}" for kind in ("wall", "cpu")),
            *(_ratio(own[kind], by_hand[kind]) for kind in ("wall", "cpu")),
        ]
        for name, own in samples.items()
    }


def _ratio(own: Sequence[float], by_hand: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(own, by_hand, strict=True)]
    return f"{statistics.median(ratios):.2f}"


MEASURE = Reads()
