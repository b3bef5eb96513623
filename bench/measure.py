"""What a measure is: its units, which run one by one, and the tables that come of them."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bench import environments
from bench.apps import Setup
from bench.servers import POOL_SIZE, Server, ServerFailedError
from bench.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from bench.contestant import Contestant

T = TypeVar("T")

Json = Any
"""What a unit found: whatever JSON can hold."""


@dataclass(frozen=True)
class Bench:
    """What the units of a run share.

    Attributes:
        url: Of PostgreSQL, with the tables in it.

        contestants: Those whose packages are there.

        is_quick: Whether a look is enough.

        kept: What is kept to the end of the run.

        servers: Those that were started.
    """

    url: str
    contestants: Sequence[Contestant]
    is_quick: bool = False
    kept: ExitStack = field(default_factory=ExitStack)
    servers: dict[str, Server] = field(default_factory=dict[str, Server])

    def budget(self, full: float, quick: float) -> float:
        """How much of something a unit may take: seconds, requests, rounds."""
        return quick if self.is_quick else full

    def group(self, name: str) -> list[Contestant]:
        """Who is measured together: those of a framework."""
        return [each for each in self.contestants if each.group == name]

    def worker(
        self,
        contestant: Contestant,
        setup: Setup | None = None,
        loop: str = "asyncio",
        *,
        wrapper: Sequence[str] = (),
        source: Path | None = None,
        beside: Sequence[Contestant] = (),
        start: int = 0,
    ) -> Worker:
        """A process for a contestant, in its environment; use it in a `with` block."""
        python = environments.python(contestant.environment)
        return Worker(
            contestant,
            python,
            setup or Setup(self.url),
            loop=loop,
            wrapper=wrapper,
            source=source,
            beside=beside,
            start=start,
        )

    def server(self, contestant: Contestant) -> Server:
        """The server of a contestant, kept to the end of the run."""
        if contestant.name not in self.servers:
            server = self.kept.enter_context(self.new_server(contestant))
            self.servers[contestant.name] = server
        return self.servers[contestant.name]

    def new_server(self, contestant: Contestant, start: int = 0) -> Server:
        """One of its own, with *start* as its hash seed; use it in a `with` block."""
        python = environments.python(contestant.environment)
        pool = {"pool_size": POOL_SIZE, "max_overflow": 0}
        return Server(contestant, python, Setup(self.url, pool), start)


@dataclass(frozen=True)
class Unit:
    """What runs in one piece, and is written down as one.

    Attributes:
        name: Unique in its measure.

        contestants: Their names; with others it is another unit.

        seconds: About how long it takes.

        run: Measures; told how much of it is done, from 0 to 1, it moves the progress bar.
    """

    name: str
    contestants: Sequence[str]
    seconds: float
    run: Callable[[Bench, Callable[[float], None]], Json]


@dataclass(frozen=True)
class Bars:
    """A chart: a bar for each contestant.

    Attributes:
        name: Of its file.

        title: What is drawn, with its unit.

        values: By the name of a contestant.

        ranges: Between which two each is, where that is known.

        shown: How a value is written.
    """

    name: str
    title: str
    values: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=dict[str, tuple[float, float]]
    )
    shown: str = "{:,.1f}"


@dataclass(frozen=True)
class Lines:
    """A chart: a line for each contestant, over how many there are of something.

    Attributes:
        name: Of its file.

        title: What is drawn, with its unit.

        over: What there are so many of.

        values: By the name of a contestant: by how many.
    """

    name: str
    title: str
    over: str
    values: Mapping[str, Mapping[int, float]]


Chart = Bars | Lines


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: Its heading.

        columns: Without the first, which names the row.

        rows: By the name of a contestant, or whatever else a row stands for.

        charts: What is drawn of it.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    charts: Sequence[Chart] = ()


class Measure(Protocol):
    """A file of `bench.measures` has one of these, called `MEASURE`.

    Attributes:
        name: What `--only` and the results call it.

        title: Its heading on the page.

        about: Markdown below that: what is measured, and how.

        needs: Programs, without which it is left out.
    """

    name: str
    title: str
    about: str
    needs: Sequence[str]

    # What there is to run.
    def units(self, bench: Bench, /) -> list[Unit]: ...

    # What came of it, by the units' names; not all of them need be there.
    def tables(self, found: Mapping[str, Json], /) -> list[Table]: ...


def asked(group: str, asking: Coroutine[Any, Any, T]) -> T:
    """What the servers of a group answer; what goes wrong with them is told as theirs."""
    try:
        return asyncio.run(asking)
    except (OSError, EOFError) as error:  # a timeout, a connection that broke
        raise ServerFailedError(f"{group}: {error!r}") from error


def by_group(
    bench: Bench,
    groups: Sequence[str],
    seconds: float,
    measure: Callable[[Sequence[Server], Callable[[float], None]], Coroutine[Any, Any, Json]],
    ways: Sequence[str] = (),
) -> list[Unit]:
    """Units of a measure that asks servers: one for each group.

    Args:
        bench: Who is there.

        groups: Those of them that take part; the first of them in a quick run.

        seconds: About how long it takes for each contestant.

        measure: Given the servers of a group; what it found.

        ways: Those that take part, if not all do.
    """

    def unit(group: str) -> Unit:
        contestants = [each for each in bench.group(group) if not ways or each.way in ways]

        def run(bench: Bench, tell: Callable[[float], None]) -> Json:
            return asked(group, measure([bench.server(each) for each in contestants], tell))

        names = [each.name for each in contestants]
        return Unit(group, names, seconds * len(contestants), run)

    if bench.is_quick:
        groups = groups[:1]
    return [unit(group) for group in groups if bench.group(group)]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def flat(found: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    """What was found for each contestant, whatever its group."""
    return {name: told for contestants in found.values() for name, told in contestants.items()}


ASYNC_GROUPS = ("asgi", "starlette", "fastapi", "litestar")
GROUPS = (*ASYNC_GROUPS, "fastapi-sync")
