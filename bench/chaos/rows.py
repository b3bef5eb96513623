"""Who is in the documentation's table, in its order, and how each row comes to be."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from bench.environments import ENVIRONMENTS, install, python


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: What the page calls it.

        contestant: A module of `bench/chaos/contestants`.

        driver: What it reaches PostgreSQL with.

        environment: Where its packages are installed.
    """

    label: str
    contestant: str
    driver: str = "asyncpg"
    environment: str = "main"

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's: nothing may be found."""
        return self.contestant.startswith("ours")

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.contestant}-{self.driver}"

    def interpreter(self) -> str:
        """The interpreter that serves it; its environment is made where it is missing."""
        install(self.environment, print)
        return str(python(self.environment))

    def command(self, minutes: float, seed: int) -> str:
        """What runs it alone."""
        told = f"python -m bench.chaos --contestant {self.contestant}"
        if self.driver != "asyncpg":
            told += f" --driver {self.driver}"
        return f"{told} --minutes {minutes:g} --seed {seed}"


def _package(name: str, environment: str = "peers") -> Row:
    packages = dict(each.split("==") for each in ENVIRONMENTS[environment].packages)
    return Row(f"{name} {packages[name]}", name.replace("-", "_"), environment=environment)


ROWS = (
    Row("**asgi-dbscope**, as it comes", "ours"),
    Row("**asgi-dbscope**, asks, retries, has clocks", "ours_all"),
    Row("**asgi-dbscope**, psycopg", "ours", "psycopg"),
    Row("**asgi-dbscope**, psycopg, asks, retries, has clocks", "ours_all", "psycopg"),
    Row("**asgi-dbscope**, psycopg, synchronous sessions", "ours_sync", "psycopg"),
    Row("`yield` dependency", "yield_dependency"),
    Row("`BaseHTTPMiddleware` that commits", "base_http_middleware"),
    _package("context-async-sqlalchemy"),
    _package("fastapi-async-sqlalchemy"),
    _package("advanced-alchemy"),
    _package("fastapi-sqla", "fastapi-sqla"),
)


def find(contestant: str, driver: str) -> Row:
    """The row of a contestant with a driver; the page needn't have it."""
    of_contestant = [each for each in ROWS if each.contestant == contestant]
    if not of_contestant:
        sys.exit(f"no such contestant: {contestant}")
    return next(
        (each for each in of_contestant if each.driver == driver),
        replace(of_contestant[0], driver=driver),
    )
