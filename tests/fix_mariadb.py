"""Pytest plugin: a real MariaDB, from the system's package or from `DBSCOPE_TEST_MARIADB_URL`.

The package's server starts when the first test asks for it, in a temporary directory of its own and
without a network; it asks nobody for a password. Its keeper process waits on a pipe that only the
test run holds, so it goes when the test run ends, also when that was killed.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import sqlalchemy as sa

from bench.postgres import give_to_nobody

URL_VARIABLE = "DBSCOPE_TEST_MARIADB_URL"

_PROGRAMS = ("mariadbd", "/usr/sbin/mariadbd", "/usr/local/sbin/mariadbd")

_OPTIONS = (
    "--no-defaults",
    "--skip-networking",
    # There are no tables of users, nor any others but the tests'.
    "--skip-grant-tables",
    # Nothing here survives the test run.
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=8M",
    "--skip-performance-schema",
    "--character-set-server=utf8mb4",
)

# $1: the program, $2: the directory; its options follow.
_KEEPER = r"""
trap '' HUP PIPE
program=$1 directory=$2
shift 2
mkdir "$directory/data"
"$program" "$@" --datadir="$directory/data" --socket="$directory/socket" \
    >"$directory/log" 2>&1 &
cat >/dev/null || :
kill -9 $! 2>/dev/null
wait
cd /
rm -rf "$directory"
"""

SCHEMA = "CREATE TABLE item (id INTEGER PRIMARY KEY, note TEXT) ENGINE = InnoDB"
"""The tests' `Item`; MariaDB has no deferred constraints, so there is no `Child`."""


class MariaDBUnavailable(Exception):  # noqa: N818 - a condition of this machine, not an error
    """There is no MariaDB to test with; the message says why."""


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[sa.URL]:
    """Where a MariaDB listens, by the driver PyMySQL."""
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield sa.make_url(named).set(drivername="mysql+pymysql")
        return
    with _running() as url:
        yield url


@pytest.fixture(scope="session")
def strict_mariadb_server() -> Iterator[sa.URL]:
    """Where one listens that rolls back whole transactions when a wait for a lock times out."""
    with _running("--innodb-rollback-on-timeout") as url:
        yield url


@contextlib.contextmanager
def _running(*options: str) -> Iterator[sa.URL]:
    try:
        program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
        if program is None:
            raise MariaDBUnavailable(
                f"no MariaDB: install mariadb-server-core or set {URL_VARIABLE}"
            )
        keeper, directory = _start(program, options)
    except MariaDBUnavailable as error:
        if os.environ.get("CI"):
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        raise pytest.skip.Exception(str(error).splitlines()[0]) from None
    yield sa.make_url(f"mysql+pymysql://root@/?unix_socket={directory}/socket")
    _stop(keeper)


def _start(program: str, options: tuple[str, ...]) -> tuple[subprocess.Popen[str], Path]:
    directory = Path(tempfile.mkdtemp(prefix="dbscope-mariadb-"))
    identity: dict[str, Any] = give_to_nobody(directory) if os.geteuid() == 0 else {}
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "sh", program, directory, *_OPTIONS, *options],
        stdin=subprocess.PIPE,
        text=True,
        cwd=directory,
        # Ctrl-C is for the tests, which still need the server to clean up.
        start_new_session=True,
        **identity,
    )
    deadline = time.monotonic() + 60
    while not _answers(directory / "socket"):
        if keeper.poll() is not None or time.monotonic() > deadline:
            log = directory / "log"
            told = log.read_text(errors="replace")[-2000:] if log.exists() else "it left no log"
            _stop(keeper)
            raise MariaDBUnavailable(f"MariaDB did not start: {told}")
        time.sleep(0.02)
    return keeper, directory


def _answers(path: Path) -> bool:
    """Whether a server greets whoever connects."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(str(path))
            return bool(connection.recv(1))
        except OSError:
            return False


def _stop(keeper: subprocess.Popen[str]) -> None:
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait()


@pytest.fixture(scope="session")
def mariadb_schema(mariadb_server: sa.URL) -> Iterator[sa.Engine]:
    """An engine of its own that looks at an empty database of this worker; the schema is there."""
    with schema_on(mariadb_server) as observer:
        yield observer


@contextlib.contextmanager
def schema_on(server: sa.URL) -> Iterator[sa.Engine]:
    """A new database on *server* with the schema, and an engine that looks at it."""
    name = f"dbscope_test_{uuid.uuid4().hex[:12]}"
    options: dict[str, Any] = {"pool_size": 2, "isolation_level": "AUTOCOMMIT"}
    administration = sa.create_engine(server, **options)
    with administration.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    observer = sa.create_engine(server.set(database=name), **options)
    with observer.connect() as connection:
        connection.exec_driver_sql(SCHEMA)
    yield observer
    observer.dispose()
    with administration.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    administration.dispose()


@pytest.fixture
def of_mariadb(mariadb_schema: sa.Engine) -> None:
    """For a test of what MariaDB has: a server that was named may be a MySQL."""
    if not mariadb_schema.dialect.is_mariadb:  # type: ignore[attr-defined]
        raise pytest.skip.Exception("MySQL has no max_statement_time, and no dialect mariadb://")


LIMITS = sa.text(
    "SHOW SESSION VARIABLES WHERE Value > 0 "
    "AND Variable_name IN ('max_statement_time', 'idle_transaction_timeout')"
)
"""The limits of the session that are not 0; MySQL has none."""


def numbers(count: int, *, more: str = "") -> sa.TextClause:
    """A SELECT of *count* rows, up to 10,000; in each one *more* is evaluated."""
    digits = " UNION ALL ".join(f"SELECT {digit} AS n" for digit in range(10))
    return sa.text(
        f"WITH digit AS ({digits}) SELECT a.n + 10 * b.n + 100 * c.n + 1000 * d.n AS seq{more} "
        f"FROM digit AS d, digit AS c, digit AS b, digit AS a LIMIT {count:d}"
    )


class Wire:
    """Stands between a client and MariaDB, and cuts a connection at a statement.

    Attributes:
        url: Where to connect to, instead of the server.
    """

    def __init__(self, url: sa.URL) -> None:
        self._path = str(url.query["unix_socket"])
        self._directory = tempfile.TemporaryDirectory(prefix="dbscope-wire-")
        here = str(Path(self._directory.name, "socket"))
        self.url = url.set(query={**url.query, "unix_socket": here})
        self._statement: bytes | None = None
        self._is_heard = False
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def cut(self, statement: bytes, *, is_heard: bool) -> None:
        """End the connection that sends *statement* next.

        Args:
            statement: How it begins.

            is_heard: Whether the server still gets it, and does it; its answer comes too late.
        """
        self._statement, self._is_heard = statement, is_heard

    async def __aenter__(self) -> Self:
        path = Path(self._directory.name, "socket")
        self._server = await asyncio.start_unix_server(self._accept, path)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._directory.cleanup()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_unix_connection(self._path)
        answering = asyncio.create_task(_relay(answers, writer))
        try:
            while data := await reader.read(65536):
                if self._statement is not None and data[5:].startswith(self._statement):
                    self._statement = None
                    answering.cancel()
                    await asyncio.gather(answering, return_exceptions=True)
                    if self._is_heard:
                        requests.write(data)
                        await answers.read(1)
                    break
                requests.write(data)
        finally:
            answering.cancel()
            requests.close()
            writer.close()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
