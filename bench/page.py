"""`docs/benchmarks.md` and its charts, of what the results file holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.charts import draw, image
from bench.correct import LIE, liars
from bench.targets import BARE, BY_HAND, COLUMNS, GROUP, OURS, TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.contestant import Contestant
    from bench.measure import Measure, Table
    from bench.results import Results

CHARTS = "_static/benchmarks"
"""Where the charts are, seen from the page."""

HEAD = """\
# Benchmarks

What a request costs with `DBSessionMiddleware`, beside the bare app, the session opened by hand, \
and every other way to get a session that we know. Every guarantee is on; the others are used as \
their own documentation says. To repeat it:

```sh
tox run -e bench                 # all of it; resumed where it was interrupted
tox run -e bench -- --quick      # a look
```

`bench/README.md` says how it is measured. This page and its charts were written by that command, \
from one file of results.
"""

ABOUT_TARGETS = """\
## What we set ourselves

Raw ASGI apps, without a framework: there every microsecond shows. *By hand* is \
`async with session_factory() as session` in the endpoint, which commits where it writes; *best \
other* is the best of the others that take raw ASGI apps ({others}), the tables below have all of \
them. The *target* is a figure that we set ourselves before we began, the microseconds on one \
machine where a session that is opened by hand and not used costs 56. Times are of the \
processor, each beside its control in the same process, in brackets between which two they are, \
whatever processes differ by ([how](#time)). *Met* and *not met* are said where all of that is on \
one side of the target. *By hand* is beside a second one of the same. What was missed, and why: \
[decisions](design.md#decisions).
"""

MENTIONED = (
    "python",
    "sqlalchemy",
    "asyncpg",
    "psycopg",
    "greenlet",
    "anyio",
    "uvicorn",
    "uvloop",
    "httptools",
    "starlette",
    "fastapi",
    "litestar",
)
"""What is named of the versions, beside the contestants' own packages."""


def write_page(
    results: Results, measures: Sequence[Measure], contestants: Sequence[Contestant], file: Path
) -> None:
    """Write the page, and its charts beside it."""
    titles = Titles(contestants, liars(results))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(results, measures, contestants))
    for left in (file.parent / CHARTS).glob("*.svg"):
        left.unlink()
    for table in tables(results, measures):
        for chart in table.charts:
            draw(chart, titles.of([*chart.values]), file.parent / CHARTS)


def tables(results: Results, measures: Sequence[Measure]) -> list[Table]:
    """All of them."""
    found = ((each, results.found(each.name)) for each in measures)
    return [table for measure, units in found if units for table in measure.tables(units)]


def page(results: Results, measures: Sequence[Measure], contestants: Sequence[Contestant]) -> str:
    """The page."""
    titles = Titles(contestants, liars(results))
    racing = {each.name: each.title for each in contestants if each.group == GROUP}
    targets = [each.row(results, racing) for each in TARGETS]
    others = ", ".join(racing[name] for name in racing if name not in {BARE, BY_HAND, OURS})
    parts = [HEAD, ABOUT_TARGETS.format(others=others or "none"), _table(["", *COLUMNS], targets)]
    if titles.liars:
        parts.append(f"{LIE} answers 200 to a request whose COMMIT fails.\n")
    for measure in measures:
        if results.found(measure.name):
            parts.append(f"## {measure.title}\n\n{measure.about}\n")
            for table in tables(results, [measure]):
                parts += _render(table, titles)
    return "\n".join(parts + _where(results, contestants))


class Titles:
    """What rows are called: a contestant by its title, with what one has to know of it."""

    def __init__(self, contestants: Sequence[Contestant], liars: set[str]) -> None:
        self._contestants = {each.name: each for each in contestants}
        self.liars = liars

    def of(self, names: Sequence[str]) -> dict[str, str]:
        """The titles of the rows of one table, or of the bars of one chart."""
        known = [self._contestants[name] for name in names if name in self._contestants]
        is_mixed = len({each.group for each in known}) > 1
        return {name: self._title(name, is_mixed=is_mixed) for name in names}

    def _title(self, name: str, *, is_mixed: bool) -> str:
        contestant = self._contestants.get(name)
        if contestant is None:
            return name
        kind = f" ({contestant.group})" if is_mixed else ""
        return f"{contestant.title}{kind}{f' {LIE}' if name in self.liars else ''}"


def _render(table: Table, titles: Titles) -> list[str]:
    named = titles.of([*table.rows])
    rows = [[_stressed(name, named[name]), *cells] for name, cells in table.rows.items()]
    return [
        f"### {table.title}\n",
        _table(["", *table.columns], rows),
        *(image(chart, CHARTS) for chart in table.charts),
    ]


def _stressed(name: str, title: str) -> str:
    return f"**{title}**" if ".ours" in name else title


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _where(results: Results, contestants: Sequence[Contestant]) -> list[str]:
    """The machine and the versions."""
    machine, versions = results.about["machine"], results.about["versions"]
    low, high = results.loads()
    rows = []
    for environment, installed in versions.items():
        found = {name.replace("_", "-"): version for name, version in installed.items()}
        own = [
            name
            for each in contestants
            if each.environment == environment
            for name in each.packages
        ]
        named = [name for name in dict.fromkeys([*MENTIONED, *own]) if name in found]
        rows.append([environment, ", ".join(f"{name} {found[name]}" for name in named)])
    return [
        "## The machine and the versions\n",
        (
            f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; PostgreSQL on "
            f"a unix socket, `fsync` off. The load average was between {low} and {high} while it "
            "was measured, the benchmark's own part included.\n"
        ),
        _table(["environment", "versions"], rows),
        (
            "Packages whose pins conflict with the others' have an environment of their own. What "
            "they are compared with is there, too: an older framework changes no ratio.\n"
        ),
    ]
