"""Two apps by turns in one process, and that in several processes, one after the other.

Processes of the same code differ by more than what is measured here: by where their objects came to
be in memory, and in which order Python finds what it looks up. So an app is compared with another
one of its own process, and what processes differ by is part of the interval (`bench.estimate`).
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from bench.estimate import Estimate, estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.apps import Setup
    from bench.contestant import Contestant
    from bench.measure import Bench
    from bench.served import Served

KINDS = ("wall", "cpu")

OWN, OTHER = 0, 1

Raced = dict[str, list[list[float]]]
"""Of one process, by kind: microseconds for one request, of the app and of the other one."""

Processes = dict[str, dict[str, list[Raced]]]
"""By route and contestant: each process."""

Racing = Mapping["Contestant", Mapping[str, "Contestant"]]
"""Of each contestant, by route: which other one it is compared with."""

WARM = 20
"""Requests before it counts."""

SETTLING = 8
"""Of each batch, so many times fewer requests go before it, and aren't counted: processor and
interpreter find their caches as they are after the same app."""


async def race(  # noqa: PLR0917 - what is sent to the process
    served: Served, other: str, route: str, rounds: int, batch_seconds: float, seed: int
) -> Raced:
    """In the contestant's process: the app and the other one by turns, each round by chance."""
    racing = (served, served.beside[other])
    sizes = [await prepare(each, route, batch_seconds) for each in racing]
    # What is there by now is there to the end; without this each collection has to look at it.
    gc.collect()
    gc.freeze()
    taken: Raced = {kind: [[], []] for kind in KINDS}
    order = [OWN, OTHER]
    chance = random.Random(seed)
    for _ in range(rounds):
        chance.shuffle(order)
        for which in order:
            times = await batch(racing[which], route, sizes[which])
            for kind, microseconds in zip(KINDS, times, strict=True):
                taken[kind][which].append(round(microseconds, 3))
    gc.unfreeze()
    return taken


async def prepare(served: Served, route: str, batch_seconds: float) -> int:
    """Warm up; how many requests make a batch."""
    answer = await served.ask(route)
    if answer.status != HTTPStatus.OK or b"item" not in answer.body:
        raise RuntimeError(f"{route}: {answer}")
    await served.serve(route, WARM)
    start = time.perf_counter()
    await served.serve(route, WARM)
    return max(1, round(WARM * batch_seconds / (time.perf_counter() - start)))


async def batch(served: Served, route: str, requests: int) -> tuple[float, float]:
    """Microseconds for one request: with the waiting, and the processor's alone.

    The garbage collector is on. It begins with none of another's garbage, and what this batch
    leaves behind is collected in its own time.
    """
    await served.serve(route, max(1, requests // SETTLING))
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    await served.serve(route, requests)
    gc.collect(0)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return wall / requests * 1e6, cpu / requests * 1e6


@dataclass(frozen=True)
class Budget:
    """How much is raced.

    Attributes:
        starts: Processes for each contestant.

        rounds: Turns that each app has in each of them.

        batch_seconds: What a turn takes, about.
    """

    starts: int
    rounds: int
    batch_seconds: float

    def seconds(self, racing: Racing) -> float:
        """About how long that takes."""
        routes = sum(len(others) for others in racing.values())
        return self.starts * (
            1.2 * len(racing) + routes * (0.1 + self.rounds * self.batch_seconds * 2.5)
        )


def in_processes(
    bench: Bench,
    racing: Racing,
    budget: Budget,
    *,
    loop: str = "asyncio",
    setup: Setup | None = None,
    tell: Callable[[float], None] = lambda _: None,
) -> Processes:
    """Race each contestant against others.

    Each process has another `PYTHONHASHSEED`, and makes its apps in another order.
    """
    found: Processes = {}
    turns = [(start, each) for start in range(budget.starts) for each in racing]
    for done, (start, contestant) in enumerate(turns):
        others = racing[contestant]
        beside = tuple(dict.fromkeys(others.values()))
        with bench.worker(contestant, setup, loop, beside=beside, start=start) as worker:
            for route, other in others.items():
                order = (other.name, route, budget.rounds, budget.batch_seconds, start)
                raced = worker.call(race, *order)
                found.setdefault(route, {}).setdefault(contestant.name, []).append(raced)
        tell((done + 1) / len(turns))
    return found


def median(processes: Sequence[Raced], kind: str, which: int = OWN) -> float:
    """Microseconds, over all of them."""
    return statistics.median([each for process in processes for each in process[kind][which]])


def above(processes: Sequence[Raced], kind: str) -> Estimate:
    """How many microseconds more than the other one, in pairs of one round."""
    return estimate([[a - b for a, b in zip(*process[kind], strict=True)] for process in processes])


def ratio(processes: Sequence[Raced], kind: str) -> Estimate:
    """To the other one, in pairs of one round."""
    return estimate([[a / b for a, b in zip(*process[kind], strict=True)] for process in processes])
