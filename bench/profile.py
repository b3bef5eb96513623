"""Where a request's bytecodes are spent, by Python function; and where it changed since a commit.

    python -m bench.profile select
    python -m bench.profile select --against origin/main
    python -m bench.profile select --contestant asgi.by_hand

Bytecodes are exact, and tell what a function itself does: `bench.gate` counts instructions, which
tell how much that costs, but not by Python function.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from bench.bytecodes import lines, spend
from bench.contestants import by_name
from bench.database import database
from bench.measure import Bench
from bench.measures.latency import ROUTES

ROOT = Path(__file__).parents[1]


def extract(commit: str, directory: Path) -> None:
    """Put the package as it was then into a directory."""
    archive = subprocess.run(
        ["git", "archive", commit, "asgi_dbscope"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(directory, filter="data")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("route", choices=ROUTES)
    parser.add_argument("--contestant", default="asgi.ours", help="default: %(default)s")
    parser.add_argument("--against", metavar="COMMIT", help="what changed since then")
    parser.add_argument("--lines", type=int, default=40, help="how many; default: %(default)s")
    options = parser.parse_args()
    contestant = by_name(options.contestant)
    with database(None) as url, tempfile.TemporaryDirectory() as directory:
        bench = Bench(url, [contestant])
        # The source that is here, also where a package is installed.
        with bench.worker(contestant, source=ROOT) as worker:
            after = worker.call(spend, options.route)
        before = None
        if options.against is not None:
            extract(options.against, Path(directory))
            with bench.worker(contestant, source=Path(directory)) as worker:
                before = worker.call(spend, options.route)
    print("\n".join(lines(after, before, options.lines)))


if __name__ == "__main__":
    main()
