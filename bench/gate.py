"""Whether a request takes more instructions than it did: what CI asks of every change.

    python -m bench.gate             # compare with bench/baseline.json
    python -m bench.gate --record    # after a change that is worth it, or that made it less

Counted by callgrind, so that a busy machine doesn't matter. What is compared is the ratio to a
control that is counted in the same run: another processor, C library or build of Python counts a
little differently, for both of them. `bench/constraints.txt` pins what both of them run on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.contestant import Contestant

sys.path.append(str(Path(__file__).parents[1]))

from bench.contestants import by_name
from bench.database import database
from bench.measure import Bench
from bench.measures.instructions import Counts, apart, at_once

BASELINE = Path(__file__).with_name("baseline.json")
CONTROLS = {"none": "asgi.bare", "select": "asgi.by_hand", "insert": "asgi.by_hand"}
"""By path: a request without the database, one SELECT, one INSERT."""

OURS = "asgi.ours"
PINNED = ("sqlalchemy", "asyncpg", "greenlet", "anyio")
TOLERANCE = 0.02
SHUFFLES = 6
"""Counts of each request, as in `bench.measures.instructions`: what is left is 0.3 %."""


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", action="store_true", help="write the baseline anew")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("there is no valgrind: nothing is counted", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    versions = _versions()
    baseline: dict[str, Any] = (
        json.loads(BASELINE.read_text()) if BASELINE.exists() else {"versions": None}
    )
    if not options.record and baseline["versions"] != versions:
        print(f"The baseline is of {baseline['versions']}, this is {versions}.")
        print(f"Use bench/constraints.txt, or record it again: {RECORD}")
        return 1
    counted = count()
    print("\n".join(table(counted)))
    if options.record:
        BASELINE.write_text(
            json.dumps({"versions": versions, "instructions": counted}, indent=1) + "\n"
        )
        return 0
    found = judge(counted, baseline["instructions"])
    print("\n".join(found) or "within 2 % of the baseline")
    return 1 if found else 0


RECORD = "tox run -e instructions -- --record"


def count() -> Counts:
    """Ours, and the controls."""
    asked: dict[Contestant, list[str]] = {by_name(name): [] for name in (OURS, *CONTROLS.values())}
    for path, control in CONTROLS.items():
        asked[by_name(control)].append(path)
        asked[by_name(OURS)].append(path)
    with database(None) as url:
        return at_once(Bench(url, list(asked)), apart(asked), SHUFFLES)


def ratios(counted: Counts) -> dict[str, float]:
    """Ours to its control, by path."""
    return {path: counted[OURS][path] / counted[each][path] for path, each in CONTROLS.items()}


def table(counted: Counts) -> list[str]:
    return [
        f"{path:8}{counted[OURS][path]:12,.0f} instructions, {ratio:.4f} of {CONTROLS[path]}"
        for path, ratio in ratios(counted).items()
    ]


def judge(counted: Counts, baseline: Counts) -> list[str]:
    """What rose by more than is tolerated, and the command that shows where."""
    before = ratios(baseline)
    found: list[str] = []
    for path, ratio in ratios(counted).items():
        rise = ratio / before[path] - 1
        if rise > TOLERANCE:
            found += [
                f"{path}: {rise:.1%} more instructions than the baseline ({before[path]:.4f}).",
                f"  Where: python -m bench.profile {path} --against {recorded_at()}",
                f"  If it is worth that: {RECORD}",
            ]
        elif rise < -TOLERANCE:
            print(f"{path}: {-rise:.1%} less. So that it stays like that: {RECORD}")
    return found


def recorded_at() -> str:
    """The commit that wrote the baseline, so far as git knows."""
    told = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", BASELINE],
        cwd=BASELINE.parent,
        check=False,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or "HEAD"


def _versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{name: version(name) for name in PINNED}}


if __name__ == "__main__":
    sys.exit(main())
