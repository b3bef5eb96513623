"""Pytest plugin: a real PostgreSQL, from a wheel or from `DBSCOPE_TEST_POSTGRES_URL`.

The server from the wheel starts when the first test asks for it (under pytest-xdist: once, for all
workers), and ends when the test run does, also when that was killed.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from bench.postgres import PostgresUnavailable, WheelServer

URL_VARIABLE = "DBSCOPE_TEST_POSTGRES_URL"


class NamedServer:
    """The server that `DBSCOPE_TEST_POSTGRES_URL` names; its role can create databases."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)

    def version(self) -> str:
        """The version, by asking."""
        with _administration(self._url) as connection:
            version = connection.scalar(sa.text("SHOW server_version"))
        return f"postgres (PostgreSQL) {version}, named by {URL_VARIABLE}"

    def url(self) -> sa.URL:
        """Return where it listens."""
        return self._url

    def stop(self) -> None:
        """Leave it running: it isn't ours."""


Server = WheelServer | NamedServer
_SERVER = pytest.StashKey[Server]()
_TELLTALES = ("asyncpg", "pgbouncer", "postgres", "psycopg")
"""Of the name of a fixture, or of a parameter, of a test that uses PostgreSQL."""
_WORKER_INPUT = "dbscope_postgres"
_UNAVAILABLE = (PostgresUnavailable, ImportError, OSError, sa.exc.SQLAlchemyError)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the server, and start none."""
    given: dict[str, str] | None = getattr(config, "workerinput", {}).get(_WORKER_INPUT)
    url = given.get("url") if given else os.environ.get(URL_VARIABLE)
    config.stash[_SERVER] = NamedServer(url) if url else WheelServer()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server if this process started it."""
    if server := config.stash.get(_SERVER, None):
        server.stop()


def pytest_report_header(config: pytest.Config) -> str:
    """Print the server's version."""
    try:
        return f"postgresql: {config.stash[_SERVER].version()}"
    except _UNAVAILABLE as error:
        return f"postgresql: none ({str(error).splitlines()[0]})"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Under pytest-xdist, start the server in the one process that outlives all workers."""
    try:
        url = node.config.stash[_SERVER].url()
    except _UNAVAILABLE as error:
        node.workerinput[_WORKER_INPUT] = {"error": str(error)}
    else:
        node.workerinput[_WORKER_INPUT] = {"url": url.render_as_string(hide_password=False)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that uses PostgreSQL, so that `-m "not postgres"` leaves them out."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        told = [*getattr(item, "fixturenames", ()), *map(str, parameters.values())]
        if any(word in each for each in told for word in _TELLTALES):
            item.add_marker("postgres")


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the URL (asyncpg) of an empty database that no other worker uses."""
    given: dict[str, str] = getattr(request.config, "workerinput", {}).get(_WORKER_INPUT, {})
    name = f"dbscope_test_{uuid.uuid4().hex[:12]}"
    try:
        if "error" in given:
            raise PostgresUnavailable(given["error"])
        url = request.config.stash[_SERVER].url()
        with _administration(url) as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE template0"))
    except _UNAVAILABLE as error:
        if os.environ.get("CI") or os.environ.get(URL_VARIABLE):
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        raise pytest.skip.Exception(str(error).splitlines()[0]) from None
    database = url.set(drivername="postgresql+asyncpg", database=name)
    yield database.render_as_string(hide_password=False)
    with _administration(url) as connection:
        connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@contextlib.contextmanager
def _administration(url: sa.URL) -> Iterator[sa.Connection]:
    """Connect outside of any transaction, as CREATE DATABASE asks."""
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
    )
    with engine.connect() as connection:
        yield connection
    engine.dispose()
