"""The command line: ``python -m asgi_dbscope demo``."""

from __future__ import annotations

import argparse
import sys

HIGHEST_PORT = 65534
"""The demo takes the port after it too."""

DEFAULT_PORT = 8000

DRIVERS = {"asyncpg": "asgi-dbscope[postgresql]", "psycopg": "psycopg[binary]"}
"""What to install for a database's driver."""

FAILED = 2
"""The exit status of a command that could not run."""


def main() -> int:
    """Run the command; the exit status."""
    options = _parse_arguments()
    port = options.port
    if port is None:
        port = 0 if options.once else DEFAULT_PORT
    try:
        from asgi_dbscope._demo.command import Demo
        from asgi_dbscope._demo.store import DemoError

        try:
            return Demo(options.url, port, once=options.once, keep=options.keep).run()
        except DemoError as error:
            message = str(error)
    except ModuleNotFoundError as error:
        package = DRIVERS.get(str(error.name), "asgi-dbscope[demo]")
        message = f"The demo needs {error.name}, which is not installed: pip install '{package}'"
    print(message, file=sys.stderr)
    return FAILED


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asgi_dbscope",
        description="One SQLAlchemy session per ASGI request, committed before the client hears.",
    )
    demo = parser.add_subparsers(required=True, metavar="demo").add_parser(
        "demo",
        help="serve a ledger, and show what its database does when",
        description="Serve a small ledger app, and next to it the same one with a plain yield "
        "dependency. Tour both over HTTP, and show what the database does when, and what of it "
        "the client is told.",
        epilog="The exit status is 0 if every guarantee was kept, 1 if not, 2 if the demo could "
        "not run.",
    )
    demo.add_argument("--once", action="store_true", help="end after the tour; else go on serving")
    demo.add_argument(
        "--url",
        help="a PostgreSQL database (postgresql+asyncpg://user:password@host/name) instead of an "
        "SQLite file; the tables get schemas of their own, dropped at the end",
    )
    demo.add_argument(
        "--port",
        type=_port,
        help=f"where to serve; the other app gets the next one; 0 is any free port "
        f"(default: {DEFAULT_PORT}, or any with --once)",
    )
    demo.add_argument("--keep", action="store_true", help="leave the tables at the end")
    return parser.parse_args()


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and {HIGHEST_PORT}")
    return port


if __name__ == "__main__":
    sys.exit(main())
