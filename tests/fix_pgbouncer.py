"""Pytest plugin: PgBouncer in transaction mode, in front of the tests' PostgreSQL.

The system's package is started in a temporary directory, on a socket of its own. Its keeper process
waits on a pipe that only the test run holds.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from bench.postgres import give_to_nobody

SERVER_CONNECTIONS = 3
"""How many connections to PostgreSQL it has to share out."""

_PROGRAMS = ("pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer")
_PORT = 6432

_SETTINGS = """
[databases]
{databases}

[pgbouncer]
unix_socket_dir = {directory}
listen_port = 6432
listen_addr =
auth_type = any
admin_users = pgbouncer
pool_mode = transaction
default_pool_size = {size}
server_login_retry = 0.1
{more}
"""

# $1: the program, $2: the directory.
_KEEPER = r"""
trap '' HUP PIPE
"$1" -q "$2/pgbouncer.ini" >"$2/log" 2>&1 &
echo $!
cat >/dev/null || :
kill -9 $! 2>/dev/null
wait
cd /
rm -rf "$2"
"""


class PgBouncer:
    """A pooler that can be told to reconnect, and be killed.

    Attributes:
        url: Where it listens, for the same database as the one behind it.
    """

    def __init__(self, program: str, behind: sa.URL) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="dbscope-pgbouncer-"))
        self.url = behind.set(
            host=None, port=None, query={"host": str(self._directory), "port": str(_PORT)}
        )
        settings = _SETTINGS.format(
            databases=_database_line(behind),
            directory=self._directory,
            size=SERVER_CONNECTIONS,
            # Since 1.21 it can keep prepared statements; here it is one that doesn't.
            more="max_prepared_statements = 0" if _version(program) >= (1, 21) else "",
        )
        (self._directory / "pgbouncer.ini").write_text(settings)
        # It refuses to run as root.
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            identity = give_to_nobody(self._directory)
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", program, self._directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **identity,
        )
        assert self._keeper.stdout is not None
        self._pid = int(self._keeper.stdout.readline())
        deadline = time.monotonic() + 20
        while not self._listens():
            if time.monotonic() > deadline:
                told = (self._directory / "log").read_text(errors="replace")
                self.stop()
                raise pytest.fail.Exception(f"PgBouncer did not start: {told}", pytrace=False)
            time.sleep(0.02)

    def _listens(self) -> bool:
        return (self._directory / f".s.PGSQL.{_PORT}").exists()

    def tell(self, command: str) -> list[tuple[Any, ...]]:
        """Say something to its console."""
        with psycopg.connect(
            host=str(self._directory),
            port=_PORT,
            dbname="pgbouncer",
            user="pgbouncer",
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,  # it understands the simple protocol alone
        ) as console:
            cursor = console.execute(command)
            return [] if cursor.description is None else cursor.fetchall()

    def kill(self) -> None:
        """End it at once; those who are connected see their connections end."""
        os.kill(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it, and remove what is left of it."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        self._keeper.wait()


def _version(program: str) -> tuple[int, ...]:
    told = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    return tuple(int(part) for part in told.split()[1].split(".")[:2])


def _database_line(url: sa.URL) -> str:
    query_host = url.query.get("host")
    settings = {
        "host": url.host or query_host,
        "port": url.port or url.query.get("port"),
        "dbname": url.database,
        "user": url.username,
        "password": url.password,
    }
    told = " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    return f"{url.database} = {told}"


@pytest.fixture(scope="session")
def pgbouncer_program() -> str:
    """The program."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        message = "no PgBouncer: install the package pgbouncer"
        if os.environ.get("CI"):
            raise pytest.fail.Exception(message, pytrace=False)
        raise pytest.skip.Exception(message)
    return program


@pytest.fixture(scope="session")
def pgbouncer(pgbouncer_program: str, postgres_schema: sa.Engine) -> Iterator[PgBouncer]:
    """A pooler that all tests of this worker share."""
    pooler = PgBouncer(pgbouncer_program, postgres_schema.url)
    yield pooler
    pooler.stop()


@pytest.fixture
def doomed_pgbouncer(pgbouncer_program: str, postgres_schema: sa.Engine) -> Iterator[PgBouncer]:
    """A pooler for one test, which may kill it."""
    pooler = PgBouncer(pgbouncer_program, postgres_schema.url)
    yield pooler
    pooler.stop()
