"""What a request costs, beside every other way to get a session: measured, and written down.

    python -m bench --quick                 # a look: three minutes
    python -m bench                         # all of it; what is in the results file already, stays
    python -m bench --only latency 'instructions/fast*'

`bench/README.md` says what is measured, and how; `docs/benchmarks.md` is what came of it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.append(str(Path(__file__).parents[1]))  # where it was started from elsewhere

from typing import TYPE_CHECKING

from bench import environments
from bench.contestants import contestants
from bench.database import database
from bench.measure import Bench, Measure, Unit
from bench.measures import measures
from bench.page import MENTIONED, write_page
from bench.results import Results, machine, source
from bench.servers import ServerFailedError
from bench.worker import WorkerFailedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contestant import Contestant

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
QUICK = ROOT / "build" / "bench"

UNMENTIONED = ("msgspec", "pydantic", "pydantic-core")
"""What frameworks are built on: with another version of these, too, all is measured again."""


def main() -> int:
    """The command; its exit status."""
    options = _options()
    console = Console(stderr=True)
    failed = []
    if options.page_only:
        results = _results(options.results, console, None)
    else:
        install = not (options.no_install or options.list)
        taking_part = _installed(contestants(), console, install=install)
        about = _about(taking_part, is_quick=options.quick)
        results = _results(options.results, console, about, source())
        planned = _plan(Bench("", taking_part, options.quick), options.only)
        if not planned:
            console.print(f"nothing is called {options.only}: see --list", markup=False)
            return 2
        if options.list:
            for measure, unit in planned:
                done = "done" if results.has(measure.name, unit) else f"{unit.seconds:.0f} s"
                print(f"{measure.name}/{unit.name}\t{done}")
            return 0
        with database(options.database) as url:
            bench = Bench(url, taking_part, options.quick)
            with bench.kept:
                failed = _run(bench, planned, results, console)
    write_page(results, measures(), contestants(), options.page)
    console.print(f"{options.results}, {options.page}")
    for name, error in failed:
        console.print(f"{name} failed:\n{error}", style="red", markup=False)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="measures, or units: 'latency/*fastapi'"
    )
    parser.add_argument("--list", action="store_true", help="say what there is to run")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where it is written down")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where the page is written")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--database", metavar="URL", help="default: PostgreSQL from the wheel")
    parser.add_argument(
        "--no-install", action="store_true", help="leave out whose packages aren't there"
    )
    options = parser.parse_args()
    options.results = options.results or (QUICK / "results.json" if options.quick else RESULTS)
    options.page = options.page or (QUICK / "benchmarks.md" if options.quick else PAGE)
    return options


def _results(
    file: Path, console: Console, about: dict[str, object] | None, source: str | None = None
) -> Results:
    """What is written down, so far as it belongs beside what is measured now."""
    results = Results(file, about, source)
    for each in results.dropped:
        console.print(f"dropped: {each}", style="yellow", markup=False)
    return results


def _installed(known: Sequence[Contestant], console: Console, *, install: bool) -> list[Contestant]:
    """Those whose environments are there, or can be made."""
    for name in dict.fromkeys(each.environment for each in known):
        if install and name != "main":
            environments.install(name, console.print)
    return [each for each in known if environments.is_there(each.environment)]


def _about(taking_part: Sequence[Contestant], *, is_quick: bool) -> dict[str, object]:
    versions: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(each.environment for each in taking_part):
        own = {
            package for each in taking_part if each.environment == name for package in each.packages
        }
        versions[name] = {
            package.replace("_", "-"): version
            for package, version in environments.versions(name).items()
            if package.replace("_", "-") in own.union(MENTIONED, UNMENTIONED)
        }
    return {"machine": machine(), "versions": versions, "quick": is_quick}


def _plan(bench: Bench, only: Sequence[str] | None) -> list[tuple[Measure, Unit]]:
    """What there is to run, of what was asked for, with the programs that are there."""
    return [
        (measure, unit)
        for measure in measures()
        if all(shutil.which(program) for program in measure.needs)
        for unit in measure.units(bench)
        if not only
        or any(
            fnmatch(name, pattern)
            for pattern in only
            for name in (measure.name, f"{measure.name}/{unit.name}")
        )
    ]


def _run(
    bench: Bench,
    planned: Sequence[tuple[Measure, Unit]],
    results: Results,
    console: Console,
) -> list[tuple[str, Exception]]:
    """Run what is missing; what failed."""
    missing = [each for each in planned if not results.has(each[0].name, each[1])]
    failed: list[tuple[str, Exception]] = []
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("of about {task.total:.0f} s; {task.description}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(unit.seconds for _, unit in missing))
        done = 0.0
        for measure, unit in missing:
            name = f"{measure.name}/{unit.name}"
            progress.update(task, description=name)

            def tell(part: float, done: float = done, unit: Unit = unit) -> None:
                progress.update(task, completed=done + part * unit.seconds)

            try:
                results.put(measure.name, unit, unit.run(bench, tell))
            except (
                ServerFailedError,
                WorkerFailedError,
            ) as error:  # the others are still worth their time
                failed.append((name, error))
            done += unit.seconds
            tell(1.0)
    return failed


if __name__ == "__main__":
    sys.exit(main())
