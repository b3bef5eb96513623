"""Faults on purpose, under load, and an audit of the database afterwards.

    python -m bench.chaos --minutes 30 --seed 1
    python -m bench.chaos --all --minutes 30 --seed 1

`bench/README.md` says what it does, `docs/reliability.md` what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# The installed package is what is tried; the checkout serves where none is installed.
sys.path.append(str(Path(__file__).parents[2]))

from bench.chaos import page
from bench.chaos.report import COLUMNS, as_json, row, table, violations
from bench.chaos.rows import ROWS, Row, find
from bench.chaos.runner import Run

if TYPE_CHECKING:
    from bench.chaos.results import Results


OVERTIME = 600
"""Seconds after which a run that should be over is given up."""


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, at least")
    parser.add_argument("--seed", type=int, default=1, help="of all chance")
    parser.add_argument("--contestant", default="ours", help="a module of bench/chaos/contestants")
    parser.add_argument("--driver", default="asyncpg", choices=["asyncpg", "psycopg"])
    parser.add_argument(
        "--all", action="store_true", help="every row of the page, one after the other"
    )
    parser.add_argument(
        "--others", type=float, help="minutes of each but the first (default: a sixth)"
    )
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    page.RESULTS.mkdir(parents=True, exist_ok=True)
    if options.page:
        page.write()
        return 0
    if options.all:
        return _run_all(options.minutes, options.others or options.minutes / 6, options.seed)
    return _run_one(find(options.contestant, options.driver), options.minutes, options.seed)


def _run_all(minutes: float, others: float, seed: int) -> int:
    """Every row; whatever becomes of one, the next has its turn. Then the page is written."""
    status = 0
    for each in ROWS:
        try:
            found = _run_one(each, minutes if each is ROWS[0] else others, seed)
            status |= found and each.is_ours
        except Exception:  # noqa: BLE001 - nobody is there who could start it again
            traceback.print_exc()
            status = 1
    page.write()
    return status


def _run_one(each: Row, minutes: float, seed: int) -> int:
    """One row: run it, tell what came of it, and keep that."""
    logs = page.RESULTS / each.name
    logs.mkdir(parents=True, exist_ok=True)
    results = _run(each, minutes, seed, logs)
    file = page.RESULTS / f"{each.name}.json"
    file.write_text(json.dumps(as_json(results, minutes=minutes, seed=seed), indent=1))
    found = violations(results)
    print(table(COLUMNS, [row(results)]))
    print("\n".join(found) or "nothing lost, nothing left")
    print(f"everything: {file}; the app's logs: {logs}", flush=True)
    return 1 if found else 0


def _run(each: Row, minutes: float, seed: int, logs: Path) -> Results:
    seconds = minutes * 60
    columns = (
        TextColumn("{task.fields[name]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=seconds, name=each.name, told="")

        def tell(results: Results, what: str) -> None:
            told = (
                f"{results.findings.requests:,} requests, {results.faulty:,} faults, "
                f"{len(violations(results))} findings; round {results.rounds + 1}: {what}"
            )
            progress.update(task, completed=results.seconds, told=told)

        run = Run(
            each.contestant,
            python=each.interpreter(),
            driver=each.driver,
            seed=seed,
            is_over=lambda results: results.seconds >= seconds,
            logs=logs,
            tell=tell,
        )
        return asyncio.run(asyncio.wait_for(run.run(), seconds + OVERTIME))


if __name__ == "__main__":
    sys.exit(main())
