"""What a measure is: its units, which run one by one, and the tables that come of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bench import environments
from bench.apps import Setup
from bench.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.contestant import Contestant

Json = Any
"""What a unit found: whatever JSON can hold."""


@dataclass(frozen=True)
class Bench:
    """What the units of a run share.

    Attributes:
        url: Of PostgreSQL, with the tables in it.

        contestants: Those whose packages are there.

        is_quick: Whether a look is enough.
    """

    url: str
    contestants: Sequence[Contestant]
    is_quick: bool = False

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
        wrapper: Sequence[str] = (),
    ) -> Worker:
        """A process for a contestant, in its environment; use it in a `with` block."""
        python = environments.python(contestant.environment)
        return Worker(contestant, python, setup or Setup(self.url), loop, wrapper)


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
class Table:
    """A table of the page.

    Attributes:
        title: Its heading.

        columns: Without the first, which names the row.

        rows: By the name of a contestant, or whatever else a row stands for.

        note: Markdown below it: what the columns mean, how it was measured.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    note: str = ""


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
