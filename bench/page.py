"""`docs/benchmarks.md`, of what the results file holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.contestant import Contestant
    from bench.measure import Measure, Table
    from bench.results import Results

HEAD = (
    "# Benchmarks\n\nWhat a request costs with `DBSessionMiddleware`, beside the bare app, the "
    "session opened by hand, and every other way that we know. To repeat it: `tox run -e bench`. "
    "`bench/README.md` says how it is measured.\n"
)


def page(results: Results, measures: Iterable[Measure], contestants: Sequence[Contestant]) -> str:
    """The whole of it."""
    titles = {each.name: each.title for each in contestants}
    parts = [HEAD]
    for measure in measures:
        found = results.found(measure.name)
        if not found:
            continue
        parts.append(f"## {measure.title}\n\n{measure.about}\n")
        parts += [render(table, titles) for table in measure.tables(found)]
    return "\n".join(parts)


def render(table: Table, titles: dict[str, str]) -> str:
    """A table in markdown; a contestant's row has its title."""
    lines = [["", *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[titles.get(name, name), *cells] for name, cells in table.rows.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"\n{table.note}\n" if table.note else ""
    return f"### {table.title}\n\n{text}\n{note}"
