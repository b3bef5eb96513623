"""Faults on purpose, under load, and an audit of the database afterwards.

    python -m bench.chaos --minutes 30 --seed 1

`bench/README.md` says what it does, `docs/reliability.md` what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# The installed package is what is tried; the checkout serves where none is installed.
sys.path.append(str(Path(__file__).parents[2]))

from typing import TYPE_CHECKING

from bench.chaos.report import as_json, row, table, violations
from bench.chaos.runner import Run

if TYPE_CHECKING:
    from bench.chaos.results import Results


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, at least")
    parser.add_argument("--seed", type=int, default=1, help="of all chance")
    parser.add_argument("--contestant", default="ours", help="a module of bench/chaos/contestants")
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter of the contestant's environment"
    )
    parser.add_argument("--driver", default="asyncpg", choices=["asyncpg", "psycopg"])
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--logs", type=Path, help="where the app's logs are kept")
    options = parser.parse_args()
    logs = options.logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    logs.mkdir(parents=True, exist_ok=True)
    results = _run(options, logs)
    print(table([row(results)]))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(results, options.seed), indent=1))
    found = violations(results)
    print("\n".join(found) or "nothing lost, nothing left")
    print(f"the app's logs: {logs}")
    return 1 if found else 0


def _run(options: argparse.Namespace, logs: Path) -> Results:
    seconds = options.minutes * 60
    columns = (
        TextColumn("{task.fields[contestant]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=seconds, contestant=options.contestant, told="")

        def tell(results: Results, what: str) -> None:
            told = (
                f"{results.findings.requests:,} requests, {results.faulty:,} faults, "
                f"{len(violations(results))} findings; round {results.rounds + 1}: {what}"
            )
            progress.update(task, completed=results.seconds, told=told)

        run = Run(
            options.contestant,
            python=options.python,
            driver=options.driver,
            seed=options.seed,
            is_over=lambda results: results.seconds >= seconds,
            logs=logs,
            tell=tell,
        )
        return asyncio.run(run.run())


if __name__ == "__main__":
    sys.exit(main())
